"""Filters over a sharded vocabulary, in Triton: the global threshold, and what each shard keeps of it.

The search is that of ``accept/law.py`` with its counts and masses summed over ranks: ``narrow`` counts in
a shard, ``settle`` (every rank alike) takes the quarter of the interval that holds the threshold. Ties
at it are kept by token, so a shard keeps what the shards before it leave room for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dspark_kernels.accept.law import kept_sums, kept_weight, masses_above, nth_tie
from dspark_kernels.accept.parts import LOWEST, filters_of, fits_inside, heat_of, key_value
from dspark_kernels.vocab_parallel_accept.kernel import (
    COUNTS,
    FREE,
    LAW_FIELDS,
    STATS,
    UNALIGNED,
)


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=UNALIGNED)
def narrow_kernel(
    logits, logits_stride, rows, width, vocabulary, first, lens, drafted, temperature,
    top_k, top_p, min_p, laws, bounds, counts_out,
    gamma, PLACES: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """One program a row: counts and masses of its shard above three keys of the search."""
    request = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1)
    start, length, fits = fits_inside(
        first, lens, drafted, request, rows, vocabulary, gamma, PLACES
    )
    hot, _inverse, scale = heat_of(temperature, request)
    most, nucleus, _least, _any = filters_of(top_k, top_p, min_p, request, vocabulary)
    place = request * (gamma + 1) + position
    n0 = tl.full([], 0, tl.int32)
    n1 = tl.full([], 0, tl.int32)
    n2 = tl.full([], 0, tl.int32)
    m0 = tl.full([], 0.0, tl.float32)
    m1 = tl.full([], 0.0, tl.float32)
    m2 = tl.full([], 0.0, tl.float32)
    ties = tl.full([], 0, tl.int32)
    if fits & hot & (position <= length) & ((most < vocabulary) | (nucleus < 1.0)):
        low = tl.load(bounds + place * 2)
        gap = tl.load(bounds + place * 2 + 1) - low
        n0, n1, n2, m0, m1, m2, ties = masses_above(
            logits + (start + position) * logits_stride, width,
            tl.load(laws + place * LAW_FIELDS).to(tl.float32), scale,
            (low + gap // 4).to(tl.int32), (low + gap // 2).to(tl.int32),
            (low + (3 * gap) // 4).to(tl.int32), STAGES, SHIFT, TILE,
        )  # fmt: skip
    out = counts_out + place * COUNTS
    tl.store(out, n0.to(tl.float64))
    tl.store(out + 1, n1.to(tl.float64))
    tl.store(out + 2, n2.to(tl.float64))
    tl.store(out + 3, m0.to(tl.float64))
    tl.store(out + 4, m1.to(tl.float64))
    tl.store(out + 5, m2.to(tl.float64))
    tl.store(out + 6, ties.to(tl.float64))


@triton.jit
def _limits(laws, place, mask, most, nucleus):
    """The mass that may lie above the cut, by row."""
    mass = tl.load(laws + place * LAW_FIELDS + 1, mask=mask, other=1.0)
    return tl.where(nucleus < 1.0, nucleus.to(tl.float64) * mass, float("inf"))


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=UNALIGNED)
def settle_kernel(
    counts, requests, ranks, vocabulary, top_k, top_p, min_p, laws, bounds,
    gamma, PLACES: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """One program a request: the next interval of the search of every row."""
    request = tl.program_id(0).to(tl.int64)
    most, nucleus, _least, _any = filters_of(top_k, top_p, min_p, request, vocabulary)
    position = tl.arange(0, PLACES)
    rank = tl.arange(0, RANKS)
    real = position <= gamma
    inside = real[None, :] & (rank < ranks)[:, None]
    place = request * (gamma + 1) + position
    record = counts + (rank[:, None] * requests * (gamma + 1) + place[None, :]) * COUNTS
    limit = _limits(laws, place, real, most, nucleus)
    low = tl.load(bounds + place * 2, mask=real, other=0)
    high = tl.load(bounds + place * 2 + 1, mask=real, other=0)
    gap = high - low
    fits0 = (tl.sum(tl.load(record, mask=inside, other=0.0), 0) < most) & (
        tl.sum(tl.load(record + 3, mask=inside, other=0.0), 0) <= limit
    )
    fits1 = (tl.sum(tl.load(record + 1, mask=inside, other=0.0), 0) < most) & (
        tl.sum(tl.load(record + 4, mask=inside, other=0.0), 0) <= limit
    )
    fits2 = (tl.sum(tl.load(record + 2, mask=inside, other=0.0), 0) < most) & (
        tl.sum(tl.load(record + 5, mask=inside, other=0.0), 0) <= limit
    )
    t0 = low + gap // 4
    t1 = low + gap // 2
    t2 = low + (3 * gap) // 4
    after = tl.where(fits0, low, tl.where(fits1, t0 + 1, tl.where(fits2, t1 + 1, t2 + 1)))
    before = tl.where(fits0, t0, tl.where(fits1, t1, tl.where(fits2, t2, high)))
    # Once an interval is one key, it stays.
    tl.store(bounds + place * 2, tl.where(gap > 0, after, low), mask=real)
    tl.store(bounds + place * 2 + 1, tl.where(gap > 0, before, high), mask=real)


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=UNALIGNED)
def kept_kernel(
    logits, logits_stride, rows, width, base, vocabulary, first, lens, drafted, temperature,
    top_k, top_p, min_p, counts, requests, ranks, own_rank, laws, bounds, stats,
    sums_out, cuts_out, kept_out,
    gamma, PLACES: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, SHIFT: tl.constexpr, CUTS: tl.constexpr,
):  # fmt: skip
    """One program a row: what the filters keep of its shard, and the drafted token's weight.

    ``CUTS``: top-k and top-p were searched for; else only min-p filters.
    """
    request = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1)
    start, length, fits = fits_inside(
        first, lens, drafted, request, rows, vocabulary, gamma, PLACES
    )
    hot, _inverse, scale = heat_of(temperature, request)
    most, nucleus, least, filtered = filters_of(top_k, top_p, min_p, request, vocabulary)
    place = request * (gamma + 1) + position
    slot = tl.arange(0, SLOTS)
    top = tl.load(laws + place * LAW_FIELDS).to(tl.float32)
    own = tl.load(stats + place * STATS).to(tl.float32)
    sums = tl.load(sums_out + place * SLOTS + slot)
    # Sums are relative to the shard's own largest logit.
    sums = tl.where(own > -float("inf"), sums * tl.exp2((own - top) * scale), sums)
    cut = tl.full([], LOWEST, tl.int32)
    last = width
    x = tl.load(stats + place * STATS + 5).to(tl.float32)
    weight = tl.exp2((x - top) * scale)
    if fits & hot & (position <= length) & filtered:
        row = logits + (start + position) * logits_stride
        if CUTS:  # noqa: SIM102
            if (most < vocabulary) | (nucleus < 1.0):
                cut = tl.load(bounds + place * 2).to(tl.int32)
                count = tl.full([], 0.0, tl.float64)
                above = tl.full([], 0.0, tl.float64)
                ties = tl.full([], 0.0, tl.float64)
                mine = tl.full([], 0.0, tl.float64)
                for rank in tl.range(0, ranks):
                    record = counts + (rank * requests * (gamma + 1) + place) * COUNTS
                    count += tl.load(record)
                    above += tl.load(record + 3)
                    each = tl.load(record + 6)
                    ties += tl.where(rank < own_rank, each, 0.0)
                    mine = tl.where(rank == own_rank, each, mine)
                mass = tl.load(laws + place * LAW_FIELDS + 1)
                one = tl.exp2((key_value(cut, SHIFT) - top) * scale).to(tl.float64)
                left = nucleus.to(tl.float64) * mass - above
                fit = tl.where(nucleus < 1.0, left / tl.maximum(one, 1e-37), float("inf"))
                fit = tl.minimum(fit, vocabulary * 1.0).to(tl.int32) + 1
                room = tl.minimum(most - count.to(tl.int32), fit) - ties.to(tl.int32)
                if room <= 0:
                    last = -1
                elif room < mine.to(tl.int32):
                    last = nth_tie(row, width, cut, room - 1, STAGES, SHIFT, TILE)
        sums, _many = kept_sums(
            row, width, top, scale, cut, last, least, BLOCK, SLOTS, STAGES, SHIFT
        )
        token = tl.load(drafted + request * gamma + position, mask=position < length, other=-1)
        weight = kept_weight(x, (token - base).to(tl.int32), top, scale, cut, last, least, SHIFT)
    tl.store(sums_out + place * SLOTS + slot, sums)
    tl.store(cuts_out + place * 2, cut)
    tl.store(cuts_out + place * 2 + 1, last)
    tl.store(kept_out + place * 2, tl.sum(sums).to(tl.float64))
    tl.store(kept_out + place * 2 + 1, weight.to(tl.float64))
