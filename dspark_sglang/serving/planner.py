"""Scheduling inside SGLang: which drafted tokens of which requests to verify."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sglang.srt.speculative.dspark_components.dspark_planner import (
    DSparkVerifyPlanner,
    HostConfidenceBudgetPlanner,
    VerifyBudgetDecision,
)
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite

from dspark_sglang.core.cost import StepCost
from dspark_sglang.core.schedule import (
    admission_order,
    early_stop_budget,
    global_budget,
    lengths,
)
from dspark_sglang.core.survival import survival
from dspark_sglang.serving.telemetry import Telemetry


class LaggedBudget(HostConfidenceBudgetPlanner):
    """The asynchronous budget: global argmax over confidences two steps old.

    SGLang's class carries confidences over the lag; the arithmetic is ours.
    """

    cost: StepCost

    def compute_budget(
        self,
        *,
        confidence: torch.Tensor,
        generation: torch.Tensor,
        current_generation: torch.Tensor,
        req_pool_indices_cpu: torch.Tensor,
    ) -> int:
        old, old_generation = self._shift_to_lag(
            confidence=confidence,
            generation=generation,
            req_pool_indices_cpu=req_pool_indices_cpu,
        )
        current = current_generation.to(torch.int64)
        fresh = ((current >= 1) & (old_generation.to(torch.int64) == current)).numpy()
        # A slot whose owner changed has no history: plan for it as if all would survive.
        values = np.where(fresh[:, None], survival(old.numpy()), 1.0)
        if self.forced_budget_frac is not None:
            budget = int(float(self.forced_budget_frac) * values.size)
        else:
            budget = global_budget(values, self.cost)
        self.last_decision = VerifyBudgetDecision(budget=budget)
        return budget


class Planner(DSparkVerifyPlanner):
    """Budget and admission by our scheduler; layouts and graph tiers stay SGLang's."""

    _budget_planner: Any

    def bind(
        self, *, cost: StepCost, adaptive: bool, asynchronous: bool, telemetry: Telemetry
    ) -> None:
        """Attach the scheduler; called once after construction.

        Args:
            cost: step cost shared with whoever measures it.
            adaptive: False verifies every drafted token.
            asynchronous: whether SGLang overlaps scheduling with the device.
        """
        self._cost = cost
        self._adaptive = adaptive
        self._asynchronous = asynchronous
        self._telemetry = telemetry
        self._is_verify_all = not adaptive
        base = self._budget_planner
        budget = LaggedBudget(
            sps_table=base.sps_table,
            cfg=base.cfg,
            model_runner=self.model_runner,
            relay_lag_steps=max(base.lag_steps - base.carry_steps, 0),
        )
        budget.cost = cost
        self._budget_planner = budget

    def compute_budget_sync(
        self,
        *,
        confidence: torch.Tensor,
        prefix_lens: torch.Tensor,
        req_pool_indices: torch.Tensor,
    ) -> int | None:
        """Algorithm 1 on the confidences of this step (no overlap: the host has them)."""
        if not self._adaptive:
            return None
        with self._telemetry.timed("plan"):
            values = survival(confidence.cpu().numpy())
            forced = self._budget_planner.forced_budget_frac
            if forced is not None:
                return int(float(forced) * values.size)
            return early_stop_budget(values, admission_order(values), self._cost)

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
        with self._telemetry.timed("plan"):
            values = survival(confidence.cpu().numpy())
            drafted = lengths(
                admission_order(values), budget, requests=values.shape[0], gamma=self.gamma
            )
        verify_lens = torch.from_numpy(drafted + 1).to(device=device, dtype=torch.int32)
        self._tp_sync.sync(SpecTpSyncSite.DSPARK_PLAN, verify_lens)
        kind = "lagged" if self._asynchronous else "early-stop"
        self._telemetry.ran[f"schedule:{kind}"] += 1
        return verify_lens
