"""How V4's numbers are stored: weights in the published files, latents in a server's cache.

- fp8: e4m3 values ``[r, c]`` and a power-of-two scale (e8m0) for each block of 128 by 128;
- fp4: e2m1 values, two in a byte, the even column in its low half, ``[r, c / 2]`` int8, and a
  power-of-two scale for each run of 32 columns.

Scales are powers of two and the values have four significant bits at most, so dequantising is exact in float32 and in
bfloat16. Latents [D] are kept as fp8 in tiles of 64 with a power-of-two scale each, the RoPE part as bfloat16. Keys and
queries of the indexer are fp8 with one float scale a row in SGLang 0.5.23; DeepSeek's own inference code rounds them to
fp4 in runs of 32.

Source: ``quantization_config`` of the published ``config.json``; SGLang 0.5.23, ``layers/quantization`` and
``kernels/ops/attention/dsv4``; ``docs/explanation/v4.md`` compares with DeepSeek's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.v4.config import FP4_RUN, FP8_BLOCK

_SCALE, _WEIGHT = ".scale", ".weight"
FP8_LARGEST, FP4_LARGEST = 448.0, 6.0
#: The eight magnitudes of e2m1; bit 3 is the sign.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: Halfway between neighbours: ties go to the even code.
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def _scale_of(largest: torch.Tensor, limit: float) -> torch.Tensor:
    """The smallest power of two under which ``largest`` fits ``limit``; 1 for zeros."""
    mantissa, exponent = torch.frexp(largest / limit)
    power = exponent - (mantissa == 0.5).to(exponent.dtype)
    power = torch.where(largest == 0, torch.zeros_like(power), power)
    return torch.ldexp(torch.ones_like(largest), power)


def _fp4_codes(x: torch.Tensor) -> torch.Tensor:
    """``[...]`` values up to 6 in magnitude to their 4-bit codes, as int64."""
    middles = torch.tensor(_MIDDLES, dtype=torch.float64)
    magnitude = x.abs().double()
    low = torch.bucketize(magnitude, middles, right=False)
    high = torch.bucketize(magnitude, middles, right=True)
    code = torch.where(low % 2 == 0, low, high)
    return code + 8 * torch.signbit(x).long()


def _fp4_values(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=dtype)
    return table[codes.long()]


def round_fp4(x: torch.Tensor) -> torch.Tensor:
    """``[...]`` values, at most 6 in magnitude, to the nearest of e2m1, ties to even."""
    return _fp4_values(_fp4_codes(x), x.dtype)


def quantise_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[r, c]`` floats to ``[r, c]`` e4m3 and ``[ceil(r / 128), ceil(c / 128)]`` e8m0 scales."""
    rows, columns = weight.shape
    blocks = _blocks(weight.float())
    scale = _scale_of(blocks.abs().amax(dim=(1, 3)), FP8_LARGEST)
    values = blocks / scale[:, None, :, None]
    flat = values.reshape(values.shape[0] * FP8_BLOCK, -1)[:rows, :columns]
    return flat.to(torch.float8_e4m3fn).contiguous(), scale.to(torch.float8_e8m0fnu)


def dequantise_fp8(
    weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The ``[r, c]`` weight that :func:`quantise_fp8` came from, as far as fp8 holds it.

    Args:
        weight: ``[r, c]`` float8_e4m3fn.
        scale: ``[ceil(r / 128), ceil(c / 128)]`` float8_e8m0fnu or float.
        dtype: of the result.
    """
    rows, columns = weight.shape
    wide = scale.float().repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return (weight.float() * wide[:rows, :columns]).to(dtype)


def quantise_fp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[r, c]`` floats, ``c`` a multiple of 32, to ``[r, c / 2]`` int8 and ``[r, c / 32]`` e8m0."""
    runs = torch.unflatten(weight.float(), 1, (-1, FP4_RUN))
    scale = _scale_of(runs.abs().amax(dim=-1), FP4_LARGEST)
    codes = _fp4_codes(runs / scale[..., None]).flatten(1)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
    return packed.contiguous(), scale.to(torch.float8_e8m0fnu)


def dequantise_fp4(
    weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The ``[r, c]`` weight of :func:`quantise_fp4`.

    Args:
        weight: ``[r, c / 2]`` int8 (or uint8), two values in a byte.
        scale: ``[r, c / 32]`` float8_e8m0fnu or float.
        dtype: of the result.
    """
    codes = weight.view(torch.uint8)
    halves = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    values = _fp4_values(halves, torch.float32)
    return (values * scale.float().repeat_interleave(FP4_RUN, 1)).to(dtype)


def dequantised(
    weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a checkpoint, one by one, ``dtype`` where they were fp8 or fp4, without scales.

    Raises:
        CheckpointError: a quantised weight without its scale, or a scale without its weight.
    """
    waiting: dict[str, torch.Tensor] = {}
    for name, value in weights:
        stem, kind = name.rpartition(".")[0], name[name.rfind(".") :]
        if kind not in (_SCALE, _WEIGHT) or (kind == _WEIGHT and value.element_size() > 1):
            yield name, value
            continue
        other = stem + (_SCALE if kind == _WEIGHT else _WEIGHT)
        if other not in waiting:
            waiting[name] = value
            continue
        found = waiting.pop(other)
        weight, scale = (value, found) if kind == _WEIGHT else (found, value)
        form = dequantise_fp8 if weight.dtype == torch.float8_e4m3fn else dequantise_fp4
        yield stem + _WEIGHT, form(weight, scale, dtype)
    if waiting:
        name = min(waiting)
        lacks = "weight" if name.endswith(_SCALE) else "scale"
        raise CheckpointError(
            f"{name} has no {lacks}.",
            expected="a weight and a scale of everything that is quantised",
            fix="Download the checkpoint again; it is incomplete.",
        )


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    """``[R, 128, C, 128]``: padded with zeros to whole blocks."""
    rows, columns = weight.shape
    padded = weight.new_zeros(
        -(-rows // FP8_BLOCK) * FP8_BLOCK, -(-columns // FP8_BLOCK) * FP8_BLOCK
    )
    padded[:rows, :columns] = weight
    return padded.view(-(-rows // FP8_BLOCK), FP8_BLOCK, -(-columns // FP8_BLOCK), FP8_BLOCK)


TILE = 64
#: No scale is made from less.
_SMALLEST = 1e-4


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
    scale = _scale_of(tiles.abs().amax(dim=-1, keepdim=True).clamp_min(_SMALLEST), FP8_LARGEST)
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
    scale = _scale_of(runs.abs().amax(dim=-1, keepdim=True).clamp_min(smallest), FP4_LARGEST)
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
