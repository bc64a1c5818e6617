"""Acceptance: how much of each drafted block the target keeps, and the token after it.

Rows are ragged: request ``r`` sent its anchor and ``lens[r]`` drafted tokens through the target,
so it owns the logits rows ``first[r] .. first[r] + lens[r]``; row ``first[r] + j`` is the target's
law after the first ``j`` drafted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dspark_sglang.core.sampling import sample


@dataclass(frozen=True, slots=True)
class Accepted:
    """The outcome of one round."""

    #: ``[R]`` int64 drafted tokens kept, at most ``lens``.
    count: torch.Tensor
    #: ``[R]`` int64 the target's own token after them (correction or bonus).
    token: torch.Tensor


def accept_greedy(
    choice: torch.Tensor, drafted: torch.Tensor, lens: torch.Tensor, first: torch.Tensor
) -> Accepted:
    """Keep the longest prefix that equals the target's argmax.

    Args:
        choice: ``[N]`` int64 argmax of every target row.
        drafted: ``[R, gamma]`` int64 drafted tokens.
        lens: ``[R]`` int64 drafted tokens sent to verification.
        first: ``[R]`` int64 row of each request's anchor.
    """
    position = torch.arange(drafted.shape[1], device=drafted.device)
    sent = position < lens[:, None]
    rows = (first[:, None] + position).clamp(max=choice.shape[0] - 1)
    kept = (choice[rows] == drafted) & sent
    count = kept.long().cumprod(dim=1).sum(dim=1)
    return Accepted(count=count, token=choice[first + count])


def accept_sampled(
    weights: torch.Tensor,
    drafted: torch.Tensor,
    laws: torch.Tensor,
    lens: torch.Tensor,
    first: torch.Tensor,
    uniforms: torch.Tensor,
    support: torch.Tensor | None = None,
) -> Accepted:
    """Rejection sampling: the committed tokens follow the target's law exactly.

    ``x_k`` is kept with probability ``min(1, p(x_k) / q(x_k))``; at the first rejection the token
    comes from ``max(0, p - q)`` normalised; if all are kept, from the row after the last
    (Leviathan et al. 2023, theorem 1, applied to a ragged batch).

    Args:
        weights: ``[N, V]`` target weights of every row (need not be normalised).
        drafted: ``[R, gamma]`` int64 drafted tokens.
        laws: ``[R, gamma, V]`` the law each drafted token was drawn from.
        lens: ``[R]`` int64 drafted tokens sent to verification.
        first: ``[R]`` int64 row of each request's anchor.
        uniforms: ``[R, gamma + 1]`` in [0, 1): one per test, the last for the final token.
        support: ``[R, gamma, M]`` int64 tokens that ``laws`` (then ``[R, gamma, M]``) are over;
            None: the whole vocabulary.
    """
    gamma = drafted.shape[1]
    position = torch.arange(gamma, device=drafted.device)
    sent = position < lens[:, None]
    rows = (first[:, None] + position).clamp(max=weights.shape[0] - 1)
    total = weights.sum(-1)
    p = weights[rows, drafted] / total[rows]
    if support is None:
        q = laws.gather(-1, drafted[..., None]).squeeze(-1)
    else:
        q = (laws * (support == drafted[..., None])).sum(-1)
    kept = (uniforms[:, :gamma] * q < p) & sent
    count = kept.long().cumprod(dim=1).sum(dim=1)
    row = first + count
    final = weights[row] / total[row][:, None]
    rejected = (count < lens).nonzero().view(-1)
    if rejected.numel():
        where = rejected, count[rejected]
        if support is None:
            excess = final[rejected] - laws[where]
        else:
            excess = final[rejected].scatter_add(-1, support[where], -laws[where])
        residual = excess.clamp_(min=0.0)
        # p = q up to rounding leaves no residual mass; a rejection then had probability zero, and
        # the target's own law is the continuous answer.
        empty = residual.sum(-1) <= 0
        residual[empty] = final[rejected][empty]
        final = final.index_copy(0, rejected, residual)
    return Accepted(count=count, token=sample(final, uniforms[:, gamma]))
