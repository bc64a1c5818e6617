"""Survivals of steps that are over: what the asynchronous form takes its budget from (the paper's section 5.2)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


class History:
    """The last survivals that every slot was noted with.

    A slot is a row of the server's request pool; its generation tells one owner from the next, so
    that no request is budgeted by the confidences of the one that had its slot before. A
    request without a past of its own is taken for the mean of those that had one.
    """

    def __init__(self, *, gamma: int, slots: int = 0, smoothing: float = 0.1) -> None:
        """Args:
        gamma: drafted tokens a request.
        slots: rows of the request pool, as far as known; it grows.
        smoothing: weight of a step in the mean that stands for unknown requests.
        """
        self._values = np.zeros((slots, gamma))
        self._generations = np.full(slots, -1, dtype=np.int64)
        self._mean = np.ones(gamma)
        self._smoothing = smoothing

    def recall(self, slots: Int64, generations: Int64) -> Float64:
        """The survivals to budget a step by.

        Args:
            slots: ``[R]`` slot of each request, all different.
            generations: ``[R]`` generation of each slot, at least 0.

        Returns:
            ``[R, gamma]`` survivals, non-increasing along each row.
        """
        self._hold(slots)
        known = self._generations[slots] == generations
        earlier = np.where(known[:, None], self._values[slots], self._mean)
        if known.any():
            mean = earlier[known].mean(axis=0)
            self._mean += self._smoothing * (mean - self._mean)
        return earlier

    def note(self, slots: Int64, generations: Int64, survival: Float64) -> None:
        """Keep the survivals ``[R, gamma]`` of a step that is over.

        Where one is 0 nothing was drafted: what was known of that position stays.
        """
        self._hold(slots)
        known = self._generations[slots] == generations
        before = np.where(known[:, None], self._values[slots], self._mean)
        found = np.where(survival > 0.0, survival, before)
        self._values[slots] = np.minimum.accumulate(found, axis=1)
        self._generations[slots] = generations

    def _hold(self, slots: Int64) -> None:
        """Make room for these slots."""
        missing = int(slots.max(initial=-1)) + 1 - len(self._values)
        if missing > 0:
            missing = max(missing, len(self._values))
            self._values = np.pad(self._values, ((0, missing), (0, 0)))
            self._generations = np.pad(self._generations, (0, missing), constant_values=-1)
