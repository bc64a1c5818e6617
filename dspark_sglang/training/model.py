"""The drafter with weights that learn: the published layouts as a torch module.

Parameter names are the checkpoint's, and layers are those of :mod:`dspark_sglang.layouts.dense.reference`, here over
many anchors of many sequences at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import linear

from dspark_sglang.core.heads import MarkovHead
from dspark_sglang.layouts.dense.config import DenseConfig
from dspark_sglang.layouts.dense.reference import draft_layer, norm
from dspark_sglang.layouts.dense.tensors import dense_tensors


class Markov(nn.Module):
    """Weights of a Markov head of any kind."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        rank, hidden, vocab = config.markov_rank, config.hidden_size, config.vocab_size
        self.markov_w1 = nn.Embedding(vocab, rank)
        self.markov_w2 = nn.Linear(rank, vocab, bias=False)
        if config.markov_head == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)
        elif config.markov_head == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)


class Confidence(nn.Module):
    """The linear probe."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(features, 1)


def _hold(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Give a module a parameter under a dotted name; ``layer_scalar`` is stored and not trained."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if last == "layer_scalar":
        module.register_buffer(last, value)
    else:
        module.register_parameter(last, nn.Parameter(value))


class Drafter(nn.Module):
    """A dense DSpark drafter; without a Markov head it is a DFlash one."""

    def __init__(self, config: DenseConfig, *, markov: bool = True) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        for name, shape in dense_tensors(config).items():
            if "_head." not in name:
                _hold(self, name, torch.ones(shape))
        self.markov_head = Markov(config) if markov else None
        with_markov = markov and config.confidence_with_markov
        self.confidence_head = Confidence(hidden + (config.markov_rank if with_markov else 0))

    @property
    def rows(self) -> int:
        """Input rows a block."""
        return self.config.gamma + (0 if self.config.sample_from_anchor else 1)

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
        t: dict[str, torch.Tensor] = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        context = norm(linear(states, t["fc.weight"]), t["hidden_norm.weight"], self.config)
        x = mask_embedding.to(context.dtype).expand(batch, count, rows, -1).clone()
        x[:, :, 0] = embedded.to(x.dtype)
        x = x.view(batch, count * rows, -1)
        own = anchors[..., None] + torch.arange(rows, device=anchors.device)
        before = torch.arange(length, device=anchors.device).expand(batch, -1)
        own = own.view(batch, -1)
        for layer in range(self.config.num_layers):
            x = draft_layer(t, f"layers.{layer}.", self.config, x, own, context, before, mask)
        x = norm(x, t["norm.weight"], self.config).view(batch, count, rows, -1)
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
