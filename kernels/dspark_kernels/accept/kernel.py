"""Acceptance in Triton: rows by chunks of the vocabulary, then a walk over what is known of each row.

With rows ``j = 0 .. l`` of a request, ``p_j`` the target's law (filtered) and ``q_j`` the drafted law:

    greedy      x_{j+1} kept iff it is argmax l_j; the token after: argmax
    coupled     x_{j+1} kept iff it is argmax_x l_j(x) / T + g(seed, position + j, x); the token after:
                that draw
    rejection   x_{j+1} kept iff u_j q_j(x_{j+1}) < p_j(x_{j+1}); the token after: from
                max(0, p_j - q_j), at the last row from p_l
    block       w_0 = 1, w_{k+1} = min(1, w_k p_k(x_{k+1}) / q_k(x_{k+1})); prefix k < l is kept with chance
                r_k / (r_k + 1 - w_k), r_k = sum_x max(0, w_k p_k - q_k), the whole block with w_l; the
                longest wins; the token after: from max(0, w_k p_k - q_k), or p_l

A greedy row decides as ``torch.argmax``, whatever it holds. Of the others, a row whose mass or largest logit is
not finite, or that has no mass, has no law: where the decision reaches it, the token is -1. A drafted law
``q_k`` that is NaN says nothing: the block ends before it, so ``x_{k+1}`` is rejected, and the token
after ``x_k`` comes from ``p_k``. To block verification ``l`` is the first of these positions.

    scan      (rows, chunks)      reads every logit once: the chunk's largest, its mass, its seeded draw; of a row
                                  with filters its largest logits (candidates)
    cut       (rows)              with filters: where they end the row, what each chunk keeps, the seeded draw by rank
    residual  (requests, chunks)  dense drafted laws: the chunk's part of max(0, w p - q)
    accept    (requests)          decides, and inverts the cumulative sum in one chunk, which is read again

**Why every row is read.** Whether row ``j + 1`` is needed is known only after row ``j``. One program a request that
stops at the first rejection reads fewer bytes, and leaves 131 of 132 multiprocessors idle at one request.

**Candidates.** A chunk gives at least as many as top-k keeps, or CAP / 2, and at most CAP: any threshold between
will do, so a search of about ten steps in registers finds one. ``bounds`` holds the key above which the chunk's are
complete. The filters of a row end among its candidates if top-k is at most CAP, or if top-k, top-p or min-p
end above the largest bound. Else ``cut`` bisects the row itself.

Sums are taken in a fixed order (tree in a chunk, then over chunks): the same input gives the same token.
Exponentials and sums of chunks are float32, cumulative sums across chunks and the search float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dspark_kernels.accept.adjust import adjust_row
from dspark_kernels.accept.final import (
    DENSE,
    dense_residual,
    drafted_chances,
    final_token,
    residual_sums,
)
from dspark_kernels.accept.law import cut_row, kept_sums, kept_weight, ranked_draw
from dspark_kernels.accept.parts import (
    LOWEST,
    filters_of,
    fits_inside,
    heat_of,
    key_value,
    noise_state,
    order_key,
    seeded_best,
)

#: Flag of an outcome.
BROKEN_LAYOUT = tl.constexpr(2)
#: No kernel is compiled for a value of these, nor for where operands lie. A row whose alignment is not known is read
#: in 4 bytes a thread, as candidates are written: with 16, registers would move between threads.
FREE = ["logits_stride", "rows", "width", "gamma", "chunks", "law_size", "adjust_size"]
UNALIGNED = [
    "logits", "law", "listed", "first", "lens", "drafted", "temperature", "uniforms", "top_k", "top_p", "min_p", "lse", "seeds",
    "positions", "coupling", "adjust_tokens", "adjust_counts", "adjust_bias", "adjust_stops",
    "frequency", "presence", "repetition", "min_new", "lengths", "count_out", "token_out", "flag_out",
]  # fmt: skip


@triton.jit
def _candidates(x, inside, top, most, CAP: tl.constexpr, SHIFT: tl.constexpr):
    """Keys of a chunk, the one above which all are candidates, and the place of each candidate; CAP: none."""
    held = inside & (x > -float("inf"))
    keys = tl.where(held, order_key(x, SHIFT), LOWEST)
    wanted = tl.where(most <= CAP, most, CAP // 2)
    low = tl.full([], LOWEST >> SHIFT, tl.int64)
    high = order_key(top, SHIFT).to(tl.int64) + 1
    bound = low
    count = tl.sum(held.to(tl.int32))
    searching = count > CAP
    while searching:
        middle = low + (high - low) // 2
        count = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32))
        low = tl.where(count > CAP, middle, low)
        high = tl.where(count < wanted, middle, high)
        fits = (count <= CAP) & (count >= wanted)
        # At one key ties are left, which are taken in token order.
        bound = tl.where(fits, middle - 1, low)
        searching = (fits == 0) & (high - low > 1)
    bound = bound.to(tl.int32)
    above = keys > bound
    tied = held & (keys == bound)
    room = CAP - tl.sum(above.to(tl.int32))
    # Both are counted at once: above in the lower half, tied in the upper.
    upto = tl.cumsum(above.to(tl.int32) + (tied.to(tl.int32) << 16), 0)
    ties = tl.minimum(upto >> 16, room)
    kept = above | (tied & (upto >> 16 <= room))
    return keys, bound, tl.where(kept, (upto & 0xFFFF) + ties - 1, CAP)


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=UNALIGNED)
def scan_kernel(
    logits, logits_stride, rows, width, gamma, chunks, first, lens, drafted, temperature,
    top_k, top_p, min_p, seeds, positions, coupling,
    adjust_tokens, adjust_counts, adjust_bias, adjust_stops, adjust_size,
    frequency, presence, repetition, min_new, lengths,
    tops, sums, choices, scores, draws, values, lanes, counts, bounds,
    PLACES: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, SHIFT: tl.constexpr,
    COUPLED: tl.constexpr, FILTERED: tl.constexpr, ADJUSTED: tl.constexpr,
):  # fmt: skip
    """One chunk of a row. Rows that no request owns are not read."""
    place = tl.program_id(0).to(tl.int64)
    request = place // (gamma + 1)
    position = (place % (gamma + 1)).to(tl.int32)
    begin = tl.program_id(1) * BLOCK
    at = place * chunks + tl.program_id(1)
    start, length, fits = fits_inside(first, lens, drafted, request, rows, width, gamma, PLACES)
    hot, inverse, scale = heat_of(temperature, request)
    if fits & (position <= length):
        row = logits + (start + position) * logits_stride
        if ADJUSTED:
            listing = request * adjust_size
            adjust_row(
                row + begin, tl.minimum(BLOCK, width - begin), begin, drafted + request * gamma,
                position, adjust_tokens + listing, adjust_counts + listing,
                adjust_bias + listing, adjust_stops + listing, adjust_size,
                tl.load(frequency + request), tl.load(presence + request),
                tl.load(repetition + request),
                tl.load(lengths + request) + position < tl.load(min_new + request), PLACES,
            )  # fmt: skip
        offs = begin + tl.arange(0, BLOCK)
        inside = offs < width
        x = tl.load(row + offs, mask=inside, other=-float("inf")).to(tl.float32)
        top = tl.max(x)
        level = tl.where(top == -float("inf"), 0.0, top)
        mass = tl.sum(tl.exp2((x - level) * scale))
        choice = tl.min(tl.where(x == top, offs, 2147483647))
        # Maxima keep a NaN or drop it, as the compiler likes; the mass shows where to look for one.
        if mass != mass:
            odd = tl.min(tl.where(x != x, offs, 2147483647))
            top = tl.where(odd < 2147483647, float("nan"), top)
            choice = tl.where(odd < 2147483647, odd, choice)
        tl.store(tops + at, top)
        tl.store(sums + at, mass)
        tl.store(choices + at, choice)
        if COUPLED:  # noqa: SIM102
            if hot & (tl.load(coupling + request) != 0):
                state = noise_state(
                    tl.load(seeds + request), tl.load(positions + request).to(tl.int64) + position
                )
                score, drawn = seeded_best(
                    x, offs, inside, inverse, state, tl.full([], -float("inf"), tl.float64),
                    tl.full([], 0, tl.int32),
                )  # fmt: skip
                tl.store(scores + at, score)
                tl.store(draws + at, drawn)
        if FILTERED:
            most, _nucleus, _least, filtered = filters_of(top_k, top_p, min_p, request, width)
            count = tl.full([], -1, tl.int32)
            if hot & filtered & (tl.abs(mass) < float("inf")):
                keys, bound, item = _candidates(x, inside, top, most, CAP, SHIFT)
                # The logit is made again from its key: holding both takes registers.
                tl.store(values + at * CAP + item, key_value(keys, SHIFT), mask=item < CAP)
                tl.store(lanes + at * CAP + item, (offs - begin).to(tl.int16), mask=item < CAP)
                tl.store(bounds + at, bound)
                count = tl.sum((item < CAP).to(tl.int32))
            tl.store(counts + at, count)


@triton.jit
def _column(lanes, item, BLOCK: tl.constexpr, CAP: tl.constexpr):
    """The column of a candidate of a row."""
    return (item // CAP) * BLOCK + tl.load(lanes + item).to(tl.int32)


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=UNALIGNED)
def cut_kernel(  # noqa: PLR0915
    logits, logits_stride, rows, width, gamma, chunks, first, lens, drafted, temperature,
    top_k, top_p, min_p, seeds, positions, coupling,
    tops, sums, scores, draws, values, lanes, counts, bounds, cuts,
    PLACES: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, CAP: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, SHIFT: tl.constexpr, COUPLED: tl.constexpr,
):  # fmt: skip
    """Filters of one row. What ``scan`` left of it is completed in place.

    ``tops`` becomes the row's, ``sums`` what each chunk keeps; ``counts`` -1 where the candidates were not enough.
    """
    place = tl.program_id(0).to(tl.int64)
    request = place // (gamma + 1)
    position = (place % (gamma + 1)).to(tl.int32)
    start, length, fits = fits_inside(first, lens, drafted, request, rows, width, gamma, PLACES)
    hot, inverse, scale = heat_of(temperature, request)
    most, nucleus, least, filtered = filters_of(top_k, top_p, min_p, request, width)
    cut = tl.full([], LOWEST, tl.int32)
    last = width
    if fits & (position <= length) & hot & filtered:
        slot = tl.arange(0, SLOTS)
        own = slot < chunks
        at = place * chunks + slot
        each = tl.load(tops + at, mask=own, other=-float("inf"))
        weight = tl.load(sums + at, mask=own, other=0.0)
        top = tl.max(each)
        far = tl.exp2((each - top) * scale)
        mass = tl.sum(tl.where(each == -float("inf"), 0.0, weight * far))
        if (mass > 0.0) & (mass < float("inf")) & (tl.abs(top) < float("inf")):
            row = logits + (start + position) * logits_stride
            many = tl.load(counts + at, mask=own, other=0)
            held = tl.reshape(tl.arange(0, CAP)[None, :] < many[:, None], [SLOTS * CAP])
            item = tl.arange(0, SLOTS * CAP)
            x = tl.load(values + place * chunks * CAP + item, mask=held, other=-float("inf"))
            keys = tl.where(held, order_key(x, SHIFT), LOWEST)
            weights = tl.exp2((x - top) * scale)
            bound = tl.max(tl.load(bounds + at, mask=own, other=LOWEST))
            above = keys > bound
            enough = (most <= CAP) | (bound == LOWEST >> SHIFT)
            enough = enough | (tl.sum(above.to(tl.int32)) >= most)
            enough = enough | (tl.exp2((key_value(bound, SHIFT) - top) * scale) < least)
            over = tl.sum(tl.where(above, weights, 0.0)) > nucleus * mass
            enough = enough | ((nucleus < 1.0) & over)
            cut, last = cut_row(
                row, width, top, scale, mass, most, nucleus, keys, weights, enough,
                STAGES, SHIFT, TILE,
            )  # fmt: skip
            if enough:
                lawful = ((keys > cut) | ((keys == cut) & (item <= last))) & (weights >= least)
                lawful = tl.where(lawful, weights, 0.0)
                kept = tl.sum((lawful > 0).to(tl.int32))
                weight = tl.sum(tl.reshape(lawful, [SLOTS, CAP]), 1)
                if last < width:
                    last = _column(lanes + place * chunks * CAP, last, BLOCK, CAP)
            else:
                weight, kept = kept_sums(
                    row, width, top, scale, cut, last, least, BLOCK, SLOTS, 1, SHIFT
                )
                tl.store(counts + at, tl.full([SLOTS], -1, tl.int32), mask=own)
            # Every warp has read what is overwritten.
            tl.debug_barrier()
            tl.store(tops + at, tl.zeros([SLOTS], tl.float32) + top, mask=own)
            tl.store(sums + at, weight, mask=own)
            if COUPLED:  # noqa: SIM102
                if tl.load(coupling + request) != 0:
                    state = noise_state(
                        tl.load(seeds + request),
                        tl.load(positions + request).to(tl.int64) + position,
                    )
                    drawn = ranked_draw(
                        row, width, top, scale, inverse, kept, state, keys, weights, enough,
                        STAGES, SHIFT, TILE,
                    )  # fmt: skip
                    if enough:
                        drawn = _column(lanes + place * chunks * CAP, drawn, BLOCK, CAP)
                    tl.store(scores + at, tl.zeros([SLOTS], tl.float64), mask=own)
                    tl.store(draws + at, tl.zeros([SLOTS], tl.int32) + drawn, mask=own)
    tl.store(cuts + place * 2, cut)
    tl.store(cuts + place * 2 + 1, last)


@triton.jit
def _decide(  # noqa: PLR0915
    request, logits, logits_stride, rows, width, gamma, chunks, first, lens, drafted, temperature,
    min_p, uniforms, law, lse, listed, law_size, coupling, tops, sums, choices, scores, draws, cuts,
    PLACES: tl.constexpr, SLOTS: tl.constexpr, SHIFT: tl.constexpr, LAW: tl.constexpr,
    COUPLED: tl.constexpr, FILTERED: tl.constexpr, JOINT: tl.constexpr,
):  # fmt: skip
    """All rows of a request side by side: the laws of each, and how many drafted tokens are kept.

    To block verification that is where the block ends, and ``survives`` is ``w`` of every prefix.
    """
    start, length, fits = fits_inside(first, lens, drafted, request, rows, width, gamma, PLACES)
    hot, _inverse, scale = heat_of(temperature, request)
    flag = tl.where(fits | (length < 0), 0, BROKEN_LAYOUT)
    length = tl.where(fits, length, -1)
    position = tl.arange(0, PLACES)
    slot = tl.arange(0, SLOTS)
    real = position <= length
    sent = position < length
    place = request * (gamma + 1) + position
    at = place[:, None] * chunks + slot[None, :]
    own = real[:, None] & (slot < chunks)[None, :]
    each = tl.load(tops + at, mask=own, other=-float("inf"))
    weights = tl.load(sums + at, mask=own, other=0.0)
    choice = tl.load(choices + at, mask=own, other=2147483647)
    odd = each != each
    top = tl.max(tl.where(odd, float("inf"), each), 1)
    far = tl.exp2((each - top[:, None]) * scale)
    weights = tl.where(each == -float("inf"), weights, weights * far)
    mass = tl.sum(weights, 1)
    good = real & (mass > 0) & (mass < float("inf")) & (tl.abs(top) < float("inf"))
    reach = tl.where((tl.max(odd.to(tl.int32), 1) > 0)[:, None], odd, each == top[:, None])
    choice = tl.min(tl.where(reach, choice, 2147483647), 1)
    sampled = hot
    if COUPLED:
        coupled = tl.load(coupling + request) != 0
        sampled = hot & (coupled == 0)
        if hot & coupled:
            score = tl.load(scores + at, mask=own, other=-float("inf"))
            drawn = tl.load(draws + at, mask=own, other=2147483647)
            drawn = tl.where(score == tl.max(score, 1)[:, None], drawn, 2147483647)
            choice = tl.min(drawn, 1)
    cut = tl.full([PLACES], LOWEST, tl.int32)
    last = tl.zeros([PLACES], tl.int32) + width
    least = tl.full([], 0.0, tl.float32)
    if FILTERED:
        cut = tl.load(cuts + place * 2, mask=real, other=0)
        last = tl.load(cuts + place * 2 + 1, mask=real, other=0)
        least = tl.load(min_p + request).to(tl.float32)
    token = tl.load(drafted + request * gamma + position, mask=sent, other=0)
    survives = tl.full([PLACES], 1.0, tl.float32)
    kept = choice == token
    if sampled:
        x = tl.load(
            logits + (start + position) * logits_stride + token, mask=sent, other=-float("inf")
        ).to(tl.float32)
        wanted = kept_weight(x, token.to(tl.int32), top, scale, cut, last, least, SHIFT)
        offered = drafted_chances(
            law, lse, listed, law_size, request * gamma + position, sent, token, scale, LAW, PLACES
        )
        if JOINT:
            kept = offered == offered
            ratio = tl.where(offered > 0, wanted / (mass * offered), 1.0)
            factor = tl.full([], 1.0, tl.float32)
            for step in tl.range(0, length):
                factor = tl.minimum(factor * tl.sum(tl.where(position == step, ratio, 0.0)), 1.0)
                survives = tl.where(position == step + 1, factor, survives)
        else:
            uniform = tl.load(uniforms + request * (gamma + 1) + position, mask=sent, other=0.0)
            # Products in float64, not quotients: a division is a call, around which registers are spilled.
            kept = uniform.to(tl.float64) * offered * mass < wanted
    goes = kept & (good | (hot == 0))
    count = tl.min(tl.where(sent & (goes == 0), position, length))
    return (
        start, length, flag, scale, sampled, good | (hot == 0), choice, count, survives,
        top, mass, cut, last, least, weights,
    )  # fmt: skip


@triton.jit
def _at(values, here):
    """The entry of a position, as ``here`` marks it."""
    return tl.sum(tl.where(here, values, 0), 0)


@triton.jit
def _left(row, offs, inside, top, scale, share, cut, last, least, law, lse, SHIFT: tl.constexpr):
    """Float64 sum of ``max(0, f p - q)`` over some columns of a row."""
    x = tl.load(row + offs, mask=inside, other=-float("inf")).to(tl.float32)
    weight = kept_weight(x, offs, top, scale, cut, last, least, SHIFT) * share
    return tl.sum(dense_residual(weight, offs, inside, scale, law, lse)).to(tl.float64)


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=UNALIGNED)
def residual_kernel(
    logits, logits_stride, rows, width, gamma, chunks, first, lens, drafted, temperature,
    min_p, uniforms, law, lse, listed, coupling,
    tops, sums, choices, scores, draws, lanes, counts, cuts, left,
    PLACES: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, CAP: tl.constexpr,
    SHIFT: tl.constexpr, LAW: tl.constexpr, COUPLED: tl.constexpr, FILTERED: tl.constexpr,
    JOINT: tl.constexpr,
):  # fmt: skip
    """One chunk of the residual against a dense drafted law: of the rejecting row, or of a block's rows."""
    request = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    (
        start, length, _flag, scale, sampled, good, _choice, count, survives,
        top, mass, cut, last, least, _weights,
    ) = _decide(
        request, logits, logits_stride, rows, width, gamma, chunks, first, lens, drafted,
        temperature, min_p, uniforms, law, lse, listed, width, coupling,
        tops, sums, choices, scores, draws, cuts,
        PLACES, SLOTS, SHIFT, LAW, COUPLED, FILTERED, JOINT,
    )  # fmt: skip
    position = count
    end = tl.minimum(count + 1, length)
    if JOINT:
        position = 0
        end = count
    while position < end:
        here = tl.arange(0, PLACES) == position
        if sampled & (_at(good.to(tl.int32), here) > 0):
            at = (request * (gamma + 1) + position) * chunks + chunk
            drawn = request * gamma + position
            row = logits + (start + position) * logits_stride
            share = _at(survives, here) / _at(mass, here)
            many = tl.full([], -1, tl.int32)
            if FILTERED:
                many = tl.load(counts + at)
            over = tl.full([], 0.0, tl.float64)
            begin = chunk * BLOCK
            if many < 0:
                lane = tl.arange(0, BLOCK)
                over = _left(
                    row, begin + lane, begin + lane < width, _at(top, here), scale, share,
                    _at(cut, here), _at(last, here), least, law + drawn * width, lse + drawn, SHIFT,
                )  # fmt: skip
            else:
                item = tl.arange(0, CAP)
                held = tl.load(lanes + at * CAP + item, mask=item < many, other=0).to(tl.int32)
                over = _left(
                    row, begin + held, item < many, _at(top, here), scale, share,
                    _at(cut, here), _at(last, here), least, law + drawn * width, lse + drawn, SHIFT,
                )  # fmt: skip
            tl.store(left + at, over)
        position += 1


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=UNALIGNED)
def accept_kernel(  # noqa: C901
    logits, logits_stride, rows, width, gamma, chunks, first, lens, drafted, temperature,
    min_p, uniforms, law, lse, listed, law_size, coupling,
    tops, sums, choices, scores, draws, cuts, left, count_out, token_out, flag_out,
    PLACES: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, SHIFT: tl.constexpr,
    LAW: tl.constexpr, COUPLED: tl.constexpr, FILTERED: tl.constexpr, JOINT: tl.constexpr,
):  # fmt: skip
    """Judge one request; ``JOINT``: sampled requests by block verification."""
    request = tl.program_id(0).to(tl.int64)
    size = law_size
    if LAW == DENSE:
        size = width
    (
        start, length, flag, scale, sampled, good, choice, position, survives,
        top, mass, cut, last, least, weights,
    ) = _decide(
        request, logits, logits_stride, rows, width, gamma, chunks, first, lens, drafted,
        temperature, min_p, uniforms, law, lse, listed, size, coupling,
        tops, sums, choices, scores, draws, cuts,
        PLACES, SLOTS, SHIFT, LAW, COUPLED, FILTERED, JOINT,
    )  # fmt: skip
    place = tl.arange(0, PLACES)
    slot = tl.arange(0, SLOTS)
    end = length
    if JOINT:
        end = position
    # Backwards from the end of a block, whose own chance is ``w``; without JOINT the row is known.
    factor = tl.full([], 1.0, tl.float32)
    going = sampled & (position >= 0)
    token = tl.full([], -1, tl.int32)
    while going:
        here = place == position
        if JOINT:
            factor = _at(survives, here)
        at = request * gamma + tl.minimum(position, gamma - 1)
        row = logits + (start + position) * logits_stride
        row_mass = _at(mass, here)
        kept = tl.sum(tl.where(here[:, None], weights, 0.0), 0)
        minus = position < end
        rest = tl.zeros([SLOTS], tl.float64)
        if minus:
            if LAW == DENSE:
                rest = tl.load(
                    left + (request * (gamma + 1) + position) * chunks + slot,
                    mask=slot < chunks,
                    other=0.0,
                )
            else:
                rest = residual_sums(
                    row, width, 0, _at(top, here), scale, factor / row_mass, _at(cut, here),
                    _at(last, here), least, kept, law + at * size, lse + at, listed + at * size,
                    size, BLOCK, SLOTS, SHIFT, LAW,
                )  # fmt: skip
        going = position < 0
        if JOINT:  # noqa: SIM102
            if position > 0:
                uniform = tl.load(uniforms + request * (gamma + 1) + position - 1).to(tl.float64)
                going = uniform >= factor
                total = tl.sum(rest)
                # NaN: the drafted law is, so the block ends here.
                if minus & (total == total):
                    total = tl.where(total < 0.0, 0.0, total)
                    going = uniform * (total + 1.0 - factor) >= total
        if going:
            position -= 1
        elif _at(good.to(tl.int32), here) > 0:
            token = final_token(
                row, width, _at(top, here), scale, row_mass, _at(cut, here), _at(last, here), least,
                kept, rest, factor, minus,
                tl.load(uniforms + request * (gamma + 1) + gamma).to(tl.float64),
                law + at * size, lse + at, listed + at * size, size, BLOCK, SLOTS, SHIFT, LAW,
            )  # fmt: skip
    if sampled == 0:
        here = place == position
        token = tl.where(_at(good.to(tl.int32), here) > 0, _at(choice, here), -1)
    done = length >= 0
    tl.store(count_out + request, tl.where(done, position, 0))
    tl.store(token_out + request, tl.where(done, token, 0).to(tl.int64))
    tl.store(flag_out + request, flag)
