"""Acceptance that drifts: a one-sided CUSUM whose threshold comes from the baseline itself.

Exact acceptance hides a stale draft cache or a wrong drafter revision from the text: only the accepted length falls. It
differs more from question to question than any fault changes it, so each answer is held against the baseline's answer to the
same question with the same text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

#: Falls of less than twice this, in standard deviations, are left alone.
SLACK = 0.5
#: Standard deviations that one answer counts at most, and the smallest one believed, in tokens: equal
#: lengths by chance are no certainty.
_MOST, _LEAST = 4.0, 0.05
#: The lowest threshold: four answers that count most. Where accepted lengths repeat exactly, one that a
#: batch has rounded otherwise is no alarm.
_LOWEST = 4 * (_MOST - SLACK)
#: The threshold is set so that so many requests of an unchanged server raise no alarm but in this share of runs.
HORIZON, FALSE_ALARMS = 5000, 0.01
_RUNS = 400


class Level(msgspec.Struct, frozen=True):
    """Accepted length of one kind of prompt on a server known to be right."""

    mean: float
    deviation: float
    count: int


def level(lengths: Sequence[float]) -> Level:
    """Mean and standard deviation; the latter at least 0.05 tokens."""
    values = np.asarray(lengths, dtype=np.float64)
    deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return Level(float(values.mean()), max(deviation, _LEAST), len(values))


def spread(repeats: Iterable[Sequence[float]]) -> float:
    """Standard deviation of a question's accepted length about its own mean, pooled over questions.

    Args:
        repeats: accepted lengths of each question, all with one text.
    """
    squares, freedom = 0.0, 0
    for lengths in repeats:
        values = np.asarray(lengths, dtype=np.float64)
        squares += float(((values - values.mean()) ** 2).sum())
        freedom += len(values) - 1
    return max(math.sqrt(squares / freedom) if freedom else 0.0, _LEAST)


def residual(length: float, expected: float, deviation: float) -> float:
    """Standard deviations above (positive) or below the baseline, at most 4."""
    return min(max((length - expected) / deviation, -_MOST), _MOST)


def threshold(residuals: Sequence[float], rng: np.random.Generator) -> float:
    """The CUSUM height that an unchanged server hardly ever reaches.

    Resamples the baseline's own residuals, so that no distribution is assumed, lowered by twice the standard error of
    their mean, since a baseline may have been lucky: ``HORIZON`` requests, ``1 - FALSE_ALARMS`` quantile of their highest point.
    """
    values = np.asarray(residuals, dtype=np.float64)
    error = 1.0 / math.sqrt(len(values))
    highest = np.empty(_RUNS)
    for run in range(_RUNS):
        drawn = rng.choice(values, size=HORIZON) - values.mean() - 2.0 * error
        highest[run] = cusum(drawn).max()
    return max(float(np.quantile(highest, 1.0 - FALSE_ALARMS)) + 1.0, _LOWEST)


def cusum(residuals: Sequence[float] | np.ndarray) -> np.ndarray:
    """``S_n = max(0, S_{n-1} - z_n - SLACK)``: grows while accepted lengths stay low.

    Returns:
        Float64 ``[N]``.
    """
    steps = -np.asarray(residuals, dtype=np.float64) - SLACK
    walk = np.concatenate([[0.0], np.cumsum(steps)])
    return np.asarray(walk - np.minimum.accumulate(walk))[1:]


class Drift:
    """The CUSUM of a run, one request after the other."""

    def __init__(self, height: float) -> None:
        self._height = height
        self._level = 0.0
        self._seen = 0
        #: The first request at which the CUSUM exceeded its height; None: not yet.
        self.found: int | None = None

    def add(self, residual: float) -> None:
        """Count one more request."""
        self._level = max(0.0, self._level - residual - SLACK)
        if self.found is None and self._level > self._height:
            self.found = self._seen
        self._seen += 1
