"""A Hugging Face model as the target of the reference engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from dspark_sglang.training.states import Target


class HFTarget:
    """Logits and layer states of one sequence, as :class:`dspark_sglang.core.engine.Target` asks."""

    def __init__(self, target: Target, layer_ids: Sequence[int]) -> None:
        """Args:
        target: the model, on the CPU.
        layer_ids: decoder layers whose outputs the drafter reads; -1 is the embedding.
        """
        self._target = target
        self._layer_ids = tuple(layer_ids)
        #: ``[V, d]`` as the model's own module embeds: scaled where it scales.
        self.embedding = target.embed(torch.arange(target.head.shape[0])).detach()
        #: ``[V, d]``.
        self.head = target.head.detach()

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[n]`` int64 tokens to ``[n, V]`` float32 logits and ``[n, L * d]`` states."""
        states = self._target.states(tokens[None], self._layer_ids)
        logits = linear(states.final[0], self.head).float()
        cap = self._target.softcap
        return (cap * torch.tanh(logits / cap) if cap else logits), states.layers[0]
