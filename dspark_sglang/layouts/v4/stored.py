"""How a server keeps V4's latents, and how they come back: the rounding that a reference imitates.

Latents [D] are kept as fp8 e4m3 in tiles of 64 with a power-of-two scale each, the RoPE part as
bfloat16. Keys and queries of the indexer are fp8 with one float scale a row in SGLang 0.5.23;
DeepSeek's own inference code rounds them to fp4 in runs of 32 with power-of-two scales.

Source: SGLang 0.5.23, ``kernels/ops/attention/dsv4``; ``docs/explanation/v4.md`` compares with DeepSeek's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dspark_sglang.layouts.v4.quantised import FP4_LARGEST, round_fp4
from dspark_sglang.layouts.v4.shape import FP4_RUN

TILE = 64
FP8_LARGEST = 448.0
#: No scale is made from less.
_SMALLEST = 1e-4


def _power(x: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is not below ``x``."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).to(exponent.dtype))


def _fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def round_latents(latents: torch.Tensor, rope_dim: int) -> torch.Tensor:
    """``[..., D]`` latents as they come back from the cache, in their own dtype.

    Args:
        latents: turned already; ``D - rope_dim`` is a multiple of 64, or one shorter tile.
        rope_dim: last dimensions, kept in bfloat16.
    """
    still, turned = torch.tensor_split(latents, [latents.shape[-1] - rope_dim], dim=-1)
    tiles = torch.unflatten(still, -1, (-1, min(TILE, still.shape[-1])))
    scale = _power(tiles.abs().amax(dim=-1, keepdim=True).clamp_min(_SMALLEST) / FP8_LARGEST)
    return torch.cat([_fp8(tiles, scale).flatten(-2), turned.bfloat16().to(latents.dtype)], dim=-1)


def round_index(x: torch.Tensor, form: Literal["fp8", "fp4"]) -> torch.Tensor:
    """``[..., D]`` keys or queries of the indexer as they are multiplied, in their own dtype.

    Args:
        x: after the Hadamard matrix.
        form: ``fp8`` (one float scale a row) or ``fp4`` (runs of 32, power-of-two scales).
    """
    if form == "fp8":
        return _fp8(x, x.abs().amax(dim=-1, keepdim=True).clamp_min(_SMALLEST) / FP8_LARGEST)
    runs = torch.unflatten(x, -1, (-1, FP4_RUN))
    smallest = FP4_LARGEST * 2.0**-126
    scale = _power(runs.abs().amax(dim=-1, keepdim=True).clamp_min(smallest) / FP4_LARGEST)
    return (round_fp4(runs / scale) * scale).flatten(-2)


@dataclass(frozen=True, slots=True)
class Rounding:
    """What of the storage a reference imitates."""

    #: Latents in fp8 tiles, their RoPE part in bfloat16.
    kv: bool = True
    #: Keys and queries of the indexer; None: as they are.
    indexer: Literal["fp8", "fp4"] | None = "fp8"

    def latents(self, latents: torch.Tensor, rope_dim: int) -> torch.Tensor:
        """``[..., D]`` latents as attention reads them."""
        return round_latents(latents, rope_dim) if self.kv else latents

    def index(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` keys or queries of the indexer as they are multiplied."""
        return x if self.indexer is None else round_index(x, self.indexer)


#: Nothing is rounded.
EXACT = Rounding(kv=False, indexer=None)
#: As SGLang 0.5.23 stores.
STORED = Rounding()
