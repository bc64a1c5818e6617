"""Placements on real servers with several ranks: texts, collectives a step, and a rank that dies."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from dspark_sglang.demo.server import Server, free_port, serve_command
from dspark_sglang.errors import ServerError
from dspark_sglang.profiling import collectives

#: One thread a rank: ranks share the cores of one machine.
_ALONE = {"OMP_NUM_THREADS": "1", "DSPARK_CPU_THREADS": "1", "DSPARK_COST": "online"}
#: A rank that dies has to end the server within this.
DEATH_SECONDS = 30.0
#: Ranks that share two cores with other work take minutes to start.
_START_SECONDS = 900.0
_TIMEOUT = 600.0


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One server."""

    name: str
    target: Path
    drafter: Path
    ranks: int
    #: ``DSPARK_PLACEMENT``; None: SGLang's builtin.
    placement: str | None
    #: ``DSPARK_HEADS``.
    heads: str = "auto"
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int = 48

    @property
    def environment(self) -> dict[str, str]:
        """What its server is started with."""
        if self.placement is None:
            return _ALONE | {"DSPARK_PLUGIN": "off"}
        places = {"DSPARK_PLACEMENT": self.placement, "DSPARK_HEADS": self.heads}
        # Everything drafted is verified in every case, so that steps compare.
        return _ALONE | {"DSPARK_SCHEDULE": "all"} | places


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What a server did."""

    texts: tuple[tuple[int, ...], ...]
    #: Tokens a step.
    accept_length: float
    #: A step of one request, by purpose.
    collectives: dict[str, float]
    collective_bytes: dict[str, float]


@contextmanager
def running(case: Case, folder: Path) -> Iterator[tuple[Server, Path]]:
    """The server of a case and the folder its ranks count collectives into."""
    counts = folder / case.name / "counts"
    counts.mkdir(parents=True, exist_ok=True)
    for old in counts.glob("*.json"):
        old.unlink()
    (folder / case.name / "sitecustomize.py").write_text(
        collectives.customization(counts.resolve()), encoding="utf-8"
    )
    paths = [str((folder / case.name).resolve()), *(entry for entry in sys.path if entry)]
    environment = case.environment | {"PYTHONPATH": os.pathsep.join(paths)}
    port = free_port()
    command = serve_command(
        case.target,
        port,
        dtype="float32",
        drafter=case.drafter,
        extra=["--tp", str(case.ranks), "--disable-radix-cache"],
    )
    log = folder / case.name / "server.log"
    with Server(command, port=port, log=log, environment=environment) as server:
        server.wait_ready(_START_SECONDS)
        yield server, counts


def generate(server: Server, prompt: tuple[int, ...], max_tokens: int) -> tuple[list[int], int]:
    """Greedy tokens after a prompt, and the verify steps they took.

    Raises:
        ServerError: the server stopped answering.
    """
    sampling = {"temperature": 0.0, "max_new_tokens": max_tokens, "ignore_eos": True}
    body = {"input_ids": list(prompt), "sampling_params": sampling}
    try:
        answer = server.http.post("/generate", json=body, timeout=_TIMEOUT)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise server.gone(error) from error
    found = answer.json()
    return found["output_ids"], int(found["meta_info"]["spec_verify_ct"])


def measure(case: Case, folder: Path) -> Found:
    """Texts of a case and its collectives a step, one request at a time."""
    with running(case, folder) as (server, counts):
        generate(server, case.prompts[0], 4)  # first uses allocate
        before, steps, texts = collectives.read(counts), 0, []
        for prompt in case.prompts:
            tokens, taken = generate(server, prompt, case.max_tokens)
            texts.append(tuple(tokens))
            steps += taken
        after = collectives.read(counts)

    def each(kind: str) -> dict[str, float]:
        spent = {k: v - before[kind].get(k, 0) for k, v in after[kind].items()}
        return {name: round(value / steps, 3) for name, value in sorted(spent.items())}

    return Found(
        texts=tuple(texts),
        accept_length=round(sum(map(len, texts)) / steps, 3),
        collectives=each("count"),
        collective_bytes=each("bytes"),
    )


def scheduler_pids(server: Server) -> list[int]:
    """Process ids of a server's ranks, in rank order (Linux)."""
    ranks = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            group = os.getpgid(int(entry.name))
        except OSError:  # it has just ended
            continue
        if group == server.pid and "sglang::scheduler" in title:
            ranks.append((title, int(entry.name)))
    return [pid for _, pid in sorted(ranks)]


def group_alive(group: int) -> bool:
    """Whether a process of a process group still runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def kill_rank(server: Server, prompt: tuple[int, ...]) -> tuple[float, str]:
    """Kill the last rank of a server while it decodes.

    Returns:
        Seconds until nothing of the server ran any more, and what its log says.

    Raises:
        ServerError: something still ran after 30 s.
    """
    group = server.pid
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_quietly, server, prompt)
        time.sleep(1.0)
        os.kill(scheduler_pids(server)[-1], signal.SIGKILL)
        start = time.monotonic()
        while server.alive():
            if time.monotonic() - start > DEATH_SECONDS:
                raise ServerError(
                    f"The server still ran {DEATH_SECONDS:.0f} s after one of its ranks was killed.",
                    expected="a server that ends with its rank",
                    fix=f"See its log in {server.log}.",
                )
            time.sleep(0.1)
        seconds = time.monotonic() - start
        waiting.result()
    while group_alive(group) and time.monotonic() - start < DEATH_SECONDS:
        time.sleep(0.1)
    if group_alive(group):
        raise ServerError(
            "Processes of the server are left after one of its ranks was killed.",
            expected="nothing left",
            fix=f"See its log in {server.log}.",
        )
    return seconds, server.reason()


def _quietly(server: Server, prompt: tuple[int, ...]) -> Any:
    """Keep a server decoding until it is gone."""
    while True:
        try:
            generate(server, prompt, 400)
        except ServerError as error:
            return error
