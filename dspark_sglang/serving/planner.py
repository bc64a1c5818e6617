"""Scheduling inside SGLang: which drafted tokens of which requests to verify."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.runtime_context import get_context, get_parallel, get_schedule
from sglang.srt.speculative.dspark_components.dspark_planner import (
    DSparkVerifyPlanner,
    ragged_capture_num_tokens,
)

from dspark_sglang.serving.cpu.packing import is_packed, row_counts
from dspark_sglang.serving.ops import Admitted
from dspark_sglang.serving.rounds import Rounds
from dspark_sglang.serving.sglang_types import ModelRunner


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

    def of(requests: int) -> npt.NDArray[np.int64] | None:
        captured = ragged_capture_num_tokens(model_runner=model_runner)
        if captured is not None:
            return np.asarray(captured, dtype=np.int64)
        return row_counts(requests * (gamma + 1)) if packed else None

    return of


def must_verify_all(device: str) -> str | None:
    """Why every drafted token has to be verified here; None where a step may verify some.

    Args:
        device: SGLang's device of the target.
    """
    if not get_schedule().disable_overlap_schedule and get_parallel().attn_dp_enabled:
        return "with attention data parallelism and overlap scheduling ranks would have to agree on every step"
    backend = get_context().resolved_server_args_dict().get("attention_backend")
    if not device.startswith("cpu") and backend == "triton":
        return "SGLang's Triton attention reads blocks of one length only"
    return None
