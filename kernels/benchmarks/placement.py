"""Placements on real servers with several ranks: texts, collectives a step, and a rank that dies."""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks import collectives
from dspark_sglang import targets
from dspark_sglang.artifacts import write_json
from dspark_sglang.cli.demo import DRAFTER
from dspark_sglang.cli.main import run
from dspark_sglang.core import placement as costs
from dspark_sglang.errors import ServerError
from dspark_sglang.provenance import machine
from dspark_sglang.server import Server, free_port, serve_command
from tests.tiny_models import Heads, ensure_models

#: Prompts of the tiny models, tokens.
PROMPTS = ((1, 9, 40, 77, 130, 23, 68), (1, 150, 12, 99, 60), (1, 33, 34, 35), (1, 171, 90, 20, 8))
#: Heads that do not divide over two ranks: those of SmolLM2's drafter.
UNEVEN = Heads(target=(8, 4), drafter=(9, 3))
EVEN = Heads(target=(8, 4), drafter=(8, 4))
#: The shape the byte counts at eight ranks are computed for: DeepSeek-V4-Pro's width and vocabulary.
COMPUTED: dict[str, Any] = {"requests": 64, "gamma": 5, "ranks": 8, "hidden": 7168}
_VOCABULARY = 129280
_SEED = 3


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


def cases(folder: Path, *, large: bool) -> list[Case]:
    """The servers that are compared; texts have to equal those of the case with one rank."""
    target, uneven = ensure_models(folder / "uneven", _SEED, UNEVEN)
    _, even = ensure_models(folder / "even", _SEED, EVEN)

    def tiny(
        name: str, drafter: Path, ranks: int, placement: str | None, heads: str = "auto"
    ) -> Case:
        return Case(
            name=name,
            target=target,
            drafter=drafter,
            ranks=ranks,
            placement=placement,
            heads=heads,
            prompts=PROMPTS,
        )

    found = [
        tiny("tp1", uneven, 1, "auto"),
        tiny("tp2-replicate", uneven, 2, "replicate"),
        tiny("tp2-single", uneven, 2, "single"),
        tiny("tp2-shard", even, 2, "shard"),
        tiny("tp2-heads-shard", uneven, 2, "replicate", "shard"),
        tiny("tp2-heads-single", uneven, 2, "single", "single"),
        tiny("tp2-builtin", even, 2, None),
        tiny("tp4-replicate", uneven, 4, "replicate"),
        tiny("tp4-single", uneven, 4, "single"),
        tiny("tp4-shard", even, 4, "shard"),
        tiny("tp4-heads-shard", even, 4, "shard", "shard"),
    ]
    if large:
        prompts = ((504, 2365, 260, 3575, 30), (6330, 346, 1232, 1195, 563))
        found += [
            Case(
                name=name,
                target=targets.ensure_target(),
                drafter=DRAFTER,
                ranks=ranks,
                placement=placement,
                prompts=prompts,
                max_tokens=32,
            )
            for name, ranks, placement in (
                ("smollm2-tp1", 1, "replicate"),
                ("smollm2-tp3", 3, "replicate"),
                ("smollm2-tp3-single", 3, "single"),
                ("smollm2-tp3-shard", 3, "shard"),
            )
        ]
    return found


def _against(case: Case) -> str:
    """The case on one rank that has the texts of ``case``."""
    return "smollm2-tp1" if case.name.startswith("smollm2") else "tp1"


def _row(case: Case, found: dict[str, Found]) -> dict[str, Any]:
    own = found[case.name]
    ours = {"count": own.collectives, "bytes": own.collective_bytes}
    parts = {
        kind: round(sum(v for k, v in values.items() if k != "target"), 2)
        for kind, values in ours.items()
    }
    return {
        "identical": own.texts == found[_against(case)].texts,
        "accept_length": own.accept_length,
        "collectives": parts["count"],
        "collective_bytes": parts["bytes"],
        "by_purpose": {
            name: [own.collectives[name], own.collective_bytes[name]] for name in own.collectives
        },
    }


def summarise(known: list[Case], found: dict[str, Found], death: float | None) -> dict[str, Any]:
    """The numbers of a run."""
    result: dict[str, Any] = {}
    for case in known:
        if case.ranks == 1:
            continue
        group = f"smollm2_tp{case.ranks}" if "smollm2" in case.name else f"tp{case.ranks}"
        name = case.placement or "builtin"
        if case.heads != "auto":
            name += f", heads {case.heads}"
        result.setdefault(group, {})[name] = _row(case, found)
    ours = {
        kind: costs.exchanged_bytes(**COMPUTED, sampled=kind == "sampled")
        for kind in ("greedy", "sampled")
    }
    apart = costs.exchanged_bytes(**COMPUTED, sampled=True, heads="shard")
    builtin = costs.builtin_bytes(**COMPUTED, vocabulary=_VOCABULARY)
    return result | {
        "tp8_computed_bytes": max(parts["all"] for parts in ours.values()),
        "builtin_tp8_computed_bytes": builtin["all"],
        "tp8_computed": {
            "shape": COMPUTED | {"vocabulary": _VOCABULARY},
            **ours,
            "sampled, heads shard": apart,
            "builtin": builtin,
        },
        "rank_death_s": None if death is None else round(death, 2),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve every case and compare; 1 where a text is not that of one rank."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.placement", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/placement"))
    parser.add_argument("--no-large", action="store_true", help="no SmolLM2 on three ranks")
    given = parser.parse_args(arguments)
    known = cases(given.out / "models", large=not given.no_large)
    found: dict[str, Found] = {}
    for case in known:
        found[case.name] = measure(case, given.out)
        same = found[case.name].texts == found[_against(case)].texts
        print(
            f"{case.name}: text {'' if same else 'NOT '}of one rank, {found[case.name].collectives} a step"
        )
    with running(known[1], given.out) as (server, _):
        death, said = kill_rank(server, PROMPTS[0])
    print(f"A rank was killed: the server ended after {death:.1f} s: {said}")
    summary = summarise(known, found, death) | {
        "rank_death_said": re.sub(r"pid \d+", "pid N", said),
        "machine": machine(),
        "command": f"python -m benchmarks.placement{' --no-large' if given.no_large else ''}",
    }
    write_json(given.out / "summary.json", summary)
    print(f"Written: {given.out / 'summary.json'}")
    return int(any(not _row(case, found)["identical"] for case in known))


if __name__ == "__main__":
    run(main)
