"""All steps of one request over its candidates.

With candidates ``C`` of step ``k`` (columns of the M best base logits, and K successors of the token
before), their tokens, and latent ``l``::

    z(c) = base[b, k, c] + sum_i W2[token of c, i] l[i]
    greedy rows:  first argmax of z
    sampled rows: first argmax of z / T + gumbel(seed, position + k, token), probs = softmax(z / T)

*Successors.* The M best come first, so one look at the last of them tells whether a successor is among
them: its key is above the least, or equal and its column not behind the last of those tied.

*Base tail.* A recorded row draws from ``softmax(y / T)`` over every column, ``y = z`` on ``C`` and
``base`` elsewhere. The columns of a span outside ``C`` are one item: successors outside the M best
are taken from the span's mass, and it scores ``top / T + log(mass) + gumbel(seed, position + k,
words + span)``, which is how the largest of as many perturbed logits is distributed. Only a span that
wins is read again, and the first argmax of ``base / T + gumbel(seed, position + k, token)`` over its
columns outside ``C`` is taken. Noise of spans, of candidates and of those columns has different
words, so the draw is exact but for float32 sums. Where successors hold nearly all of a span's mass,
the rest is summed again rather than left over from a difference, so no mass is off by more than
about 16 roundings, and none is made of rounding alone. Successors are taken out of the race inside
the span as they win it, one at a time: comparing every column with each of them would cost K
times as much.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dspark_kernels.markov_step.arithmetic import sigmoid, tanh
from dspark_kernels.markov_step.noise import gumbel, row_state
from dspark_kernels.markov_step.shortlist import UNALIGNED, heat_of, ordered

#: Above every column.
_NONE = tl.constexpr(2147483647)


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
        total += tl.sum(w.to(tl.float32) * x[None, :], 1)
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


@triton.jit
def _candidates(
    best,
    places,
    base,
    successors,
    vocabulary,
    lane,
    M: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    MAPPED: tl.constexpr,
):
    """Base logits, columns, tokens and presence of M + K lanes, and where the M best end.

    ``best`` and ``places`` of this position; its first M of ``best`` are read, the others written.

    Returns:
        float32 logits, int32 columns and tokens, presence (a successor that is among
        the best is absent), the least key of the best and the last column that holds it.
    """
    first = lane < M
    column = tl.load(places + lane, first, 0)
    x = tl.load(best + lane, first, float("-inf"))
    present = first
    if K > 0:
        follows = (lane >= M) & (lane < M + K)
        column = tl.where(follows, tl.load(successors + lane - M, follows, 0), column)
        x = tl.where(follows, tl.load(base + column, follows, float("-inf")), x)
    key = ordered(x, BITS)
    cut = tl.min(tl.where(first, key, _NONE), 0)
    last = tl.max(tl.where(first & (key == cut), column, -1), 0)
    x = x.to(tl.float32)
    if K > 0:
        present = first | (follows & ((key < cut) | ((key == cut) & (column > last))))
        x = tl.where(present, x, float("-inf"))
        tl.store(best + lane, x.to(best.dtype.element_ty), follows)
    name = column
    if MAPPED:
        name = tl.load(vocabulary + column, present, 0).to(tl.int32)
    return x, column, name, present, cut, last


@triton.jit
def _biases(w2, vector, name, present, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """``W2[name] . vector`` of each lane, float32."""
    total = tl.zeros_like(name).to(tl.float32)
    for start in range(0, RANK, BLOCK_R):
        inner = start + tl.arange(0, BLOCK_R)
        mask = present[:, None] & (inner < RANK)[None, :]
        w = tl.load(w2 + name.to(tl.int64)[:, None] * RANK + inner[None, :], mask, 0.0)
        latent = tl.load(vector + inner, inner < RANK, 0.0)
        total += tl.sum(w.to(tl.float32) * latent.to(tl.float32)[None, :], 1)
    return total


@triton.jit
def _rest(base, span, cut, last, columns, SPAN: tl.constexpr, BITS: tl.constexpr):
    """Columns of a span, their base logits in float32, and which of them are not among the best."""
    at = span * SPAN + tl.arange(0, SPAN)
    inside = at < columns
    y = tl.load(base + at, inside, 0.0)
    key = ordered(y, BITS)
    return at, y.to(tl.float32), inside & ((key < cut) | ((key == cut) & (at > last)))


@triton.jit
def _mass_again(
    base,
    column,
    span,
    level,
    cut,
    last,
    scale,
    columns,
    M: tl.constexpr,
    K: tl.constexpr,
    SPAN: tl.constexpr,
    BITS: tl.constexpr,
):
    """Mass of a span's columns that are no candidates, summed without the successors."""
    at, y, rest = _rest(base, span, cut, last, columns, SPAN, BITS)
    weight = tl.where(rest, tl.exp((y - level) * scale), 0.0)
    lane = tl.arange(0, column.shape[0])
    for k in range(K):
        weight = tl.where(at == tl.sum(tl.where(lane == M + k, column, 0), 0), 0.0, weight)
    return tl.sum(weight, 0)


@triton.jit
def _spans(
    tops,
    masses,
    base,
    x,
    column,
    outside,
    cut,
    last,
    scale,
    columns,
    spans,
    M: tl.constexpr,
    K: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS_PAD: tl.constexpr,
    BITS: tl.constexpr,
):
    """Log of the mass of each span without the candidates ``outside`` the best; -inf if none is left."""
    each = tl.arange(0, SPANS_PAD)
    top = tl.load(tops + each, each < spans, float("-inf"))
    mass = tl.load(masses + each, each < spans, 0.0)
    level = tl.where(top == float("-inf"), 0.0, top)
    if K > 0:
        inside = outside[None, :] & ((column // SPAN)[None, :] == each[:, None])
        taken = tl.where(inside, x[None, :] - level[:, None], float("-inf"))
        before = mass
        mass -= tl.sum(tl.exp(taken * scale), 1)
        # What little is left of a sum has the rounding of all of it.
        vague = mass < before * 0.0625
        while tl.sum(vague.to(tl.int32), 0) > 0:
            span = tl.min(tl.where(vague, each, SPANS_PAD), 0)
            own = each == span
            exact = _mass_again(
                base, column, span, tl.sum(tl.where(own, level, 0.0), 0), cut, last, scale,
                columns, M, K, SPAN, BITS,
            )  # fmt: skip
            mass = tl.where(own, exact, mass)
            vague = vague & (each != span)
    # NaN comes of a broken row, whose best are all NaN or infinite: a span is not to be drawn then.
    left = mass > 0
    return tl.where(left, level * scale + tl.log(tl.where(left, mass, 1.0)), float("-inf"))


@triton.jit
def _inside_span(
    base,
    vocabulary,
    span,
    column,
    outside,
    cut,
    last,
    scale,
    state,
    columns,
    SPAN: tl.constexpr,
    BITS: tl.constexpr,
    MAPPED: tl.constexpr,
):
    """The column drawn from a span's columns that are no candidates, of which one is above -inf."""
    at, y, rest = _rest(base, span, cut, last, columns, SPAN, BITS)
    name = at
    if MAPPED:
        name = tl.load(vocabulary + at, rest, 0).to(tl.int32)
    score = tl.where(rest, y * scale + gumbel(state, name), float("-inf"))
    high = tl.max(score, 0)
    found = tl.min(tl.where(score == high, at, _NONE), 0)
    while (high > float("-inf")) & (tl.sum((outside & (column == found)).to(tl.int32), 0) > 0):
        score = tl.where(at == found, float("-inf"), score)
        high = tl.max(score, 0)
        found = tl.min(tl.where(score == high, at, _NONE), 0)
    return found


@triton.jit
def _with_tail(
    chosen,
    high,
    scaled,
    x,
    column,
    outside,
    cut,
    last,
    scale,
    state,
    base,
    vocabulary,
    tops,
    masses,
    columns,
    spans,
    words,
    M: tl.constexpr,
    K: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS_PAD: tl.constexpr,
    BITS: tl.constexpr,
    MAPPED: tl.constexpr,
):
    """The column drawn from candidates and tail, and the log-sum-exp of both.

    ``chosen`` and ``high``: the candidates' winner and its score; ``scaled``: their logits / T.
    """
    height = _spans(
        tops, masses, base, x, column, outside, cut, last, scale, columns, spans,
        M, K, SPAN, SPANS_PAD, BITS,
    )  # fmt: skip
    top = tl.maximum(tl.max(scaled, 0), tl.max(height, 0))
    level = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(scaled - level), 0) + tl.sum(tl.exp(height - level), 0)
    each = tl.arange(0, SPANS_PAD)
    score = height + gumbel(state, words + each)
    best = tl.max(score, 0)
    if best > high:
        span = tl.min(tl.where(score == best, each, SPANS_PAD), 0)
        chosen = _inside_span(
            base, vocabulary, span, column, outside, cut, last, scale, state, columns,
            SPAN, BITS, MAPPED,
        )  # fmt: skip
    return chosen, level + tl.log(total)


@triton.jit(
    do_not_specialize=["steps", "spans", "words", "base_row", "base_step", "out_row", "out_step"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def chain(  # noqa: PLR0915
    best,
    places,
    support,
    w1,
    w2,
    weight_state,
    weight_embedded,
    context,
    anchors,
    vocabulary,
    successors,
    temperatures,
    seeds,
    positions,
    recorded,
    base,
    out,
    tops,
    masses,
    tokens,
    previous,
    probs,
    lses,
    latents,
    states,
    steps,
    columns,
    spans,
    words,
    base_row,
    base_step,
    out_row,
    out_step,
    weight_stride,
    UNIT: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS_PAD: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    SAMPLED: tl.constexpr,
    RECORD: tl.constexpr,
    TAIL: tl.constexpr,
    MAPPED: tl.constexpr,
):
    """All steps of one request. Grid (rows,). KIND: 0 vanilla, 1 gated, 2 rnn.

    ``places`` [rows, steps, M] are the columns of the best, ``support`` [rows, steps, M + K] is written;
    with neither K nor TAIL, ``support`` holds the tokens of the best and ``places`` is not read.
    ``latents`` [rows, RANK] in the weights' type and ``states`` [rows, RANK] float32 are scratch:
    vectors that the whole program needs along another axis pass through memory. Strides of ``base`` and ``out`` count
    UNIT elements.
    """
    WIDTH: tl.constexpr = M + K
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < WIDTH
    logits = base + row * base_row * UNIT
    law = out + row * out_row * UNIT
    token = tl.load(anchors + row)
    if SAMPLED:
        temperature, kept = heat_of(temperatures, recorded, row, RECORD)
        drawn = temperature > 0
        scale = 1.0 / tl.where(drawn, temperature, 1.0)
        seed = tl.load(seeds + row)
        first_position = tl.load(positions + row)
    for step in range(steps):
        position = row * steps + step
        tl.store(previous + position, token)
        vector = w1 + token * RANK
        if KIND != 0:
            own = context + position * (RANK if KIND == 1 else 3 * RANK)
            _latent(own, vector, latents + row * RANK, states + row * RANK, weight_embedded, weight_state, weight_stride, step, KIND, RANK, RANK_PAD, BLOCK_I)  # fmt: skip
            vector = latents + row * RANK
        listed = position * WIDTH + lane
        if K > 0 or TAIL:
            x, column, name, present, cut, last = _candidates(
                best + position * WIDTH, places + position * M, logits, successors + token * K,
                vocabulary, lane, M, K, BITS, MAPPED,
            )  # fmt: skip
            tl.store(support + listed, tl.where(present, name, -1).to(support.dtype.element_ty), inside)  # fmt: skip
        else:
            name = tl.load(support + listed, inside, 0).to(tl.int32)
            x = tl.load(best + listed, inside, float("-inf")).to(tl.float32)
            column = lane
            present = inside
        z = x + _biases(w2, vector, name, present, RANK, BLOCK_R)
        if TAIL:
            rounded = z.to(out.dtype.element_ty)
            z = tl.where(kept, rounded.to(tl.float32), z)
        score = tl.where(z != z, float("inf"), z)
        if SAMPLED:
            state = row_state(seed, first_position + step)
            score = tl.where(drawn, score * scale + gumbel(state, name), score)
        score = tl.where(present, score, float("-inf"))
        high = tl.max(score, 0)
        chosen = tl.min(tl.where(present & (score == high), column, _NONE), 0)
        token = tl.sum(tl.where(present & (column == chosen), name, 0), 0).to(tl.int64)
        if TAIL:
            lse = 0.0
            if kept:
                scaled = tl.where(present, z * scale, float("-inf"))
                drawn_column, lse = _with_tail(
                    chosen, high, scaled, x, column, present & (lane >= M), cut, last, scale, state,
                    logits, vocabulary, tops + position * spans, masses + position * spans,
                    columns, spans, words, M, K, SPAN, SPANS_PAD, BITS, MAPPED,
                )  # fmt: skip
                if MAPPED:
                    token = tl.load(vocabulary + drawn_column)
                else:
                    token = drawn_column.to(tl.int64)
                # Every warp has read the base logits, which out may be.
                tl.debug_barrier()
                tl.store(law + column, rounded, present)
            tl.store(lses + position, lse)
        elif RECORD != 0:  # noqa: SIM102
            if kept:
                tl.store(probs + listed, _law(z * scale, present), inside)
        tl.store(tokens + position, token)
        logits += base_step * UNIT
        law += out_step * UNIT
