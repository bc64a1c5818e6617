"""Leaner CPU forwards of SGLang's elementwise modules, registered for our platform only.

SGLang's reference forwards spend a small model's step on dispatch: a norm is ten tensor
operations. These compute the same functions in fewer; with a residual, the norm reads the sum as it
is stored, rounded to the activations' dtype, as HuggingFace's models do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def rms_norm(
    self: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    quant_linear: object = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of ``x`` (plus ``residual``); returns the sum as the new residual as well."""
    if (
        post_residual_addition is not None
        or self.variance_size_override is not None
        or self.override_orig_dtype is not None
        or self.fp32_residual
        or self.cast_x_before_out_mul
    ):
        result: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = self.forward_native(
            x, residual, post_residual_addition, quant_linear
        )
        return result
    if residual is None:
        return functional.rms_norm(x, (self.hidden_size,), self.weight, self.variance_epsilon)
    total = x + residual
    normed = functional.rms_norm(total, (self.hidden_size,), self.weight, self.variance_epsilon)
    return normed, total


def silu_and_mul(self: object, x: torch.Tensor) -> torch.Tensor:
    """SwiGLU: ``silu(x[:, :d]) * x[:, d:]``."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def register(dispatch_key: str) -> None:
    """Register the forwards above under the platform's dispatch key."""
    from sglang.kernels.fused_op import BaseFusedOp
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm

    BaseFusedOp.register_oot_forward(RMSNorm, rms_norm, dispatch_key)
    BaseFusedOp.register_oot_forward(SiluAndMul, silu_and_mul, dispatch_key)
