"""Configurations of one of eight ranks of ``vocab_parallel_accept``.

In the example rank 0 runs alone: what it would receive is its own record with seven ranks that hold nothing,
so it decides on its shard as if that were the vocabulary. Its loads and stores are those of a real round in
which it holds the final token. Every row of every request is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import ops
from benchmarks.ops import CPU, FLOATS, LISTED, Example, accept
from dspark_kernels.accept import Accepted
from dspark_kernels.accept.reference import judge
from dspark_kernels.vocab_parallel_accept import Shard, vocab_parallel_accept

RANKS = 8


@dataclass(frozen=True)
class Case(ops.Case):
    """One configuration; ``width`` is of all ranks."""

    width: int
    gamma: int = 5
    dtype: torch.dtype = torch.bfloat16
    coupled: bool = False
    filtered: bool = False

    @property
    def name(self) -> str:
        flags = [flag for flag in ("coupled", "filtered") if getattr(self, flag)]
        sizes = f"tp{RANKS}-gamma{self.gamma}-V{self.width}"
        return "-".join([sizes, FLOATS[self.dtype], *flags])

    @property
    def alone(self) -> accept.Case:
        """The same of a rank's shard alone."""
        return accept.Case(
            self.width // RANKS,
            self.gamma,
            self.dtype,
            coupled=self.coupled,
            filtered=self.filtered,
        )

    def floor_bytes(self, batch: int) -> int:
        """Every row's shard, the drafted laws, tokens and uniforms, and the outcome."""
        gamma = self.gamma
        each = (gamma + 1) * (self.width // RANKS) * self.dtype.itemsize
        each += gamma * LISTED * 12 * (not self.coupled) + 8 * gamma + 8 * (gamma + 1) + 12 + 16
        return batch * (each + 12 * self.filtered + 20 * self.coupled)

    def example(self, batch: int, device: torch.device = CPU) -> Example:
        """One request, ``batch`` times over."""
        given = ops.on(device, self.alone.operands(batch))
        del given["block"]
        shard = Shard(0, (self.alone.width, *(0,) * (RANKS - 1)))

        def run() -> Accepted:
            return vocab_parallel_accept(shard=shard, gather=_alone(), backend="triton", **given)

        def max_error(result: Accepted) -> float:
            once = ops.on(device, self.alone.operands(1))
            ops.check_equal(result, judge(**once).outcome, self.name)
            return 0.0

        return Example(run, max_error)


def _alone() -> Callable[[torch.Tensor], torch.Tensor]:
    """An exchange with ranks that hold no columns: no logit, no mass, no token."""
    exchanged = 0

    def gather(record: torch.Tensor) -> torch.Tensor:
        nonlocal exchanged
        empty = torch.zeros_like(record)
        if exchanged == 0:  # the first record is that of the rows
            empty[..., [0, 3, 5, 6]] = -torch.inf
        if record.dtype == torch.int64:  # the last is that of the tokens
            empty -= 1
        exchanged += 1
        return torch.stack([record] + [empty] * (RANKS - 1))

    return gather


CASES = (
    *map(Case, accept.VOCABULARIES),
    Case(129280, dtype=torch.float32),
    Case(129280, coupled=True),
    Case(32000, filtered=True),
)
