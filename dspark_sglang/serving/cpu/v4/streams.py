"""Hyper-connections of V4: mappings of the residual streams, their combination and their collapse.

Written from SGLang 0.5.23, ``kernels/ops/layernorm/mhc.py`` (``hc_split_sinkhorn``, ``mhc_combine``) and
``mhc_head.py`` (``fused_hc_head``).
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear


def hc_split_sinkhorn(
    mixes: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    hc_mult: int = 4,
    sinkhorn_iters: int = 20,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How a sublayer reads, writes and mixes ``m`` streams.

    Args:
        mixes: ``[..., (2 + m) m]`` float32 projections of the streams.
        hc_scale: ``[3]``.
        hc_base: ``[(2 + m) m]``.

    Returns:
        ``[..., m]`` weights of reading, ``[..., m]`` of writing, ``[..., m, m]`` mixing, from row to column.
    """
    parts = torch.split(mixes, [hc_mult, hc_mult, hc_mult**2], dim=-1)
    bases = torch.split(hc_base, [hc_mult, hc_mult, hc_mult**2])
    reading, writing, mixing = (
        scale * part + base for scale, part, base in zip(hc_scale, parts, bases, strict=True)
    )
    matrix = torch.unflatten(mixing, -1, (hc_mult, hc_mult)).softmax(dim=-1) + eps
    matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + eps)
    for _ in range(sinkhorn_iters - 1):
        matrix = matrix / (matrix.sum(dim=-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + eps)
    return reading.sigmoid() + eps, 2.0 * writing.sigmoid(), matrix


def mhc_combine(
    x_flat: torch.Tensor, pre: torch.Tensor, hc: int, out_dtype: torch.dtype
) -> torch.Tensor:
    """``[n, hc d]`` streams weighted by ``[n, hc]`` and summed: ``[n, d]``."""
    streams = torch.unflatten(x_flat.float(), 1, (hc, -1))
    return torch.einsum("nm,nmd->nd", pre.float(), streams).to(out_dtype)


def fused_hc_head(
    x: torch.Tensor,
    hc_fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
) -> torch.Tensor:
    """``[n, m, d]`` streams after the last layer as one: ``[n, d]``."""
    flat = x.flatten(-2).float()
    flat = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    weights = (linear(flat, hc_fn.float()) * hc_scale + hc_base).sigmoid() + hc_eps
    return (weights[..., None] * x.float()).sum(dim=-2).to(x.dtype)
