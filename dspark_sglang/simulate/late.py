"""Deciding ahead and learning late, as :class:`dspark_sglang.serving.ahead.Ahead` does on a device: here time is a number."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dspark_sglang.core.schedule import History
from dspark_sglang.serving.control import Control
from dspark_sglang.serving.running import Running

Int64 = npt.NDArray[np.int64]


class _Over(NamedTuple):
    step: Running
    slots: Int64
    generations: Int64
    buckets: Int64 | None
    lens: Int64
    counts: Int64
    seconds: float
    now: float


class Late:
    """What a server under overlap scheduling knows, and when."""

    def __init__(self, control: Control, *, slots: int) -> None:
        """Args:
        control: decides the steps.
        slots: rows of the request pool.
        """
        self._control = control
        self._history = History(slots=slots, gamma=control.gamma)
        self._over: deque[_Over] = deque()
        self._place: tuple[Int64, Int64, Int64 | None]

    def settle(self, running: int = 1) -> None:
        """Learn from all steps but the last ``running``."""
        while len(self._over) > running:
            over = self._over.popleft()
            if over.step.plan.draft:
                values = self._control.arrived(over.step, over.lens, over.counts)
                if not over.step.plan.profile:
                    self._history.note(over.slots, over.generations, values)
            self._control.ended(over.step, over.seconds, over.now)

    def decide(self, slots: Int64, generations: Int64, buckets: Int64 | None) -> None:
        """Decide how much of the running step is verified; see :meth:`Control.ahead`.

        Args:
            slots: ``[R]`` rows of the request pool and their generations.
        """
        self._place = slots, generations, buckets
        self._control.ahead(self._history.recall(slots, generations), buckets)

    def over(self, lens: Int64, counts: Int64, seconds: float, now: float) -> None:
        """The running step is over; see :meth:`Control.accepted` and :meth:`Control.finished`."""
        step = self._control.running
        if not step.plan.draft:
            self._control.accepted(lens, counts)
        self._over.append(_Over(step, *self._place, lens, counts, seconds, now))
