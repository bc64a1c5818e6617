"""Acceptance over a vocabulary sharded over ranks, in Triton.

Rank ``w`` holds columns ``s_w .. s_{w+1}`` of every row. With ``m_w, z_w`` the largest logit of a shard and
its sum of ``exp((l - m_w) / T)``, a row's law is known from ``W`` small records:

    m = max_w m_w        z = sum_w z_w exp((m_w - m) / T)        p(x) = exp((l_x - m) / T) / z
    argmax: the least column among the shards that reach m; seeded draws likewise by score;
    a shard with a NaN reaches beyond all others

Greedy rows, rows without a law and drafted laws that are NaN are treated as in ``accept``.

    stats   | local: m_w, z_w, argmax, seeded score, logits of the drafted tokens of every row      -> gather
    combine | every rank alike: laws, which tokens are kept, the final row of each request
    masses  | local: mass of p and of max(0, p - q) in the shard, of the final row                   -> gather
    draw    | the rank whose interval of the cumulative sum holds u * total inverts it in its shard -> gather
    finish  | every rank alike: the token

Filters bisect for the global threshold (``narrow`` local, gather, ``settle``: 16 bits or 32, two a step), then
sum what is kept (``kept`` local, gather, ``decide``). All sums over ranks are float64 in rank order, so
every rank decides alike.

Rows are all read: a rejection is known only after an exchange, and an exchange a row would cost more
than a ``W``-th of a row. Every row is a program of its own, so the card is busy at one request.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dspark_kernels.accept import kernel as whole
from dspark_kernels.accept.adjust import adjust_row
from dspark_kernels.accept.final import NOTHING, drafted_chances, invert, residual_sums
from dspark_kernels.accept.parts import (
    LOG2E,
    LOWEST,
    fits_inside,
    heat_of,
    noise_state,
    order_key,
    row_pass,
)

#: Fields of a row's local record (float64): largest logit, mass, argmax, seeded score, seeded draw,
#: logit of the drafted token, its drafted logit; -inf where the shard does not hold it.
STATS = tl.constexpr(7)
#: Fields of a combined row: largest logit, mass, own choice, drafted token's weight, its drafted
#: logit, whether it has a law.
LAW_FIELDS = tl.constexpr(6)
#: Counts and masses above three thresholds, ties at the first.
COUNTS = tl.constexpr(7)
#: What is known of a request's outcome: kept tokens, own choice, flag.
OUTCOME = tl.constexpr(3)
BROKEN_LAYOUT = tl.constexpr(2)
#: As for ``accept``: no kernel is compiled for a value of these, nor for where operands lie.
FREE = [
    "logits_stride", "rows", "width", "base", "vocabulary", "requests", "ranks", "own_rank", "gamma", "law_size",
    "adjust_size",
]  # fmt: skip
UNALIGNED = [
    *whole.UNALIGNED, "stats", "counts", "kept", "masses", "found", "count", "token", "flag",
]  # fmt: skip


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=UNALIGNED)
def stats_kernel(
    logits, logits_stride, rows, width, base, vocabulary, first, lens, drafted, temperature,
    law, seeds, positions, coupling,
    adjust_tokens, adjust_counts, adjust_bias, adjust_stops, adjust_size,
    frequency, presence, repetition, min_new, lengths, stats_out, sums_out,
    gamma, PLACES: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
    STAGES: tl.constexpr, DENSE: tl.constexpr, COUPLED: tl.constexpr, ADJUSTED: tl.constexpr,
):  # fmt: skip
    """One program a row: the record of its shard. Rows that no request owns are not read."""
    request = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1)
    start, length, fits = fits_inside(
        first, lens, drafted, request, rows, vocabulary, gamma, PLACES
    )
    _hot, inverse, scale = heat_of(temperature, request)
    place = request * (gamma + 1) + position
    out = stats_out + place * STATS
    slot = tl.arange(0, SLOTS)
    top = tl.full([], -float("inf"), tl.float32)
    choice = tl.full([], 0, tl.int32)
    sums = tl.zeros([SLOTS], tl.float32)
    score = tl.full([], -float("inf"), tl.float64)
    drawn = tl.full([], 0, tl.int32)
    x = tl.full([], -float("inf"), tl.float32)
    q = tl.full([], -float("inf"), tl.float32)
    if fits & (position <= length):
        row = logits + (start + position) * logits_stride
        if ADJUSTED:
            listing = request * adjust_size
            adjust_row(
                row, width, base, drafted + request * gamma, position, adjust_tokens + listing,
                adjust_counts + listing, adjust_bias + listing, adjust_stops + listing,
                adjust_size, tl.load(frequency + request), tl.load(presence + request),
                tl.load(repetition + request),
                tl.load(lengths + request) + position < tl.load(min_new + request), PLACES,
            )  # fmt: skip
        state = noise_state(tl.full([], 0, tl.int64), tl.full([], 0, tl.int64))
        coupled = position < 0
        if COUPLED:
            at = tl.load(positions + request) + position
            state = noise_state(tl.load(seeds + request), at)
            coupled = tl.load(coupling + request) != 0
        top, choice, sums, score, drawn = row_pass(
            row, width, base, scale, inverse, state, coupled, BLOCK, SLOTS, STAGES, COUPLED
        )
        if position < length:
            token = tl.load(drafted + request * gamma + position) - base
            own = (token >= 0) & (token < width)
            x = tl.load(row + token, mask=own, other=-float("inf")).to(tl.float32)
            if DENSE:
                offered = law + (request * gamma + position) * width
                q = tl.load(offered + token, mask=own, other=-float("inf")).to(tl.float32)
    tl.store(out, top.to(tl.float64))
    tl.store(out + 1, tl.sum(sums).to(tl.float64))
    tl.store(out + 2, (choice + base).to(tl.float64))
    tl.store(out + 3, score)
    tl.store(out + 4, drawn.to(tl.float64))
    tl.store(out + 5, x.to(tl.float64))
    tl.store(out + 6, q.to(tl.float64))
    tl.store(sums_out + place * SLOTS + slot, sums)


@triton.jit
def _decide(
    request, position, length, fits, decides, sampled, choice, wanted, q, drafted, uniforms,
    law, lse, listed, law_size, scale, count_out, token_out, flag_out,
    gamma, PLACES: tl.constexpr, LAW: tl.constexpr,
):  # fmt: skip
    """Kept tokens of one request from ``[PLACES]`` float64 laws; the own choice after them.

    The choice is -1 at a row that decides nothing.
    """
    inside = position < length
    token = tl.load(drafted + request * gamma + position, mask=inside, other=-1)
    uniform = tl.load(uniforms + request * (gamma + 1) + position, mask=inside, other=0.0)
    offered = tl.full([PLACES], 1.0, tl.float64)
    if LAW == 1:
        share = tl.load(lse + request * gamma + position, mask=inside, other=0.0)
        offered = tl.exp2(q.to(tl.float32) * scale - share * LOG2E).to(tl.float64)
        offered = tl.where(tl.abs(share) < float("inf"), offered, float("nan"))
    if LAW == 2:
        offered = drafted_chances(
            law, lse, listed, law_size, request * gamma + position, inside, token, scale, LAW, PLACES
        ).to(tl.float64)  # fmt: skip
    kept = tl.where(sampled, uniform.to(tl.float64) * offered < wanted, choice == token)
    count = tl.min(tl.where(inside & kept & decides, PLACES, position))
    final = tl.sum(tl.where(position == count, tl.where(decides, choice, -1), 0))
    done = fits & (length >= 0)
    tl.store(count_out + request, tl.where(done, count, 0))
    tl.store(token_out + request, tl.where(done, final, 0))
    tl.store(flag_out + request, tl.where(fits | (length < 0), 0, BROKEN_LAYOUT))


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=UNALIGNED)
def combine_kernel(
    stats, requests, ranks, rows, vocabulary, first, lens, drafted, temperature, uniforms,
    law, lse, listed, law_size, coupling, laws_out, bounds_out, count_out, token_out, flag_out,
    gamma, PLACES: tl.constexpr, RANKS: tl.constexpr, SHIFT: tl.constexpr,
    LAW: tl.constexpr, COUPLED: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """One program a request: its rows' laws, and what is kept unless filters come first."""
    request = tl.program_id(0).to(tl.int64)
    _start, length, fits = fits_inside(
        first, lens, drafted, request, rows, vocabulary, gamma, PLACES
    )
    hot, _inverse, scale = heat_of(temperature, request)
    position = tl.arange(0, PLACES)
    rank = tl.arange(0, RANKS)
    inside = (position <= gamma)[None, :] & (rank < ranks)[:, None]
    place = (rank[:, None] * requests + request) * (gamma + 1) + position[None, :]
    record = stats + place * STATS
    none = -float("inf")
    tops = tl.load(record, mask=inside, other=none)
    masses = tl.load(record + 1, mask=inside, other=0.0)
    choices = tl.load(record + 2, mask=inside, other=0.0)
    odd = tops != tops
    top = tl.max(tl.where(odd, float("inf"), tops), 0)
    far = tl.exp2(((tops - top[None, :]) * scale.to(tl.float64)).to(tl.float32)).to(tl.float64)
    mass = tl.sum(tl.where(tops == none, masses, masses * far), 0)
    reach = tl.where((tl.max(odd.to(tl.int32), 0) > 0)[None, :], odd, tops == top[None, :])
    choice = tl.min(tl.where(reach, choices, 1e18), 0)
    coupled = length < -1
    if COUPLED:
        coupled = (tl.load(coupling + request) != 0) & hot
        scores = tl.load(record + 3, mask=inside, other=none)
        score = tl.max(scores, 0)
        drawn = tl.load(record + 4, mask=inside, other=0.0)
        drawn = tl.min(tl.where(scores == score[None, :], drawn, 1e18), 0)
        choice = tl.where(coupled, drawn, choice)
    x = tl.max(tl.load(record + 5, mask=inside, other=none), 0)
    q = tl.load(record + 6, mask=inside, other=none)
    # A maximum would drop a NaN; a sum of exponentials of one finite logit and -inf is the logit.
    broken = tl.max((q != q).to(tl.int32), 0) > 0
    q = tl.where(broken, float("nan"), tl.max(q, 0))
    valid = (mass > 0) & (mass < float("inf")) & (tl.abs(top) < float("inf"))
    weight = tl.exp2(((x - top) * scale.to(tl.float64)).to(tl.float32)).to(tl.float64)
    choice = tl.where(position <= length, choice, 0.0)
    out = laws_out + (request * (gamma + 1) + position) * LAW_FIELDS
    real = position <= gamma
    tl.store(out, tl.where(valid, top, 0.0), mask=real)
    tl.store(out + 1, tl.where(valid, mass, 1.0), mask=real)
    tl.store(out + 2, choice, mask=real)
    tl.store(out + 3, weight, mask=real)
    tl.store(out + 4, q, mask=real)
    tl.store(out + 5, valid.to(tl.float64), mask=real)
    if FILTERED:
        bounds = bounds_out + (request * (gamma + 1) + position) * 2
        high = order_key(tl.where(valid, top, 0.0).to(tl.float32), SHIFT)
        tl.store(bounds, tl.full([PLACES], LOWEST >> SHIFT, tl.int64), mask=real)
        tl.store(bounds + 1, high.to(tl.int64), mask=real)
    else:
        _decide(
            request, position, length, fits, valid | (hot == 0), hot & (coupled == 0),
            choice.to(tl.int64), weight / mass, q, drafted, uniforms, law, lse, listed, law_size, scale,
            count_out, token_out, flag_out, gamma, PLACES, LAW,
        )  # fmt: skip


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=UNALIGNED)
def decide_kernel(
    kept, requests, ranks, rows, vocabulary, first, lens, drafted, temperature, uniforms,
    law, lse, listed, law_size, laws, count_out, token_out, flag_out,
    gamma, PLACES: tl.constexpr, RANKS: tl.constexpr, LAW: tl.constexpr,
):  # fmt: skip
    """One program a request: what is kept under filters."""
    request = tl.program_id(0).to(tl.int64)
    _start, length, fits = fits_inside(
        first, lens, drafted, request, rows, vocabulary, gamma, PLACES
    )
    hot, _inverse, scale = heat_of(temperature, request)
    position = tl.arange(0, PLACES)
    rank = tl.arange(0, RANKS)
    real = position <= gamma
    inside = real[None, :] & (rank < ranks)[:, None]
    place = request * (gamma + 1) + position
    record = kept + (rank[:, None] * requests * (gamma + 1) + place[None, :]) * 2
    mass = tl.sum(tl.load(record, mask=inside, other=0.0), 0)
    weight = tl.max(tl.load(record + 1, mask=inside, other=0.0), 0)
    out = laws + place * LAW_FIELDS
    valid = (tl.load(out + 5, mask=real, other=0.0) > 0) & (mass > 0)
    choice = tl.load(out + 2, mask=real, other=0.0).to(tl.int64)
    q = tl.load(out + 4, mask=real, other=0.0)
    tl.store(out + 1, tl.where(valid, mass, 1.0), mask=real)
    _decide(
        request, position, length, fits, valid | (hot == 0), hot, choice, weight / mass, q,
        drafted, uniforms, law, lse, listed, law_size, scale, count_out, token_out, flag_out,
        gamma, PLACES, LAW,
    )  # fmt: skip


@triton.jit
def _final_row(
    count, token, lens, first, flag, temperature, coupling, request, COUPLED: tl.constexpr
):
    """Whether a request draws a token, from which row, and whether from a residual."""
    position = tl.load(count + request).to(tl.int32)
    length = tl.load(lens + request).to(tl.int32)
    start = tl.load(first + request).to(tl.int64)
    draws = (tl.load(flag + request) == 0) & (length >= 0) & (tl.load(token + request) >= 0)
    draws = draws & (tl.load(temperature + request).to(tl.float32) > 0.0)
    if COUPLED:
        draws = draws & (tl.load(coupling + request) == 0)
    return draws, start + position, position, position < length


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=UNALIGNED)
def masses_kernel(
    logits, logits_stride, width, base, first, lens, temperature, min_p, law, lse, listed,
    law_size, coupling, stats, laws, cuts, count, token, flag, sums, left_out, masses_out,
    gamma, BLOCK: tl.constexpr, SLOTS: tl.constexpr, SHIFT: tl.constexpr,
    LAW: tl.constexpr, COUPLED: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """One program a request: masses of ``p`` and ``max(0, p - q)`` of its final row's shard."""
    request = tl.program_id(0).to(tl.int64)
    draws, line, position, minus = _final_row(
        count, token, lens, first, flag, temperature, coupling, request, COUPLED
    )
    _hot, _inverse, scale = heat_of(temperature, request)
    slot = tl.arange(0, SLOTS)
    plain = tl.zeros([SLOTS], tl.float64)
    left = tl.zeros([SLOTS], tl.float64)
    if draws:
        place = request * (gamma + 1) + position
        top = tl.load(laws + place * LAW_FIELDS).to(tl.float32)
        share = (1.0 / tl.load(laws + place * LAW_FIELDS + 1)).to(tl.float32)
        weight = tl.load(sums + place * SLOTS + slot)
        cut = tl.full([], LOWEST, tl.int32)
        last = width
        least = tl.full([], 0.0, tl.float32)
        if FILTERED:
            cut = tl.load(cuts + place * 2)
            last = tl.load(cuts + place * 2 + 1)
            least = tl.load(min_p + request).to(tl.float32)
        else:
            own = tl.load(stats + place * STATS).to(tl.float32)
            weight = tl.where(own > -float("inf"), weight * tl.exp2((own - top) * scale), weight)
        plain = weight.to(tl.float64) * share.to(tl.float64)
        # A block lighter than this may have no weight at all when it is read again.
        plain = tl.where(plain > NOTHING, plain, 0.0)
        left = plain
        if minus:
            at = request * gamma + position
            left = residual_sums(
                logits + line * logits_stride, width, base, top, scale, share, cut, last, least,
                weight, law + at * law_size, lse + at, listed + at * law_size, law_size,
                BLOCK, SLOTS, SHIFT, LAW,
            )  # fmt: skip
            left = tl.where(left <= NOTHING, 0.0, left)
    tl.store(left_out + (request * 2) * SLOTS + slot, left)
    tl.store(left_out + (request * 2 + 1) * SLOTS + slot, plain)
    tl.store(masses_out + request * 2, tl.sum(left))
    tl.store(masses_out + request * 2 + 1, tl.sum(plain))


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=UNALIGNED)
def draw_kernel(
    logits, logits_stride, width, base, requests, ranks, own_rank, first, lens, temperature, min_p,
    uniforms, law, lse, listed, law_size, coupling, laws, cuts, count, token, flag, left, masses,
    found_out,
    gamma, RANKS: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
    SHIFT: tl.constexpr, LAW: tl.constexpr, COUPLED: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """One program a request: its token if ``u * total`` falls into this shard, -1 if not."""
    request = tl.program_id(0).to(tl.int64)
    draws, line, position, minus = _final_row(
        count, token, lens, first, flag, temperature, coupling, request, COUPLED
    )
    _hot, _inverse, scale = heat_of(temperature, request)
    slot = tl.arange(0, SLOTS)
    rank = tl.arange(0, RANKS)
    found = tl.full([], -1, tl.int64)
    if draws:
        record = masses + (rank * requests + request) * 2
        each = tl.load(record, mask=rank < ranks, other=0.0)
        plain = tl.load(record + 1, mask=rank < ranks, other=0.0)
        total = tl.sum(each)
        # A residual that is NaN on any rank is none: the token comes from p.
        rest = minus & (total > 0)
        each = tl.where(rest, each, plain)
        total = tl.sum(each)
        wanted = tl.load(uniforms + request * (gamma + 1) + gamma).to(tl.float64) * total
        upto = tl.cumsum(each, 0)
        after = tl.min(tl.where((upto > wanted) & (each > 0), rank, 2147483647))
        holder = tl.minimum(after, tl.max(tl.where(each > 0, rank, 0)))
        if holder == own_rank:
            wanted = tl.maximum(wanted - tl.sum(tl.where(rank < holder, each, 0.0)), 0.0)
            place = request * (gamma + 1) + position
            at = request * gamma + tl.minimum(position, gamma - 1)
            top = tl.load(laws + place * LAW_FIELDS).to(tl.float32)
            share = (1.0 / tl.load(laws + place * LAW_FIELDS + 1)).to(tl.float32)
            cut = tl.full([], LOWEST, tl.int32)
            last = width
            least = tl.full([], 0.0, tl.float32)
            if FILTERED:
                cut = tl.load(cuts + place * 2)
                last = tl.load(cuts + place * 2 + 1)
                least = tl.load(min_p + request).to(tl.float32)
            column = -1
            tries = 0
            while (column < 0) & (tries < 2):
                kind = tl.where(rest, 0, 1)
                sums = tl.load(left + (request * 2 + kind) * SLOTS + slot)
                column = invert(
                    logits + line * logits_stride, width, base, top, scale, share, cut, last,
                    least, sums, wanted, rest, law + at * law_size, lse + at,
                    listed + at * law_size, law_size, BLOCK, SLOTS, SHIFT, LAW,
                )  # fmt: skip
                # A residual block of rounding only: the shard's own p, as accept's p.
                rest = rest & False
                tries += 1
            found = tl.where(column >= 0, column + base, -1).to(tl.int64)
    tl.store(found_out + request, found)


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=UNALIGNED)
def finish_kernel(
    found, requests, ranks, first, lens, temperature, coupling, count_out, token_out, flag_out,
    RANKS: tl.constexpr, COUPLED: tl.constexpr,
):  # fmt: skip
    """One program a request: the token that one rank found."""
    request = tl.program_id(0).to(tl.int64)
    draws, _line, _position, _minus = _final_row(
        count_out, token_out, lens, first, flag_out, temperature, coupling, request, COUPLED
    )
    rank = tl.arange(0, RANKS)
    each = tl.load(found + rank * requests + request, mask=rank < ranks, other=-1)
    if draws:
        tl.store(token_out + request, tl.max(each))
