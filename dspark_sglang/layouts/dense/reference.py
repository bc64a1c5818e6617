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
from pathlib import Path

import torch
from torch.nn.functional import gelu, linear, rms_norm, scaled_dot_product_attention, silu

from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.layouts.dense.config import DenseConfig
from dspark_sglang.layouts.dense.read import read_drafter

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


def norm(x: torch.Tensor, gain: torch.Tensor, config: DenseConfig) -> torch.Tensor:
    """Root-mean-square norm of ``[..., D]`` with a gain ``[D]``, in the type of ``x``."""
    return rms_norm(x, (x.shape[-1],), gain.to(x.dtype), config.rms_norm_eps)


def draft_layer(
    t: Tensors,
    p: str,
    config: DenseConfig,
    x: torch.Tensor,
    own: torch.Tensor,
    context: torch.Tensor,
    before: torch.Tensor,
    seen: torch.Tensor,
) -> torch.Tensor:
    """One draft layer, as it is served and as it is trained.

    Args:
        t: tensors by published name.
        p: prefix of the layer's.
        config: their sizes.
        x: ``[B, Q, d]`` block rows.
        own: ``[B, Q]`` int64 their positions.
        context: ``[S, d]``, or ``[B, S, d]``, context rows.
        before: ``[S]`` or ``[B, S]`` int64 their positions.
        seen: bool that broadcasts to ``[B, 1, Q, S + Q]``.

    Returns:
        ``[B, Q, d]``.
    """

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return norm(x, t[f"{p}{name}.weight"], config)

    def project(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, t[f"{p}{name}_proj.weight"])

    attended = _attention(
        t, f"{p}self_attn.", config, normed(x, "input_layernorm"), own, context, before, seen
    )
    if config.gemma4:
        attended = normed(attended, "post_attention_layernorm")
    x = x + attended
    h = normed(x, "pre_feedforward_layernorm" if config.gemma4 else "post_attention_layernorm")
    gate = project(h, "mlp.gate")
    gate = gelu(gate, approximate="tanh") if config.gemma4 else silu(gate)
    inner = project(gate * project(h, "mlp.up"), "mlp.down")
    if not config.gemma4:
        return x + inner
    return (x + normed(inner, "post_feedforward_layernorm")) * t[f"{p}layer_scalar"].to(x.dtype)


def _attention(
    t: Tensors,
    p: str,
    config: DenseConfig,
    h: torch.Tensor,
    own: torch.Tensor,
    context: torch.Tensor,
    before: torch.Tensor,
    seen: torch.Tensor,
) -> torch.Tensor:
    """Queries from normed block rows ``h`` ``[B, Q, d]``, keys and values from context and block rows alike."""

    def project(x: torch.Tensor, name: str, heads: int) -> torch.Tensor:
        flat = linear(x, t[f"{p}{name}_proj.weight"])
        return flat.view(*x.shape[:-1], heads, config.head_dim)

    def turned(x: torch.Tensor, positions: torch.Tensor, name: str) -> torch.Tensor:
        normed = norm(x, t[f"{p}{name}_norm.weight"], config)
        return rotate(normed, positions, config.rope_theta, config.rope_share)

    def keys_values(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = project(x, "k", config.num_kv_heads)
        value = key if config.shared_kv else project(x, "v", config.num_kv_heads)
        if config.gemma4:
            value = rms_norm(value, (config.head_dim,), eps=config.rms_norm_eps)
        return turned(key, positions, "k"), value

    batch, rows, _ = h.shape
    query = turned(project(h, "q", config.num_heads), own, "q")
    # Repeated rather than grouped: kernels that take a mask do not group.
    group = config.num_heads // config.num_kv_heads
    key, value = (
        torch.cat([shared.expand(batch, -1, -1, -1), block], dim=1)
        .transpose(1, 2)
        .repeat_interleave(group, dim=1)
        for shared, block in zip(keys_values(context, before), keys_values(h, own), strict=True)
    )
    scale = 1.0 if config.gemma4 else None
    out = scaled_dot_product_attention(
        query.transpose(1, 2), key, value, attn_mask=seen, scale=scale
    )
    return linear(out.transpose(1, 2).reshape(batch, rows, -1), t[f"{p}o_proj.weight"])


class DenseDrafter:
    """Forward passes over a checkpoint in the published dense layout.

    Args:
        tensors: by published name, with or without ``model.`` before it; norm gains as they multiply.
        config: their sizes.
        embedding: ``[V, d]`` the target's.
    """

    def __init__(self, tensors: Tensors, config: DenseConfig, embedding: torch.Tensor) -> None:
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
        return norm(x, self._t[f"{name}.weight"], self.config)

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
        before = torch.arange(context.shape[0])
        seen = before < anchors[:, None]
        visible = torch.cat([seen, torch.ones(blocks, rows, dtype=torch.bool)], dim=1)
        visible = visible[:, None, None]
        for layer in range(self.config.num_layers):
            x = draft_layer(
                self._t, f"layers.{layer}.", self.config, x, own, context, before, visible
            )
        return self._norm(x, "norm")[:, rows - self.gamma :]

    def base_logits(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """``[..., d]`` final hidden states through the target's ``[V, d]`` LM head."""
        return linear(hidden, head)


def load(directory: Path, dtype: torch.dtype, embedding: torch.Tensor) -> DenseDrafter:
    """The drafter in a directory, with the target's ``[V, d]`` embedding.

    Raises:
        CheckpointError: damaged, incomplete, or of another architecture.
    """
    config, tensors = read_drafter(directory)
    stored = {name: value.to(dtype) for name, value in tensors.items()}
    return DenseDrafter(stored, config, embedding)
