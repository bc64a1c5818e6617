"""RoPE over adjacent pairs of a head's last dimensions, with YaRN for compressed layers.

Pair ``i`` of ``dims / 2`` turns by ``position * f_i``, ``f_i = theta^(-2 i / dims)``. YaRN divides
the frequencies that make less than ``beta_slow`` turns over the original context by ``factor``,
keeps those that make more than ``beta_fast``, and mixes both in between; V4 leaves amplitudes and
the attention scale alone. Angles are float64: at position 10^5 float32 would be off by 10^-2.

Source: the published configurations, and SGLang 0.5.23, ``models/deepseek_v4.py``.
"""

from __future__ import annotations

import math

import torch

from dspark_sglang.layouts.v4.target import Yarn


def frequencies(dims: int, theta: float, yarn: Yarn | None = None) -> torch.Tensor:
    """``[dims / 2]`` float64 radians a position.

    Args:
        dims: even; dimensions that turn.
        theta: base.
        yarn: stretches slow pairs; None: none.
    """
    base = theta ** -(torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    if yarn is None:
        return base

    def pair(turns: float) -> float:
        """The (fractional) pair that makes so many turns over the original context."""
        return dims * math.log(yarn.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(yarn.beta_fast)), 0)
    high = min(math.ceil(pair(yarn.beta_slow)), dims - 1)
    steps = torch.arange(dims // 2, dtype=torch.float64) - low
    slow = (steps / (high - low if high > low else 1e-3)).clamp(0, 1)
    return base / yarn.factor * slow + base * (1 - slow)


def turn(
    x: torch.Tensor, positions: torch.Tensor, speeds: torch.Tensor, *, inverse: bool = False
) -> torch.Tensor:
    """Turn adjacent pairs of the last dimensions.

    Args:
        x: ``[..., D]``.
        positions: integers that broadcast with ``x`` without its last dimension.
        speeds: ``[k]`` float64 of :func:`frequencies`; the last ``2 k`` dimensions turn.
        inverse: turn back instead.

    Returns:
        As ``x``, in its dtype.
    """
    angle = positions[..., None].double() * speeds.to(x.device)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    sin = -sin if inverse else sin
    still, pairs = torch.tensor_split(x, [x.shape[-1] - 2 * len(speeds)], dim=-1)
    even, odd = pairs[..., 0::2], pairs[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return torch.cat([still, turned.flatten(-2)], dim=-1)
