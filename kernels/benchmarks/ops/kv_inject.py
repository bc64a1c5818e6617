"""Configurations of ``kv_inject``, in bfloat16; half of each request's window is accepted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks import ops
from benchmarks.ops import CPU, Example
from dspark_kernels.kv_inject import kv_inject, pools, rope_table
from dspark_kernels.kv_inject.reference import reference

#: Positions of the example's table and slots of its pool; neither is read as a whole.
_POSITIONS = 64
_SLOTS = 4096


@dataclass(frozen=True)
class Case(ops.Case):
    """``rotary``: how many of a head's dimensions are turned."""

    gamma: int
    layers: int
    heads: int
    dim: int
    rotary: int

    @property
    def name(self) -> str:
        sizes = f"L{self.layers}-H{self.heads}-D{self.dim}-rotary{self.rotary}"
        return f"gamma{self.gamma}-{sizes}-bf16"

    @property
    def accepted(self) -> int:
        """Rows of a request's window that are written."""
        return (self.gamma + 1) // 2

    def floor_bytes(self, batch: int) -> int:
        """K and V of accepted rows in and out, with a position and a rotation; every slot.

        The gains and the table of addresses are read once.
        """
        row = self.layers * self.heads * self.dim * 2 * 4 + 8 + 4 * self.rotary
        shared = self.layers * (2 * self.dim + 16)
        return batch * (self.accepted * row + (self.gamma + 1) * 8) + shared

    def example(self, batch: int, device: torch.device = CPU) -> Example:
        """Random rows; the first ones of each request are accepted, to scattered slots."""
        random = torch.Generator().manual_seed(7)
        window, layers = self.gamma + 1, self.layers
        rows = batch * window
        fused = torch.randn(rows, layers, 2, self.heads * self.dim, generator=random).bfloat16()
        positions = torch.randint(_POSITIONS, (rows,), generator=random)
        slots = torch.randperm(_SLOTS, generator=random)[:rows]
        slots[torch.arange(rows) % window >= self.accepted] = -1
        weight = (1 + 0.1 * torch.randn(layers, self.dim, generator=random)).bfloat16()
        table = rope_table(_POSITIONS, self.rotary, 1e6)
        fused, positions, slots, weight, table = ops.on(
            device, (fused, positions, slots, weight, table)
        )
        k, v = fused[:, :, 0], fused[:, :, 1]

        def fresh(dtype: torch.dtype) -> list[torch.Tensor]:
            shape = (_SLOTS, self.heads, self.dim)
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]

        into = pools(fresh(torch.bfloat16), fresh(torch.bfloat16))

        def run() -> None:
            kv_inject(k, v, positions, slots, weight, table, into, eps=1e-6, backend="triton")

        def max_error(result: None) -> float:
            keys, values = fresh(torch.float64), fresh(torch.float64)
            exact = (k.double(), v.double(), positions, slots, weight, table)
            reference(*exact, keys, values, eps=1e-6, dtype=torch.float64)
            pairs = zip((*into.keys, *into.values), (*keys, *values), strict=True)
            return max(float((a.double() - b).abs().max()) for a, b in pairs)

        named = {f"keys.{i}": pool for i, pool in enumerate(into.keys)}
        named |= {f"values.{i}": pool for i, pool in enumerate(into.values)}
        return Example(run, max_error, named)


#: The published dense drafters (Qwen3 8B and 14B, Gemma 4 12B), one of SmolLM2's size, and half of each head.
CASES = (
    Case(7, 5, 8, 128, 128),
    Case(5, 5, 8, 128, 128),
    Case(7, 5, 8, 256, 256),
    Case(7, 2, 5, 64, 64),
    Case(7, 5, 8, 128, 64),
)
