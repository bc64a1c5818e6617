"""The published production result, re-derived: MTP-1 against DSpark-5 on H800 nodes, V4-Flash and V4-Pro.

Source of the published figures: arXiv 2607.05147. Everything else is assumed (:func:`rows`). Computed, not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dspark_loadtests.frontier import (
    Frontier,
    Point,
    Series,
    draw_budget,
    draw_frontier,
    non_dominated,
    speed_at,
    throughput_at,
)
from dspark_sglang.artifacts import SCHEMA_VERSION, write_json
from dspark_sglang.errors import ArtifactError
from dspark_sglang.provenance import provenance
from dspark_sglang.simulate.arrivals import Lengths, waiting
from dspark_sglang.simulate.costs import learned
from dspark_sglang.simulate.engine import Replica, Setting
from dspark_sglang.simulate.roofline import Assumptions, Roofline, exchange, sizes
from dspark_sglang.simulate.summary import Summary, point, summarise

MTP, DSPARK = "MTP-1", "DSpark-5"
FILE = "simulation.json"


class OneOfMany:
    """What one of ``ranks`` equal GPUs sees: all of them decide alike and step together.

    With data parallel attention each GPU schedules its own requests, and a step lasts as long as all
    their tokens take.
    """

    def __init__(self, times: Roofline) -> None:
        self.gamma, self._times, self._ranks = times.gamma, times, times.count

    def plain(self, requests: int, context: int, sampled: int) -> float:
        return self._times.plain(*(self._ranks * n for n in (requests, context, sampled)))

    def round(self, requests: int, drafted: int, context: int, sampled: int) -> float:
        many = (self._ranks * n for n in (requests, drafted, context, sampled))
        return self._times.round(*many)

    def prefill(self, tokens: int, requests: int) -> float:
        return self._times.prefill(self._ranks * tokens, self._ranks * requests)

    def between(self, requests: int) -> float:
        return 0.0


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What was published of one model."""

    checkpoint: str
    #: Tokens a second and user at which throughput was compared, and DSpark's over MTP-1's there.
    speed: float
    throughput: float
    #: Speed of a user at equal throughput, lowest and highest.
    matched: tuple[float, float]
    #: Where the baseline collapses: speed and ratio of throughputs.
    fast: float
    fast_throughput: float
    #: An independent report: tokens a second, seconds to the first token.
    user: float
    ttft_s: float


CLAIMS = {
    "flash": Claim(
        checkpoint="deepseek-v4-flash-dspark", speed=80, throughput=1.51, matched=(1.60, 1.85),
        fast=120, fast_throughput=7.61, user=131, ttft_s=1.859,
    ),
    "pro": Claim(
        checkpoint="deepseek-v4-pro-dspark", speed=35, throughput=1.52, matched=(1.57, 1.78),
        fast=50, fast_throughput=5.06, user=89, ttft_s=3.274,
    ),
}  # fmt: skip
#: Tokens of the independent run, and seconds of one task in it before and after.
_RUN_TOKENS, _TASK_S = 21900, (214.0, 116.0)
#: Steps that are left out, and that are counted, of each load.
_WARM, _STEPS = 60, 220
#: Below so many requests runs are longer: few answers say little.
_FEW = 12
#: Concurrent requests of a GPU.
LOADS = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512)
_COARSE = (2, 16, 45, 91, 181, 362)
Tell = Callable[[str], None]


class Row(msgspec.Struct, frozen=True):
    """One assumption as it is told."""

    name: str
    value: str
    source: str
    #: Other values that are tried, each instead of this one.
    instead: tuple[float, ...] = ()


def rows() -> list[Row]:
    """All assumptions with their sources."""
    own = Assumptions()
    lines = ", ".join(
        f"{count} GPUs {1e6 * wait:.0f} us and {speed / 1e9:.0f} GB/s"
        for count, (wait, speed) in ((n, exchange(n)) for n in (8, 16, 32))
    )
    return [
        Row("memory", f"{own.memory / 1e12:.2f} TB/s a GPU",
            "FlashMLA's README: up to 3000 GB/s on H800; data sheet 3.35 TB/s", (2.4e12, 3.35e12)),
        Row("fp8", f"{own.fp8 / 1e12:.0f} TFLOP/s a GPU",
            "DeepGEMM's README: up to 1550 TFLOP/s on H800; data sheet 1979", (0.8e15, 1.979e15)),
        Row("attention", f"{own.attention / 1e12:.0f} TFLOP/s a GPU, bfloat16",
            "FlashMLA's README: up to 660 TFLOP/s on H800", (4e14,)),
        Row("exchange_wait", f"dispatch or combine: {lines}",
            "a line through DeepEP's low-latency dispatch and combine on H800, docs/legacy.md; waits times", (0.5, 2.0)),
        Row("exchange_speed", "the same line; speeds times", "as above", (0.5, 2.0)),
        Row("kernel", f"{1e6 * own.kernel:g} us the shortest kernel in a graph",
            "assumed, no public source for these kernels", (1.5e-6, 6e-6)),
        Row("layer_kernels", f"{own.layer_kernels} kernels a layer",
            "assumed: attention with indexer and compression, hyper-connections, router, experts", (15, 60)),
        Row("host", f"{1e3 * own.host:g} ms a step that no graph hides",
            "assumed: sampling, scheduling", (0.0, 2e-3)),
        Row("bucket", f"graphs at multiples of {own.bucket} tokens a GPU", "assumed: SGLang captures batches in such steps", (1,)),
        Row("mtp_acceptance", f"{own.mtp_acceptance:g}",
            "DeepSeek-V3's report (arXiv 2412.19437, 5.4.3): 85% to 90% of second tokens", (0.8, 0.9)),
        Row("dspark_length", f"{own.dspark_length:.3f} tokens a round with blocks of 7",
            "the paper's table 1, mean of its four targets; one chance at every position", (4.0, 5.5)),
        Row("spread", f"confidences Beta with concentration {own.spread:g}",
            "assumed; calibrated, as after STS (paper: error about 1%)", (0.7, 8.0)),
        Row("context", f"{own.context} cached tokens a request",
            "DeepSeek's account of its inference system (2025): mean KV length per output token", (1024, 20000)),
        Row("draft_depth", "MTP-1 one layer, DSpark three layers and 5 chained heads",
            "shapes of the checkpoints (`dspark plan`)"),
        Row("nodes", "the fewest whole nodes (1, 2, 4) that hold the weights, prefill elsewhere",
            "shapes of the checkpoints, attention data parallel, experts spread (arXiv 2412.19437, 3.4)"),
    ]  # fmt: skip


def changed(name: str, value: float) -> Assumptions:
    """The assumptions with one of them replaced."""
    kind = type(getattr(Assumptions(), name))
    return replace(Assumptions(), **{name: kind(value)})


def frontier(
    model: str,
    given: Assumptions,
    *,
    loads: Sequence[int] = LOADS,
    steps: int = _STEPS,
    tell: Tell = lambda what: None,
) -> Frontier:
    """Both frontiers of one model.

    Args:
        model: ``flash`` or ``pro``.
        loads: concurrent requests of a GPU; one GPU is simulated, the others are its equals.
        tell: told before each load.
    """
    shape = sizes(CLAIMS[model].checkpoint)
    gpus = Roofline(shape, given)
    series = []
    for name, drafter in ((MTP, "mtp"), (DSPARK, "dspark")):
        found: list[Point] = []
        for load in loads:
            tell(f"{model} {name}, {load * gpus.count} requests")
            times = Roofline(shape, given, drafter=drafter)
            one = point(_steady(times, given, load, steps), gpus=1)
            if one is not None:
                # A load is what the whole server has.
                found.append(msgspec.structs.replace(one, load=one.load * gpus.count))
        series.append(Series(name=name, gpus=gpus.count, points=found))
    return Frontier(
        source="simulated",
        model=CLAIMS[model].checkpoint,
        hardware=gpus.name,
        assumptions={row.name: f"{row.value} ({row.source})" for row in rows()},
        series=series,
    )


def _steady(machine: Roofline, given: Assumptions, users: int, steps: int) -> Summary:
    """A closed loop of ``users`` on one GPU of a decoding server."""
    ours, times = machine.drafter == "dspark", OneOfMany(machine)
    blocks = given.dspark(times.gamma) if ours else given.mtp()
    rng = np.random.default_rng(0)
    if users < _FEW:
        steps = max(steps, 3 * given.output)
    # Whole answers come and go within a run.
    step = times.round(users, users * times.gamma, users * given.context, users)
    count = users * (2 + 2 * (_WARM + steps) * (1 + times.gamma) // given.output)
    lengths = Lengths(prompt=given.context, output=given.output)
    requests = waiting(count, lengths, weights=np.ones(1), rng=rng)
    # Users are not in step: the first answers end at any time.
    requests.output[:users] = rng.integers(1, given.output + 1, users)
    setting = Setting(
        mode="lagged" if ours else "fixed",
        speculation="on",
        slots=users,
        prefill=False,
        users=users,
        warm=_WARM * step,
        until=(_WARM + steps) * step,
        bucket=given.bucket // machine.count if ours else 0,
    )
    cost = learned(times, requests=users, context=given.context) if ours else None
    result = Replica(setting, requests, times=times, blocks=blocks, cost=cost).run()
    if result.interrupted:
        raise KeyboardInterrupt
    return summarise([result], load=float(users), warm=setting.warm)


def compare(model: str, made: Frontier, given: Assumptions) -> dict[str, Any]:
    """What was published of a model next to what comes out of its frontiers."""
    claim = CLAIMS[model]
    base, ours = made.of(MTP).points, made.of(DSPARK).points
    shape = sizes(claim.checkpoint)
    times = Roofline(shape, given)
    fastest = {name: max(p.tok_s_per_user for p in made.of(name).points) for name in (MTP, DSPARK)}
    budgets = [(p.load, round(1 + (p.budget or 0.0), 3)) for p in ours]
    ratio = _ratio(base, ours, claim.fast)
    speeds = _matched(base, ours, claim.speed, claim.fast)
    # Were the simulated steps as slow as to let the baseline collapse where it was published to.
    shared = claim.speed / claim.fast * fastest[MTP]
    lone = speed_of_load(ours, claim.user)
    return {
        "throughput_at": {"speed": claim.speed, "published": claim.throughput,
                          "simulated": _ratio(base, ours, claim.speed),
                          "at_equal_share_of_fastest": {"speed": round(shared, 1),
                                                        "simulated": _ratio(base, ours, shared)}},
        "matched": {"published": list(claim.matched), "simulated": speeds},
        "collapse": {"speed": claim.fast, "published": claim.fast_throughput, "simulated": ratio,
                     "reached_at_speed": _where(base, ours, claim.fast_throughput),
                     "fastest_baseline": round(fastest[MTP], 1), "fastest_ours": round(fastest[DSPARK], 1)},
        "verified_a_request": budgets,
        "independent": {
            "user_tok_s": {"published": claim.user, "load_there": lone},
            "ttft_s": {"published": claim.ttft_s, "simulated": round(times.prefill(_RUN_TOKENS, 1), 4)},
            "task": {"published": round(_TASK_S[0] / _TASK_S[1], 3),
                     "simulated": _lone_ratio(base, ours)},
        },
    }  # fmt: skip


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _ratio(base: Sequence[Point], ours: Sequence[Point], speed: float) -> float | None:
    """Throughput of ours over the baseline's where users have ``speed``; None where one cannot."""
    old, new = throughput_at(list(base), speed), throughput_at(list(ours), speed)
    return _round(new / old) if old and new else None


def _matched(
    base: Sequence[Point], ours: Sequence[Point], slow: float, fast: float
) -> list[float] | None:
    """Least and largest ratio of speeds at the throughputs that the baseline has between two speeds."""
    fast = min(fast, max(p.tok_s_per_user for p in base))
    found = []
    for speed in np.linspace(slow, fast, 25):
        level = throughput_at(list(base), float(speed))
        own = None if level is None else speed_at(list(ours), level)
        if own is not None:
            found.append(own / float(speed))
    return [round(min(found), 4), round(max(found), 4)] if found else None


def _where(base: Sequence[Point], ours: Sequence[Point], wanted: float) -> float | None:
    """Lowest speed from which the ratio of throughputs is ``wanted`` or more."""
    for speed in np.linspace(1.0, max(p.tok_s_per_user for p in base), 2000):
        found = _ratio(base, ours, float(speed))
        if found is not None and found >= wanted:
            return round(float(speed), 1)
    return None


def speed_of_load(points: Sequence[Point], speed: float) -> float | None:
    """Requests at once at which users have ``speed``, between neighbouring points; None beyond all."""
    pairs = sorted((p.tok_s_per_user, p.load) for p in non_dominated(list(points)))
    if not pairs or not pairs[0][0] <= speed <= pairs[-1][0]:
        return None
    return round(float(np.interp(speed, [s for s, _ in pairs], [load for _, load in pairs])), 1)


def _lone_ratio(base: Sequence[Point], ours: Sequence[Point]) -> float:
    """Speed of a user of ours over the baseline's at the smallest load."""
    return round(ours[0].tok_s_per_user / base[0].tok_s_per_user, 3)


def sensitivity(tell: Tell = lambda what: None) -> list[dict[str, Any]]:
    """The two headline ratios with each assumption replaced in turn, on fewer loads."""
    cases: list[tuple[str, float | None]] = [("as assumed", None)]
    cases += [(row.name, value) for row in rows() for value in row.instead]
    found = []
    for name, value in cases:
        given = Assumptions() if value is None else changed(name, value)
        row: dict[str, Any] = {"assumption": name, "value": value}
        for model, claim in CLAIMS.items():
            tell(f"{name} {'' if value is None else f'{value:g}'}: {model}")
            made = frontier(model, given, loads=_COARSE, steps=80)
            base, ours = made.of(MTP).points, made.of(DSPARK).points
            row[f"{model}_{claim.speed:g}"] = _ratio(base, ours, claim.speed)
            row[f"{model}_matched"] = _matched(base, ours, claim.speed, claim.fast)
            row[f"{model}_fastest_baseline"] = round(max(p.tok_s_per_user for p in base), 1)
        found.append(row)
    return found


def total(with_sensitivity: bool) -> int:
    """Calls of ``tell`` of :func:`run`."""
    cases = 1 + sum(len(row.instead) for row in rows())
    return len(CLAIMS) * (2 * len(LOADS) + (cases if with_sensitivity else 0))


def read(out: Path) -> dict[str, Any]:
    """What ``simulation.json`` in ``out`` holds already; nothing where there is none.

    Raises:
        ArtifactError: it is damaged.
    """
    path = out / FILE
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}.",
            expected="a result of `make simulate-published`",
            fix="Remove it.",
        ) from error


def update(out: Path, **parts: Any) -> dict[str, Any]:
    """Write some parts of ``simulation.json`` and keep the others."""
    known = {"schema_version": SCHEMA_VERSION, **read(out), **parts}
    write_json(out / FILE, known)
    return known


def run(out: Path, with_sensitivity: bool, tell: Tell) -> dict[str, Any]:
    """Re-derive, draw and write; a validation that is there already is kept."""
    read(out)  # before minutes are spent
    compared = {}
    for model, claim in CLAIMS.items():
        made = frontier(model, Assumptions(), tell=tell)
        compared[model] = compare(model, made, Assumptions())
        write_json(out / f"frontier-{model}.json", made)
        speeds = (claim.speed, claim.fast)
        draw_frontier(made, out / f"frontier-{model}.png", ours=DSPARK, speeds=speeds)
        draw_budget(made, out / f"budget-{model}.png")
    short = {
        f"{model}_{claim.speed:g}": compared[model]["throughput_at"]
        for model, claim in CLAIMS.items()
    }
    short |= {f"{model}_matched": compared[model]["matched"] for model in CLAIMS}
    parts: dict[str, Any] = {
        "frontier": {
            name: {key: value[key] for key in ("published", "simulated")}
            for name, value in short.items()
        },
        "details": compared,
        "assumptions": [msgspec.to_builtins(row) for row in rows()],
        "label": "computed, not run",
        "provenance": msgspec.to_builtins(provenance(["dspark", "simulate", "published"])),
    }
    if with_sensitivity:
        parts["sensitivity"] = sensitivity(tell)
    return update(out, **parts)
