"""Drawing continuations through the real server and judging them against the exact distribution."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx

from dspark_sglang.errors import ServerError
from dspark_sglang.server import Server, free_port, serve_command
from tests.exactness import mutants, store
from tests.exactness.distribution import Distribution, Model, NextLogits, Output
from tests.exactness.options import Option
from tests.exactness.statistics import Test, goodness
from tests.exactness.store import Clock, Judged, Sampled
from tests.exactness.v4 import Model as V4Model
from tests.exactness.v4 import ensure_bundle
from tests.tiny_models import PROMPT, ensure_models

#: Requests of one HTTP call.
CALL = 256
#: Requests the server runs at once; from zero to a few drafted tokens of each get verified.
RUNNING = 64
_SAVE_SECONDS = 10.0
#: One thread: the tiny model's operations are too small to share.
_ENVIRONMENT = {"DSPARK_CPU_THREADS": "1", "OMP_NUM_THREADS": "1"}
#: Shares of the drafted tokens that are verified, in turn, where drafting does not pay by itself: a tiny V4 says so.
_SHARES = (1.0, 0.5, 0.2)
_GREEDY = {"temperature": 0.0, "max_new_tokens": 5, "ignore_eos": True}

Family = Literal["dense", "v4"]


class Setting(NamedTuple):
    """What a sampled run depends on."""

    out: Path
    seed: int
    samples: int
    mutant_samples: int
    family: Family = "dense"

    def models(self) -> tuple[Path, Path]:
        """The target and the drafter; of DeepSeek-V4 they are one directory."""
        if self.family == "dense":
            return ensure_models(self.out / "models", self.seed)
        bundle = ensure_bundle(self.out / "models", self.seed)
        return bundle, bundle

    def model(self) -> NextLogits:
        """What the target says behind the fixed prompt."""
        target, _ = self.models()
        return (Model if self.family == "dense" else V4Model)(target, PROMPT)

    def key(self, option: Option, *more: str) -> str:
        """The key of an option's results."""
        family = () if self.family == "dense" else (self.family,)
        return store.key(self.seed, option.request, dict(option.environment), *more, *family)


def server(setting: Setting, name: str, *, seed: int, environment: dict[str, str]) -> Server:
    """A server of the tiny pair that was not started yet.

    Args:
        seed: SGLang's ``--random-seed``; another one for every start, or a run that goes on would
            draw the same continuations again.
    """
    target, drafter = setting.models()
    port = free_port()
    extra = ["--max-running-requests", str(RUNNING), "--random-seed", str(seed)]
    if setting.family == "v4":  # as many window slots as others: the pool is small
        extra += ["--swa-full-tokens-ratio", "1.0"]
    command = serve_command(target, port, dtype="float32", drafter=drafter, extra=extra)
    return Server(
        command,
        port=port,
        log=setting.out / "logs" / f"{name}.log",
        environment={**_ENVIRONMENT, **environment},
    )


def post(client: httpx.Client, running: Server, body: dict[str, Any]) -> Any:
    """What ``/generate`` answers.

    Raises:
        ServerError: the server refused or stopped.
    """
    try:
        answer = client.post(f"{running.url}/generate", json=body)
    except httpx.HTTPError as error:
        raise running.gone(error) from error
    if answer.status_code != 200:
        raise ServerError(
            f"/generate answered {answer.status_code}: {answer.text[:200]}",
            expected="200",
            fix=f"See the server's log in {running.log}.",
        )
    return answer.json()


def generate(
    client: httpx.Client, running: Server, params: Sequence[dict[str, Any]]
) -> list[Output]:
    """One output for each request's sampling parameters, behind the fixed prompt.

    Raises:
        ServerError: the server refused, stopped, or answered something else.
    """
    body = {"input_ids": [list(PROMPT)] * len(params), "sampling_params": list(params)}
    found = post(client, running, body)
    for entry in found:
        if entry["meta_info"]["finish_reason"]["type"] == "abort":
            raise ServerError(
                f"A request was aborted: {entry['meta_info']['finish_reason']}.",
                expected="an output",
                fix=f"See the server's log in {running.log}.",
            )
    return [tuple(entry["output_ids"]) for entry in found]


def _calls(options: Sequence[Option], missing: dict[str, int]) -> list[list[Option | None]]:
    """HTTP calls: of each option alone, and as many of all mixed with greedy requests (None)."""
    pending = [option for option in options if missing[option.name] > 0]
    calls: list[list[Option | None]] = [
        [option] * min(CALL, missing[option.name]) for option in pending
    ]
    if len(pending) > 1:
        ring: list[Option | None] = [*pending, None]
        calls += [[ring[i % len(ring)] for i in range(CALL)]] * len(pending)
    elif pending and missing[pending[0].name] > CALL:
        calls *= 2
    return calls


def draw(setting: Setting, options: Sequence[Option], *, clock: Clock) -> dict[str, Sampled]:
    """Draw what is missing of options that share a server; resumes, and saves as it goes."""
    folder = setting.out / "options"
    found = {}
    for option in options:
        known = store.load(folder / f"{option.name}.json", Sampled, setting.key(option))
        found[option.name] = known or Sampled(key=setting.key(option))

    def missing() -> dict[str, int]:
        return {name: setting.samples - piece.samples for name, piece in found.items()}

    def save() -> None:
        for name, piece in found.items():
            store.save(folder / f"{name}.json", piece)

    if max(missing().values()) <= 0 or clock.over:
        return found
    log = "options" if not options[0].environment else options[0].name
    seed = 1 + sum(piece.samples for piece in found.values())
    environment = dict(options[0].environment)
    with (
        server(setting, log, seed=seed, environment=environment) as running,
        httpx.Client(timeout=600.0) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        running.wait_ready()
        saved, shares = time.monotonic(), itertools.cycle(_SHARES)
        while max(missing().values()) > 0 and not clock.over:
            if setting.family == "v4":
                running.update(dspark_speculation=1, dspark_budget=next(shares))
            calls = _calls(options, missing())
            requests = [[o.request if o else _GREEDY for o in call] for call in calls]
            answers = pool.map(lambda params: generate(client, running, params), requests)
            for call, outputs in zip(calls, answers, strict=True):
                for name in {option.name for option in call if option}:
                    own = [x for o, x in zip(call, outputs, strict=True) if o and o.name == name]
                    found[name].add(own)
            if time.monotonic() - saved > _SAVE_SECONDS:
                save()
                saved = time.monotonic()
                print(f"{log}: {max(missing().values())} to draw", flush=True)
        save()
        _require_ours(running)
    return found


def _require_ours(running: Server) -> None:
    record = running.dspark()
    if record is None or not record["ran"]:
        raise ServerError(
            "The server did not run our algorithm.",
            expected="dspark_info_record with active true",
            fix=f"Run `dspark doctor`, and see {running.log}.",
        )
    if (record["accept_length"] or 1.0) <= 1.0:
        raise ServerError(
            "No drafted token was accepted, so the samples say nothing of verification.",
            expected="more than one token a round",
            fix=f"See why it does not draft in {running.log}, or draw more samples.",
        )


def challenge(
    setting: Setting, option: Option, model: NextLogits, *, clock: Clock
) -> Judged | None:
    """The verdict on an option's mutant; None when there was no time.

    Raises:
        ServerError: the server stopped, or the mutant never ran in it.
    """
    path = setting.out / "mutants" / f"{option.name}.json"
    wanted = setting.key(option, option.mutant, str(setting.mutant_samples))
    known = store.load(path, Judged, wanted)
    if known is not None or clock.over:
        return known
    # Everything drafted is verified: where the scheduler sends nothing, as it may while a busy
    # machine teaches it its costs, a wrong acceptance has nothing to get wrong.
    environment = (
        dict(option.environment)
        | {"DSPARK_SCHEDULE": "all"}
        | mutants.prepare(option.mutant, setting.out / "mutants" / "site")
    )
    sampled = Sampled(key=wanted)
    with (
        server(setting, f"mutant-{option.name}", seed=7, environment=environment) as running,
        httpx.Client(timeout=600.0) as client,
    ):
        running.wait_ready()
        while sampled.samples < setting.mutant_samples:
            sampled.add(generate(client, running, [option.request] * CALL))
    if mutants.said(option.mutant) not in running.log.read_text(errors="replace"):
        raise ServerError(
            f"The mutant {option.mutant} never ran in its server.",
            expected="its line in the log",
            fix=f"See {running.log}; the mutant may patch a name that has moved.",
        )
    verdict = judge(wanted, Distribution(model, option.request), sampled.outputs())
    store.save(path, verdict)
    return verdict


def judge(wanted: str, distribution: Distribution, counts: dict[Output, int]) -> Judged:
    """The goodness-of-fit test as a result."""
    test: Test = goodness(distribution, counts)
    return Judged(
        key=wanted,
        p_value=test.p_value,
        samples=sum(counts.values()),
        statistic=round(test.statistic, 3),
        freedom=test.freedom,
        impossible=test.impossible,
    )
