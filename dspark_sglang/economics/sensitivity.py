"""How far an answer moves: one assumption at a time, and all of them at once."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from dspark_sglang.economics.account import METRICS, Value, evaluate
from dspark_sglang.economics.prices import Assumptions
from dspark_sglang.errors import ConfigError

#: Of the distribution that is given, in percent.
PERCENTILES = (5, 50, 95)


class Swing(msgspec.Struct, frozen=True, kw_only=True):
    """A metric with one assumption at the ends of its range and all others at their value."""

    name: str
    low: float
    high: float
    at_low: float
    at_high: float


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """A metric over all draws: its 5th, 50th and 95th percentile."""

    p5: float
    p50: float
    p95: float


class MonteCarlo(msgspec.Struct, frozen=True, kw_only=True):
    """All assumptions drawn at once, independently, from triangles of low, value and high.

    Attributes:
        gain: cost a million of the baseline over ours, both under the same draws.
        profitable: share of draws with a profit; None without a price.
    """

    draws: int
    seed: int
    metrics: dict[str, Spread]
    profitable: float | None
    gain: Spread | None


def tornado(rate: float, assumptions: Assumptions, metric: str) -> list[Swing]:
    """One assumption at a time, the one that moves ``metric`` most first; those with no range are left out."""
    values: dict[str, Value] = dict(assumptions.values())
    found = []
    for name, quantity in assumptions.quantities().items():
        low, high = quantity.range
        if low == high:
            continue
        ends = [float(evaluate(rate, values | {name: end})[metric]) for end in (low, high)]
        found.append(Swing(name=name, low=low, high=high, at_low=ends[0], at_high=ends[1]))
    return sorted(found, key=lambda swing: -abs(swing.at_high - swing.at_low))


def draw(assumptions: Assumptions, *, draws: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """``[draws]`` values of each assumption.

    Raises:
        ConfigError: fewer than 100 draws, or a negative seed.
    """
    if draws < 100 or seed < 0:
        raise ConfigError(
            f"{draws} draws with seed {seed}.",
            expected="at least 100 draws and a seed of at least 0",
            fix="Change --draws or --seed.",
        )
    rng = np.random.default_rng(seed)
    found = {}
    for name, quantity in assumptions.quantities().items():
        low, high = quantity.range
        # Drawn even where there is no range, so that the others do not depend on it.
        uniform = rng.triangular(0.0, _mode(quantity.value, low, high), 1.0, draws)
        found[name] = low + (high - low) * uniform
    return found


def _mode(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def monte_carlo(
    rate: float, drawn: Mapping[str, NDArray[np.float64]], *, baseline: float | None, seed: int
) -> tuple[MonteCarlo, dict[str, NDArray[np.float64]]]:
    """The distribution of every metric.

    Args:
        rate: tokens a second and GPU.
        drawn: from :func:`draw`.
        baseline: the same of what is compared with.

    Returns:
        Its summary, and ``[draws]`` of every metric.
    """
    values: dict[str, Value] = dict(drawn)
    draws = len(drawn["gpu_hour"])
    ours = evaluate(rate, values)
    samples = {n: np.broadcast_to(np.asarray(ours[n]), draws) for n in METRICS if n in ours}
    gain = None
    if baseline is not None:
        theirs = evaluate(baseline, values)["cost_per_million"]
        gain = spread(np.asarray(theirs) / samples["cost_per_million"])
    return MonteCarlo(
        draws=draws,
        seed=seed,
        metrics={name: spread(values) for name, values in samples.items()},
        profitable=float((samples["profit"] > 0).mean()) if "profit" in samples else None,
        gain=gain,
    ), samples


def spread(values: NDArray[np.float64]) -> Spread:
    """Percentiles of draws."""
    return Spread(**dict(zip(("p5", "p50", "p95"), np.percentile(values, PERCENTILES).tolist(), strict=True)))  # fmt: skip
