"""Configurations of ``admit``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks import ops
from benchmarks.ops import CPU, Example
from dspark_kernels.admit import Admission, admit
from dspark_kernels.admit.reference import reference


@dataclass(frozen=True)
class Case(ops.Case):
    """``capacity``: the power of two that a batch is rounded up to."""

    gamma: int
    capacity: int

    @property
    def name(self) -> str:
        return f"gamma{self.gamma}-R{self.capacity}"

    @property
    def compiled_batch(self) -> int:
        return self.capacity

    def floor_bytes(self, batch: int) -> int:
        """Survivals and the budget in; lengths, rows, offsets and row indices out."""
        numbers = batch * 2 * 4 + (batch + 1) * 4
        return batch * self.gamma * 8 + 4 + numbers + batch * (self.gamma + 1) * 8

    def example(self, batch: int, device: torch.device = CPU) -> Example:
        """Random survivals, some of them tied, and half of the candidates admitted."""
        random = torch.Generator().manual_seed(7)
        confidence = torch.rand(batch, self.gamma, generator=random).mul(8).ceil() / 8
        survival = confidence.double().cumprod(1).to(device)
        kept = batch * self.gamma // 2
        budget = torch.tensor([kept], dtype=torch.int32, device=device)

        def run() -> Admission:
            return admit(survival, budget, backend="triton")

        def max_error(result: Admission) -> float:
            ops.check_equal(result, reference(survival, kept), self.name)
            return 0.0

        return Example(run, max_error)


#: Gamma from least to most, and every capacity.
CASES = tuple(Case(gamma, 2**power) for gamma in (1, 5, 7, 8) for power in range(11))
