"""The measurement at start-up: every kind of step in turn, so that its cost is known before anybody waits for it."""

from __future__ import annotations

import logging

import numpy as np

from dspark_sglang.core.round import Load, StepPlan
from dspark_sglang.core.schedule.cost_model import CostModel, Step

logger = logging.getLogger(__name__)

#: Steps below which it says nothing.
_FEWEST = 48


class Measurement:
    """Plans the steps of the measurement and keeps what they last."""

    def __init__(self, *, gamma: int) -> None:
        self._depths = _far_apart(gamma)
        self._gamma = gamma
        self._turn = 0
        self._began: float | None = None
        self._steps: list[tuple[Step, float]] = []
        #: Whether it is still to end.
        self.running = False
        #: Wall seconds so far.
        self.seconds = 0.0

    def begin(self) -> None:
        """Requests that ask for it are measured from now on."""
        self.running = True

    def plan(self, load: Load) -> StepPlan:
        """Every second step is a decode step, so that both kinds meet the same machine."""
        turn, decode = divmod(self._turn, 2)
        self._turn += 1
        if decode:
            return StepPlan(load=load, limits=load.limits, depth=0, profile=True)
        own = np.minimum(load.limits, self._depths[turn % len(self._depths)])
        return StepPlan(load=load, limits=own, depth=self._gamma, verify_all=True, profile=True)

    def observe(self, step: Step, seconds: float, now: float) -> None:
        """Take in what one of its steps has lasted, in seconds, and when it ended."""
        if self._began is None:
            self._began = now - seconds
        self.seconds = now - self._began
        self._steps.append((step, seconds))

    def end(self, cost: CostModel) -> float:
        """It is over: learn from all of its steps at once, or from none of a few.

        Returns:
            Wall seconds that it took; 0 where there was none.
        """
        self.running = False
        steps, self._steps = self._steps, []
        if len(steps) < _FEWEST:
            logger.warning(
                "dspark: only %d steps ran in the %.0f s meant for measuring their cost. It is learned while serving. "
                "Did something else use the machine?",
                len(steps),
                self.seconds,
            )
            cost.forget()
        else:
            cost.refit(steps)
        return self.seconds


def _far_apart(gamma: int) -> list[int]:
    """Depths 0 to gamma, far ones next to each other."""
    order: list[int] = []
    low, high = 0, gamma
    while low <= high:
        order += [high, low] if low < high else [low]
        low, high = low + 1, high - 1
    return order
