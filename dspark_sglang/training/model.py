"""The drafter with weights that learn: the published layouts as a torch module.

Parameter names are the checkpoint's. Layers are dense (Qwen 3) or Gemma 4's. The dense ones are what SGLang's
``DFlashDecoderLayer`` computes: pre-norms, SwiGLU, attention scaled by ``head_dim ** -0.5``. Gemma 4's
are DeepSpec's ``Gemma4DSparkModel``: norms before and after attention and MLP, tanh-GELU, queries and
keys normed and not scaled, values normed without a gain. The forward pass of the dense layout is that of
:class:`dspark_sglang.layouts.dense.reference.DenseDrafter` over many anchors of many sequences at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import gelu, linear, rms_norm, scaled_dot_product_attention, silu

from dspark_sglang.core.heads import MarkovHead
from dspark_sglang.layouts.dense.config import DrafterConfig
from dspark_sglang.layouts.dense.reference import rotate


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


class Markov(nn.Module):
    """Weights of a Markov head of any kind."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        rank, hidden, vocab = config.markov_rank, config.hidden_size, config.vocab_size
        self.markov_w1 = nn.Embedding(vocab, rank)
        self.markov_w2 = plain_linear(rank, vocab)
        if config.markov_head == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)
        elif config.markov_head == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)


class Confidence(nn.Module):
    """The linear probe."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(features, 1)


class Drafter(nn.Module):
    """A dense DSpark drafter; without a Markov head it is a DFlash one."""

    def __init__(self, config: DrafterConfig, *, markov: bool = True) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.fc = plain_linear(len(config.target_layer_ids) * hidden, hidden)
        self.hidden_norm = Norm(hidden, config.rms_norm_eps)
        self.norm = Norm(hidden, config.rms_norm_eps)
        layer = GemmaLayer if config.gemma4 else Layer
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_layers))
        self.markov_head = Markov(config) if markov else None
        with_markov = markov and config.confidence_with_markov
        self.confidence_head = Confidence(hidden + (config.markov_rank if with_markov else 0))

    @property
    def rows(self) -> int:
        """Input rows a block."""
        return self.config.gamma + (0 if self.config.sample_from_anchor else 1)

    def context(self, states: torch.Tensor) -> torch.Tensor:
        """Concatenated target states ``[B, S, L * d]`` to context rows ``[B, S, d]``."""
        return torch.as_tensor(self.hidden_norm(self.fc(states)))

    def forward(
        self,
        states: torch.Tensor,
        anchors: torch.Tensor,
        embedded: torch.Tensor,
        mask_embedding: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden states of the blocks at ``anchors``.

        Args:
            states: ``[B, S, L * d]`` target states.
            anchors: ``[B, A]`` int64 positions.
            embedded: ``[B, A, d]`` embedding of the token at each anchor.
            mask_embedding: ``[d]`` embedding of the mask token.
            mask: ``[B, 1, A * rows, S + A * rows]`` from :func:`batches.visible`.

        Returns:
            ``[B, A, gamma, d]``; row ``k`` predicts the token at ``anchor + k + 1``.
        """
        batch, count = anchors.shape
        rows, length = self.rows, states.shape[1]
        context = self.context(states)
        x = mask_embedding.to(context.dtype).expand(batch, count, rows, -1).clone()
        x[:, :, 0] = embedded.to(x.dtype)
        x = x.view(batch, count * rows, -1)
        own = anchors[..., None] + torch.arange(rows, device=anchors.device)
        before = torch.arange(length, device=anchors.device).expand(batch, -1)
        positions = torch.cat([before, own.view(batch, -1)], dim=1)
        for layer in self.layers:
            x = layer(x, context, positions, mask)
        x = torch.as_tensor(self.norm(x)).view(batch, count, rows, -1)
        return x[:, :, rows - self.config.gamma :]

    def latents(self, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor | None:
        """Markov latents ``[..., gamma, r]`` given the true tokens before each position.

        Args:
            hidden: ``[..., gamma, d]``.
            previous: ``[..., gamma]`` int64.
        """
        if self.markov_head is None:
            return None
        head = MarkovHead.from_module(self.markov_head)
        flat_hidden = hidden.reshape(-1, *hidden.shape[-2:])
        flat_previous = previous.reshape(-1, previous.shape[-1])
        state, made = head.start(flat_hidden.shape[0]), []
        for k in range(flat_previous.shape[1]):
            latent, state = head.step(flat_previous[:, k], flat_hidden[:, k], state)
            made.append(latent)
        return torch.stack(made, dim=1).view(*hidden.shape[:-1], -1)

    def confidence_logits(self, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Confidence logits ``[...]`` float32 for hidden ``[..., d]`` and tokens ``[...]``."""
        features = [hidden.float()]
        proj = self.confidence_head.proj
        if self.markov_head is not None and proj.in_features > hidden.shape[-1]:
            features.append(self.markov_head.markov_w1(previous).float())
        return linear(torch.cat(features, dim=-1), proj.weight, proj.bias).squeeze(-1)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Copy the tensors whose names and shapes fit; return the names left as they were."""
        left = []
        with torch.no_grad():
            for name, own in self.state_dict(keep_vars=True).items():
                value = tensors.get(name)
                if value is None or value.shape != own.shape:
                    left.append(name)
                else:
                    own.copy_(value)
        return left
