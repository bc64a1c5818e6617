"""Acceptance: how much of each drafted block the target keeps, and the token after it.

Rows are ragged: request ``r`` sent its anchor and ``lens[r]`` drafted tokens through the target,
so it owns the logits rows ``first[r] .. first[r] + lens[r]``; row ``first[r] + j`` is the target's
distribution after the first ``j`` drafted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from dspark_sglang.core.sampling import sample


@dataclass(frozen=True, slots=True)
class Accepted:
    """The outcome of one round."""

    #: ``[R]`` int64 drafted tokens kept, at most ``lens``.
    count: torch.Tensor
    #: ``[R]`` int64 the target's own token after them (correction or bonus), or
    #: :data:`~.sampling.UNDECIDED` where the target's row there has no distribution.
    token: torch.Tensor


def accept_greedy(
    choice: torch.Tensor, drafted: torch.Tensor, lens: torch.Tensor, first: torch.Tensor
) -> Accepted:
    """Keep the longest prefix that equals the target's argmax.

    Args:
        choice: ``[N]`` int64 argmax of every target row, or its seeded draw; no drafted token is
            :data:`~.sampling.UNDECIDED`.
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


def stop_at(outcome: Accepted, drafted: torch.Tensor, stops: torch.Tensor) -> Accepted:
    """End each run at its first stop token, where plain decoding ends.

    Args:
        drafted: ``[R, gamma]`` int64 drafted tokens.
        stops: ``[R, S]`` int64 stop tokens of each request, padded with -1.
    """
    width = drafted.shape[1]
    position = torch.arange(width, device=drafted.device)
    ends = (drafted[..., None] == stops[:, None]).any(-1)
    first = torch.where(ends, position, width).min(dim=1).values
    cut = first < outcome.count
    last = drafted.gather(1, first.clamp(max=width - 1)[:, None]).squeeze(1)
    return Accepted(
        count=torch.where(cut, first, outcome.count), token=torch.where(cut, last, outcome.token)
    )


class Round(NamedTuple):
    """What verification of sampled requests starts from."""

    #: ``[N, V]`` target weights of every row (need not be normalised).
    weights: torch.Tensor
    #: ``[R, gamma]`` int64 drafted tokens.
    drafted: torch.Tensor
    #: ``[R, gamma, V]`` the distribution each drafted token was drawn from.
    probs: torch.Tensor
    #: ``[R]`` int64 drafted tokens sent to verification.
    lens: torch.Tensor
    #: ``[R]`` int64 row of each request's anchor.
    first: torch.Tensor
    #: ``[R, gamma, M]`` int64 tokens that ``probs`` (then ``[R, gamma, M]``) are over, or ``[M]``
    #: ascending where all share them; None: the whole vocabulary.
    support: torch.Tensor | None = None

    def target(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``[R, gamma]`` rows that judge each drafted token, and ``[N]`` total weight of each row."""
        position = torch.arange(self.drafted.shape[1], device=self.drafted.device)
        rows = (self.first[:, None] + position).clamp(max=self.weights.shape[0] - 1)
        return rows, self.weights.sum(-1)

    def chances(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``[R, gamma]`` probability of each drafted token under the target and under the drafter."""
        rows, total = self.target()
        p = self.weights[rows, self.drafted] / total[rows]
        if self.support is None:
            q = self.probs.gather(-1, self.drafted[..., None]).squeeze(-1)
        elif self.support.dim() == 1:
            at = torch.searchsorted(self.support, self.drafted).clamp(max=len(self.support) - 1)
            q = self.probs.gather(-1, at[..., None]).squeeze(-1)
            q = torch.where(self.support[at] == self.drafted, q, 0.0)
        else:
            q = (self.probs * (self.support == self.drafted[..., None])).sum(-1)
        return p, q

    def excess(
        self, target: torch.Tensor, request: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        """``max(0, target - q)``: what the drafter of ``(request, position)`` leaves of a distribution.

        Args:
            target: ``[n, V]``; overwritten.
            request, position: ``[n]`` int64.
        """
        probs = self.probs[request, position]
        if self.support is None:
            target -= probs
        else:
            shared = self.support.dim() == 1
            at = self.support.expand(probs.shape) if shared else self.support[request, position]
            target.scatter_add_(-1, at, -probs)
        return target.clamp_(min=0.0)


def judged(p: torch.Tensor, q: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
    """``[R]`` int64 drafted tokens that can be judged: a block ends before the first that cannot.

    Neither what the drafter drew from no distribution nor what stands behind a target row without one is kept. That
    looks at nothing drafted later, so what is kept follows the target's distribution.

    Args:
        p, q: ``[R, gamma]`` chances of the drafted tokens, NaN where there is no distribution.
        lens: ``[R]`` int64 drafted tokens that were sent.
    """
    position = torch.arange(p.shape[1], device=lens.device)
    unjudged = (p.isnan() | q.isnan()) & (position < lens[:, None])
    return torch.where(unjudged, position, lens[:, None]).amin(dim=1)


def accept_sampled(round_: Round, uniforms: torch.Tensor) -> Accepted:
    """Rejection sampling: the committed tokens follow the target's distribution exactly.

    ``x_k`` is kept with probability ``min(1, p(x_k) / q(x_k))``; at the first rejection the token
    comes from ``max(0, p - q)`` normalised; if all are kept, from the row after the last
    (Leviathan et al. 2023, theorem 1, applied to a ragged batch).

    Args:
        uniforms: ``[R, gamma + 1]`` in [0, 1): one per test, the last for the final token.
    """
    gamma = round_.drafted.shape[1]
    p, q = round_.chances()
    lens = judged(p, q, round_.lens)
    round_ = round_._replace(lens=lens)
    sent = torch.arange(gamma, device=lens.device) < lens[:, None]
    kept = (uniforms[:, :gamma] * q < p) & sent
    count = kept.long().cumprod(dim=1).sum(dim=1)
    return _finish(round_, count, torch.ones_like(uniforms[:, 0]), uniforms[:, gamma])


def accept_block(round_: Round, uniforms: torch.Tensor) -> Accepted:
    """Block verification: tokens are kept together, never fewer than by rejection sampling.

    With ``w_0 = 1`` and ``w_k = min(1, w_{k-1} p(x_k) / q(x_k))`` the chance that prefix ``k`` is
    kept, the longest prefix whose test succeeds is taken; prefix ``k`` of a longer block is tested
    with ``h_k = r_k / (r_k + 1 - w_k)``, ``r_k = sum_x max(0, w_k p(x) - q(x))`` over the next
    token, the whole block with ``w``. The token after prefix ``k`` comes from ``max(0, w_k p - q)``
    normalised, after the whole block from the target (Sun et al., "Block Verification
    Accelerates Speculative Decoding", 2024, algorithm 2; the whole block is here what was sent).

    Args:
        uniforms: ``[R, gamma + 1]`` in [0, 1): one per test, the last for the final token.
    """
    requests, gamma = round_.drafted.shape
    p, q = round_.chances()
    lens = judged(p, q, round_.lens)
    round_ = round_._replace(lens=lens)
    rows, total = round_.target()
    survives = p.new_ones((requests, gamma + 1))
    for k in range(gamma):
        ratio = torch.where(q[:, k] > 0, p[:, k] / q[:, k], 1.0)
        survives[:, k + 1] = (survives[:, k] * ratio).clamp(max=1.0)
    # Prefix k <= lens - 1 of each request is followed by a drafted token.
    request, prefix = (torch.arange(gamma, device=lens.device) < lens[:, None]).nonzero().unbind(1)
    row = rows[request, prefix]
    weight = survives[request, prefix]
    dist = round_.weights[row] * (weight / total[row])[:, None]
    left = round_.excess(dist, request, prefix).sum(-1)
    leaves = torch.zeros_like(survives[:, :gamma])
    leaves[request, prefix] = left.to(leaves.dtype)
    count = block_chances(survives, leaves, lens, uniforms[:, :gamma])
    return _finish(round_, count, survives.gather(1, count[:, None])[:, 0], uniforms[:, gamma])


def block_chances(
    survives: torch.Tensor, left: torch.Tensor, lens: torch.Tensor, uniforms: torch.Tensor
) -> torch.Tensor:
    """``[R]`` int64 drafted tokens that block verification keeps.

    Args:
        survives: ``[R, gamma + 1]`` chance ``w_k`` that prefix ``k`` is kept.
        left: ``[R, gamma]`` mass ``r_k`` that prefix ``k`` leaves of the next token's distribution; not read from
            ``lens`` on.
        uniforms: ``[R, gamma]``.
    """
    gamma = left.shape[1]
    tiny = torch.finfo(left.dtype).tiny
    chance = left / (left + 1.0 - survives[:, :gamma]).clamp(min=tiny)
    chance = torch.nn.functional.pad(chance, (0, 1))
    chance.scatter_(1, lens[:, None], survives.gather(1, lens[:, None]))
    position = torch.arange(1, gamma + 1, device=lens.device)
    kept = (uniforms < chance[:, 1:]) & (position <= lens[:, None])
    return (kept * position).max(dim=1).values if gamma else torch.zeros_like(lens)


def rows_of(
    lens: torch.Tensor, first: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits rows of some requests, one after the other.

    Args:
        lens: ``[R]`` int64 drafted tokens of each that were verified.
        first: ``[R]`` int64 row of each request's anchor.

    Returns:
        ``[n]`` int64 row in the logits, ``[n]`` int64 request it belongs to and ``[R]`` int64
        place of each request's first.
    """
    owner = torch.repeat_interleave(torch.arange(len(lens), device=lens.device), lens + 1)
    start = (lens + 1).cumsum(0) - (lens + 1)
    row = first[owner] + torch.arange(len(owner), device=lens.device) - start[owner]
    return row, owner, start


def _finish(
    round_: Round, count: torch.Tensor, scale: torch.Tensor, uniforms: torch.Tensor
) -> Accepted:
    """The token after ``count`` kept ones: from ``max(0, scale p - q)``, or from the target."""
    row = round_.first + count
    final = round_.weights[row]
    final = final / final.sum(-1, keepdim=True)
    stopped = (count < round_.lens).nonzero().view(-1)
    if stopped.numel():
        own = final[stopped]
        scaled = own * scale[stopped, None].to(own.dtype)
        residual = round_.excess(scaled, stopped, count[stopped])
        # p = q up to rounding leaves no residual mass; a rejection then had probability zero, and
        # the target's own distribution is the continuous answer.
        empty = residual.sum(-1) <= 0
        residual[empty] = own[empty]
        final = final.index_copy(0, stopped, residual)
    return Accepted(count=count, token=sample(final, uniforms))
