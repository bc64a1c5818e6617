"""Step cost: seconds of one round as a function of the tokens in the target's verify forward."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from dspark_sglang.errors import ConfigError

Float64 = npt.NDArray[np.float64]


class StepCost(Protocol):
    """Predicts the duration of a round."""

    def seconds(self, tokens: npt.NDArray[np.int64]) -> Float64:
        """Seconds of a round whose verify forward holds ``tokens`` tokens; non-decreasing."""
        ...


class FlatCost:
    """Every round costs the same, so verifying everything always pays."""

    def seconds(self, tokens: npt.NDArray[np.int64]) -> Float64:
        return np.ones(len(tokens))


class TableCost:
    """Measured seconds at some numbers of tokens, linear in between and beyond the last."""

    def __init__(self, tokens: npt.ArrayLike, seconds: npt.ArrayLike) -> None:
        """Args:
            tokens: ``[n]`` ascending integers, the first at least 1; ``n`` of at least 2.
            seconds: ``[n]`` a round's seconds there.

        Raises:
            ConfigError: out of order, not positive and finite, or a round with more tokens is
                faster than one with fewer.
        """
        self._tokens = np.asarray(tokens, dtype=np.float64)
        self._seconds = np.asarray(seconds, dtype=np.float64)
        flat = self._tokens.ndim == 1 and self._tokens.shape == self._seconds.shape
        problem = ""
        if not flat or len(self._tokens) < 2:
            problem = "does not pair at least two numbers of tokens with seconds"
        elif self._tokens[0] < 1 or not np.all(np.diff(self._tokens) > 0):
            problem = "has tokens that do not ascend from at least 1"
        elif not (np.all(self._seconds > 0) and np.all(np.isfinite(self._seconds))):
            problem = "has seconds that are not positive and finite"
        elif np.any(np.diff(self._seconds) < 0):
            at = int(self._tokens[1:][np.diff(self._seconds) < 0][0])
            problem = f"is faster at {at} tokens than at fewer"
        if problem:
            raise ConfigError(
                f"The cost table {problem}.",
                expected="seconds that never fall as tokens rise, without gaps",
                fix="Measure it again.",
            )

    def seconds(self, tokens: npt.NDArray[np.int64]) -> Float64:
        inside = np.interp(tokens, self._tokens, self._seconds)
        slope = np.diff(self._seconds[-2:])[0] / np.diff(self._tokens[-2:])[0]
        beyond = np.maximum(0.0, tokens - self._tokens[-1])
        result: Float64 = inside + slope * beyond
        return result

    def smoothed(self) -> TableCost:
        """The largest convex cost that nowhere exceeds this one.

        Early stopping cannot cross a step of a staircase; along a convex cost its first maximum is
        the only one.
        """
        hull: list[tuple[float, float]] = []
        for point in zip(self._tokens.tolist(), self._seconds.tolist(), strict=True):
            while len(hull) >= 2 and _turns_right(hull[-2], hull[-1], point):
                hull.pop()
            hull.append(point)
        return TableCost([x for x, _ in hull], [y for _, y in hull])


def _turns_right(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether ``b`` lies on or above the line from ``a`` to ``c``."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


class OnlineCost:
    """An affine cost ``fixed + per_token * B`` learned from the rounds the server runs.

    Exponentially weighted least squares, with a prior slope worth half a round, so that it answers
    sensibly before ``B`` has varied. One slow round (a page fault, a noisy neighbour) moves it by
    a bounded step: a duration is believed up to ``outlier`` times the prediction. Memory and time
    of an update are constant.
    """

    def __init__(
        self, *, prior_tokens: float = 64.0, forgetting: float = 0.99, outlier: float = 3.0
    ) -> None:
        """Args:
        prior_tokens: tokens that are assumed to double the cost of an empty round.
        forgetting: weight of an observation one step older.
        outlier: largest believed ratio of a measured to a predicted round.
        """
        self._prior_tokens = prior_tokens
        self._forgetting = forgetting
        self._outlier = outlier
        self._theta: Float64 | None = None
        self._moments = np.zeros((2, 2))
        self._products = np.zeros(2)
        self.observations = 0

    @property
    def coefficients(self) -> tuple[float, float] | None:
        """``(fixed, per_token)`` in seconds, or None before the first observation."""
        return None if self._theta is None else (float(self._theta[0]), float(self._theta[1]))

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from one round. Ignores durations that are not positive and finite."""
        if not (0.0 < seconds < float("inf")) or tokens < 1:
            return
        self.observations += 1
        row = np.array([1.0, float(tokens)])
        believed = np.inf if self._theta is None else self._outlier * float(row @ self._theta)
        self._moments = self._forgetting * self._moments + np.outer(row, row)
        self._products = self._forgetting * self._products + row * min(seconds, believed)
        # Mean tokens and seconds of the recent rounds, and the prior's shape through that point.
        mean = float(self._moments[0, 1] / self._moments[0, 0])
        level = float(self._products[0] / self._moments[0, 0])
        fixed = level / (1.0 + mean / self._prior_tokens)
        prior = np.array([fixed, fixed / self._prior_tokens])
        # The prior weighs as much as half a round: it decides only what rounds have not.
        weight = np.diag([0.5, 0.5 * mean**2])
        theta = np.linalg.solve(self._moments + weight, self._products + weight @ prior)
        if theta[1] < 0.0:
            theta = np.array([level, 0.0])
        elif theta[0] <= 0.0:
            theta = np.array([1e-6 * level, level / mean])
        self._theta = theta

    def seconds(self, tokens: npt.NDArray[np.int64]) -> Float64:
        if self._theta is None:
            return 1.0 + tokens / self._prior_tokens
        result: Float64 = self._theta[0] + self._theta[1] * tokens
        return result
