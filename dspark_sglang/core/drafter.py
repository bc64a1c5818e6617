"""The dense drafter in plain torch, readable as the paper: the reference for what serving runs.

Context rows are hidden states of a few target layers, concatenated, projected by ``fc`` and
normed; every draft layer projects its keys and values from context and block rows alike. Block
rows attend to all context before the anchor and to each other in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from dspark_sglang.core.heads import ConfidenceHead, MarkovHead

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class DenseShape:
    """Sizes of a dense drafter."""

    gamma: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    mask_token: int
    eps: float
    rope_theta: float
    #: Whether the anchor's row predicts the first token. If not, a block has one more row, and
    #: each mask row predicts the token at its own position.
    sample_from_anchor: bool = True

    @property
    def rows(self) -> int:
        """Input rows a block."""
        return self.gamma + (0 if self.sample_from_anchor else 1)


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
    """Forward passes over a checkpoint in the published dense layout."""

    def __init__(self, tensors: Tensors, shape: DenseShape) -> None:
        self.shape = shape
        self._t = {name.removeprefix("model."): value for name, value in tensors.items()}
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
            with_markov=weight.numel() > shape.hidden,
            temperatures=torch.ones(shape.gamma),
        )

    @property
    def gamma(self) -> int:
        """Tokens drafted a round."""
        return self.shape.gamma

    def _pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        if f"{name}.weight" not in self._t:
            return None
        return self._t[f"{name}.weight"], self._t[f"{name}.bias"]

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self._t[f"{name}.weight"]
        return rms_norm(x, (x.shape[-1],), weight, self.shape.eps)

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
        shape, blocks, rows = self.shape, anchors.shape[0], self.shape.rows
        mask_row = self._t["mask_embedding"]
        x = mask_row.expand(blocks, rows, -1).clone()
        x[:, 0] = embedding
        own = anchors[:, None] + torch.arange(rows)
        seen = torch.arange(context.shape[0]) < anchors[:, None]
        visible = torch.cat([seen, torch.ones(blocks, rows, dtype=torch.bool)], dim=1)
        for layer in range(shape.layers):
            x = self._layer(layer, x, context, own, visible)
        return self._norm(x, "norm")[:, rows - shape.gamma :]

    def base_logits(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """``[..., d]`` final hidden states through the target's ``[V, d]`` LM head."""
        return linear(hidden, head)

    def _layer(
        self,
        layer: int,
        x: torch.Tensor,
        context: torch.Tensor,
        own: torch.Tensor,
        visible: torch.Tensor,
    ) -> torch.Tensor:
        shape, p = self.shape, f"layers.{layer}"
        blocks, rows = x.shape[:2]
        length = context.shape[0]

        def project(source: torch.Tensor, name: str, heads: int) -> torch.Tensor:
            flat = linear(source, self._t[f"{p}.self_attn.{name}_proj.weight"])
            return flat.view(*source.shape[:-1], heads, shape.head_dim)

        h = self._norm(x, f"{p}.input_layernorm")
        query = self._norm(project(h, "q", shape.heads), f"{p}.self_attn.q_norm")
        query = rotate(query, own, shape.rope_theta)

        def keys(source: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            normed = self._norm(project(source, "k", shape.kv_heads), f"{p}.self_attn.k_norm")
            return rotate(normed, positions, shape.rope_theta)

        def joined(shared: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
            return torch.cat([shared.expand(blocks, -1, -1, -1), block], dim=1).transpose(1, 2)

        key = joined(keys(context, torch.arange(length))[None], keys(h, own))
        value = joined(project(context, "v", shape.kv_heads)[None], project(h, "v", shape.kv_heads))
        out = scaled_dot_product_attention(
            query.transpose(1, 2), key, value, attn_mask=visible[:, None, None], enable_gqa=True
        )
        flat = out.transpose(1, 2).reshape(blocks, rows, -1)
        x = x + linear(flat, self._t[f"{p}.self_attn.o_proj.weight"])
        h = self._norm(x, f"{p}.post_attention_layernorm")
        gate, up = (linear(h, self._t[f"{p}.mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        return x + linear(silu(gate) * up, self._t[f"{p}.mlp.down_proj.weight"])

    @classmethod
    def load(cls, tensors: Tensors, shape: DenseShape, embedding: torch.Tensor) -> DenseDrafter:
        """Build from checkpoint tensors and the target's ``[V, d]`` embedding."""
        return cls({**tensors, "mask_embedding": embedding[shape.mask_token]}, shape)
