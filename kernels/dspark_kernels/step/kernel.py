"""What a step does with single numbers between its forwards: one launch each, a program a request or a block of rows.

:func:`survival_kernel`, for confidence ``c_j`` of position ``j``, corrected by ``s`` of its bin::

    a_j = max(least, a_{j-1} * min(1, max(0, c_j + s)))   (float64, left to right, the maximum taken last)

so it never rises, as :mod:`dspark_kernels.confidence.kernel` shows. A NaN counts as 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["requests"])
def survival_kernel(
    confidence,
    known,
    shift,
    whole,
    survival,
    requests,
    GAMMA: tl.constexpr,
    POSITIONS: tl.constexpr,
    BINS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Program ``r``: every position of request ``r``. ``POSITIONS`` is ``GAMMA`` rounded up to a power of two."""
    request = tl.program_id(0)
    position = tl.arange(0, POSITIONS)
    real = position < GAMMA
    cell = request * GAMMA + position
    limit = tl.load(known + request)
    kind = tl.load(known + requests + request)
    first = tl.load(known + 2 * requests + request)

    sure = tl.load(confidence + cell, mask=real, other=0.0)
    sure = tl.where(sure == sure, sure, 0.0)
    bucket = tl.minimum(tl.maximum(sure * BINS, 0.0), BINS - 1.0).to(tl.int32)
    by = tl.load(shift + (kind * GAMMA + position) * BINS + bucket, mask=real, other=0.0)
    chance = sure.to(tl.float64) + by.to(tl.float64)
    chance = tl.where(chance == chance, chance, 0.0)
    chance = tl.minimum(tl.maximum(chance, 0.0), 1.0)

    nothing = tl.zeros((POSITIONS,), tl.float64)
    survived = nothing
    alive = tl.full((), 1.0, tl.float64)
    for step in tl.static_range(GAMMA):
        # A sum with one term that is not zero takes the element of this step exactly.
        alive = alive * tl.sum(tl.where(position == step, chance, nothing), axis=0)
        survived = tl.where(position == step, alive, survived)
    survived = tl.maximum(survived, tl.full((POSITIONS,), LEAST, tl.float64))
    every = tl.load(whole + position, mask=real, other=0.0)
    survived = tl.where(first > 0, every, survived)
    tl.store(survival + cell, tl.where(position < limit, survived, nothing), mask=real)


@triton.jit(
    do_not_specialize=["anchor_stride", "pitch", "count", "rows"],
    do_not_specialize_on_alignment=["anchors"],
)
def window_kernel(
    cells,
    anchors,
    tokens,
    positions,
    slots,
    window,
    anchor_stride,
    pitch,
    count,
    rows,
    GAMMA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program ``b``: ``BLOCK`` packed rows; those from ``count`` on are padding."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    live = row < count
    cell = tl.load(cells + row, mask=live, other=0)
    request = cell // (GAMMA + 1)
    column = cell - request * (GAMMA + 1)
    anchor = tl.load(anchors + request * anchor_stride, mask=live & (column == 0), other=0)
    drafted = tl.load(tokens + request * GAMMA + column - 1, mask=live & (column > 0), other=0)
    tl.store(window + row, tl.load(positions + cell, mask=live, other=0), mask=inside)
    tl.store(window + pitch + row, tl.load(slots + cell, mask=live, other=0), mask=inside)
    tl.store(window + 2 * pitch + row, anchor + drafted, mask=inside)
    tl.store(window + 3 * pitch + row, tl.where(live, cell, -1), mask=inside)


@triton.jit(
    do_not_specialize=["requests", "stop_count"],
    do_not_specialize_on_alignment=["count", "token", "lens", "before"],
)
def finish_kernel(
    count,
    token,
    drafted,
    stops,
    lens,
    before,
    pair,
    correct,
    committed,
    bonus,
    after,
    tokens,
    reported,
    requests,
    stop_count,
    GAMMA: tl.constexpr,
    WINDOW: tl.constexpr,
    STOPS: tl.constexpr,
):
    """Program ``r``: the run of request ``r``. ``WINDOW`` is ``GAMMA + 1`` rounded up to a power of two."""
    request = tl.program_id(0)
    kept = tl.load(count + request)
    last = tl.load(token + request)
    place = tl.arange(0, WINDOW)
    own = tl.load(drafted + request * GAMMA + place, mask=place < GAMMA, other=-1)

    ends = tl.zeros((WINDOW,), tl.int32)
    for start in range(0, stop_count, STOPS):
        stop = start + tl.arange(0, STOPS)
        known = tl.load(stops + request * stop_count + stop, mask=stop < stop_count, other=-1)
        # Padding is no token that was kept.
        same = (own[:, None] == known[None, :]) & (known[None, :] >= 0)
        ends = tl.maximum(ends, tl.max(same.to(tl.int32), axis=1))
    stopped = tl.min(tl.where((ends > 0) & (place < kept), place, WINDOW), axis=0)
    cut = stopped < kept
    last = tl.where(cut, tl.sum(tl.where(place == stopped, own, 0), axis=0), last)
    kept = tl.where(cut, stopped.to(tl.int64), kept)

    shown = tl.maximum(last, 0)
    tl.store(pair + request, tl.load(lens + request).to(tl.int64))
    tl.store(pair + requests + request, kept)
    tl.store(correct + request, kept.to(tl.int32))
    tl.store(committed + request, (kept + 1).to(tl.int32))
    tl.store(bonus + request, shown)
    tl.store(after + request, tl.load(before + request) + kept + 1)
    run = tl.where(place < GAMMA, own, 0)
    cell = request * (GAMMA + 1) + place
    real = place <= GAMMA
    tl.store(tokens + cell, tl.where(place == kept, shown, run), mask=real)
    tl.store(reported + cell, tl.where(place == kept, last, run), mask=real)


@triton.jit(do_not_specialize=["pitch", "rows"])
def kept_kernel(
    cells,
    committed,
    slots,
    positions,
    kept,
    pitch,
    rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program ``b``: ``BLOCK`` packed rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    cell = tl.load(cells + row, mask=inside, other=0)
    request = cell // WIDTH
    within = cell - request * WIDTH < tl.load(committed + request, mask=inside, other=0)
    slot = tl.load(slots + cell, mask=inside & within, other=-1)
    tl.store(kept + row, slot, mask=inside)
    tl.store(kept + pitch + row, tl.load(positions + cell, mask=inside, other=0), mask=inside)
