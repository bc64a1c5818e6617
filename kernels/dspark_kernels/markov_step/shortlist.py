"""The M best base logits of each position, and the mass of the others.

``select`` reads every base logit once: a program keeps SPAN columns of one position in registers
and writes those that can be among the M best. ``merge`` takes the exact M best of what the spans
of a position left. :mod:`.chain` drafts from them.

*Selection.* Floats are compared as integers of the same order, so the M-th largest key is found
bit by bit by counting. Counting over the whole span would cost BITS passes over its registers; the
same search over the maxima of SLOTS disjoint groups is cheap, and its result ``t`` is a lower
bound: M groups hold a key of at least ``t``, hence so do M columns. All columns above ``t`` are
written, filled up to M with those that equal it; with random logits that is hardly more than M.
Only where it is more than CAP (large logits that share groups) is the span searched itself. Keys
that tie at the boundary are taken in token order. NaN is the largest, as in ``torch.topk``.

*Base tail.* Where a recorded row draws from every column, the columns of a span that are not among the
M best come as one item: ``top`` is their largest logit and ``mass = sum exp((x - top) / T)``. ``select``
sums what it does not write, so no logit is read again for it, and ``merge`` adds what it was given
and does not take. Relative to their own maximum no mass underflows, at any temperature.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered(x, BITS: tl.constexpr):
    """int32 keys in the order of float16, bfloat16 or float32; -0 equals 0, NaN is largest."""
    if BITS == 32:
        bits = x.to(tl.int32, bitcast=True)
        magnitude = 0x7FFFFFFF
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        magnitude = 0x7FFF
    key = tl.where(bits < 0, bits ^ magnitude, bits)
    value = x.to(tl.float32)
    key = tl.where(value == 0.0, 0, key)
    return tl.where(value != value, magnitude, key)


@triton.jit
def unordered(key, like, BITS: tl.constexpr):
    """The float of a key, in the type that the pointer ``like`` points to."""
    if BITS == 32:
        return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(like.dtype.element_ty, bitcast=True)
    else:
        bits = tl.where(key < 0, key ^ 0x7FFF, key).to(tl.int16)
        return bits.to(like.dtype.element_ty, bitcast=True)


@triton.jit
def _lowest(BITS: tl.constexpr):
    """Below every key; for float32 it is the key of no number either."""
    return -2147483647 - 1 if BITS == 32 else -32768


@triton.jit
def threshold(keys, M: tl.constexpr, BITS: tl.constexpr):
    """The largest ``t`` that at least M keys reach; the lowest key where there are fewer keys."""
    enough = tl.sum((keys >= 0).to(tl.int32)) >= M
    found = tl.where(enough, 0, _lowest(BITS))
    for i in range(BITS - 1):
        raised = found + (1 << (BITS - 2 - i))
        found = tl.where(tl.sum((keys >= raised).to(tl.int32)) >= M, raised, found)
    return found


@triton.jit
def exactly(keys, valid, found, M: tl.constexpr):
    """The lanes of the M largest valid keys, ``found`` their threshold; ties in lane order.

    With a lower ``found``, which M or more keys exceed, the lanes of those.
    """
    above = valid & (keys > found)
    tied = valid & (keys == found)
    room = M - tl.sum(above.to(tl.int32))
    return above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))


@triton.jit
def heat_of(temperatures, recorded, row, RECORD: tl.constexpr):
    """A row's temperature, and whether its law is wanted. RECORD: 1 every sampled row, 2 by flag."""
    temperature = tl.load(temperatures + row)
    wanted = temperature > 0
    if RECORD == 2:
        wanted = wanted & (tl.load(recorded + row) != 0)
    return temperature, wanted


#: Read a few numbers at a time, or not at all where another operand stands in for them.
UNALIGNED = [
    "anchors", "vocabulary", "successors", "context", "temperatures", "recorded", "seeds", "positions", "tops", "masses",
]  # fmt: skip


@triton.jit(
    do_not_specialize=["steps", "base_row", "base_step"], do_not_specialize_on_alignment=UNALIGNED
)
def select(
    base,
    temperatures,
    recorded,
    values,
    lanes,
    counts,
    tops,
    masses,
    columns,
    steps,
    base_row,
    base_step,
    UNIT: tl.constexpr,
    M: tl.constexpr,
    CAP: tl.constexpr,
    SPAN: tl.constexpr,
    SLOTS: tl.constexpr,
    BITS: tl.constexpr,
    RECORD: tl.constexpr,
):
    """Columns of one span that can be among the M best. Grid (rows * steps, spans).

    ``values`` and ``lanes`` (int16, from the span's first column) [rows * steps, spans, CAP]; the
    first ``counts`` [rows * steps, spans] of each are written, in column order. ``tops`` and
    ``masses`` [rows * steps, spans] float32 of the other columns, for rows whose base tail is drawn
    from; RECORD 0: there are none. Strides of ``base`` count UNIT elements.
    """
    position = tl.program_id(0)
    row = (position // steps).to(tl.int64)
    step = (position % steps).to(tl.int64)
    lane = tl.arange(0, SPAN)
    column = tl.program_id(1) * SPAN + lane
    valid = column < columns
    base += row * base_row * UNIT + step * base_step * UNIT
    keys = ordered(tl.load(base + column, valid, 0.0), BITS)
    keys = tl.where(valid, keys, _lowest(BITS))
    bound = threshold(tl.max(tl.reshape(keys, [SPAN // SLOTS, SLOTS]), 0), M, BITS)
    kept = exactly(keys, valid, bound, M)
    if tl.sum(kept.to(tl.int32)) > CAP:
        kept = exactly(keys, valid, threshold(keys, M, BITS), M)
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    span = position.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    # The float is made again from its key: holding both would not fit the registers.
    tl.store(values + span * CAP + place, unordered(keys, values, BITS), kept)
    tl.store(lanes + span * CAP + place, lane.to(tl.int16), kept)
    tl.store(counts + span, tl.sum(kept.to(tl.int32)))
    if RECORD != 0:
        temperature, wanted = heat_of(temperatures, recorded, row, RECORD)
        if wanted:
            x = unordered(keys, values, BITS).to(tl.float32)
            x = tl.where(valid & (kept == 0), x, float("-inf"))
            top = tl.max(x)
            level = tl.where(top == float("-inf"), 0.0, top)
            tl.store(tops + span, top)
            tl.store(masses + span, tl.sum(tl.exp((x - level) * (1.0 / temperature))))


@triton.jit(do_not_specialize=["spans", "steps"], do_not_specialize_on_alignment=UNALIGNED)
def merge(
    values,
    lanes,
    counts,
    vocabulary,
    temperatures,
    recorded,
    best,
    support,
    tops,
    masses,
    spans,
    steps,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    CAP: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS_PAD: tl.constexpr,
    BITS: tl.constexpr,
    MAPPED: tl.constexpr,
    RECORD: tl.constexpr,
):
    """The exact M best of one position. Grid (rows * steps,).

    ``best`` [rows * steps, WIDTH] base logits, of which M are written, ``support`` [rows * steps, M]
    int32 or int64 their tokens (their columns without MAPPED), both in column order. ``tops`` and
    ``masses`` are completed in place.
    """
    position = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, SPANS_PAD * CAP)
    span = lane // CAP
    each = tl.arange(0, SPANS_PAD)
    held = tl.load(counts + position * spans + each, each < spans, 0)
    valid = tl.reshape(tl.arange(0, CAP)[None, :] < held[:, None], [SPANS_PAD * CAP])
    at = position * spans * CAP + lane
    x = tl.load(values + at, valid, 0.0)
    keys = tl.where(valid, ordered(x, BITS), _lowest(BITS))
    kept = exactly(keys, valid, threshold(keys, M, BITS), M)
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    name = span * SPAN + tl.load(lanes + at, kept, 0).to(tl.int32)
    if MAPPED:
        name = tl.load(vocabulary + name, kept, 0)
    tl.store(best + position * WIDTH + place, x, kept)
    tl.store(support + position * M + place, name.to(support.dtype.element_ty), kept)
    if RECORD != 0:
        temperature, wanted = heat_of(temperatures, recorded, position // steps, RECORD)
        if wanted:
            rest = tl.where(valid & (kept == 0), x.to(tl.float32), float("-inf"))
            rest = tl.reshape(rest, [SPANS_PAD, CAP])
            own = position * spans + each
            before = tl.load(tops + own, each < spans, float("-inf"))
            mass = tl.load(masses + own, each < spans, 0.0)
            top = tl.maximum(before, tl.max(rest, 1))
            level = tl.where(top == float("-inf"), 0.0, top)
            scale = 1.0 / temperature
            mass = mass * tl.exp((before - level) * scale)
            mass += tl.sum(tl.exp((rest - level[:, None]) * scale), 1)
            # Every warp has read what is overwritten.
            tl.debug_barrier()
            tl.store(tops + own, top, each < spans)
            tl.store(masses + own, mass, each < spans)
