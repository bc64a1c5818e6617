"""A question about a frontier, and its answer: what serving at this speed costs, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from dspark_sglang import artifacts
from dspark_sglang.economics import account, sensitivity
from dspark_sglang.economics.prices import Assumptions
from dspark_sglang.economics.slots import Slots
from dspark_sglang.errors import ConfigError
from dspark_sglang.load import frontier
from dspark_sglang.load.frontier import Frontier, Point


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked.

    Attributes:
        series: the way of serving.
        baseline: what it is compared with; None: nothing.
        sla: tokens a second that every user gets at least.
        max_ttft_ms: points that are slower to the first token do not count.
    """

    series: str
    baseline: str | None = None
    sla: float
    max_ttft_ms: float | None = None
    draws: int = 10_000
    seed: int = 0


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One way of serving at the SLA.

    Attributes:
        rate: output tokens a second and GPU there, as the frontier says; 0 where it is never that fast.
        fastest: tokens a second and user of its fastest point.
        slots: requests a server has memory for; None: not known.
    """

    name: str
    rate: float
    fastest: float
    slots: float | None
    hour: account.Hour | None


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """A point of the frontier with its price."""

    tok_s_per_user: float
    cost_per_million: float


class Study(msgspec.Struct, frozen=True, kw_only=True, tag="economics", tag_field="kind"):
    """The answer."""

    schema_version: int = artifacts.SCHEMA_VERSION
    source: str
    model: str
    hardware: str
    question: Question
    assumptions: Assumptions
    ours: Side
    baseline: Side | None
    stages: list[account.Stage]
    curves: dict[str, list[Cost]]
    metric: str
    tornado: list[sensitivity.Swing]
    monte_carlo: sensitivity.MonteCarlo
    slots: Slots | None
    notes: list[str]
    provenance: artifacts.Provenance

    @property
    def gain(self) -> float | None:
        """Cost a million of the baseline over ours; None without one, or where it never is that fast."""
        if self.baseline is None or self.baseline.hour is None or self.ours.hour is None:
            return None
        return self.baseline.hour.cost_per_million / self.ours.hour.cost_per_million


def answer(
    found: Frontier,
    question: Question,
    assumptions: Assumptions,
    slots: Slots | None,
    provenance: artifacts.Provenance,
) -> tuple[Study, NDArray[np.float64]]:
    """Answer a question.

    Returns:
        The answer, and ``[draws]`` of its metric, for a histogram.

    Raises:
        ConfigError: an SLA that is no speed, or that the series cannot meet.
        ArtifactError: the frontier has no such series, or no time to the first token.
    """
    if not 0 < question.sla < float("inf"):
        raise ConfigError(
            f"The SLA is {question.sla:g} tokens/s/user.", expected="a speed above 0", fix="Change --sla."
        )  # fmt: skip
    values = assumptions.values()
    ours, fitting = _side(found, question.series, question, assumptions, slots, drafter=True)
    if ours.hour is None:
        raise ConfigError(
            f"{question.series} never gives a user {question.sla:g} tokens/s"
            + (f" within {question.max_ttft_ms:g} ms to the first token." if question.max_ttft_ms else "."),
            expected=f"at most {ours.fastest:.4g}, its fastest point",
            fix=f"Pass --sla {_below(ours.fastest):g} or less, or a frontier with lighter loads.",
        )  # fmt: skip
    baseline = base_rate = None
    if question.baseline is not None:
        baseline, base_rate = _side(found, question.baseline, question, assumptions, slots, drafter=False)  # fmt: skip
    drawn = sensitivity.draw(assumptions, draws=question.draws, seed=question.seed)
    summary, samples = sensitivity.monte_carlo(
        fitting, drawn, baseline=base_rate or None, seed=question.seed
    )
    metric = next(name for name in account.METRICS if name in samples)
    names = [question.series] + ([question.baseline] if question.baseline else [])
    return Study(
        source=found.source,
        model=found.model,
        hardware=found.hardware,
        question=question,
        assumptions=assumptions,
        ours=ours,
        baseline=baseline,
        stages=account.stages(ours.rate, assumptions, fitting if slots is not None else None),
        curves={name: _curve(found.of(name).points, values) for name in names},
        metric=metric,
        tornado=sensitivity.tornado(fitting, assumptions, metric),
        monte_carlo=summary,
        slots=slots,
        notes=_notes(found, assumptions, slots),
        provenance=provenance,
    ), samples[metric]


def _side(
    found: Frontier,
    name: str,
    question: Question,
    assumptions: Assumptions,
    slots: Slots | None,
    *,
    drafter: bool,
) -> tuple[Side, float]:
    """One way of serving, and its rate with the requests that memory holds."""
    series = found.of(name)
    points = _in_time(series.points, question.max_ttft_ms, name)
    rate = frontier.throughput_at(points, question.sla) or 0.0
    fitting, limit = rate, None
    if slots is not None and points:
        limit = (slots.requests if drafter else slots.baseline(name)) * series.gpus / slots.ranks
        fitting = frontier.throughput_at(_within(points, limit, name), question.sla) or 0.0
    hour = account.hour(fitting, assumptions.values()) if fitting > 0 else None
    fastest = max((point.tok_s_per_user for point in points), default=0.0)
    return Side(name=name, rate=rate, fastest=fastest, slots=limit, hour=hour), fitting


def _in_time(points: Sequence[Point], limit: float | None, name: str) -> list[Point]:
    """Points within ``limit`` milliseconds to the first token.

    Raises:
        ConfigError: no point says how long that takes, or the limit is no time.
    """
    if limit is None:
        return list(points)
    if not limit > 0 or all(point.ttft_ms is None for point in points):
        raise ConfigError(
            f"--max-ttft-ms is {limit:g}, and {name} has {len(points)} points.",
            expected="a time above 0, and points that say their time to the first token",
            fix="Leave --max-ttft-ms out, or measure a frontier with `dspark bench`.",
        )
    return [point for point in points if point.ttft_ms is not None and point.ttft_ms <= limit]


def _within(points: Sequence[Point], limit: float, name: str) -> list[Point]:
    """Points of at most ``limit`` requests, and one interpolated at it.

    Raises:
        ConfigError: not one of them.
    """
    ordered = sorted(points, key=lambda point: point.load)
    kept = [point for point in ordered if point.load <= limit]
    if not kept:
        raise ConfigError(
            f"Memory holds {limit:.4g} requests of {name}.",
            expected=f"at least {ordered[0].load:g}, the lightest load of the frontier",
            fix="Shorten --context, or choose a larger --hardware.",
        )
    if len(kept) < len(ordered):
        low, high = kept[-1], ordered[len(kept)]
        share = (limit - low.load) / (high.load - low.load)
        kept.append(
            Point(
                load=limit,
                tok_s_per_gpu=low.tok_s_per_gpu + share * (high.tok_s_per_gpu - low.tok_s_per_gpu),
                tok_s_per_user=low.tok_s_per_user + share * (high.tok_s_per_user - low.tok_s_per_user),
            )
        )  # fmt: skip
    return kept


def _curve(points: Sequence[Point], values: dict[str, float]) -> list[Cost]:
    return [
        Cost(
            tok_s_per_user=point.tok_s_per_user,
            cost_per_million=account.hour(point.tok_s_per_gpu, values).cost_per_million,
        )
        for point in frontier.non_dominated(list(points))
        if point.tok_s_per_gpu > 0
    ]


def _below(speed: float) -> float:
    """``speed`` rounded down to three digits, so that it can be asked for."""
    digit = 10.0 ** (np.floor(np.log10(speed)) - 2) if speed > 0 else 1.0
    return float(np.floor(speed / digit) * digit)


def _notes(found: Frontier, assumptions: Assumptions, slots: Slots | None) -> list[str]:
    """What the answer leaves out."""
    notes = []
    if found.source == "simulated":
        notes.append("The frontier is simulated, not measured: see its assumptions.")
        if assumptions.prefill is None:
            notes.append("Time for prefill is left out: the preset has no prefill rate.")
    elif assumptions.prefill is not None:
        notes.append(
            "The frontier is measured, so its throughput already pays for prefill; the preset's prefill rate "
            "charges for it again. Choose a preset without one."
        )
    if assumptions.output is None:
        notes.append("No price of output is given, so there is no revenue, and cost stands alone.")
    elif assumptions.input_miss is None and assumptions.input_hit is None:
        notes.append("What users pay for input is left out: the preset has no price of it.")
    if assumptions.utilisation.value == 1.0:
        notes.append("Idle hours are left out: every paid hour is at the frontier's load.")
    if slots is None:
        notes.append("Memory is left out: as many requests as the frontier has are taken to fit.")
    notes.append(
        "Only GPUs are paid for: no staff, network, storage, licences, retries or unpaid use."
    )
    return notes
