"""Write ``docs/results/cuda.json``: what a step asks of the device, ours beside SGLang's builtin. ``make cuda-lab`` runs it.

Everything in the file is *computed*: nothing ran on a GPU. Launches are those outside the two graphs, SGLang's
common ones (the verify window's slots) included on both sides.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.cuda_lab.fake_device import FakeDevice
from tests.cuda_lab.steps import KINDS, Kind, Step, batch, measure, request, run
from tests.cuda_lab.world import World

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "docs" / "results" / "cuda.json"
BATCHES, RANKS = (1, 8, 64), (1, 8)
#: Steps that host work is timed over.
TIMED = 16

Case = tuple[int, str, int]
EVERY: tuple[Case, ...] = tuple(
    (ranks, kind, requests) for ranks in RANKS for kind in (*KINDS, "plain") for requests in BATCHES
)
#: Cases whose lines are kept, to be mended from.
SHOWN = ("tp1-greedy-R8", "tp1-filtered-R8", "tp1-penalised-R8", "tp1-plain-R8", "tp8-greedy-R8")


def name(case: Case) -> str:
    """A case in the ledger."""
    ranks, kind, requests = case
    return f"tp{ranks}-{kind}-R{requests}"


def counts(steady: Step, first: Step) -> dict[str, int]:
    """What is kept of a step of a standing batch, and of the first one after a change."""
    return {
        "launches": steady.launches,
        "waits": steady.waits,
        "pageable": steady.pageable,
        "collectives": steady.collectives,
        "host_collectives": sum(seen.kind == "host-collective" for seen in steady.seen),
        "launches_at_change": first.launches,
        "waits_at_change": first.waits,
    }


def ledger(
    cases: Iterable[Case], *, ours: bool, lines: dict[str, Any] | None = None
) -> dict[str, dict[str, int]]:
    """Counts by case of one of the two workers.

    Args:
        lines: is given launches and waits by line, of the cases that are shown.
    """
    found = {}
    wanted = [case for case in cases if ours or case[1] != "plain"]
    for ranks in dict.fromkeys(case[0] for case in wanted):
        with World(FakeDevice(), ours=ours, ranks=ranks) as world:
            for case in wanted:
                if case[0] != ranks:
                    continue
                drafts = case[1] != "plain"
                kind: Kind = case[1] if drafts else "greedy"  # type: ignore[assignment]
                steady, first = measure(world, kind, case[2], drafts=drafts)
                found[name(case)] = counts(steady, first)
                if lines is not None and ours and name(case) in SHOWN:
                    lines[name(case)] = by_line(steady, first)
    return found


def by_line(steady: Step, first: Step) -> dict[str, Any]:
    """Launches by line, and the lines that wait or copy pageable memory."""
    launched: Counter[str] = Counter()
    for seen in steady.seen:
        if seen.kind in ("aten", "triton", "copy", "collective"):
            launched[str(seen)] += seen.count
    return {
        "launches": dict(launched.most_common()),
        "waits": sorted({str(s) for s in (*steady.seen, *first.seen) if s.kind == "wait"}),
        "pageable": sorted({str(s) for s in steady.seen if s.kind == "pageable"}),
    }


# --- the host -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def timed(world: World, names: tuple[str, ...], into: list[float]) -> Iterator[None]:
    """Add the seconds of some methods of the worker's rounds to the last of ``into``."""
    rounds, clock = world.worker._rounds, world.device.clock

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                into[-1] += clock() - start

        return call

    with contextlib.ExitStack() as stack:
        for method in names:
            stack.enter_context(mock.patch.object(rounds, method, clocked(getattr(rounds, method))))
        yield


def planner_ms(requests: int, steps: int = TIMED) -> float:
    """Median milliseconds of this machine's CPU that planning and learning take a step."""
    into: list[float] = []
    with World(FakeDevice(), ours=True) as world:
        world.worker.commands.prepare("dspark_speculation", 1.0)()
        standing = batch(world, "greedy", requests)
        with timed(world, ("begin", "ended"), into):
            for _ in range(steps):
                into.append(0.0)
                run(world, standing)
    return round(statistics.median(into[steps // 4 :]) * 1e3, 3)


#: Where a step's own Python is; operations and the fakes are elsewhere.
_HOST = ("/dspark_sglang/", "/dspark_kernels/", "/sglang/", "/numpy/")


def host_ms(requests: int, *, ours: bool, steps: int = TIMED // 2) -> float:
    """Milliseconds of this machine's CPU a step in Python of the project, of SGLang and of NumPy, under a profiler.

    The profiler makes calls dearer, on both sides alike. Starting operations is left out: on a fake device it is
    the fake that takes the time. SGLang's allocator, batches and graph inputs are left out too, see
    :mod:`tests.cuda_lab.world`.
    """
    profile = cProfile.Profile(time.thread_time)
    with World(FakeDevice(), ours=ours) as world:
        if ours:
            world.worker.commands.prepare("dspark_speculation", 1.0)()
        standing = batch(world, "greedy", requests)
        for _ in range(4):
            run(world, standing)
        profile.enable()
        for _ in range(steps):
            run(world, standing)
        profile.disable()
    spent = sum(
        one.inlinetime
        for one in profile.getstats()
        if not isinstance(one.code, str) and any(part in one.code.co_filename for part in _HOST)
    )
    return round(spent / steps * 1e3, 3)


# --- requests -----------------------------------------------------------------------------------------

#: Options that plain decoding serves under overlap scheduling.
OPTIONS: dict[str, dict[str, Any]] = {
    "frequency_penalty": {"frequency_penalty": 0.5},
    "presence_penalty": {"presence_penalty": 0.5},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "min_new_tokens": {"min_new_tokens": 4},
    "logit_bias": {"logit_bias": {"5": 1.0}},
    "min_p": {"min_p": 0.1},
}


def refused_under_overlap() -> list[str]:
    """Options for which a request is refused on a CUDA server with its defaults."""
    from types import SimpleNamespace

    from dspark_sglang.serving.requests import refusal

    found = []
    with World(FakeDevice(), ours=True):
        for option, fields in OPTIONS.items():
            asked = request("sampled", 0)
            vars(asked.sampling_params).update(fields)
            asked.logprob = SimpleNamespace(token_ids_logprob=None, top_logprobs_num=0)
            if refusal(asked) is not None:
                found.append(option)
    return found


# --- the file -----------------------------------------------------------------------------------------


#: What was found by an audit of the code, and the instrument that sees it. Faults without one do not show on a CPU.
AUDIT = {
    "A1": "capture in the mode chosen", "A2": "capture in the mode chosen", "A3": "unit tests", "A4": "arguments",
    "A5": "capture where the draft embeds", "A6": "refused_under_overlap", "A7": "specialisations", "A8": "traffic",
    "A9": "ledger tp8", "A10": "waits_at_change", "A11": "waits without our KV kernel", "A12": "waits of penalised",
    "A13": "specialisations", "A14": "unit tests", "A15": "memory", "A16": "waits of blocks over shards",
    "A17": "pageable", "A18": "host_collectives",
}  # fmt: skip


def waits_without_the_kv_kernel() -> int:
    """A11: waits of a drafted step whose draft KV SGLang writes: a quantised drafter, scaled RoPE, an fp8 pool."""
    from dspark_sglang.serving.ops.kv_writer import KvWriter

    with (
        mock.patch.object(KvWriter, "of", lambda *_: None),
        World(FakeDevice(), ours=True) as world,
    ):
        return measure(world, "greedy", 8)[0].waits


def waits_of_blocks_over_shards() -> int:
    """A16: waits of a drafted step that verifies whole blocks over several ranks."""
    settings = {"DSPARK_VERIFICATION": "block"}
    with World(FakeDevice(), ours=True, ranks=2, settings=settings) as world:
        return measure(world, "sampled", 2)[0].waits


def audit(own: dict[str, dict[str, int]], late: int, refused: list[str]) -> dict[str, str]:
    """What stands of each fault, as far as a count says it."""
    from tests.cuda_lab import capture

    faults = {name: len(capture.check(name, capture.chosen(name))) for name in capture.BACKENDS}
    steady = [one for key, one in own.items() if "plain" not in key]
    open_ = {
        "A1": sum(faults.values()) - faults["triton"],
        "A2": faults["triton"],
        "A5": len(capture.same_exchanges(capture.draft_exchanges(placement="single", ours=True))),
        "A6": len(refused),
        "A7": late,
        "A9": own["tp8-sampled-R8"]["launches"] - own["tp1-sampled-R8"]["launches"],
        "A10": max(one["waits_at_change"] for key, one in own.items() if "penalised" not in key),
        "A11": waits_without_the_kv_kernel(),
        "A12": own["tp1-penalised-R8"]["waits"],
        "A13": late,
        "A16": waits_of_blocks_over_shards(),
        "A17": max(one["pageable"] for one in steady),
        "A18": max(one["host_collectives"] for one in steady),
    }
    return {
        fault: f"{how}: {open_[fault]} open" if fault in open_ else how
        for fault, how in AUDIT.items()
    }


def in_a_process(module: str, *arguments: str, interpreted: bool = False) -> Any:
    """What an instrument prints that has to run with Triton's interpreter, or without it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", f"tests.cuda_lab.{module}", *arguments],
        env=environment, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def everything() -> dict[str, Any]:
    """The whole file."""
    lines: dict[str, Any] = {}
    refused = refused_under_overlap()
    own = ledger(EVERY, ours=True, lines=lines)
    theirs = ledger(EVERY, ours=False)
    exact = {key: one for key, one in own.items() if "penalised" not in key}
    keys, few = in_a_process("specialisations"), in_a_process("specialisations", "--few")
    return {
        "source": "computed",
        "machine": f"{platform.machine()}, no GPU",
        "command": "make cuda-lab",
        "created": time.strftime("%Y-%m-%d", time.gmtime()),
        "ledger": {key: {"ours": own[key], "builtin": theirs.get(key)} for key in own},
        "waits": {
            "steady": sum(one["waits"] for one in exact.values()),
            "at_change": max(one["waits_at_change"] for one in exact.values()),
            "penalised": max(one["waits"] for one in own.values()),
        },
        "late_specialisations": keys["late_specialisations"],
        "specialisations": {"load": keys, "few": few},
        "host_ms": {
            side: {f"R{n}": host_ms(n, ours=side == "ours") for n in BATCHES}
            for side in ("ours", "builtin")
        },
        "planner_ms": {f"R{n}": planner_ms(n) for n in BATCHES},
        "planted_faults": planted(),
        "audit": audit(own, keys["late_specialisations"], refused),
        "refused_under_overlap": len(refused),
        "refused": refused,
        "lines": lines,
    }


def planted() -> dict[str, int]:
    """Planted faults that the instruments' own tests find, of all."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "planted", "-p", "no:cacheprovider", "tests/cuda_lab"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    numbers = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    return {"found": numbers.get("passed", 0), "of": sum(numbers.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    out = parser.parse_args().out
    out.write_text(json.dumps(everything(), indent=1) + "\n")


if __name__ == "__main__":
    main()
