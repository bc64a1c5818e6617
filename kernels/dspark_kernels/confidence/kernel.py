"""Confidence and survival in one launch, one program a request.

For position ``j`` of a request with draft hidden state ``h_j`` and previous token ``x_{j-1}``::

    s_j = w[:d] . h_j + w[d:] . W1[x_{j-1}] + b      (float32 products and sums)
    c_j = 1 / (1 + exp(-s_j / t_j))                  (float32)
    a_j = a_{j-1} * c_j,   a_0 = 1                   (float64, left to right)

**Survival never rises, bit for bit.** For ``0 <= c <= 1`` the exact ``a c`` is at most ``a``, and
rounding to nearest cannot carry it above ``a``. Three things keep that true here. The division in
the sigmoid is the correctly rounded one: the fast one may be off by two units in the last place,
hence above 1. The product runs left to right, as no tree of products has this property. And it
runs in float64, where a chain of eight float32 factors keeps values apart that float32 would
round together: admission orders requests by them, and breaks ties by scan order.

**NaN** (a hidden state or weight that is not a number, or a token outside the vocabulary, whose
embedding is not read): ``s_j`` and ``c_j`` are NaN, which the host can look for in what it copies
back anyway; ``a_j`` and all after it are 0, so that nothing behind it is admitted and admission
never compares a NaN.

A program holds all positions of its request as rows of one tile and walks the width in blocks;
products are summed a lane at a time and across lanes once at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(rows, mask, weight, POSITIONS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """``weight . row`` of each of ``POSITIONS`` rows of ``WIDTH`` elements, in float32.

    ``rows`` points at the first element of each row; a row masked out counts as zeros.
    """
    total = tl.zeros((POSITIONS, BLOCK), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        w = tl.load(weight + column, mask=inside, other=0.0)
        x = tl.load(rows[:, None] + column[None, :], mask=mask[:, None] & inside[None, :], other=0)
        total += x.to(tl.float32) * w[None, :]
    return tl.sum(total, axis=1)


@triton.jit(
    do_not_specialize=["request_stride", "position_stride", "gamma"],
    do_not_specialize_on_alignment=[
        "previous", "bias", "temperatures", "logits", "confidence", "survival",
    ],
)  # fmt: skip
def confidence_kernel(
    hidden,
    previous,
    w1,
    weight,
    bias,
    temperatures,
    logits,
    confidence,
    survival,
    request_stride,
    position_stride,
    vocabulary,
    gamma,
    UNIT: tl.constexpr,
    POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program ``b``: every position of request ``b``.

    Strides of ``hidden`` count ``UNIT`` elements. ``POSITIONS`` is a power of two of at least ``gamma``; ``RANK`` is 0
    without a Markov part.
    """
    request = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, POSITIONS)
    real = position < gamma
    cell = request * gamma + position

    rows = hidden + request * request_stride * UNIT
    rows += position.to(tl.int64) * position_stride * UNIT
    score = _dot(rows, real, weight, POSITIONS, WIDTH, BLOCK) + tl.load(bias)
    if RANK > 0:
        token = tl.load(previous + cell, mask=real, other=0)
        known = (token >= 0) & (token < vocabulary)
        markov = _dot(w1 + token * RANK, real & known, weight + WIDTH, POSITIONS, RANK, BLOCK)
        score = tl.where(known, score + markov, float("nan"))

    temperature = tl.load(temperatures + position, mask=real, other=1.0)
    sure = tl.div_rn(1.0, 1.0 + tl.exp(-tl.div_rn(score, temperature)))
    tl.store(logits + cell, score, mask=real)
    tl.store(confidence + cell, sure, mask=real)

    factor = tl.where(sure == sure, sure, 0.0).to(tl.float64)
    nothing = tl.zeros((POSITIONS,), tl.float64)
    survived = nothing
    alive = tl.full((), 1.0, tl.float64)
    for step in tl.static_range(POSITIONS):
        # A sum with one term that is not zero takes the element of this step exactly.
        alive = alive * tl.sum(tl.where(position == step, factor, nothing), axis=0)
        survived = tl.where(position == step, alive, survived)
    tl.store(survival + cell, survived, mask=real)
