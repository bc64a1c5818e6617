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

from dspark_sglang.core.schedule import admission_order
from dspark_sglang.serving.ahead import Ahead
from dspark_sglang.serving.control import Budgeted, Control
from dspark_sglang.serving.cpu.packing import is_packed, row_counts
from dspark_sglang.serving.ops import Admitted, Ops
from dspark_sglang.serving.running import Running
from dspark_sglang.serving.telemetry import Telemetry


class Planner(DSparkVerifyPlanner):
    """Budget and admission by our scheduler; layouts and graph tiers stay SGLang's."""

    _budget_planner: Any

    def bind(
        self, *, control: Control, ops: Ops, telemetry: Telemetry, ahead: Ahead | None
    ) -> None:
        """Attach the scheduler; called once after construction.

        Args:
            control: decides budgets; where it does not adapt, everything drafted is verified and
                nothing is planned.
            ops: admits the budget.
            ahead: decides budgets before the step drafts; None: they are decided once it has.
        """
        self._control = control
        self._ahead = ahead
        self._ops = ops
        self._telemetry = telemetry
        #: Cells of the window that the running step verifies; None: all of them.
        self.rows: torch.Tensor | None = None
        #: ``[R]`` int32 drafted tokens of each request that it verifies; None: all.
        self.lens: torch.Tensor | None = None
        self._budgeted: Budgeted | None = None
        #: Whether that is the running step's, decided before SGLang asks for it.
        self._decided = False
        self._packed = is_packed(self.model_runner.model)
        self._is_verify_all = not control.adaptive
        if not control.adaptive:
            # Without it SGLang plans no budget, and no rank waits for another's.
            self._budget_planner = None

    def confidence_budget_prepare(self) -> None:
        """Nothing: SGLang would plan a budget of its own before each step."""

    def resolve_verify_token_budget(self, **step: Any) -> int | None:
        """The budget of this step: decided before, or now."""
        if self._ahead is None:
            budget: int | None = super().resolve_verify_token_budget(**step)
            return budget
        return self._control.running.budget

    def decide_ahead(self, batch: Any) -> None:
        """Decide on the budget of a step before it drafts.

        Args:
            batch: SGLang's ``ScheduleBatch``.
        """
        assert self._ahead is not None
        pool = self.model_runner.req_to_token_pool  # made after this planner
        with self._telemetry.timed("plan"):
            slots = batch.req_pool_indices_cpu.long()
            self._ahead.decide(
                slots.numpy(),
                pool.req_generation[slots].numpy(),
                pool=int(pool.req_to_token.shape[0]),
                buckets=self._buckets(len(slots) * (self.gamma + 1)),
            )

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
        if not self._decided:
            self.decide(confidence)
        self._decided = False
        assert self._budgeted is not None
        return self._budgeted.budget

    def decide(self, confidence: torch.Tensor) -> None:
        """Decide on the budget of this step; without drafted tokens every rank finds the same.

        Args:
            confidence: ``[R, gamma]`` calibrated.
        """
        with self._telemetry.timed("plan"):
            values = confidence.cpu().numpy()
            buckets = self._buckets(values.size + len(values))
            self._budgeted = self._control.budget(values, buckets)

    def _buckets(self, most: int) -> npt.NDArray[np.int64] | None:
        """Ascending numbers of rows that verify forwards of up to ``most`` run with; None: any."""
        captured = ragged_capture_num_tokens(model_runner=self.model_runner)
        if captured is not None:
            return np.asarray(captured, dtype=np.int64)
        return row_counts(most) if self._packed else None

    def packed(self) -> torch.Tensor:
        """``[1 + R * gamma]`` int64: what was decided, for ranks that time their own rounds."""
        assert self._budgeted is not None
        budget = torch.tensor([self._budgeted.budget])
        survival = torch.from_numpy(np.ascontiguousarray(self._budgeted.survival))
        return torch.cat([budget, survival.view(torch.int64).flatten()])

    def agree(self, packed: torch.Tensor, requests: int) -> None:
        """Take over what a rank has :meth:`packed`: all must run the same forward."""
        values = packed.cpu().contiguous()
        survival = values[1:].view(torch.float64).view(requests, -1).numpy()
        self._budgeted = Budgeted(survival, admission_order(survival), int(values[0]))
        self._decided = True

    def _schedule_verify_lens(
        self,
        *,
        req_pool_indices: torch.Tensor,
        prefix_lens: torch.Tensor,
        device: Any,
        confidence: torch.Tensor | None,
        budget: int | None,
    ) -> torch.Tensor | None:
        self.rows = self.lens = None
        device, running = torch.device(device), self._control.running
        if self._ahead is not None:
            form, found = "ahead", self._admitted_ahead(running, device)
        elif confidence is None or budget is None or self._budgeted is None:
            return None
        else:
            form, given = "early-stop", self._budgeted
            found = self._ops.admit(given.survival, given.order, given.budget, device)
        self.rows, self.lens = found.rows, found.lens
        verify_lens: torch.Tensor = (found.lens + 1).to(torch.int32)
        self._telemetry.ran[f"schedule:{form if running.plan.draft else 'plain'}"] += 1
        return verify_lens

    def _admitted_ahead(self, running: Running, device: torch.device) -> Admitted:
        assert self._ahead is not None
        if self._ahead.survival is not None:
            return self._ops.admit_there(self._ahead.survival, running.budget)
        requests = len(running.requests)  # nothing was drafted: anchors alone
        rows = torch.arange(requests, device=device) * (self.gamma + 1)
        return Admitted(torch.zeros(requests, dtype=torch.int32, device=device), rows)
