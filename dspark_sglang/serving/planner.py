"""Scheduling inside SGLang: which drafted tokens of which requests to verify."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sglang.srt.speculative.dspark_components.dspark_planner import DSparkVerifyPlanner
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite

from dspark_sglang.core.cost import StepCost
from dspark_sglang.core.schedule import admission_order, early_stop_budget, lengths
from dspark_sglang.core.survival import survival
from dspark_sglang.serving.telemetry import Telemetry


class Planner(DSparkVerifyPlanner):
    """Budget and admission by our scheduler; layouts and graph tiers stay SGLang's."""

    _budget_planner: Any

    def bind(self, *, cost: StepCost | None, telemetry: Telemetry) -> None:
        """Attach the scheduler; called once after construction.

        Args:
            cost: step cost shared with whoever measures it; None verifies every drafted token.
        """
        self._cost = cost
        self._telemetry = telemetry
        #: Admission order of the step being planned: the budget is taken along it.
        self._order = np.empty(0, dtype=np.int64)
        self._is_verify_all = cost is None
        if cost is None:
            # Without it SGLang plans no budget, and no rank waits for another's.
            self._budget_planner = None

    def compute_budget_sync(
        self,
        *,
        confidence: torch.Tensor,
        prefix_lens: torch.Tensor,
        req_pool_indices: torch.Tensor,
    ) -> int | None:
        """Algorithm 1 on the confidences of this step (no overlap: the host has them)."""
        if self._cost is None:
            return None
        with self._telemetry.timed("plan"):
            values = survival(confidence.cpu().numpy())
            self._order = admission_order(values)
            forced = self._budget_planner.forced_budget_frac
            if forced is not None:
                budget = int(float(forced) * values.size)
            else:
                budget = early_stop_budget(values, self._order, self._cost)
        # Every rank times its own rounds; all must run the same forward.
        agreed = torch.tensor([budget], device=confidence.device)
        return int(self._tp_sync.sync(SpecTpSyncSite.DSPARK_PLAN, agreed))

    def _schedule_verify_lens(
        self,
        *,
        req_pool_indices: torch.Tensor,
        prefix_lens: torch.Tensor,
        device: Any,
        confidence: torch.Tensor | None,
        budget: int | None,
    ) -> torch.Tensor | None:
        if confidence is None or budget is None:
            return None
        drafted = lengths(self._order, budget, requests=len(confidence), gamma=self.gamma)
        verify_lens = torch.from_numpy(drafted + 1).to(device=device, dtype=torch.int32)
        self._tp_sync.sync(SpecTpSyncSite.DSPARK_PLAN, verify_lens)
        self._telemetry.ran["schedule:early-stop"] += 1
        return verify_lens
