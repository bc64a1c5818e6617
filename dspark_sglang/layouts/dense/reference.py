"""The dense drafter in plain torch, readable as the paper: the reference for what serving runs.

Context rows are hidden states of a few target layers, concatenated, projected by ``fc`` and
normed; every draft layer projects its keys and values from context and block rows alike. Block
rows attend to all context before the anchor and to each other in both directions.

Layers are Qwen 3's: pre-norms, SwiGLU, attention scaled by ``head_dim ** -0.5``. Gemma 4's have norms before and
after attention and MLP and a tanh-GELU; queries and keys are normed and not scaled, values are normed without a
gain.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import gelu, linear, rms_norm, scaled_dot_product_attention, silu

from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.layouts.dense.config import DrafterConfig

Tensors = Mapping[str, torch.Tensor]


def rotate(
    x: torch.Tensor, positions: torch.Tensor, theta: float, share: float = 1.0
) -> torch.Tensor:
    """Rotary embedding (halves rotated together): ``[..., S, heads, dim]`` at ``[..., S]``.

    Only the ``share`` of the dimensions with the highest frequencies turns.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    if share < 1.0:
        frequency[int(share * x.shape[-1] // 2) :] = 0.0
    angle = positions[..., None, None].float() * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


class DenseDrafter:
    """Forward passes over a checkpoint in the published dense layout.

    Args:
        tensors: by published name, with or without ``model.`` before it; norm gains as they multiply.
        config: their sizes.
        embedding: ``[V, d]`` the target's.
    """

    def __init__(self, tensors: Tensors, config: DrafterConfig, embedding: torch.Tensor) -> None:
        self.config = config
        self._t = {name.removeprefix("model."): value for name, value in tensors.items()}
        self._mask = embedding[config.mask_token_id]
        self.markov = MarkovHead(
            w1=self._t["markov_head.markov_w1.weight"],
            w2=self._t["markov_head.markov_w2.weight"],
            gate=self._pair("markov_head.gate_proj"),
            joint=self._pair("markov_head.joint_proj"),
        )
        weight = self._t["confidence_head.proj.weight"].float().view(-1)
        self.confidence = ConfidenceHead(
            weight=weight,
            bias=self._t["confidence_head.proj.bias"].float().view(()),
            with_markov=weight.numel() > config.hidden_size,
            temperatures=torch.ones(config.gamma),
        )

    @property
    def gamma(self) -> int:
        """Tokens drafted a round."""
        return self.config.gamma

    def _pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        if f"{name}.weight" not in self._t:
            return None
        return self._t[f"{name}.weight"], self._t[f"{name}.bias"]

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self._t[f"{name}.weight"]
        return rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def context(self, target_hidden: torch.Tensor) -> torch.Tensor:
        """``[S, layers * d]`` concatenated target states to ``[S, d]`` context rows."""
        return self._norm(linear(target_hidden, self._t["fc.weight"]), "hidden_norm")

    def hidden(
        self, context: torch.Tensor, anchors: torch.Tensor, embedding: torch.Tensor
    ) -> torch.Tensor:
        """Final hidden states of one block at every anchor of one sequence.

        Args:
            context: ``[S, d]`` context rows of positions 0..S-1.
            anchors: ``[A]`` int64 anchor positions; the block at anchor ``a`` sees context
                ``0..a-1``.
            embedding: ``[A, d]`` embedding of the token at each anchor.

        Returns:
            ``[A, gamma, d]``; row ``k`` predicts the token at ``anchor + k + 1``.
        """
        # Where the anchor's row predicts nothing, a block has one more row.
        rows = self.gamma + (0 if self.config.sample_from_anchor else 1)
        blocks = anchors.shape[0]
        x = self._mask.expand(blocks, rows, -1).clone()
        x[:, 0] = embedding
        own = anchors[:, None] + torch.arange(rows)
        seen = torch.arange(context.shape[0]) < anchors[:, None]
        visible = torch.cat([seen, torch.ones(blocks, rows, dtype=torch.bool)], dim=1)
        for layer in range(self.config.num_layers):
            x = self._layer(f"layers.{layer}", x, context, own, visible)
        return self._norm(x, "norm")[:, rows - self.gamma :]

    def base_logits(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """``[..., d]`` final hidden states through the target's ``[V, d]`` LM head."""
        return linear(hidden, head)

    def _layer(
        self, p: str, x: torch.Tensor, context: torch.Tensor, own: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        attended = self._attention(p, self._norm(x, f"{p}.input_layernorm"), context, own, seen)
        if not self.config.gemma4:
            x = x + attended
            return x + self._mlp(p, self._norm(x, f"{p}.post_attention_layernorm"))
        x = x + self._norm(attended, f"{p}.post_attention_layernorm")
        inner = self._mlp(p, self._norm(x, f"{p}.pre_feedforward_layernorm"))
        return (x + self._norm(inner, f"{p}.post_feedforward_layernorm")) * self._t[
            f"{p}.layer_scalar"
        ]

    def _mlp(self, p: str, h: torch.Tensor) -> torch.Tensor:
        gate, up = (linear(h, self._t[f"{p}.mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        gate = gelu(gate, approximate="tanh") if self.config.gemma4 else silu(gate)
        return linear(gate * up, self._t[f"{p}.mlp.down_proj.weight"])

    def _attention(
        self, p: str, h: torch.Tensor, context: torch.Tensor, own: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """``h`` ``[A, rows, d]`` at positions ``own`` over context ``[S, d]`` and itself, as ``seen`` says."""
        config, blocks, rows = self.config, *h.shape[:2]

        def project(source: torch.Tensor, name: str, heads: int) -> torch.Tensor:
            flat = linear(source, self._t[f"{p}.self_attn.{name}_proj.weight"])
            return flat.view(*source.shape[:-1], heads, config.head_dim)

        def turned(x: torch.Tensor, positions: torch.Tensor, norm: str) -> torch.Tensor:
            normed = self._norm(x, f"{p}.self_attn.{norm}")
            return rotate(normed, positions, config.rope_theta, config.rope_share)

        def keys_values(
            source: torch.Tensor, positions: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            key = project(source, "k", config.num_kv_heads)
            value = key if config.shared_kv else project(source, "v", config.num_kv_heads)
            if config.gemma4:
                value = rms_norm(value, (config.head_dim,), eps=config.rms_norm_eps)
            return turned(key, positions, "k_norm"), value

        query = turned(project(h, "q", config.num_heads), own, "q_norm")
        shared = keys_values(context, torch.arange(len(context)))
        key, value = (
            torch.cat([before.expand(blocks, -1, -1, -1), block], dim=1).transpose(1, 2)
            for before, block in zip(shared, keys_values(h, own), strict=True)
        )
        out = scaled_dot_product_attention(
            query.transpose(1, 2),
            key,
            value,
            attn_mask=seen[:, None, None],
            scale=1.0 if config.gemma4 else None,
            enable_gqa=True,
        )
        flat = out.transpose(1, 2).reshape(blocks, rows, -1)
        return linear(flat, self._t[f"{p}.self_attn.o_proj.weight"])
