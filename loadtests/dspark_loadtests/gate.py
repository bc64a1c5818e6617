"""A regression gate: a result against a saved one, stage by stage, with the noise of both."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from dspark_loadtests.schema import BenchResult, Estimate, Summary
from dspark_sglang.errors import ConfigError

Verdict = Literal["ok", "better", "worse", "unsure"]
#: By metric: whether more is better.
METRICS = {
    "output_tok_s": True,
    "goodput_ratio": True,
    "ttft_ms_p50": False,
    "ttft_ms_p99": False,
    "tpot_ms_mean": False,
    "tpot_ms_p99": False,
    "e2e_ms_p50": False,
}


class Check(NamedTuple):
    """One metric of one stage.

    Attributes:
        change: relative change of the metric, positive where it grew; with its 95% interval.
        verdict: ``worse``: by more than the tolerance, and the interval excludes no change; ``unsure``: the interval
            reaches beyond the tolerance on the bad side, but also the other way.
    """

    stage: str
    metric: str
    before: float
    after: float
    low: float
    change: float
    high: float
    verdict: Verdict


class Gate(NamedTuple):
    """What came of it; ``problems`` are reasons to fail beside the checks."""

    checks: list[Check]
    problems: list[str]

    @property
    def passed(self) -> bool:
        """Whether nothing is worse."""
        return not self.problems and all(check.verdict != "worse" for check in self.checks)


def compare(result: BenchResult, baseline: BenchResult, *, tolerance: float) -> Gate:
    """Every metric of every stage that both have.

    Args:
        tolerance: relative; a change beyond it on the bad side is a regression where it is no noise.

    Raises:
        ConfigError: the two have no stage in common.
    """
    known = {stage.name: stage for stage in baseline.stages}
    shared = [(known[stage.name], stage) for stage in result.stages if stage.name in known]
    if not shared:
        raise ConfigError(
            f"The result has stages {', '.join(s.name for s in result.stages)}.",
            expected=f"some of the baseline's: {', '.join(known)}",
            fix="Run both with the same --pattern and loads.",
        )
    problems = [
        f"{stage.name} of the baseline was not measured"
        for stage in baseline.stages
        if stage.name not in {s.name for s in result.stages}
    ]
    if not result.complete:
        problems.append("the run is incomplete: " + "; ".join(result.incidents))
    checks: list[Check] = []
    for before, after in shared:
        problems += _problems(before, after)
        for metric in METRICS:
            if metric in before.estimates and metric in after.estimates:
                checks.append(
                    _check(after.name, metric, before.estimates[metric], after.estimates[metric], tolerance)
                )  # fmt: skip
    return Gate(checks, problems)


def _problems(before: Summary, after: Summary) -> list[str]:
    found = []
    old, new = before.settings, after.settings
    for name in ("temperature", "max_tokens", "prompts", "slo", "arrival"):
        if getattr(old, name) != getattr(new, name):
            found.append(
                f"{after.name}: {name} is {getattr(new, name)}, the baseline's {getattr(old, name)}"
            )
    if after.counts.failed > before.counts.failed:
        found.append(
            f"{after.name}: {after.counts.failed} of {after.counts.sent} requests failed "
            f"({before.counts.failed} in the baseline)"
        )
    lost = [name for name in METRICS if name in before.estimates and name not in after.estimates]
    if lost:
        found.append(
            f"{after.name}: too few requests completed to tell {', '.join(lost)} "
            f"({after.counts.completed} of {after.counts.sent})"
        )
    return found


def _check(stage: str, metric: str, before: Estimate, after: Estimate, tolerance: float) -> Check:
    if before.value <= 0 or after.value <= 0:
        # no ratio: a goodput that was or became zero
        change = after.value - before.value
        low = high = change
    else:
        ratio = math.log(after.value / before.value)
        spread = math.hypot(_relative(before), _relative(after))
        low, change, high = (math.expm1(ratio + sign * spread) for sign in (-1, 0, 1))
    return Check(
        stage, metric, before.value, after.value, low, change, high,
        _verdict((low, change, high), METRICS[metric], tolerance),
    )  # fmt: skip


def _relative(estimate: Estimate) -> float:
    """Half the interval in log, the unit in which the intervals of a quotient add up in squares."""
    low = max(estimate.low, 1e-3 * estimate.value)
    return (math.log(max(estimate.high, low)) - math.log(low)) / 2


def _verdict(
    interval: tuple[float, float, float], more_is_better: bool, tolerance: float
) -> Verdict:
    low, change, high = interval if more_is_better else tuple(-value for value in interval[::-1])
    if change < -tolerance and high < 0:
        return "worse"
    if low < -tolerance:
        return "unsure"
    return "better" if low > 0 else "ok"
