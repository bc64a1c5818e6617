"""Acceptance over a sharded vocabulary: three exchanges, one where every request is greedy; and its filters."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dspark_sglang.core.accept import Accepted, accept_greedy, block_chances, judged, rows_of
from dspark_sglang.core.sampling import UNDECIDED, Filters
from dspark_sglang.core.seeded import gumbel
from dspark_sglang.core.tensor_parallel.shard import Exchange, Shard, best_of


class Sampling(NamedTuple):
    """The requests that sample, as ranks need them."""

    #: ``[S]`` int64 indices of their rows in the batch.
    requests: torch.Tensor
    #: ``[S]`` temperatures above 0.
    temperatures: torch.Tensor
    #: ``[S, gamma, width]`` this rank's columns of the drafted distributions; None where draws are coupled.
    probs: torch.Tensor | None = None
    #: ``[S, gamma + 1]`` in [0, 1), equal on every rank; None where draws are coupled.
    uniforms: torch.Tensor | None = None
    #: ``[S]``; None where no request filters. Not where draws are coupled.
    filters: Filters | None = None
    #: ``[S]`` int64 seeds and positions of the anchors, where the target draws with its own noise.
    seeds: torch.Tensor | None = None
    anchors: torch.Tensor | None = None
    #: Verify sampled blocks together.
    block: bool = False


class _Rows(NamedTuple):
    """Target rows of the sampled requests, request after request."""

    #: ``[n, width]`` float64 weights relative to the row's largest, this rank's columns.
    weights: torch.Tensor
    #: ``[n]`` float64 their sum over all ranks.
    total: torch.Tensor
    #: ``[n]`` float64 weight of the drafted token that the row judges, and its drafted probability.
    drafted: torch.Tensor
    prob: torch.Tensor


def accept(
    logits: torch.Tensor,
    drafted: torch.Tensor,
    lens: torch.Tensor,
    first: torch.Tensor,
    shard: Shard,
    sampling: Sampling | None = None,
) -> Exchange[Accepted]:
    """What :mod:`dspark_sglang.core.accept` decides on whole rows.

    Args:
        logits: ``[N, width]`` this rank's columns of the target's logits, adjusted as in plain decoding.
        drafted: ``[R, gamma]`` int64 drafted tokens.
        lens: ``[R]`` int64 drafted tokens sent to verification.
        first: ``[R]`` int64 row of each request's anchor.
        sampling: the requests that sample; None: all are greedy.
    """
    record = shard.best(logits)
    if sampling is None:
        return accept_greedy(best_of((yield record)), drafted, lens, first)
    row, owner, start = rows_of(lens[sampling.requests], first[sampling.requests])
    scaled = logits[row] / sampling.temperatures[owner, None]
    # Infinity counts as the largest number, as on whole rows.
    scaled = scaled.clamp_(max=torch.finfo(scaled.dtype).max).double()
    if sampling.seeds is not None and sampling.anchors is not None:
        within = torch.arange(len(owner), device=row.device) - start[owner]
        positions = sampling.anchors[owner] + within
        noise = gumbel(sampling.seeds[owner], positions, shard.columns(row.device))
        record[row] = shard.best(scaled + noise)
        every = yield record
        choice, score = best_of(every), every[..., 0].amax(dim=0)[row]
        choice[row] = choice[row].where(score.isfinite(), UNDECIDED)
        return accept_greedy(choice, drafted, lens, first)
    own = drafted[sampling.requests]
    stats = _stats(scaled, sampling, own, (owner, start), shard)
    every = yield torch.cat([record.view(-1), stats.view(-1)])
    greedy, stats = every[:, : record.numel()], every[:, record.numel() :]
    choice = best_of(greedy.reshape(len(every), *record.shape))
    rows = _weigh(scaled, stats.reshape(len(every), len(row), 4))
    if sampling.filters is not None:
        rows = yield from _filtered(rows, sampling.filters.take(owner), own, (owner, start), shard)
    found = yield from _sampled(rows, sampling, own, lens[sampling.requests], start, shard)
    outcome = accept_greedy(choice, drafted, lens, first)
    return Accepted(
        count=outcome.count.index_copy(0, sampling.requests, found.count),
        token=outcome.token.index_copy(0, sampling.requests, found.token),
    )


def _judged(
    drafted: torch.Tensor, places: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n]`` position of each row in its block, and the token it judges (any one for the last row)."""
    owner, start = places
    position = torch.arange(len(owner), device=owner.device) - start[owner]
    position = position.clamp(max=drafted.shape[1] - 1)
    return position, drafted[owner, position]


def _stats(
    scaled: torch.Tensor,
    sampling: Sampling,
    drafted: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor],
    shard: Shard,
) -> torch.Tensor:
    """``[n, 4]``: largest logit, mass relative to it, the drafted token's logit and its drafted distribution."""
    position, tokens = _judged(drafted, places)
    assert sampling.probs is not None
    top = scaled.amax(dim=-1)
    mass = (scaled - top[:, None]).exp().sum(-1)
    prob = shard.pick(sampling.probs[places[0], position], tokens, 0.0)
    return torch.stack(
        [top, mass, shard.pick(scaled, tokens, -float("inf")), prob.double()], dim=-1
    )


def _weigh(scaled: torch.Tensor, stats: torch.Tensor) -> _Rows:
    """Weights relative to the largest logit of any rank; ``stats`` ``[W, n, 4]``."""
    top = stats[..., 0].amax(dim=0)
    total = (stats[..., 1] * (stats[..., 0] - top).exp()).sum(dim=0)
    drafted = (stats[..., 2].amax(dim=0) - top).exp()
    return _Rows((scaled - top[:, None]).exp(), total, drafted, stats[..., 3].sum(dim=0))


def _filtered(
    rows: _Rows,
    filters: Filters,
    drafted: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor],
    shard: Shard,
) -> Exchange[_Rows]:
    """The rows after their filters; rows that filter nothing are not exchanged."""
    using = (~filters.idle(shard.vocabulary)).nonzero().view(-1)
    if not len(using):
        return rows
    kept = yield from keep(rows.weights[using], filters.take(using), shard)
    tokens = _judged(drafted, places)[1][using]
    record = torch.stack([kept.sum(-1), shard.pick(kept, tokens, 0.0)], dim=-1)
    found = (yield record).sum(dim=0)
    return rows._replace(
        weights=rows.weights.index_copy(0, using, kept),
        total=rows.total.index_copy(0, using, found[:, 0]),
        drafted=rows.drafted.index_copy(0, using, found[:, 1]),
    )


def _sampled(
    rows: _Rows,
    sampling: Sampling,
    drafted: torch.Tensor,
    lens: torch.Tensor,
    start: torch.Tensor,
    shard: Shard,
) -> Exchange[Accepted]:
    """Verification of the sampled requests; see ``accept_sampled`` and ``accept_block``."""
    uniforms, gamma = sampling.uniforms, drafted.shape[1]
    assert uniforms is not None and sampling.probs is not None
    position = torch.arange(gamma, device=lens.device)
    place = torch.minimum(start[:, None] + position, start[:, None] + lens[:, None])
    p, q = rows.drafted[place] / rows.total[place], rows.prob[place]
    lens = judged(p, q, lens)
    if sampling.block:
        survives = p.new_ones((len(lens), gamma + 1))
        for k in range(gamma):
            ratio = torch.where(q[:, k] > 0, p[:, k] / q[:, k], 1.0)
            survives[:, k + 1] = (survives[:, k] * ratio).clamp(max=1.0)
        dist = rows.weights[place] * (survives[:, :gamma] / rows.total[place])[..., None]
        left = (dist - sampling.probs).clamp_(min=0.0).sum(-1)
        count = block_chances(survives, (yield left).sum(dim=0), lens, uniforms[:, :gamma])
        scale = survives.gather(1, count[:, None])
    else:
        kept = (uniforms[:, :gamma] * q < p) & (position < lens[:, None])
        count = kept.long().cumprod(dim=1).sum(dim=1)
        scale = torch.ones_like(uniforms[:, :1])
    row = start + count
    own = rows.weights[row] / rows.total[row, None]
    at = count.clamp(max=gamma - 1)
    dist = sampling.probs[torch.arange(len(lens), device=lens.device), at]
    residual = (own * scale - dist).clamp_(min=0.0)
    every = yield torch.stack([residual.sum(-1), own.sum(-1)], dim=-1)
    # As in ``core.accept``: p = q up to rounding leaves no residual, and then the target's own distribution is it.
    rejected = (count < lens) & (every[..., 0].sum(dim=0) > 0)
    final = torch.where(rejected[:, None], residual, own)
    masses = torch.where(rejected, every[..., 0], every[..., 1])
    token = yield from _draw(final, masses, uniforms[:, gamma], shard)
    return Accepted(count=count, token=token)


def _draw(
    final: torch.Tensor, masses: torch.Tensor, uniforms: torch.Tensor, shard: Shard
) -> Exchange[torch.Tensor]:
    """One token a row, by the cumulative sum over all columns; ``masses`` ``[W, S]``."""
    cumulative = masses.cumsum(dim=0)
    wanted = uniforms * cumulative[-1]
    # u * total can round up to total; the last rank with any mass is then the right one.
    last = masses.shape[0] - 1 - (masses.flip(0) > 0).int().argmax(dim=0)
    rank = torch.minimum((cumulative <= wanted).sum(dim=0), last)
    before = cumulative.gather(0, rank[None])[0] - masses.gather(0, rank[None])[0]
    inside = final.cumsum(-1)
    total = inside[:, -1:].contiguous()
    column = torch.searchsorted(inside, (wanted - before).clamp(min=0.0)[:, None], right=True)
    column = torch.minimum(column, torch.searchsorted(inside, total)).squeeze(1)
    column = column.clamp(max=shard.width - 1)
    token = torch.where(rank == shard.rank, column + shard.start, -1)
    every = yield token
    sound = (cumulative[-1] > 0) & (cumulative[-1] < torch.inf)
    return torch.where(sound, every.amax(dim=0), UNDECIDED)


#: Weights relative to the largest lie in [0, 1]; as bits of float32 that is a range of 2^30, and each
#: exchange of the search leaves a quarter of it.
_ONE = 0x3F800000
_ROUNDS = 16


def keep(weights: torch.Tensor, filters: Filters, shard: Shard) -> Exchange[torch.Tensor]:
    """Weights with those set to 0 that the filters drop, as ``sorted_weights`` drops them.

    Where a row filters by top-k or top-p, 17 exchanges: of ``[F, 3, 2]`` float32, then one of
    ``[F, 3]`` float64, ``F`` the rows given. Equal weights at the edge are kept by token.

    Args:
        weights: ``[F, width]`` float64 weights of this rank's columns, relative to the row's largest.
        filters: of the rows; all thresholds refer to the unfiltered distribution.
    """
    values = weights.float()
    kept = values >= filters.min_p[:, None].to(values.dtype)
    if bool((filters.top_p < 1.0).any() or (filters.top_k < shard.vocabulary).any()):
        kept &= yield from _searched(values, filters, shard)
    return torch.where(kept, weights, 0.0)


class _Sorted:
    """Counts and masses above a weight, of one shard."""

    def __init__(self, values: torch.Tensor) -> None:
        self._ascending = values.sort(dim=-1).values
        self._width = values.shape[-1]
        tail = self._ascending.flip(-1).double().cumsum(-1)
        self._masses = torch.nn.functional.pad(tail, (1, 0))

    def above(self, bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many weights lie above ``bounds`` ``[F, n]`` float32, and their sum."""
        index = torch.searchsorted(self._ascending, bounds.contiguous(), right=True)
        count = self._width - index
        return count, self._masses.gather(-1, count)


def _searched(values: torch.Tensor, filters: Filters, shard: Shard) -> Exchange[torch.Tensor]:
    """``[F, width]`` bool: what top-k and top-p keep.

    A token of weight ``t`` stays if fewer than ``top_k`` tokens, of at most ``top_p`` of the mass, weigh
    more; the least such ``t`` is searched for.
    """
    known = _Sorted(values)
    own = known.above(torch.full_like(values[:, :1], -1.0))[1].squeeze(-1)
    low = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    high = torch.full_like(low, _ONE)
    most, share = filters.top_k.double()[:, None], filters.top_p.double()[:, None]
    limit = torch.full_like(share, float("inf"))
    for round_ in range(_ROUNDS):
        gap = high - low
        keys = torch.stack([low + gap * part // 4 for part in (1, 2, 3)], dim=-1)
        count, mass = known.above(keys.int().view(torch.float32))
        record = torch.stack([count.float(), mass.float()], dim=-1)
        if not round_:  # the row's whole mass travels with the first
            record = torch.cat([record, own.float()[:, None, None].expand(-1, 1, 2)], dim=1)
        total = (yield record).double().sum(dim=0)
        if not round_:
            limit = torch.where(share < 1.0, share * total[:, 3:, 1], limit)
        fits = (total[:, :3, 0] < most) & (total[:, :3, 1] <= limit)
        high = torch.where(fits, keys, high[:, None]).amin(dim=-1)
        low = torch.where(fits, low[:, None], keys + 1).amax(dim=-1)
    edge = high.int().view(torch.float32)[:, None]
    ties = values == edge
    count, mass = known.above(edge)
    record = torch.stack([count[:, 0].double(), mass[:, 0], ties.sum(-1).double()], dim=-1)
    every = yield record
    above = every.sum(dim=0)
    room = most[:, 0] - above[:, 0]
    fitting = ((limit[:, 0] - above[:, 1]) / edge[:, 0].double().clamp(min=1e-300)).floor() + 1
    room = torch.minimum(room, fitting) - every[: shard.rank, :, 2].sum(dim=0)
    kept: torch.Tensor = (values > edge) | (ties & (ties.cumsum(-1) <= room[:, None]))
    return kept
