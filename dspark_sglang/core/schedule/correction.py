"""Confidences in service: how far they are from what is accepted, and a correction until refit.

Every verified token tells whether its confidence was right. Kept are decayed counts by position and
confidence, apart for greedy and sampled requests (a match and an acceptance are different events),
and the last blocks for a new fit. Nothing grows.

Counts are kept twice. Those that forget slowly say how large the error is and correct it: few tokens
in a bin look like an error although there is none. Those that forget fast raise the alarm, and
correct while it lasts: a drafter that has just gone wrong must not be trusted for as long as it was
right.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dspark_sglang.core.round import Bool, Float64, Int64
from dspark_sglang.core.sts import BINS

#: Weight of an observation one verified token of its position older. Perfect confidences show an
#: error of 1.1% under the first and 2.0% under the second; a confidence that is suddenly 0.4 too
#: high raises the alarm after 3300 and after 700 tokens.
_SLOW, _FAST = 0.9999, 0.9995
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
        #: Tokens seen, their confidences and those kept; the last two again of what was served, after
        #: correction. By kind, position and bin.
        self._slow = np.zeros((5, 2, gamma, BINS))
        #: Seen, predicted and kept.
        self._fast = np.zeros((3, 2, gamma, BINS))
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
            flat = place * BINS + _bin(chance)
            served_flat = place * BINS + _bin(served)
            size, shape = self._slow[0].size, self._slow.shape
            new = np.array([
                np.bincount(at, value, minlength=size)
                for at, value in (
                    (flat, None),
                    (flat, chance),
                    (flat, kept),
                    (served_flat, served),
                    (served_flat, kept),
                )
            ]).reshape(shape)  # fmt: skip
            self._slow *= (_SLOW**age)[..., None]
            self._slow += new
            self._fast *= (_FAST**age)[..., None]
            self._fast += new[:3]
            seen, predicted, right = self._fast
            errors, enough = _error(predicted, right, seen, axis=2), seen.sum(axis=2) >= ENOUGH
            self.alarms = enough & (errors > np.where(self.alarms, _RELIEF * ALARM, ALARM))
        self._keep(logits, lens, counts, sampled)

    def _keep(self, logits: Float64, lens: Int64, counts: Int64, sampled: Bool) -> None:
        verified = (lens > 0).nonzero()[0]
        number = self._blocks + np.arange(len(verified))
        self._blocks += len(verified)
        newest = slice(max(0, len(verified) - BLOCKS_KEPT), None)  # each place is written once
        block, place = verified[newest], number[newest] % BLOCKS_KEPT
        self._logits[place] = logits[block]
        self._lens[place], self._counts[place] = lens[block], counts[block]
        self._sampled[place] = sampled[block]

    def errors(self) -> Float64:
        """``[2, gamma]`` expected calibration error of each position's confidence, uncorrected."""
        seen, predicted, kept, *_ = self._slow
        return _error(predicted, kept, seen, axis=2)

    def error(self) -> float | None:
        """Calibration error of all verified tokens' confidences; None while too few were."""
        seen, predicted, kept, *_ = self._slow
        if seen.sum() < ENOUGH:
            return None
        return float(_error(predicted, kept, seen, axis=(0, 1, 2)))

    def served_error(self) -> float | None:
        """The same after the correction: of what the scheduler was given."""
        seen, _, _, served, kept = self._slow
        if seen.sum() < ENOUGH:
            return None
        return float(_error(served, kept, seen, axis=(0, 1, 2)))

    def corrected(self, confidence: Float64, sampled: Bool) -> Float64:
        """Confidences ``[R, gamma]`` after what service has shown.

        Histogram binning (Zadrozny and Elkan, 2001): each is moved by the mean error of its
        position and bin, less where little was seen. It uses nothing of the current step but the
        confidences themselves.
        """
        kind, column = sampled.astype(np.int64)[:, None], np.arange(self.gamma)
        shift = self.shift()[kind, column, _bin(confidence)]
        found: Float64 = np.clip(confidence + shift, 0.0, 1.0)
        return found

    def shift(self) -> Float64:
        """What a confidence is moved by, ``[2, gamma, BINS]``: greedy and sampled requests, position, bin."""
        seen, predicted, kept = np.where(self.alarms[..., None], self._fast, self._slow[:3])
        found: Float64 = (kept - predicted) / (seen + _TRUST)
        return found

    def table(self) -> dict[str, list[list[list[float]]]]:
        """JSON-ready counts by kind of request, position and bin: seen, predicted and kept."""
        known = dict(zip(("seen", "predicted", "kept"), self._slow, strict=False))
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
