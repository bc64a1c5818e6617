"""Configurations of the small operations of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from benchmarks import ops
from benchmarks.ops import CPU, Example
from dspark_kernels import step
from dspark_sglang.core.accept import Accepted
from dspark_sglang.core.schedule.scheduler import ADMISSIBLE
from dspark_sglang.core.step import Step
from dspark_sglang.core.sts import BINS

#: Stop tokens of a request.
STOPS = 3


@dataclass(frozen=True)
class Case(ops.Case):
    """Every drafted token is verified."""

    kind: Literal["survival", "window", "finish", "kept"]
    gamma: int

    @property
    def name(self) -> str:
        return f"{self.kind}-gamma{self.gamma}"

    def floor_bytes(self, batch: int) -> int:
        """Corrections of bins that are met are counted as one a position."""
        gamma, cells = self.gamma, self.gamma + 1
        row = {
            "survival": gamma * (4 + 4 + 8) + 24,
            # Cells, positions and slots in; they, ids and cells out.
            "window": cells * (3 + 4) * 8 + cells * 8,
            "finish": gamma * 8 + STOPS * 8 + 28 + 40 + 2 * cells * 8,
            "kept": cells * 5 * 8 + 4,
        }[self.kind]
        return batch * row + (gamma * 8 if self.kind == "survival" else 0)

    def example(self, batch: int, device: torch.device = CPU) -> Example:
        given = ops.on(device, getattr(self, f"_{self.kind}")(batch))
        named: dict[str, Any] = {}
        if self.kind == "window":
            named = {"rows": batch * (self.gamma + 1)}
        least = {"least": ADMISSIBLE} if self.kind == "survival" else {}

        def run() -> Any:
            return getattr(step, self.kind)(*given, **named, **least)

        def max_error(result: Any) -> float:
            operands = given
            if self.kind == "finish":
                operands = (Accepted(*given[:2]), *given[2:])
            wanted = getattr(Step(), self.kind)(*operands, **named)
            if isinstance(wanted, torch.Tensor):
                result, wanted = (result,), (wanted,)
            ops.check_equal(result, wanted, self.name)
            return 0.0

        return Example(run, max_error)

    def _survival(self, batch: int) -> tuple[torch.Tensor, ...]:
        random = torch.Generator().manual_seed(7)
        confidence = torch.rand(batch, self.gamma, generator=random)
        limits = torch.full((batch,), self.gamma)
        kinds = torch.arange(batch) % 2
        shift = torch.rand(2, self.gamma, BINS, generator=random) * 0.1
        whole = torch.linspace(2.0, 1.0, self.gamma, dtype=torch.float64)
        return confidence, torch.stack([limits, kinds, 0 * limits]), shift, whole

    def _window(self, batch: int) -> tuple[torch.Tensor, ...]:
        cells = torch.arange(batch * (self.gamma + 1))
        tokens = torch.arange(batch * self.gamma).view(batch, self.gamma)
        return cells, torch.arange(batch), tokens, cells + 5, cells + 7

    def _finish(self, batch: int) -> tuple[torch.Tensor, ...]:
        tokens = torch.arange(batch * self.gamma).view(batch, self.gamma)
        stops = torch.full((batch, STOPS), 3)
        lens = torch.full((batch,), self.gamma, dtype=torch.int32)
        count = torch.arange(batch) % (self.gamma + 1)
        return count, count + 9, tokens, stops, lens, count + 100

    def _kept(self, batch: int) -> tuple[torch.Tensor, ...]:
        cells = torch.arange(batch * (self.gamma + 1))
        committed = torch.full((batch,), self.gamma, dtype=torch.int32)
        return cells, committed, cells + 5, cells + 7


#: Gamma of DeepSeek-V4 and of dense drafters.
CASES = tuple(
    Case(kind, gamma) for gamma in (5, 7) for kind in ("survival", "window", "finish", "kept")
)
