"""Scheduling inside SGLang: which drafted tokens of which requests to verify."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sglang.srt.speculative.dspark_components.dspark_planner import (
    DSparkVerifyPlanner,
    ragged_capture_num_tokens,
)
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite

from dspark_sglang.serving.control import Budgeted, Control
from dspark_sglang.serving.ops import Ops
from dspark_sglang.serving.telemetry import Telemetry


class Planner(DSparkVerifyPlanner):
    """Budget and admission by our scheduler; layouts and graph tiers stay SGLang's."""

    _budget_planner: Any

    def bind(self, *, control: Control, ops: Ops, telemetry: Telemetry) -> None:
        """Attach the scheduler; called once after construction.

        Args:
            control: decides budgets; where it does not adapt, everything drafted is verified and
                nothing is planned.
            ops: admits the budget.
        """
        self._control = control
        self._form = "lagged" if control.lagged else "early-stop"
        self._ops = ops
        self._telemetry = telemetry
        #: Cells of the window that the running step verifies; None: all of them.
        self.rows: torch.Tensor | None = None
        self._budgeted: Budgeted | None = None
        self._is_verify_all = not control.adaptive
        if not control.adaptive:
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
        if not self._control.adaptive:
            return None
        pool = self.model_runner.req_to_token_pool  # made after this planner
        with self._telemetry.timed("plan"):
            slots = req_pool_indices.cpu().long()
            values = confidence.cpu().numpy()
            captured = ragged_capture_num_tokens(model_runner=self.model_runner)
            self._budgeted = self._control.budget(
                values,
                slots=slots.numpy(),
                generations=pool.req_generation[slots].numpy(),
                pool=int(pool.req_to_token.shape[0]),
                buckets=None if captured is None else np.asarray(captured, dtype=np.int64),
            )
        # Every rank times its own rounds; all must run the same forward.
        agreed = torch.tensor([self._budgeted.budget], device=confidence.device)
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
        self.rows = None
        if confidence is None or budget is None or self._budgeted is None:
            return None
        given = self._budgeted
        found = self._ops.admit(given.survival, given.order, budget, torch.device(device))
        packed = torch.cat([found.lens.to(torch.int64), found.rows])
        packed = self._tp_sync.sync(SpecTpSyncSite.DSPARK_PLAN, packed)
        lens, self.rows = packed[: len(found.lens)], packed[len(found.lens) :]
        verify_lens: torch.Tensor = (lens + 1).to(torch.int32)
        self._telemetry.ran[f"schedule:{self._form if self._control.plan.draft else 'plain'}"] += 1
        return verify_lens
