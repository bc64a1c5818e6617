"""Scheduling inside SGLang: which drafted tokens of which requests to verify."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.runtime_context import get_parallel, get_schedule
from sglang.srt.speculative.dspark_components.dspark_planner import (
    DSparkVerifyPlanner,
    ragged_capture_num_tokens,
)
from sglang.srt.speculative.ragged_verify import RaggedVerifyMode, read_ragged_verify_mode

from dspark_sglang.serving.cpu.packing import is_packed, row_counts
from dspark_sglang.serving.ops import Admitted
from dspark_sglang.serving.rounds import Rounds
from dspark_sglang.serving.sglang_types import ModelRunner, VerifyLayout


class Planner(DSparkVerifyPlanner):
    """Budget and admission by our scheduler; layouts and graph tiers stay SGLang's."""

    _budget_planner: Any

    def __init__(self, *, rounds: Rounds, **sglang: Any) -> None:
        """Args:
        rounds: has decided what is verified.
        sglang: arguments of SGLang's planner.
        """
        super().__init__(**sglang)
        self._rounds = rounds
        #: What the running step verifies; None: every drafted token.
        self.admitted: Admitted | None = None
        self._is_verify_all = not rounds.scheduler.adaptive
        if self._is_verify_all:
            # Without it SGLang plans no budget, and no rank waits for another's.
            self._budget_planner = None

    def confidence_budget_prepare(self) -> None:
        """Nothing: SGLang would plan a budget of its own before each step."""

    def resolve_verify_token_budget(self, **step: Any) -> int | None:
        """The budget of this step, which is decided by now."""
        return self._rounds.budget

    def schedule_layout(self, **step: Any) -> VerifyLayout | None:
        layout: VerifyLayout | None = super().schedule_layout(**step)
        if not self.is_compact_mode and not self._is_verify_all:
            # Whole blocks run whatever is verified of them.
            kept = {name: step[name] for name in ("req_pool_indices", "prefix_lens", "device")}
            self._schedule_verify_lens(**kept, confidence=None, budget=None)
        return layout

    def _schedule_verify_lens(
        self,
        *,
        req_pool_indices: torch.Tensor,
        prefix_lens: torch.Tensor,
        device: torch.device | str,
        confidence: torch.Tensor | None,
        budget: int | None,
    ) -> torch.Tensor | None:
        self.admitted = found = self._rounds.admitted(torch.device(device))
        if found is None:
            return None
        form = self._rounds.form if self._rounds.running.depth else "plain"
        self._rounds.telemetry.ran[f"schedule:{form}"] += 1
        return found.sent


def buckets(model_runner: ModelRunner, gamma: int) -> Callable[[int], npt.NDArray[np.int64] | None]:
    """Gives the ascending numbers of rows that verify forwards of so many requests run with; None: any."""
    packed = is_packed(model_runner.model)
    whole = read_ragged_verify_mode() is RaggedVerifyMode.STATIC

    def of(requests: int) -> npt.NDArray[np.int64] | None:
        if whole:
            return np.array([requests * (gamma + 1)])
        captured = ragged_capture_num_tokens(model_runner=model_runner)
        if captured is not None:
            return np.asarray(captured, dtype=np.int64)
        return row_counts(requests * (gamma + 1)) if packed else None

    return of


def must_verify_all(*, recurrent: bool, adapters: bool) -> str | None:
    """Why every step has to draft, and to verify all of it; None where a step may do less.

    Args:
        recurrent: whether the target has recurrent layers.
        adapters: whether LoRA adapters are served.
    """
    parallel = get_parallel()
    if read_ragged_verify_mode() is RaggedVerifyMode.STATIC:
        # What is left to decide is whether to draft, and a step that does not is faster only where it decodes.
        alone = {
            "recurrent layers": recurrent,
            "LoRA adapters": adapters,
            "several ranks": parallel.tp_size > 1,
        }
        for what, holds in alone.items():
            if holds:
                return f"whole blocks are verified here, and with {what} no step decodes beside"
    if not get_schedule().disable_overlap_schedule and parallel.attn_dp_enabled:
        return "with attention data parallelism and overlap scheduling ranks would have to agree on every step"
    return None
