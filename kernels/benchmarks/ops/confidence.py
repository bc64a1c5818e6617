"""Configurations of ``confidence``: hidden states and embeddings in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks import ops
from benchmarks.ops import CPU, Example
from dspark_kernels.confidence import Confidence, confidence
from dspark_kernels.confidence.reference import reference


@dataclass(frozen=True)
class Case(ops.Case):
    """``rank`` 0: the head has no Markov part."""

    gamma: int
    width: int
    rank: int
    columns: int

    @property
    def name(self) -> str:
        return f"gamma{self.gamma}-d{self.width}-r{self.rank}-V{self.columns}-bf16"

    @property
    def row_bytes(self) -> int:
        """What a request needs of its own: states, tokens, embeddings; logits, confidence, survival."""
        return self.gamma * (2 * self.width + (8 + 2 * self.rank if self.rank else 0) + 4 + 4 + 8)

    @property
    def shared_bytes(self) -> int:
        """Weight, bias and temperatures. Every program reads them; all but the first find them in cache."""
        return 4 * (self.width + self.rank + 1 + self.gamma)

    def floor_bytes(self, batch: int) -> int:
        return batch * self.row_bytes + self.shared_bytes

    def example(self, batch: int, device: torch.device = CPU) -> Example:
        """Scores of order 1."""
        gamma, width, rank = self.gamma, self.width, self.rank
        random = torch.Generator().manual_seed(7)
        given = (
            torch.randn(batch, gamma, width, generator=random).bfloat16(),
            torch.randint(self.columns, (batch, gamma), generator=random),
            torch.randn(width + rank, generator=random) / width**0.5,
            torch.randn((), generator=random),
            torch.rand(gamma, generator=random) + 0.5,
        )
        w1 = torch.randn(self.columns, rank, generator=random).bfloat16() if rank else None
        given, w1 = ops.on(device, (given, w1))

        def run() -> Confidence:
            return confidence(*given, w1=w1, backend="triton")

        def max_error(result: Confidence) -> float:
            exact = reference(*given, w1, dtype=torch.float64)
            pairs = zip(result[1:], exact[1:], strict=True)
            return max(float((found.double() - right).abs().max()) for found, right in pairs)

        return Example(run, max_error)


#: V4 Flash and Pro, Qwen3-8B, SmolLM2, and no Markov part.
CASES = (
    Case(5, 4096, 256, 129280),
    Case(5, 7168, 512, 129280),
    Case(7, 4096, 256, 151936),
    Case(7, 960, 256, 49152),
    Case(7, 4096, 0, 151936),
)
