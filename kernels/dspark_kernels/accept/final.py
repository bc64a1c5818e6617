"""The drafted law and the final token in Triton: chances, residual masses, inverse CDF.

The token after the kept ones comes from weights ``w(x) = max(0, f p(x) - q(x))`` (or ``p``), drawn by
inverting their cumulative sum in token order. Sums by block are known, so the block that
``u * total`` falls into is found from them and only that block is read again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dspark_kernels.accept.law import kept_weight
from dspark_kernels.accept.parts import LOG2E

#: How the drafted law is given: one certain token, logits with their log-sum-exp, or probabilities
#: over a list of tokens.
CERTAIN = tl.constexpr(0)
DENSE = tl.constexpr(1)
LISTED = tl.constexpr(2)
#: Listed tokens worked on at a time, and those compared with many columns.
LIST = tl.constexpr(16)
FEW = tl.constexpr(4)
#: A probability that no draw reaches, which float32 still holds shared out over a block.
NOTHING = tl.constexpr(1e-30)


@triton.jit
def _listed(law, tokens, size, start, MANY: tl.constexpr, LAW: tl.constexpr):
    """Tokens and probabilities ``start .. start + MANY`` of a listed law, padded with token -1."""
    entry = start + tl.arange(0, MANY)
    token = tl.load(tokens + entry, mask=entry < size, other=-1)
    if LAW == CERTAIN:
        chance = tl.where(token >= 0, 1.0, 0.0)
    else:
        chance = tl.load(law + entry, mask=(entry < size) & (token >= 0), other=0.0)
    return token, chance.to(tl.float32)


@triton.jit
def drafted_chances(
    law, lse, tokens, size, place, known, token, scale, LAW: tl.constexpr, PLACES: tl.constexpr
):
    """``[PLACES]`` float32 ``q(token)``; NaN where the law is, at whichever of its tokens.

    A dense one is by its log-sum-exp: that is finite unless a logit is NaN or ``+inf`` or all are ``-inf``.

    Args:
        law, lse, tokens: all positions' laws (see :data:`DENSE` and the others), of ``size`` entries each.
        place: ``[PLACES]`` which of them each token was drawn from; known: where there is one.
    """
    if LAW == CERTAIN:
        return tl.full([PLACES], 1.0, tl.float32)
    elif LAW == DENSE:
        logit = tl.load(law + place * size + token, mask=known, other=0.0).to(tl.float32)
        total = tl.load(lse + place, mask=known, other=0.0)
        chance = tl.exp2(logit * scale - total * LOG2E)
        return tl.where(tl.abs(total) < float("inf"), chance, float("nan"))
    else:
        chance = tl.zeros([PLACES, LIST], tl.float32)
        for start in tl.range(0, size, LIST):
            entry = start + tl.arange(0, LIST)
            inside = known[:, None] & (entry < size)[None, :]
            at = place[:, None] * size + entry[None, :]
            each = tl.load(tokens + at, mask=inside, other=-1)
            weight = tl.load(law + at, mask=inside & (each >= 0), other=0.0).to(tl.float32)
            # A product: 0 times NaN is NaN.
            chance += weight * (each == token[:, None]).to(tl.float32)
        return tl.sum(chance, 1)


@triton.jit
def dense_residual(weight, offs, inside, scale, law, lse):
    """Float32 ``max(0, w - q)`` of columns with weights ``w = f p``; NaN where ``q`` is and ``w`` is not 0."""
    drafted = tl.load(law + offs, mask=inside & (weight > 0), other=-float("inf")).to(tl.float32)
    chance = tl.exp2(drafted * scale - tl.load(lse) * LOG2E)
    return tl.where(chance == chance, tl.maximum(weight - chance, 0.0), float("nan"))


@triton.jit
def residual_sums(
    row, width, base, top, scale, share, cut, last, min_p, sums, law, lse, tokens, size,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, SHIFT: tl.constexpr, LAW: tl.constexpr,
):  # fmt: skip
    """``[SLOTS]`` float64 sums of ``max(0, f p - q)`` by block, from below by rounding only.

    NaN where the drafted law is NaN, a dense one at a token that ``p`` may draw.

    A listed law changes few tokens: ``f p - min(f p, q)`` needs the row at those only. A dense law
    needs both read through.

    Args:
        base: token of the first column (of a shard).
        share: float32 ``f / mass``.
        sums: ``[SLOTS]`` float32 sums of the weights of every block.
    """
    slot = tl.arange(0, SLOTS)
    if LAW == DENSE:
        left = tl.zeros([SLOTS], tl.float64)
        for block in tl.range(0, tl.cdiv(width, BLOCK)):
            offs = block * BLOCK + tl.arange(0, BLOCK)
            inside = offs < width
            x = tl.load(row + offs, mask=inside, other=-float("inf")).to(tl.float32)
            weight = kept_weight(x, offs, top, scale, cut, last, min_p, SHIFT) * share
            over = dense_residual(weight, offs, inside, scale, law, lse)
            left = tl.where(slot == block, tl.sum(over).to(tl.float64), left)
    else:
        left = sums.to(tl.float64) * share.to(tl.float64)
        for start in tl.range(0, size, LIST):
            entry, chance = _listed(law, tokens, size, start, LIST, LAW)
            entry = entry - base
            own = (entry >= 0) & (entry < width)
            x = tl.load(row + entry, mask=own, other=-float("inf")).to(tl.float32)
            offs = entry.to(tl.int32)
            weight = kept_weight(x, offs, top, scale, cut, last, min_p, SHIFT) * share
            shared = tl.where(chance == chance, tl.minimum(weight, chance), float("nan"))
            shared = tl.where(own, shared, 0.0).to(tl.float64)
            inside = (offs // BLOCK)[:, None] == slot[None, :]
            left -= tl.sum(tl.where(inside, shared[:, None], 0.0), 0)
    return left


@triton.jit
def _weights(
    row, offs, inside, base, top, scale, share, cut, last, min_p, minus, law, lse, tokens, size,
    SHIFT: tl.constexpr, LAW: tl.constexpr,
):  # fmt: skip
    """Float32 ``f p``, less the drafted law if ``minus``, of some columns of a row."""
    x = tl.load(row + offs, mask=inside, other=-float("inf")).to(tl.float32)
    weight = kept_weight(x, offs, top, scale, cut, last, min_p, SHIFT) * share
    if minus:
        if LAW == DENSE:
            weight = dense_residual(weight, offs, inside, scale, law, lse)
        else:
            for start in tl.range(0, size, FEW):
                entry, chance = _listed(law, tokens, size, start, FEW, LAW)
                same = (entry - base)[None, :] == offs[:, None]
                weight -= tl.sum(tl.where(same, chance[None, :], 0.0), 1)
    return tl.where(inside, tl.maximum(weight, 0.0), 0.0)


@triton.jit
def invert(
    row, width, base, top, scale, share, cut, last, min_p, left, wanted, minus,
    law, lse, tokens, size,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, SHIFT: tl.constexpr, LAW: tl.constexpr,
):  # fmt: skip
    """The first column whose cumulative weight exceeds ``wanted``; -1 if its block has no weight.

    Args:
        left: ``[SLOTS]`` float64 sums of the weights by block.
        wanted: float64 in [0, total of ``left``].
        minus: whether the weights are a residual.
    """
    SEARCH: tl.constexpr = BLOCK // 4
    slot = tl.arange(0, SLOTS)
    total = tl.cumsum(left, 0)
    after = tl.min(tl.where((total > wanted) & (left > 0), slot, 2147483647))
    final = tl.max(tl.where(left > 0, slot, 0))
    block = tl.minimum(after, final)
    before = tl.sum(tl.where(slot < block, left, 0.0))
    found = -1
    positive = -1
    start = block * BLOCK
    end = tl.minimum(start + BLOCK, width)
    while (start < end) & (found < 0):
        offs = start + tl.arange(0, SEARCH)
        inside = offs < end
        weight = _weights(
            row, offs, inside, base, top, scale, share, cut, last, min_p, minus,
            law, lse, tokens, size, SHIFT, LAW,
        ).to(tl.float64)  # fmt: skip
        upto = before + tl.cumsum(weight, 0)
        first = tl.min(tl.where((upto > wanted) & (weight > 0), offs, 2147483647))
        found = tl.where(first < 2147483647, first, -1)
        positive = tl.maximum(positive, tl.max(tl.where(weight > 0, offs, -1)))
        before += tl.sum(weight)
        start += SEARCH
    # The sum by block can exceed the sum read again by rounding; the last weight is meant then.
    return tl.where(found >= 0, found, positive)


@triton.jit
def final_token(
    row, width, top, scale, mass, cut, last, min_p, sums, left, factor, minus, uniform,
    law, lse, tokens, size,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, SHIFT: tl.constexpr, LAW: tl.constexpr,
):  # fmt: skip
    """Correction (``minus``) or bonus token.

    It comes from ``p`` itself where the residual has no mass (``p = q`` up to rounding) and where it is
    NaN: nothing of such a drafted law can be judged.

    Args:
        left: ``[SLOTS]`` float64 sums of the residual by block; read with ``minus`` only.
    """
    plain = sums.to(tl.float64) * (1.0 / mass)
    # A block lighter than this may have no weight at all when it is read again.
    plain = tl.where(plain > NOTHING, plain, 0.0)
    # A difference of sums can fall below 0 by rounding; NaN stays.
    left = tl.where(left < 0.0, 0.0, left)
    total = tl.sum(left)
    share = factor / mass
    token = -1
    rest = minus & (total > 0)
    tries = 0
    while (token < 0) & (tries < 2):
        if not rest:
            left = plain
            share = 1.0 / mass
            total = tl.sum(left)
        token = invert(
            row, width, 0, top, scale, share, cut, last, min_p, left, uniform * total, rest,
            law, lse, tokens, size, BLOCK, SLOTS, SHIFT, LAW,
        )  # fmt: skip
        rest = rest & False
        tries += 1
    return token
