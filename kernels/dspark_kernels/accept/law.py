"""Filtered laws in Triton: thresholds by bisection, kept sums, draws keyed by rank.

A filter keeps a prefix of the tokens ordered by (logit descending, token ascending). The prefix is
described by the key of its last logit, the last token kept of that logit, and ``min_p``:

    kept(x) = (key(x) > cut or (key(x) = cut and x <= last)) and exp((l_x - max) / T) >= min_p

``cut`` is the least key ``t`` with ``#{key > t} < top_k`` and ``mass{key > t} <= top_p * mass``;
of the tokens tied at it as many are kept as satisfy both conditions one by one.

It is searched among candidates: the largest logits of each chunk of the vocabulary, in registers. Where they
do not reach as far as the filters (a top-p of a flat law), the row itself is bisected.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dspark_kernels.accept.parts import LOWEST, gumbel, hash_column, key_value, order_key


@triton.jit
def masses_above(
    row, width, top, scale, t0, t1, t2,
    STAGES: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Counts and masses of the keys above three thresholds, and the count equal to the first."""
    n0 = tl.zeros([TILE], tl.int32)
    n1 = tl.zeros([TILE], tl.int32)
    n2 = tl.zeros([TILE], tl.int32)
    m0 = tl.zeros([TILE], tl.float32)
    m1 = tl.zeros([TILE], tl.float32)
    m2 = tl.zeros([TILE], tl.float32)
    ties = tl.zeros([TILE], tl.int32)
    for block in tl.range(0, tl.cdiv(width, TILE), num_stages=STAGES):
        offs = block * TILE + tl.arange(0, TILE)
        inside = offs < width
        x = tl.load(row + offs, mask=inside, other=-float("inf")).to(tl.float32)
        key = order_key(x, SHIFT)
        weight = tl.exp2((x - top) * scale)
        n0 += (inside & (key > t0)).to(tl.int32)
        n1 += (inside & (key > t1)).to(tl.int32)
        n2 += (inside & (key > t2)).to(tl.int32)
        ties += (inside & (key == t0)).to(tl.int32)
        m0 += tl.where(key > t0, weight, 0.0)
        m1 += tl.where(key > t1, weight, 0.0)
        m2 += tl.where(key > t2, weight, 0.0)
    return tl.sum(n0), tl.sum(n1), tl.sum(n2), tl.sum(m0), tl.sum(m1), tl.sum(m2), tl.sum(ties)


@triton.jit
def bisect(
    row, width, top, scale, most, limit,
    STAGES: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The least key above which fewer than ``most`` tokens and at most ``limit`` mass lie.

    Four intervals a pass: about 17 passes over 32 bits, 9 over bfloat16's 16.

    Returns:
        the key (int32), tokens above it, mass above it, tokens equal to it.
    """
    low = tl.full([], LOWEST >> SHIFT, tl.int64)
    high = order_key(top, SHIFT).to(tl.int64)
    count = 0
    mass = tl.full([], 0.0, tl.float32)
    ties = 0
    # One pass more than the search needs: the last, with low = high, counts at the key found.
    searching = low <= high
    while searching:
        searching = low < high
        t0 = low + (high - low) // 4
        t1 = low + (high - low) // 2
        t2 = low + (3 * (high - low)) // 4
        count, n1, n2, mass, m1, m2, ties = masses_above(
            row, width, top, scale, t0.to(tl.int32), t1.to(tl.int32), t2.to(tl.int32),
            STAGES, SHIFT, TILE,
        )  # fmt: skip
        if searching:
            fits0 = (count < most) & (mass <= limit)
            fits1 = (n1 < most) & (m1 <= limit)
            fits2 = (n2 < most) & (m2 <= limit)
            low = tl.where(fits0, low, tl.where(fits1, t0 + 1, tl.where(fits2, t1 + 1, t2 + 1)))
            high = tl.where(fits0, t0, tl.where(fits1, t1, tl.where(fits2, t2, high)))
    key = low.to(tl.int32)
    return key, count, mass, ties


@triton.jit
def kept_weight(x, offs, top, scale, cut, last, min_p, SHIFT: tl.constexpr):
    """``exp((x - top) / T)`` of the tokens the filters keep, 0 of the others."""
    weight = tl.exp2((x - top) * scale)
    key = order_key(x, SHIFT)
    kept = ((key > cut) | ((key == cut) & (offs <= last))) & (weight >= min_p)
    return tl.where(kept, weight, 0.0)


@triton.jit
def nth_tie(row, width, key, which, STAGES: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """The token that is number ``which`` (from 0) of those whose logit has this key."""
    before = 0
    token = width - 1
    block = 0
    blocks = tl.cdiv(width, TILE)
    while block < blocks:
        offs = block * TILE + tl.arange(0, TILE)
        inside = offs < width
        x = tl.load(row + offs, mask=inside, other=-float("inf")).to(tl.float32)
        tie = (inside & (order_key(x, SHIFT) == key)).to(tl.int32)
        many = tl.sum(tie)
        block += 1
        if before + many > which:
            rank = before + tl.cumsum(tie, 0) - 1
            token = tl.min(tl.where((tie > 0) & (rank == which), offs, 2147483647))
            block = blocks
        before += many
    return token


@triton.jit
def _key_above(
    row, width, top, scale, most, limit, keys, weights, enough,
    STAGES: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """:func:`bisect` of a row by its candidates where they are ``enough``."""
    low = tl.full([], LOWEST >> SHIFT, tl.int64)
    high = order_key(top, SHIFT).to(tl.int64)
    count = 0
    mass = tl.full([], 0.0, tl.float32)
    ties = 0
    if enough:
        while low < high:
            middle = (low + (high - low) // 2).to(tl.int32)
            above = keys > middle
            fits = (tl.sum(above.to(tl.int32)) < most) & (
                tl.sum(tl.where(above, weights, 0.0)) <= limit
            )
            low = tl.where(fits, low, middle.to(tl.int64) + 1)
            high = tl.where(fits, middle.to(tl.int64), high)
        above = keys > low.to(tl.int32)
        count = tl.sum(above.to(tl.int32))
        mass = tl.sum(tl.where(above, weights, 0.0))
        ties = tl.sum((keys == low.to(tl.int32)).to(tl.int32))
        key = low.to(tl.int32)
    else:
        key, count, mass, ties = bisect(row, width, top, scale, most, limit, STAGES, SHIFT, TILE)
    return key, count, mass, ties


@triton.jit
def _tie(
    row, width, key, which, keys, enough,
    STAGES: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """:func:`nth_tie` of a row; where its candidates are ``enough``, the place among these."""
    token = width - 1
    if enough:
        tie = (keys == key).to(tl.int32)
        here = (tie > 0) & (tl.cumsum(tie, 0) - 1 == which)
        token = tl.min(tl.where(here, tl.arange(0, keys.shape[0]), 2147483647))
    else:
        token = nth_tie(row, width, key, which, STAGES, SHIFT, TILE)
    return token


@triton.jit
def cut_row(
    row, width, top, scale, mass, top_k, top_p, keys, weights, enough,
    STAGES: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Where top-k and top-p end a row.

    Args:
        mass: float32 sum of all ``exp((x - top) / T)``.
        keys, weights: the row's candidates in the order of their columns; places without one have the lowest
            key and weight 0.
        enough: whether all that the filters keep are among them.

    Returns:
        key of the last kept logit, and the last token kept of that logit: its place among candidates where
        these are enough, ``width`` where all are kept.
    """
    key = tl.full([], LOWEST, tl.int32)
    last = width
    if (top_k < width) | (top_p < 1.0):
        limit = tl.where(top_p < 1.0, top_p * mass, float("inf"))
        most = tl.minimum(top_k, width)
        key, count, above, ties = _key_above(
            row, width, top, scale, most, limit, keys, weights, enough, STAGES, SHIFT, TILE
        )
        each = tl.exp2((key_value(key, SHIFT) - top) * scale)
        fit = tl.where(top_p < 1.0, (limit - above) / tl.maximum(each, 1e-37), float("inf"))
        room = tl.minimum(most - count, tl.minimum(fit, width * 1.0).to(tl.int32) + 1)
        # As many ties as there is room for: candidates may have left out others.
        if room <= ties:
            last = _tie(row, width, key, room - 1, keys, enough, STAGES, SHIFT, TILE)
    return key, last


@triton.jit
def kept_sums(
    row, width, top, scale, cut, last, min_p,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """``[SLOTS]`` sums of the kept weights of every block, and how many tokens are kept."""
    slot = tl.arange(0, SLOTS)
    sums = tl.zeros([SLOTS], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for block in tl.range(0, tl.cdiv(width, BLOCK), num_stages=STAGES):
        offs = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(row + offs, mask=offs < width, other=-float("inf")).to(tl.float32)
        weight = kept_weight(x, offs, top, scale, cut, last, min_p, SHIFT)
        count += (weight > 0).to(tl.int32)
        sums = tl.where(slot == block, tl.sum(weight), sums)
    return sums, tl.sum(count)


@triton.jit
def ranked_draw(
    row, width, top, scale, inverse, kept, state, keys, weights, enough,
    STAGES: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Seeded draw of a filtered row, whose noise is keyed by rank in the sorted law.

    Probabilities fall with rank, so only a rank whose noise is a record (above the noise of every
    rank before it) can win: about ``log(kept)`` ranks, each found by a bisection.

    Args:
        kept: tokens that the filters keep.
        keys, weights, enough: as for :func:`cut_row`.

    Returns:
        int32 token, or its place among candidates that are enough.
    """
    record = tl.full([], -float("inf"), tl.float64)
    best = tl.full([], -float("inf"), tl.float64)
    winner = order_key(top, SHIFT)
    which = 0
    level = top
    for start in tl.range(0, kept, TILE):
        rank = start + tl.arange(0, TILE)
        noise = tl.where(rank < kept, gumbel(hash_column(state, rank)), -float("inf"))
        highest = tl.max(noise)
        while highest > record:
            place = tl.min(tl.where(noise > record, rank, 2147483647))
            record = tl.max(tl.where(rank == place, noise, -float("inf")))
            # The logit of a later rank is at most the last one found.
            if record + (level - top).to(tl.float64) * inverse.to(tl.float64) > best:
                key, count, _mass, _ties = _key_above(
                    row, width, top, scale, place + 1, float("inf"), keys, weights, enough,
                    STAGES, SHIFT, TILE,
                )  # fmt: skip
                level = key_value(key, SHIFT)
                score = record + (level - top).to(tl.float64) * inverse.to(tl.float64)
                if score > best:
                    best = score
                    winner = key
                    which = place - count
    return _tie(row, width, winner, which, keys, enough, STAGES, SHIFT, TILE)
