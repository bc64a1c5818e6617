"""V4's experts and the projections that SGLang gives to kernels.

Written from SGLang 0.5.23, ``kernels/ops/activation/silu_and_mul_clamp.py``, ``kernels/ops/gemm/bf16_fp32.py``,
``models/deepseek_v4.py`` (``_apply_wo_a_bf16_matmul``) and ``layers/moe/fused_moe_native.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear, silu


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
