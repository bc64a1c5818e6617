"""Markov heads and the confidence head, over tensors somebody else owns.

Equations (paper, "sequential stage"), for step ``k`` with previous token ``x``, draft hidden
state ``h`` and low-rank embeddings ``W1`` [V, r], ``W2`` [V, r]:

- vanilla: ``B = W2 W1[x]``
- gated:   ``B = W2 (sigmoid(Wg [h; W1[x]] + bg) * W1[x])``
- rnn:     ``(g, c, o) = Wj [s; W1[x]; h] + bj``, ``s' = sigmoid(g) s + (1 - sigmoid(g)) tanh(c)``,
  ``B = W2 tanh(o)``

Confidence: ``c = sigmoid((w [h; W1[x]] + b) / t_k)``, the chance that the token at ``k`` survives
verification given that those before it did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear


@dataclass(frozen=True, slots=True)
class MarkovHead:
    """A Markov head of any kind; the tensors that are set decide which.

    Attributes:
        w1: ``[V, r]`` embedding of the previous token.
        w2: ``[V, r]`` projection to vocabulary logits.
        gate: weight ``[r, d + r]`` and bias ``[r]`` of a gated head.
        joint: weight ``[3r, 2r + d]`` and bias ``[3r]`` of an rnn head.
    """

    w1: torch.Tensor
    w2: torch.Tensor
    gate: tuple[torch.Tensor, torch.Tensor] | None = None
    joint: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def from_module(cls, module: Any) -> MarkovHead:
        """View the weights of a head module in the published layout (``markov_w1``, ...)."""
        gate = getattr(module, "gate_proj", None)
        joint = getattr(module, "joint_proj", None)
        return cls(
            w1=module.markov_w1.weight,
            w2=module.markov_w2.weight,
            gate=None if gate is None else (gate.weight, gate.bias),
            joint=None if joint is None else (joint.weight, joint.bias),
        )

    @property
    def kind(self) -> str:
        """``vanilla``, ``gated`` or ``rnn``."""
        return "gated" if self.gate else "rnn" if self.joint else "vanilla"

    def start(self, rows: int) -> torch.Tensor | None:
        """The state before the first step: ``[rows, r]`` zeros for rnn, else None."""
        if self.joint is None:
            return None
        return self.w1.new_zeros((rows, self.w1.shape[1]))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """``W1[x]``: ``[...]`` int64 tokens to ``[..., r]``."""
        return torch.nn.functional.embedding(tokens, self.w1)

    def step(
        self, previous: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The latent whose projection through ``w2`` is the bias of one step.

        Args:
            previous: ``[B]`` int64 tokens drafted at the step before.
            hidden: ``[B, d]`` draft hidden states of this step (unused by vanilla).
            state: ``[B, r]`` state of an rnn head.

        Returns:
            ``[B, r]`` latent and the state for the next step.
        """
        return self.latent(self.embed(previous), hidden, state)

    def latent(
        self, embedded: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As :meth:`step`, of the previous tokens' embeddings ``[B, r]``."""
        if self.gate is not None:
            joined = torch.cat([hidden.to(embedded.dtype), embedded], dim=-1)
            return torch.sigmoid(linear(joined, *self.gate)) * embedded, state
        if self.joint is not None:
            assert state is not None
            joined = torch.cat([state, embedded, hidden.to(embedded.dtype)], dim=-1)
            gate, candidate, output = linear(joined, *self.joint).chunk(3, dim=-1)
            gate = torch.sigmoid(gate)
            return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)
        return embedded, state


@dataclass(frozen=True, slots=True)
class ConfidenceHead:
    """The linear probe that scores each drafted token.

    Attributes:
        weight: ``[d]`` or ``[d + r]`` float32.
        bias: ``[]`` float32.
        with_markov: whether the previous token's Markov embedding is part of the features.
        temperatures: ``[gamma]`` float32, from sequential temperature scaling.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    with_markov: bool
    temperatures: torch.Tensor

    @classmethod
    def from_module(cls, module: Any, temperatures: torch.Tensor) -> ConfidenceHead:
        """View a head module in the published layout (``proj`` of one output row)."""
        weight = module.proj.weight.detach().float().view(-1)
        bias = module.proj.bias
        return cls(
            weight=weight,
            bias=weight.new_zeros(()) if bias is None else bias.detach().float().view(()),
            with_markov=bool(module.with_markov),
            temperatures=temperatures.to(weight.device, torch.float32),
        )

    def logits(
        self, hidden: torch.Tensor, previous: torch.Tensor, markov: MarkovHead
    ) -> torch.Tensor:
        """Uncalibrated confidence logits.

        Args:
            hidden: ``[B, gamma, d]`` draft hidden states.
            previous: ``[B, gamma]`` tokens before each position (the anchor first).

        Returns:
            ``[B, gamma]`` float32.
        """
        width = hidden.shape[-1]
        score = hidden.float() @ self.weight[:width] + self.bias
        if self.with_markov:
            score = score + markov.embed(previous).float() @ self.weight[width:]
        return score

    def calibrate(self, logits: torch.Tensor) -> torch.Tensor:
        """``sigmoid(logit / temperature)`` of each position, ``[B, gamma]``."""
        return torch.sigmoid(logits / self.temperatures[: logits.shape[-1]])
