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
