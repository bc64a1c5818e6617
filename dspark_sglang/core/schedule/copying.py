"""Copies as a draft of their own: what verifying them alone is worth, and when the draft forward is skipped for it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dspark_sglang.core.lookup import CopyBudget, copy_budget
from dspark_sglang.core.policy import DraftPolicy
from dspark_sglang.core.round import Load, StepPlan
from dspark_sglang.core.steps import CostModel

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

#: Weight of the newest step with copies alone, and the most it may last over those before.
_RATE, _STALLED = 0.05, 1.3


class Copying:
    """Weighs steps with copies alone against decode steps and rounds."""

    def __init__(self, cost: CostModel, policy: DraftPolicy) -> None:
        self._cost = cost
        self._policy = policy
        #: Seconds of a step with copies alone over those of a plain step and of what verifying more
        #: adds to a round: a verification costs more than decoding.
        self._dearer = 1.1

    def alone(self, load: Load, gains: Float64) -> CopyBudget:
        """How many copied tokens of a step that drafts nothing to verify.

        Args:
            gains: their survivals, falling.
        """
        requests, at = load.requests, (load.context, load.sampling)
        if not self._cost.comparable:
            return CopyBudget(0, 0.0)
        decode = self._cost.plain_seconds(requests, *at)
        return copy_budget(gains, requests, decode, self._cost.curve(requests, *at), self._dearer)

    def skip_draft(self, plan: StepPlan, rows: Int64, chances: Float64) -> bool | None:
        """Whether copies alone are expected to bring more tokens a second than a draft beside them.

        Args:
            rows: ``[n]`` requests of the step that can copy.
            chances: ``[n, depth]`` of each copied token, given those before it.

        Returns:
            None where too little is known to tell; never where drafting is the operator's choice.
        """
        if self._policy.choice == "on":
            return False
        load, requests = plan.load, plan.load.requests
        known = self._policy.learned(requests, load.samples)
        if not self._cost.comparable or known is None:
            return None
        if plan.verify_all:
            return False
        within = np.arange(chances.shape[1]) < load.limits[rows][:, None]
        survives = np.where(within, chances.cumprod(axis=1), 0.0)
        alone = self.alone(load, -np.sort(-survives[within])).rate
        # A request that copies keeps the better of both; the others what drafts usually bring.
        drafted = max(0.0, known.gain * known.length - 1.0)
        best = np.maximum(survives.sum(axis=1), drafted).sum() + (requests - len(rows)) * drafted
        decode = self._cost.plain_seconds(requests, load.context, load.sampling)
        return alone >= (requests + float(best)) / (known.length * decode)

    def learn(self, load: Load, budget: int, seconds: float) -> None:
        """Take in what a step with copies alone has cost, of which ``budget`` tokens were verified."""
        requests, at = load.requests, (load.context, load.sampling)
        none, some = self._cost.curve(requests, *at).seconds(
            np.array([requests, requests + budget])
        )
        dearer = seconds / (self._cost.plain_seconds(requests, *at) + some - none)
        if 0.0 < dearer < np.inf:  # one step teaches little, a stalled one no more
            self._dearer += _RATE * (min(dearer, _STALLED * self._dearer) - self._dearer)
