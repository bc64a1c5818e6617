"""Confidences in service: how far they are from what is accepted, and a correction until refit.

Every verified token tells whether its confidence was right. Kept are decayed counts by position and
confidence, apart for greedy and sampled requests (a match and an acceptance are different events), and
the last blocks for a new fit. Nothing grows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dspark_sglang.core.sts import BINS

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

#: Weight of an observation one verified token of its position older.
_FORGET = 0.9995
#: Observations of a position from which its error counts, and the error that raises the alarm.
ENOUGH, ALARM = 300.0, 0.10
#: Below this share of it the alarm is taken back.
_RELIEF = 0.6
#: Observations of a bin at which half of its error is corrected.
_TRUST = 6.0
BLOCKS_KEPT = 4096


class Blocks(NamedTuple):
    """The last blocks of which something was verified."""

    #: ``[N, gamma]`` uncalibrated confidence logits.
    logits: Float64
    #: ``[N]`` drafted tokens verified, and kept.
    lens: Int64
    counts: Int64
    #: ``[N]`` whether the request samples.
    sampled: Bool


class Reliability:
    """Follows the confidences of one server; constant memory."""

    def __init__(self, *, gamma: int) -> None:
        self.gamma = gamma
        #: ``[2, gamma]`` positions of greedy and of sampled requests whose error is too large.
        self.alarms = np.zeros((2, gamma), dtype=bool)
        shape = (2, gamma, BINS)
        self._seen, self._predicted, self._kept = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        #: The same of what was served: after correction.
        self._served = np.zeros(shape)
        self._served_kept = np.zeros(shape)
        self._logits = np.zeros((BLOCKS_KEPT, gamma), dtype=np.float32)
        self._lens = np.zeros(BLOCKS_KEPT, dtype=np.int64)
        self._counts = np.zeros(BLOCKS_KEPT, dtype=np.int64)
        self._sampled = np.zeros(BLOCKS_KEPT, dtype=bool)
        self._blocks = 0

    def observe(
        self, confidence: Float64, logits: Float64, lens: Int64, counts: Int64, sampled: Bool
    ) -> None:
        """Take in one step.

        Args:
            confidence: ``[R, gamma]`` calibrated, before any correction.
            logits: ``[R, gamma]`` of the confidence head.
            lens: ``[R]`` drafted tokens verified.
            counts: ``[R]`` drafted tokens kept.
            sampled: ``[R]`` whether each request samples.
        """
        position = np.arange(self.gamma)
        reached = (position < lens[:, None]) & (position <= counts[:, None])
        row, column = reached.nonzero()
        if row.size:
            kind = sampled[row].astype(np.int64)
            kept = (column < counts[row]).astype(np.float64)
            chance = confidence[row, column]
            served = self.corrected(confidence, sampled)[row, column]
            place = kind * self.gamma + column
            age = np.bincount(place, minlength=2 * self.gamma).reshape(2, self.gamma)
            decay = (_FORGET**age)[..., None]
            flat = place * BINS + _bin(chance)
            served_flat = place * BINS + _bin(served)
            for table, at, value in (
                (self._seen, flat, None),
                (self._predicted, flat, chance),
                (self._kept, flat, kept),
                (self._served, served_flat, served),
                (self._served_kept, served_flat, kept),
            ):
                table *= decay
                table += np.bincount(at, value, minlength=table.size).reshape(table.shape)
            errors, enough = self.errors(), self._seen.sum(axis=2) >= ENOUGH
            self.alarms = enough & (errors > np.where(self.alarms, _RELIEF * ALARM, ALARM))
        self._keep(logits, lens, counts, sampled)

    def _keep(self, logits: Float64, lens: Int64, counts: Int64, sampled: Bool) -> None:
        for block in (lens > 0).nonzero()[0]:
            place = self._blocks % BLOCKS_KEPT
            self._logits[place] = logits[block]
            self._lens[place], self._counts[place] = lens[block], counts[block]
            self._sampled[place] = sampled[block]
            self._blocks += 1

    def errors(self) -> Float64:
        """``[2, gamma]`` expected calibration error of each position's confidence, uncorrected."""
        return _error(self._predicted, self._kept, self._seen, axis=2)

    def error(self) -> float | None:
        """Calibration error of all verified tokens' confidences; None while too few were."""
        if self._seen.sum() < ENOUGH:
            return None
        return float(_error(self._predicted, self._kept, self._seen, axis=(0, 1, 2)))

    def served_error(self) -> float | None:
        """The same after the correction: of what the scheduler was given."""
        if self._seen.sum() < ENOUGH:
            return None
        return float(_error(self._served, self._served_kept, self._seen, axis=(0, 1, 2)))

    def corrected(self, confidence: Float64, sampled: Bool) -> Float64:
        """Confidences ``[R, gamma]`` after what service has shown.

        Histogram binning (Zadrozny and Elkan, 2001): each is moved by the mean error of its position
        and bin, less where little was seen. It uses nothing of the current step but the confidences
        themselves.
        """
        kind, column = sampled.astype(np.int64)[:, None], np.arange(self.gamma)
        shift = (self._kept - self._predicted) / (self._seen + _TRUST)
        found: Float64 = np.clip(confidence + shift[kind, column, _bin(confidence)], 0.0, 1.0)
        return found

    def table(self) -> dict[str, list[list[list[float]]]]:
        """JSON-ready counts by kind of request, position and bin: seen, predicted and kept."""
        known = {"seen": self._seen, "predicted": self._predicted, "kept": self._kept}
        return {name: values.round(3).tolist() for name, values in known.items()}

    @property
    def blocks(self) -> Blocks:
        """The blocks kept for a new fit."""
        count = min(self._blocks, BLOCKS_KEPT)
        return Blocks(
            self._logits[:count].astype(np.float64),
            self._lens[:count].copy(),
            self._counts[:count].copy(),
            self._sampled[:count].copy(),
        )

    def forget(self) -> None:
        """Start anew, as after a refit."""
        self.__init__(gamma=self.gamma)  # type: ignore[misc]


def _bin(chance: Float64) -> Int64:
    return np.minimum((chance * BINS).astype(np.int64), BINS - 1)


def _error(
    predicted: Float64, kept: Float64, seen: Float64, axis: int | tuple[int, ...]
) -> Float64:
    gap, total = np.abs(predicted - kept).sum(axis=axis), seen.sum(axis=axis)
    return np.asarray(gap / np.maximum(total, 1e-9))
