"""Drafting from the M best base logits of each position.

``select`` reads every base logit once: a program keeps SPAN columns of one position in registers
and writes those that can be among the M best. ``merge`` takes the exact M best of what the spans
of a position left. ``chain`` runs all steps of one request: with candidates ``c_1..c_M`` of step
``k``, ascending tokens, and latent ``l``::

    z(m) = base[b, k, c_m] + sum_i W2[c_m, i] l[i]
    greedy rows:  token = c at the first argmax of z
    sampled rows: token = c at the first argmax of z / T + gumbel(seed, position + k, c),
                  probs = softmax(z / T)

*Selection.* Floats are compared as integers of the same order, so the M-th largest key is found
bit by bit by counting. Counting over the whole span would cost BITS passes over its registers; the
same search over the maxima of SLOTS disjoint groups is cheap, and its result ``t`` is a lower
bound: M groups hold a key of at least ``t``, hence so do M columns. All columns above ``t`` are
written, filled up to M with those that equal it; with random logits that is hardly more than M.
Only where it is more than CAP (large logits that share groups) is the span searched itself. Keys
that tie at the boundary are taken in token order. NaN is the largest, as in ``torch.topk``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dspark_kernels.markov_step.arithmetic import sigmoid, tanh
from dspark_kernels.markov_step.noise import gumbel, row_state


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


@triton.jit(do_not_specialize=["steps"])
def select(
    base,
    values,
    lanes,
    counts,
    columns,
    steps,
    base_row,
    base_step,
    M: tl.constexpr,
    CAP: tl.constexpr,
    SPAN: tl.constexpr,
    SLOTS: tl.constexpr,
    BITS: tl.constexpr,
):
    """Columns of one span that can be among the M best. Grid (rows * steps, spans).

    ``values`` and ``lanes`` (int16, from the span's first column) [rows * steps, spans, CAP]; the
    first ``counts`` [rows * steps, spans] of each are written, in column order.
    """
    position = tl.program_id(0)
    row = (position // steps).to(tl.int64)
    step = (position % steps).to(tl.int64)
    lane = tl.arange(0, SPAN)
    column = tl.program_id(1) * SPAN + lane
    valid = column < columns
    base += row * base_row + step * base_step
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


@triton.jit(do_not_specialize=["spans"])
def merge(
    values,
    lanes,
    counts,
    vocabulary,
    best,
    support,
    spans,
    M: tl.constexpr,
    CAP: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS_PAD: tl.constexpr,
    BITS: tl.constexpr,
    MAPPED: tl.constexpr,
):
    """The exact M best of one position. Grid (rows * steps,).

    ``best`` [rows * steps, M] base logits, ``support`` [rows * steps, M] int32 or
    int64 their tokens, both in column order.
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
    place = position * M + tl.cumsum(kept.to(tl.int32), 0) - 1
    name = span * SPAN + tl.load(lanes + at, kept, 0).to(tl.int32)
    if MAPPED:
        name = tl.load(vocabulary + name, kept, 0)
    tl.store(best + place, x, kept)
    tl.store(support + place, name.to(support.dtype.element_ty), kept)


@triton.jit
def _matvec(
    vector,
    weight,
    stride,
    total,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Add ``weight[:RANK] @ vector`` to ``total`` [RANK_PAD] float32."""
    output = tl.arange(0, RANK_PAD)
    for start in range(0, RANK, BLOCK_I):
        inner = start + tl.arange(0, BLOCK_I)
        mask = (output < RANK)[:, None] & (inner < RANK)[None, :]
        at = output.to(tl.int64)[:, None] * stride + inner[None, :]
        w = tl.load(weight + at, mask, 0.0)
        # In the type of the weights, as the matrix products of the latents of scan take it.
        x = tl.load(vector + inner, inner < RANK, 0.0).to(w.dtype)
        total += tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :], 1)
    return total


@triton.jit
def _preactivation(
    context,
    embedded,
    states,
    weight_embedded,
    weight_state,
    stride,
    step,
    PART: tl.constexpr,
    RECURRENT: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """``W_h h + bias + W_e e`` (``+ W_s s``) of one part of the joint layer, [RANK_PAD]."""
    output = tl.arange(0, RANK_PAD)
    total = tl.load(context + PART * RANK + output, output < RANK, 0.0)
    first = PART * RANK * stride.to(tl.int64)
    total = _matvec(embedded, weight_embedded + first, stride, total, RANK, RANK_PAD, BLOCK_I)
    if RECURRENT:
        remembers = step > 0
        if remembers:
            total = _matvec(states, weight_state + first, stride, total, RANK, RANK_PAD, BLOCK_I)
    return total


@triton.jit
def _latent(
    context,
    embedded,
    latents,
    states,
    weight_embedded,
    weight_state,
    stride,
    step,
    KIND: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Write the latent of one row and step to ``latents``, and its next state to ``states``."""
    output = tl.arange(0, RANK_PAD)
    known = output < RANK
    gate = sigmoid(_preactivation(context, embedded, states, weight_embedded, weight_state, stride, step, 0, KIND == 2, RANK, RANK_PAD, BLOCK_I))  # fmt: skip
    if KIND == 1:
        result = gate * tl.load(embedded + output, known, 0.0).to(tl.float32)
        # Every warp has read the latent of the step before.
        tl.debug_barrier()
    else:
        candidate = tanh(_preactivation(context, embedded, states, weight_embedded, weight_state, stride, step, 1, True, RANK, RANK_PAD, BLOCK_I))  # fmt: skip
        result = tanh(_preactivation(context, embedded, states, weight_embedded, weight_state, stride, step, 2, True, RANK, RANK_PAD, BLOCK_I))  # fmt: skip
        held = tl.load(states + output, known & (output * 0 + step > 0), 0.0)
        # Every warp has read the state and the latent of the step before.
        tl.debug_barrier()
        tl.store(states + output, gate * held + (1.0 - gate) * candidate, known)
    tl.store(latents + output, result.to(latents.dtype.element_ty), known)
    # From here on every warp may read what another one wrote.
    tl.debug_barrier()


@triton.jit
def _law(scaled, inside):
    """Softmax of one row."""
    top = tl.max(tl.where(inside, scaled, float("-inf")), 0)
    weights = tl.where(inside, tl.exp(scaled - top), 0.0)
    return weights / tl.sum(weights, 0)


@triton.jit(do_not_specialize=["steps"])
def chain(
    best,
    support,
    w1,
    w2,
    weight_state,
    weight_embedded,
    context,
    anchors,
    temperatures,
    seeds,
    positions,
    recorded,
    tokens,
    previous,
    probs,
    latents,
    states,
    steps,
    weight_stride,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    M: tl.constexpr,
    M_PAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    KIND: tl.constexpr,
    SAMPLED: tl.constexpr,
    RECORD: tl.constexpr,
):
    """All steps of one request. Grid (rows,). KIND: 0 vanilla, 1 gated, 2 rnn.

    ``latents`` [rows, RANK] in the weights' type and ``states`` [rows, RANK] float32 are scratch:
    vectors that the whole program needs along another axis pass through memory.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, M_PAD)
    inside = lane < M
    token = tl.load(anchors + row)
    if SAMPLED:
        temperature = tl.load(temperatures + row)
        drawn = temperature > 0
        scale = 1.0 / tl.where(drawn, temperature, 1.0)
        seed = tl.load(seeds + row)
        first_position = tl.load(positions + row)
        kept = drawn
        if RECORD == 2:
            kept = kept & (tl.load(recorded + row) != 0)
    for step in range(steps):
        position = row * steps + step
        tl.store(previous + position, token)
        vector = w1 + token * RANK
        if KIND != 0:
            own = context + position * (RANK if KIND == 1 else 3 * RANK)
            _latent(own, vector, latents + row * RANK, states + row * RANK, weight_embedded, weight_state, weight_stride, step, KIND, RANK, RANK_PAD, BLOCK_I)  # fmt: skip
            vector = latents + row * RANK
        listed = position * M + lane
        name = tl.load(support + listed, inside, 0).to(tl.int32)
        z = tl.load(best + listed, inside, float("-inf")).to(tl.float32)
        for start in range(0, RANK, BLOCK_R):
            inner = start + tl.arange(0, BLOCK_R)
            mask = inside[:, None] & (inner < RANK)[None, :]
            w = tl.load(w2 + name.to(tl.int64)[:, None] * RANK + inner[None, :], mask, 0.0)
            x = tl.load(vector + inner, inner < RANK, 0.0)
            z += tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :], 1)
        score = tl.where(z != z, float("inf"), z)
        if SAMPLED:
            noise = gumbel(row_state(seed, first_position + step), name)
            score = tl.where(drawn, score * scale + noise, score)
            if RECORD != 0:
                scaled = z * scale
                if kept:
                    tl.store(probs + listed, _law(scaled, inside), inside)
        score = tl.where(inside, score, float("-inf"))
        at = tl.min(tl.where(inside & (score == tl.max(score, 0)), lane, M_PAD), 0)
        token = tl.sum(tl.where(lane == at, name, 0), 0).to(tl.int64)
        tl.store(tokens + position, token)
