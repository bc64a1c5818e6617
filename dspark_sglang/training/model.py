"""The drafter with weights that learn: the published layouts as a torch module.

Parameter names are the checkpoint's. The forward pass of the dense layout is that of
:class:`dspark_sglang.core.drafter.DenseDrafter` over many anchors of many sequences at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import linear

from dspark_sglang.checkpoint import DrafterConfig
from dspark_sglang.core.heads import MarkovHead
from dspark_sglang.training.layers import GemmaLayer, Layer, Norm, plain_linear


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
            mask: ``[B, 1, A * rows, S + A * rows]`` from :func:`packing.visible`.

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
