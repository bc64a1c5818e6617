"""Configurations of ``penalise`` and ``extend``: every request has penalties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import ops
from benchmarks.ops import CPU, Example
from dspark_kernels import penalise
from dspark_sglang.core.penalties import OutputCounts, Penalties, Terms


@dataclass(frozen=True)
class Case(ops.Case):
    """Anchors and one drafted token are verified; ``adds``: what they bring is counted."""

    adds: bool
    gamma: int
    columns: int

    @property
    def name(self) -> str:
        return f"{'extend' if self.adds else 'penalise'}-gamma{self.gamma}-V{self.columns}"

    def floor_bytes(self, batch: int) -> int:
        """Logits read and written, counts read; or the counts that grow."""
        if self.adds:
            return batch * (2 * 8 + 8 + 8 + 1 + 2 * 4 + 16)
        return batch * 2 * self.columns * (4 + 4 + 4)

    def example(self, batch: int, device: torch.device = CPU) -> Example:
        """A request has a row of counts of its own."""
        random = torch.Generator().manual_seed(7)
        width = self.gamma + 1
        counts = OutputCounts(self.columns, device)
        counts.begin({slot: [3, 5 + slot % 7] for slot in range(batch)})
        terms = Terms.of([Penalties(0.5, 0.25, 1.1)] * batch, range(batch), device)
        block = torch.randint(self.columns, (batch, width), generator=random)
        cells = (torch.arange(batch)[:, None] * width + torch.arange(2)).view(-1)
        logits = torch.randn(2 * batch, self.columns, generator=random)
        block, cells, logits = ops.on(device, (block, cells, logits))
        kept = torch.ones(batch, dtype=torch.int64, device=device)
        given = penalise.Counts(*counts.tensors), penalise.Terms(*terms)
        before = logits.clone(), counts.tensors[0].clone()

        def run() -> Any:
            if self.adds:
                penalise.extend(*given, block, kept)
                return counts.tensors
            penalise.penalise(logits, cells, *given, block)
            return (logits,)

        def max_error(result: Any) -> float:
            again = OutputCounts(self.columns, device)
            again.begin({slot: [3, 5 + slot % 7] for slot in range(batch)})
            if self.adds:
                again.extend(terms, block, kept + 1)
                ops.check_equal(result, again.tensors, self.name)
                return 0.0
            owner = cells // width
            again.penalise(before[0], terms, owner, cells - owner * width + 1, block)
            ops.check_equal(result, (before[0],), self.name)
            return 0.0

        return Example(run, max_error)


#: Qwen3, and a small vocabulary.
CASES = tuple(Case(adds, 7, columns) for columns in (151936, 49152) for adds in (False, True))
