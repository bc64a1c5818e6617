"""Layers of a drafter, dense (Qwen 3) or Gemma 4, as torch modules with the checkpoint's names.

Each takes block rows ``[B, Q, d]``, context rows ``[B, S, d]`` and their positions and mask. The dense
one is what SGLang's ``DFlashDecoderLayer`` computes: pre-norms, SwiGLU, attention scaled by
``head_dim ** -0.5``. Gemma 4's is DeepSpec's ``Gemma4DSparkModel``: norms before and after attention
and MLP, tanh-GELU, queries and keys normed and not scaled, values normed without a gain.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import gelu, rms_norm, scaled_dot_product_attention, silu

from dspark_sglang.checkpoint import DrafterConfig
from dspark_sglang.core.drafter import rotate


class Norm(nn.Module):
    """Root-mean-square norm with a gain."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., width]`` in, the same out, in the input's type."""
        return rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def plain_linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    """Queries from block rows, keys and values from context and block rows alike."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.theta = config.rope_theta
        hidden = config.hidden_size
        self.q_proj = plain_linear(hidden, self.heads * self.dim)
        self.k_proj = plain_linear(hidden, self.kv_heads * self.dim)
        self.v_proj = plain_linear(hidden, self.kv_heads * self.dim)
        self.o_proj = plain_linear(self.heads * self.dim, hidden)
        self.q_norm = Norm(self.dim, config.rms_norm_eps)
        self.k_norm = Norm(self.dim, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, source: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """``x`` ``[B, Q, d]`` attends to ``source`` ``[B, K, d]`` whose last Q rows are its own.

        Args:
            positions: ``[B, K]``.
            mask: ``[B, 1, Q, K]`` bool.
        """
        batch, rows, _ = x.shape
        query = self.q_norm(self.q_proj(x).view(batch, rows, self.heads, self.dim))
        query = rotate(query, positions[:, -rows:], self.theta)
        key = self.k_norm(self.k_proj(source).view(batch, -1, self.kv_heads, self.dim))
        key = rotate(key, positions, self.theta)
        value = self.v_proj(source).view(batch, -1, self.kv_heads, self.dim)
        group = self.heads // self.kv_heads
        out = scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2).repeat_interleave(group, dim=1),
            value.transpose(1, 2).repeat_interleave(group, dim=1),
            attn_mask=mask,
        )
        return torch.as_tensor(self.o_proj(out.transpose(1, 2).reshape(batch, rows, -1)))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.gate_proj = plain_linear(config.hidden_size, config.intermediate_size)
        self.up_proj = plain_linear(config.hidden_size, config.intermediate_size)
        self.down_proj = plain_linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., d]`` to ``[..., d]``."""
        return torch.as_tensor(self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x)))


class Layer(nn.Module):
    """One draft layer."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, context: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Block rows ``x`` ``[B, Q, d]`` over ``context`` ``[B, S, d]``."""
        h = self.input_layernorm(x)
        source = torch.cat([context.to(h.dtype), h], dim=1)
        x = x + self.self_attn(h, source, positions, mask)
        return torch.as_tensor(x + self.mlp(self.post_attention_layernorm(x)))


class GemmaAttention(nn.Module):
    """As :class:`Attention`, the way Gemma 4's full-attention layers do it."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.theta, self.share, self.eps = config.rope_theta, config.rope_share, config.rms_norm_eps
        hidden = config.hidden_size
        self.q_proj = plain_linear(hidden, self.heads * self.dim)
        self.k_proj = plain_linear(hidden, self.kv_heads * self.dim)
        self.v_proj = None if config.shared_kv else plain_linear(hidden, self.kv_heads * self.dim)
        self.o_proj = plain_linear(self.heads * self.dim, hidden)
        self.q_norm = Norm(self.dim, config.rms_norm_eps)
        self.k_norm = Norm(self.dim, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, source: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Arguments as :meth:`Attention.forward`."""
        batch, rows, _ = x.shape
        query = self.q_norm(self.q_proj(x).view(batch, rows, self.heads, self.dim))
        query = rotate(query, positions[:, -rows:], self.theta, self.share)
        raw = self.k_proj(source)
        value = raw if self.v_proj is None else self.v_proj(source)
        key = self.k_norm(raw.view(batch, -1, self.kv_heads, self.dim))
        key = rotate(key, positions, self.theta, self.share)
        value = rms_norm(value.view(batch, -1, self.kv_heads, self.dim), (self.dim,), eps=self.eps)
        group = self.heads // self.kv_heads
        out = scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2).repeat_interleave(group, dim=1),
            value.transpose(1, 2).repeat_interleave(group, dim=1),
            attn_mask=mask,
            scale=1.0,
        )
        return torch.as_tensor(self.o_proj(out.transpose(1, 2).reshape(batch, rows, -1)))


class GemmaMLP(MLP):
    """Gated tanh-GELU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., d]`` to ``[..., d]``."""
        gate = gelu(self.gate_proj(x), approximate="tanh")
        return torch.as_tensor(self.down_proj(gate * self.up_proj(x)))


class GemmaLayer(nn.Module):
    """One draft layer with sandwich norms; ``layer_scalar`` is stored and not trained."""

    layer_scalar: torch.Tensor

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = GemmaAttention(config)
        self.mlp = GemmaMLP(config)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = Norm(hidden, eps)
        self.post_attention_layernorm = Norm(hidden, eps)
        self.pre_feedforward_layernorm = Norm(hidden, eps)
        self.post_feedforward_layernorm = Norm(hidden, eps)
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(
        self, x: torch.Tensor, context: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Arguments as :meth:`Layer.forward`."""
        h = self.input_layernorm(x)
        source = torch.cat([context.to(h.dtype), h], dim=1)
        x = x + self.post_attention_layernorm(self.self_attn(h, source, positions, mask))
        inner = self.mlp(self.pre_feedforward_layernorm(x))
        x = x + self.post_feedforward_layernorm(inner)
        return torch.as_tensor(x * self.layer_scalar.to(x.dtype))
