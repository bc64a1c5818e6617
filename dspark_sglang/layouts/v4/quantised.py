"""The published quantised forms of V4's weights, both ways.

- fp8: e4m3 values ``[r, c]`` and a power-of-two scale (e8m0) for each block of 128 by 128;
- fp4: e2m1 values, two in a byte, the even column in its low half, ``[r, c / 2]`` int8, and a
  power-of-two scale for each run of 32 columns.

Scales are powers of two and the values have four significant bits at most, so dequantising is
exact in float32 and in bfloat16.

Source: ``quantization_config`` of the published ``config.json`` (fp8, e4m3, ue8m0, 128 by 128);
SGLang 0.5.23, ``layers/quantization``; the order of the halves as in DeepSeek's conversion code.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dspark_sglang.layouts.v4.shape import FP4_RUN, FP8_BLOCK

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


def dequantise(
    tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """A checkpoint with plain weights in place of quantised ones and their scales.

    Args:
        tensors: of a published or a plain checkpoint, by name.
        dtype: of what was quantised; other tensors stay as they are.

    Raises:
        KeyError: a quantised weight without its ``.scale``.
    """
    made: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if name.endswith(".scale"):
            continue
        scale = name.removesuffix("weight") + "scale"
        if value.dtype is torch.float8_e4m3fn:
            made[name] = dequantise_fp8(value, tensors[scale], dtype)
        elif value.dtype in (torch.int8, torch.uint8):
            made[name] = dequantise_fp4(value, tensors[scale], dtype)
        else:
            made[name] = value
    return made


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    """``[R, 128, C, 128]``: padded with zeros to whole blocks."""
    rows, columns = weight.shape
    padded = weight.new_zeros(
        -(-rows // FP8_BLOCK) * FP8_BLOCK, -(-columns // FP8_BLOCK) * FP8_BLOCK
    )
    padded[:rows, :columns] = weight
    return padded.view(-(-rows // FP8_BLOCK), FP8_BLOCK, -(-columns // FP8_BLOCK), FP8_BLOCK)
