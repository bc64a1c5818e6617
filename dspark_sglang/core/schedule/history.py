"""Survivals of earlier steps: what the asynchronous form takes its budget from."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


class History:
    """The last survivals of every slot that are at least ``lag`` steps old.

    A slot is a row of the server's request pool; its generation tells one owner from the next, so
    that no request is budgeted by the confidences of the one that had its slot before. A
    request without a past of its own is taken for the mean of those that had one.
    """

    def __init__(self, *, slots: int, gamma: int, lag: int = 2, smoothing: float = 0.1) -> None:
        """Args:
        slots: rows of the request pool.
        gamma: drafted tokens a request.
        lag: steps between a confidence and the budget it decides (2 in the paper, section 5.2).
        smoothing: weight of a step in the mean that stands for unknown requests.
        """
        self._values = np.zeros((lag, slots, gamma))
        self._generations = np.full((lag, slots), -1, dtype=np.int64)
        self._mean = np.ones(gamma)
        self._smoothing = smoothing
        self._step = 0

    def advance(self, slots: Int64, generations: Int64, survival: Float64) -> Float64:
        """Take note of this step and give the survivals to budget it by: :meth:`recall`, then :meth:`note`."""
        earlier = self.recall(slots, generations)
        self.note(slots, generations, survival)
        return earlier

    def recall(self, slots: Int64, generations: Int64) -> Float64:
        """The survivals to budget a step by.

        Args:
            slots: ``[R]`` slot of each request, all different.
            generations: ``[R]`` generation of each slot, at least 0.

        Returns:
            ``[R, gamma]`` survivals noted ``lag`` steps ago or before.
        """
        ring = self._step % len(self._values)
        known = self._generations[ring, slots] == generations
        # The ring holds every lag-th step; a request that missed some turns has older values there.
        earlier = np.where(known[:, None], self._values[ring, slots], self._mean)
        if known.any():
            mean = earlier[known].mean(axis=0)
            self._mean += self._smoothing * (mean - self._mean)
        return earlier

    def note(self, slots: Int64, generations: Int64, survival: Float64) -> None:
        """Keep the survivals ``[R, gamma]`` of a step for later ones."""
        ring = self._step % len(self._values)
        self._values[ring, slots] = survival
        self._generations[ring, slots] = generations
        self._step += 1
