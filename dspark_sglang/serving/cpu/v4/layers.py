"""Layers of V4 that SGLang gives to kernels: hyper-connections and experts.

Written from SGLang 0.5.23, ``kernels/ops/layernorm/mhc.py`` (``hc_split_sinkhorn``, ``mhc_combine``), ``mhc_head.py``
(``fused_hc_head``), ``kernels/ops/activation/silu_and_mul_clamp.py``, ``kernels/ops/gemm/bf16_fp32.py``,
``models/deepseek_v4.py`` (``_apply_wo_a_bf16_matmul``) and ``layers/moe/fused_moe_native.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear, silu


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


def clamped_swiglu(gate_up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """``silu(gate) * up`` of ``[..., 2 w]``, the gate clamped from above and ``up`` on both sides."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (silu(gate) * up).to(gate_up.dtype)


def silu_and_mul_clamp(input: torch.Tensor, output: torch.Tensor, swiglu_limit: float) -> None:
    """:func:`clamped_swiglu` into ``output``: the shared expert's."""
    output.copy_(clamped_swiglu(input, swiglu_limit))


def routed_experts(layer: Any, dispatched: Any) -> torch.Tensor:
    """``[n, d]`` sum of the routed experts; SGLang's torch path leaves ``swiglu_limit`` out.

    Args:
        layer: SGLang's fused experts: ``w13_weight`` ``[experts, 2 w, d]`` and ``w2_weight`` ``[experts, d, w]``.
        dispatched: ``[n, d]`` states, and the ``[n, k]`` weights and experts of each (negative: not on this rank).
    """
    x, (weights, chosen, *_) = dispatched.hidden_states, dispatched.topk_output
    limit = layer.moe_runner_config.swiglu_limit
    out = torch.zeros_like(x, dtype=torch.float32)
    for index in chosen[chosen >= 0].unique().tolist():
        row, slot = (chosen == index).nonzero(as_tuple=True)
        made = clamped_swiglu(linear(x[row], layer.w13_weight[index]), limit)
        made = linear(made, layer.w2_weight[index]).float()
        out.index_add_(0, row, made * weights[row, slot, None])
    return out.to(x.dtype)


def linear_bf16_fp32(x: torch.Tensor, y: torch.Tensor, **_: Any) -> torch.Tensor:
    """``[n, d]`` by ``[o, d]`` weights in float32."""
    return linear(x.float(), y.float())


def wo_a_matmul(o: torch.Tensor, wo_a: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Each group's ``[n, g, d]`` outputs by its own ``[g, r, d]``: ``[n, g, r]``."""
    return torch.einsum("ngd,grd->ngr", o, wo_a.to(o.dtype))
