"""Confidence and survival in plain torch, one position at a time."""

from __future__ import annotations

import torch


def reference(
    hidden: torch.Tensor,
    previous: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    temperatures: torch.Tensor,
    w1: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``c_j = sigmoid((w . [h_j; W1[x_{j-1}]] + b) / t_j)`` and ``a_j = a_{j-1} c_j``, ``a_0 = 1``.

    Args:
        hidden: ``[B, gamma, d]`` draft hidden states.
        previous: ``[B, gamma]`` int64 token before each position.
        weight: ``[d]``, or ``[d + r]`` with ``w1``.
        bias: ``[]``.
        temperatures: ``[gamma]``.
        w1: ``[V, r]`` Markov embeddings, or None: the feature is the hidden state alone.
        dtype: what the logit and the sigmoid are computed in.

    Returns:
        ``[B, gamma]`` logits and confidences of ``dtype`` and survivals in float64. A confidence is
        NaN where its logit is or its token is outside the vocabulary; survival is 0 from there on.
    """
    batch, gamma, _ = hidden.shape
    logits = hidden.new_empty((batch, gamma), dtype=dtype)
    confidence = torch.empty_like(logits)
    survival = hidden.new_empty((batch, gamma), dtype=torch.float64)
    for b in range(batch):
        alive = torch.ones((), dtype=torch.float64, device=hidden.device)
        for j in range(gamma):
            feature = hidden[b, j].to(dtype)
            if w1 is not None:
                feature = torch.cat([feature, _embedding(w1, int(previous[b, j])).to(dtype)])
            logits[b, j] = (feature * weight.to(dtype)).sum() + bias.to(dtype)
            confidence[b, j] = torch.sigmoid(logits[b, j] / temperatures[j].to(dtype))
            alive = alive * confidence[b, j].double().nan_to_num(nan=0.0)
            survival[b, j] = alive
    return logits, confidence, survival


def _embedding(w1: torch.Tensor, token: int) -> torch.Tensor:
    if 0 <= token < w1.shape[0]:
        return w1[token]
    return w1.new_full((w1.shape[1],), torch.nan)
