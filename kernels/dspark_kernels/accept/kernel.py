"""Acceptance in Triton: one launch, one program a request.

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

**Why one program a request.** Whether row ``j + 1`` is needed is known only after row ``j`` is read
through, and a launch cannot depend on that. A program walks its request's rows and stops at the
first rejection, so later rows are never read. Splitting the vocabulary over programs needs either a launch
a row (``gamma + 1`` of them) or two launches that read every row: at 64 requests of 6 rows, V = 129280 in
bfloat16, 99 MB against 58 MB when half of the drafts are kept. The price is parallelism: a program a
multiprocessor, each with 16 warps and three blocks of a row in flight (``cp.async``).

**Why the row is not read twice.** The pass that finds the maximum and the mass also keeps the mass of each block
of columns (a few dozen numbers, in registers). The final draw inverts the cumulative sum: the block is
found from these, and one block is read again. A residual against a *listed* drafted law (a shortlist)
differs from ``p`` at the listed tokens only, so its block masses need the row at those. Against a
*dense* law it needs both rows through: the second read of one row a request. Sampling while streaming (exponential
races) would save the block but not that: ``max(0, p - q)`` needs the mass of ``p`` first.

Sums are taken in a fixed order (tree in a block, then blocks left to right): the same input gives
the same token. Exponentials and block sums are float32, cumulative sums across blocks and the search float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dspark_kernels.accept.adjust import adjust_row
from dspark_kernels.accept.final import (
    drafted_chance,
    final_token,
    residual_sums,
    target_chance,
)
from dspark_kernels.accept.law import cut_row, kept_sums, ranked_draw
from dspark_kernels.accept.parts import LOG2E, LOWEST, noise_state, row_pass

#: Flag of an outcome.
BROKEN_LAYOUT = tl.constexpr(2)


@triton.jit
def _row_law(
    row, width, scale, inverse, seed, position, coupled, filtered, top_k, top_p, min_p,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, SHIFT: tl.constexpr,
    COUPLED: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """A row's law: largest logit, own choice, block sums, mass, where filters cut, whether it has one."""
    state = noise_state(seed, position)
    top, choice, sums, _score, drawn = row_pass(
        row, width, 0, scale, inverse, state, coupled, BLOCK, SLOTS, STAGES, COUPLED
    )
    mass = tl.sum(sums)
    good = (mass > 0.0) & (mass < float("inf")) & (tl.abs(top) < float("inf"))
    cut = tl.full([], LOWEST, tl.int32)
    last = width
    if COUPLED:
        choice = tl.where(coupled, drawn, choice)
    if FILTERED:  # noqa: SIM102
        if good & filtered:
            cut, last = cut_row(row, width, top, scale, mass, top_k, top_p, STAGES, SHIFT, TILE)
            sums, kept = kept_sums(
                row, width, top, scale, cut, last, min_p, BLOCK, SLOTS, STAGES, SHIFT
            )
            mass = tl.sum(sums)
            good = mass > 0.0
            if COUPLED:  # noqa: SIM102
                if coupled:
                    choice = ranked_draw(
                        row, width, top, scale, inverse, kept, state, STAGES, SHIFT, TILE
                    )
    return top, choice, sums, mass, cut, last, good


@triton.jit
def _longest(
    rows, stride, width, scale, least, tops, masses, cuts, lasts, survives, length, uniforms,
    law, lse, listed, place_law, law_size,
    PLACES: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, SHIFT: tl.constexpr,
    LAW: tl.constexpr,
):  # fmt: skip
    """Block verification: the longest prefix whose test succeeds, and its ``w``.

    Args:
        rows: the request's first row; place_law: the place of its first drafted law.
        length: the first position whose row has no law or whose drafted law is NaN, or the last row.
        tops, masses, cuts, lasts, survives: ``[PLACES]`` what each row left behind, and ``w``.
    """
    place = tl.arange(0, PLACES)
    slot = tl.arange(0, SLOTS)
    position = length
    testing = length > 0
    while testing:
        here = place == position
        factor = tl.sum(tl.where(here, survives, 0.0))
        chance = factor.to(tl.float64)
        if position < length:
            mass = tl.sum(tl.where(here, masses, 0.0))
            at = place_law + position
            # Only the total counts here: a listed law subtracts from the one that is given whole.
            left = tl.sum(residual_sums(
                rows + position * stride, width, 0, tl.sum(tl.where(here, tops, 0.0)), scale,
                factor / mass, tl.sum(tl.where(here, cuts, 0)), tl.sum(tl.where(here, lasts, 0)),
                least, tl.where(slot == 0, mass, 0.0), law + at * law_size, lse + at,
                listed + at * law_size, law_size, BLOCK, SLOTS, SHIFT, LAW,
            ))  # fmt: skip
            left = tl.where(left < 0.0, 0.0, left)
            # NaN: the drafted law is, so the block ends here.
            ends = left != left
            chance = tl.where(ends, chance, left / tl.maximum(left + 1.0 - factor, 1e-37))
        testing = tl.load(uniforms + position - 1).to(tl.float64) >= chance
        if testing:
            position -= 1
            testing = position > 0
    return position, tl.sum(tl.where(place == position, survives, 0.0))


@triton.jit
def accept_kernel(  # noqa: C901, PLR0915
    logits, logits_stride, rows, width, first, lens, drafted, temperature, uniforms,
    top_k, top_p, min_p, law, lse, listed, law_size, seeds, positions, coupling,
    adjust_tokens, adjust_counts, adjust_bias, adjust_stops, adjust_size,
    frequency, presence, repetition, min_new, lengths, count_out, token_out, flag_out,
    GAMMA: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, SHIFT: tl.constexpr, LAW: tl.constexpr,
    SAMPLED: tl.constexpr,
    COUPLED: tl.constexpr, FILTERED: tl.constexpr, ADJUSTED: tl.constexpr, JOINT: tl.constexpr,
):  # fmt: skip
    """Judge one request; ``JOINT``: sampled requests by block verification."""
    request = tl.program_id(0).to(tl.int64)
    length = tl.load(lens + request).to(tl.int32)
    start = tl.load(first + request).to(tl.int64)
    heat = tl.load(temperature + request).to(tl.float32)
    greedy = heat <= 0.0
    inverse = 1.0 / tl.where(greedy, 1.0, heat)
    scale = inverse * LOG2E
    mine = drafted + request * GAMMA
    place = tl.arange(0, PLACES)
    block = tl.load(mine + place, mask=place < tl.minimum(length, GAMMA), other=0)
    outside = tl.max(((block < 0) | (block >= width)).to(tl.int32)) > 0
    fits = (length <= GAMMA) & (start >= 0) & (start + length < rows)
    fits = (fits & (outside == 0)) | (length < 0)
    seed = tl.full([], 0, tl.int64)
    anchor = tl.full([], 0, tl.int64)
    coupled = greedy & (heat > 0.0)
    if COUPLED:
        seed = tl.load(seeds + request)
        anchor = tl.load(positions + request).to(tl.int64)
        coupled = (tl.load(coupling + request) != 0) & (heat > 0.0)
    sampled = (heat > 0.0) & (coupled == 0)
    most = width
    nucleus = tl.full([], 1.0, tl.float32)
    least = tl.full([], 0.0, tl.float32)
    if FILTERED:
        most = tl.maximum(tl.load(top_k + request).to(tl.int32), 1)
        nucleus = tl.load(top_p + request).to(tl.float32)
        least = tl.load(min_p + request).to(tl.float32)
    filtered = (heat > 0.0) & ((most < width) | (nucleus < 1.0) | (least > 0.0))
    # Greedy rows have no filters: nothing below may cut them.
    least = tl.where(filtered, least, 0.0)

    position = 0
    going = fits & (length >= 0)
    good = going
    top = tl.full([], 0.0, tl.float32)
    choice = tl.full([], 0, tl.int32)
    sums = tl.zeros([SLOTS], tl.float32)
    mass = tl.full([], 1.0, tl.float32)
    cut = tl.full([], LOWEST, tl.int32)
    last = width
    factor = tl.full([], 1.0, tl.float32)
    # Block verification only: what every row left behind.
    tops = tl.zeros([PLACES], tl.float32)
    masses = tl.full([PLACES], 1.0, tl.float32)
    cuts = tl.full([PLACES], LOWEST, tl.int32)
    lasts = tl.full([PLACES], 2147483647, tl.int32)
    survives = tl.full([PLACES], 1.0, tl.float32)
    every = tl.zeros([PLACES, SLOTS], tl.float32)
    while going:
        row = logits + (start + position) * logits_stride
        if ADJUSTED:
            listing = request * adjust_size
            adjust_row(
                row, width, 0, mine, position, adjust_tokens + listing, adjust_counts + listing,
                adjust_bias + listing, adjust_stops + listing, adjust_size,
                tl.load(frequency + request), tl.load(presence + request),
                tl.load(repetition + request),
                tl.load(lengths + request) + position < tl.load(min_new + request), PLACES,
            )  # fmt: skip
        top, choice, sums, mass, cut, last, good = _row_law(
            row, width, scale, inverse, seed, anchor + position, coupled, filtered,
            most, nucleus, least, BLOCK, SLOTS, TILE, STAGES, SHIFT, COUPLED, FILTERED,
        )  # fmt: skip
        good = good | greedy
        going = good & (position < length)
        if JOINT:
            every = tl.where((place == position)[:, None], sums[None, :], every)
        if going:
            token = tl.load(mine + position)
            if SAMPLED:
                if sampled:
                    place_law = request * GAMMA + position
                    wanted = target_chance(row, token, top, scale, mass, cut, last, least, SHIFT)
                    offered = drafted_chance(
                        law + place_law * law_size, lse + place_law, listed + place_law * law_size,
                        law_size, token, scale, LAW,
                    ).to(tl.float64)  # fmt: skip
                    if JOINT:
                        going = offered == offered
                        here = place == position
                        tops = tl.where(here, top, tops)
                        masses = tl.where(here, mass, masses)
                        cuts = tl.where(here, cut, cuts)
                        lasts = tl.where(here, last, lasts)
                        ratio = tl.where(offered > 0, wanted / offered, 1.0)
                        factor = tl.minimum(factor * ratio.to(tl.float32), 1.0)
                        survives = tl.where(place == position + 1, factor, survives)
                    else:
                        uniform = tl.load(uniforms + request * (GAMMA + 1) + position)
                        going = uniform.to(tl.float64) * offered < wanted
                else:
                    going = choice == token
            else:
                going = choice == token
            if going:
                position += 1
    end = length
    if JOINT:
        end = position
        if sampled & (position > 0):
            position, factor = _longest(
                logits + start * logits_stride, logits_stride, width, scale, least,
                tops, masses, cuts, lasts, survives, end, uniforms + request * (GAMMA + 1),
                law, lse, listed, request * GAMMA, law_size, PLACES, BLOCK, SLOTS, SHIFT, LAW,
            )  # fmt: skip
            # What the row it stops at left behind; the last one read is still at hand.
            if position < end:
                good = sampled
                here = place == position
                top = tl.sum(tl.where(here, tops, 0.0))
                mass = tl.sum(tl.where(here, masses, 0.0))
                cut = tl.sum(tl.where(here, cuts, 0))
                last = tl.sum(tl.where(here, lasts, 0))
                sums = tl.sum(tl.where(here[:, None], every, 0.0), 0)
    token = tl.where(good, choice.to(tl.int32), -1)
    if SAMPLED:  # noqa: SIM102
        if sampled & good:
            place_law = request * GAMMA + tl.minimum(position, GAMMA - 1)
            token = final_token(
                logits + (start + position) * logits_stride, width, top, scale, mass, cut, last,
                least, sums, factor, position < end,
                tl.load(uniforms + request * (GAMMA + 1) + GAMMA).to(tl.float64),
                law + place_law * law_size, lse + place_law, listed + place_law * law_size,
                law_size, BLOCK, SLOTS, SHIFT, LAW,
            )  # fmt: skip
    done = fits & (length >= 0)
    tl.store(count_out + request, tl.where(done, position, 0))
    tl.store(token_out + request, tl.where(done, token, 0).to(tl.int64))
    tl.store(flag_out + request, tl.where(fits, 0, BROKEN_LAYOUT))
