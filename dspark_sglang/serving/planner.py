"""Scheduling inside SGLang: which drafted tokens of which requests to verify."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.speculative.dspark_components.dspark_planner import (
    DSparkVerifyPlanner,
    ragged_capture_num_tokens,
)
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite

from dspark_sglang.core.cost import StepCost
from dspark_sglang.core.schedule import (
    History,
    admission_order,
    early_stop_budget,
    global_budget,
)
from dspark_sglang.core.survival import survival
from dspark_sglang.serving.ops import Ops
from dspark_sglang.serving.telemetry import Telemetry


class Planner(DSparkVerifyPlanner):
    """Budget and admission by our scheduler; layouts and graph tiers stay SGLang's."""

    _budget_planner: Any

    def bind(self, *, cost: StepCost | None, lagged: bool, ops: Ops, telemetry: Telemetry) -> None:
        """Attach the scheduler; called once after construction.

        Args:
            ops: admits the budget.
            cost: step cost shared with whoever measures it; None verifies every drafted token.
            lagged: take the budget from confidences two steps old (the asynchronous form).
        """
        self._cost = cost
        self._ops = ops
        self._telemetry = telemetry
        #: Cells of the window that the running step verifies; None: all of them.
        self.rows: torch.Tensor | None = None
        self._pool = self.model_runner.req_to_token_pool
        self._history: History | None = None
        if lagged and cost is not None:
            slots = int(self._pool.req_to_token.shape[0])
            self._history = History(slots=slots, gamma=self.gamma)
        #: Survivals of the step being planned, and their admission order.
        self._survival = np.empty((0, self.gamma))
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
        """The budget of this step, decided on the host (no overlap: the host has confidences)."""
        if self._cost is None:
            return None
        with self._telemetry.timed("plan"):
            values = survival(confidence.cpu().numpy())
            self._survival, self._order = values, admission_order(values)
            forced = self._budget_planner.forced_budget_frac
            if forced is not None:
                budget = int(float(forced) * values.size)
            elif self._history is None:
                budget = early_stop_budget(values, self._order, self._cost)
            else:
                budget = self._lagged_budget(values, req_pool_indices.cpu(), self._history)
        # Every rank times its own rounds; all must run the same forward.
        agreed = torch.tensor([budget], device=confidence.device)
        return int(self._tp_sync.sync(SpecTpSyncSite.DSPARK_PLAN, agreed))

    def _lagged_budget(
        self, values: npt.NDArray[np.float64], slots: torch.Tensor, history: History
    ) -> int:
        assert self._cost is not None
        generations = self._pool.req_generation[slots.long()].numpy()
        earlier = history.advance(slots.long().numpy(), generations, values)
        captured = ragged_capture_num_tokens(model_runner=self.model_runner)
        buckets = None if captured is None else np.asarray(captured, dtype=np.int64)
        return global_budget(earlier, self._cost, buckets)

    def _schedule_verify_lens(
        self,
        *,
        req_pool_indices: torch.Tensor,
        prefix_lens: torch.Tensor,
        device: Any,
        confidence: torch.Tensor | None,
        budget: int | None,
    ) -> torch.Tensor | None:
        self.rows = None
        if confidence is None or budget is None:
            return None
        found = self._ops.admit(self._survival, self._order, budget, torch.device(device))
        packed = torch.cat([found.lens.to(torch.int64), found.rows])
        packed = self._tp_sync.sync(SpecTpSyncSite.DSPARK_PLAN, packed)
        lens, self.rows = packed[: len(found.lens)], packed[len(found.lens) :]
        verify_lens: torch.Tensor = (lens + 1).to(torch.int32)
        form = "early-stop" if self._history is None else "lagged"
        self._telemetry.ran[f"schedule:{form}"] += 1
        return verify_lens
