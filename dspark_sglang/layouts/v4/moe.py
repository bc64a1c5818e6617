"""V4's mixture of experts: a biased choice, unbiased weights, and shared experts on top.

    s   = sqrt(softplus(W_g x))
    top = the k experts of largest s + bias
    w_e = route_scale * s_e / sum over top of s       (no division without ``normalise``)
    y   = shared(x) + sum over top of w_e expert_e(x)
    expert(x) = W_2 (silu(min(W_1 x, limit)) * clamp(W_3 x, -limit, limit))

The draft layers are never routed by a table of tokens. Source: SGLang 0.5.23, ``models/deepseek_v2.py``
(``DeepseekV2MoE``) and ``layers/moe/topk.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import linear, silu, softplus

from dspark_sglang.layouts.v4.shape import V4Shape


class MixtureOfExperts:
    """One layer's experts over tensors somebody else owns."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], prefix: str, shape: V4Shape) -> None:
        """``tensors`` holds ``{prefix}gate.weight`` and so on."""
        self.shape = shape
        self._t = tensors
        self._prefix = prefix

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts of ``[N, d]`` rows: ``[N, k]`` int64 and their ``[N, k]`` weights."""
        chosen = self.biased(x).topk(self.shape.active, dim=-1).indices
        return chosen, self.weights(self.scores(x), chosen)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, experts]``, from which weights are made."""
        return softplus(linear(x, self._t[f"{self._prefix}gate.weight"])).sqrt()

    def biased(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, experts]``, by which experts are chosen."""
        return self.scores(x) + self._t[f"{self._prefix}gate.bias"]

    def weights(self, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """``[N, k]`` weights of the chosen experts from ``[N, experts]`` unbiased scores."""
        weights = scores.gather(-1, chosen)
        if self.shape.normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.shape.route_scale

    def expert(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """One expert (``experts.3``, ``shared_experts``) over ``[N, d]`` rows."""
        gate, up = (
            linear(x, self._t[f"{self._prefix}{name}.{part}.weight"]) for part in ("w1", "w3")
        )
        limit = self.shape.swiglu_limit
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return linear(silu(gate) * up, self._t[f"{self._prefix}{name}.w2.weight"])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., d]`` normed rows to ``[..., d]``."""
        flat = x.reshape(-1, x.shape[-1])
        chosen, weights = self.route(flat)
        out = self.expert(flat, "shared_experts")
        for index in torch.unique(chosen).tolist():
            row, slot = (chosen == index).nonzero(as_tuple=True)
            made = self.expert(flat[row], f"experts.{index}") * weights[row, slot, None]
            out = out.index_add(0, row, made.to(out.dtype))
        return out.view(x.shape)
