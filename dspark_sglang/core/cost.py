"""Step cost: seconds of one round as a function of the tokens in the target's verify forward."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

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


class OnlineCost:
    """An affine cost ``fixed + per_token * B`` learned from the rounds the server runs.

    Recursive least squares with exponential forgetting, started from a prior slope so that it
    answers sensibly before ``B`` has varied. One slow round (a page fault, a noisy neighbour)
    moves it by at most a bounded step: observations are clipped to ``outlier`` times the
    prediction. Memory and time per update are constant.
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
        self._covariance = np.zeros((2, 2))
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
        if self._theta is None:
            fixed = seconds / (1.0 + tokens / self._prior_tokens)
            self._theta = np.array([fixed, fixed / self._prior_tokens])
            # The slope is as uncertain as itself, the intercept as the whole round.
            self._covariance = np.diag([1.0, 1.0 / self._prior_tokens**2])
            return
        row = np.array([1.0, float(tokens)])
        predicted = float(row @ self._theta)
        seen = min(max(seconds, predicted / self._outlier), predicted * self._outlier)
        gain = self._covariance @ row
        gain /= self._forgetting + float(row @ gain)
        self._theta = self._theta + gain * (seen - predicted)
        covariance = (self._covariance - np.outer(gain, row @ self._covariance)) / self._forgetting
        # Forgetting inflates the direction that no observation excites; keep it bounded.
        self._covariance = covariance / max(1.0, float(np.trace(covariance)))
        floor = 1e-9
        self._theta[1] = max(float(self._theta[1]), 0.0)
        self._theta[0] = max(float(self._theta[0]), floor)

    def seconds(self, tokens: npt.NDArray[np.int64]) -> Float64:
        if self._theta is None:
            return 1.0 + tokens / self._prior_tokens
        result: Float64 = self._theta[0] + self._theta[1] * tokens
        return result
