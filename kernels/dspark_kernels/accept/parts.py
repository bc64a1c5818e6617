"""Pieces of acceptance in Triton: row statistics, noise, and keys that order logits.

All are inlined into the kernels of :mod:`.kernel` and of ``vocab_parallel_accept``; :func:`row_pass` into the
latter only.

- *Key* of a logit: its float32 bits as a signed integer, with the lower 31 bits of negative values
  inverted, so that keys order as the logits do (``-0.0`` and ``0.0`` share one). The bits that
  bfloat16 does not have (``SHIFT``) are dropped, so a bisection takes half as many steps.
- *Noise* of (seed, position, column): ``-log(-log(h / (2^32 - 1)))`` with ``h`` MurmurHash3 (32 bits)
  of the seed's two halves, the position and the column, ``-log`` capped below by ``2^-32``.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
#: The least float32 key, that of no finite number.
LOWEST = tl.constexpr(-(2**31))


@triton.jit
def order_key(x, SHIFT: tl.constexpr):
    """Int32 key of each float32 value; ``SHIFT`` low bits are dropped."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def key_value(key, SHIFT: tl.constexpr):
    """The float32 value of an :func:`order_key` of int32."""
    high = key << SHIFT
    low: tl.constexpr = (1 << SHIFT) - 1
    # The dropped bits of a bfloat16 are zero; inverted, they are ones for negative values.
    full = tl.where(high < 0, (high | low) ^ 0x7FFFFFFF, high)
    return full.to(tl.float32, bitcast=True)


@triton.jit
def _mix(state, key):
    key = key * tl.full([], 0xCC9E2D51, tl.uint32)
    key = ((key << 15) | (key >> 17)) * tl.full([], 0x1B873593, tl.uint32)
    state = state ^ key
    state = (state << 13) | (state >> 19)
    return state * tl.full([], 5, tl.uint32) + tl.full([], 0xE6546B64, tl.uint32)


@triton.jit
def noise_state(seed, position):
    """Hash state of (seed, position), both int64; the same for every column."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    state = _mix(_mix(tl.full([], 0, tl.uint32), low), high)
    return _mix(state, (position & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def hash_column(state, column):
    """Uint32 hash of int32 columns."""
    state = _mix(state, column.to(tl.uint32)) ^ tl.full([], 16, tl.uint32)
    state = (state ^ (state >> 16)) * tl.full([], 0x85EBCA6B, tl.uint32)
    state = (state ^ (state >> 13)) * tl.full([], 0xC2B2AE35, tl.uint32)
    return state ^ (state >> 16)


@triton.jit
def gumbel(hashed):
    """Float64 noise of uint32 hashes."""
    uniform = hashed.to(tl.float64) / 4294967295.0
    # log(0) would be infinite; its cap is the largest float64.
    negative = tl.where(hashed == 0, 1.7976931348623157e308, -tl.log(tl.maximum(uniform, 1e-300)))
    return -tl.log(tl.maximum(negative, 2.3283064365386963e-10))


@triton.jit
def rough_gumbel(hashed):
    """Float32 noise within 1e-4 of :func:`gumbel`, for screening.

    Near ``h = 2^32`` the complement is exact where ``h`` is not, and ``-log(1 - y)`` is a series.
    """
    left = (tl.full([], 0xFFFFFFFF, tl.uint32) - hashed).to(tl.float32) * 2.3283064365386963e-10
    series = left * (1.0 + left * (0.5 + left * (0.33333333 + left * 0.25)))
    low = -tl.log(tl.maximum(hashed.to(tl.float32) * 2.3283064365386963e-10, 1e-30))
    high = tl.where(left < 0.01, series, -tl.log(tl.maximum(1.0 - left, 1e-30)))
    negative = tl.where(left < 0.5, high, low)
    rough = -tl.log(tl.maximum(negative, 2.3283064365386963e-10))
    return tl.where(hashed == 0, -709.0, rough)


@triton.jit
def seeded_best(x, offs, inside, inverse, state, best, token):
    """The better of (``best``, ``token``) and the seeded scores of a tile.

    Scores are ``g + x / T`` in float64; the lower token of equals wins. A float32 estimate of all of them
    says which can be the best: one or two, whose scores are then computed.

    Args:
        x: float32 tile of logits; offs: int32 tokens; inside: which of them exist.
        inverse: float32 ``1 / T``; state: :func:`noise_state`.
        best: float64 score; token: int32.
    """
    rough = tl.where(inside, rough_gumbel(hash_column(state, offs)) + x * inverse, -float("inf"))
    top = tl.max(rough)
    # Ten times the error of an estimate, for each of two.
    slack = 4e-3 + 2e-5 * tl.abs(top)
    least = tl.maximum(top - slack, (best - slack).to(tl.float32))
    while (top >= least) & (tl.abs(top) < float("inf")):
        lane = tl.min(tl.where(rough == top, offs, 2147483647))
        logit = tl.max(tl.where(offs == lane, x, -float("inf"))).to(tl.float64)
        score = gumbel(hash_column(state, lane)) + logit * inverse.to(tl.float64)
        if (score > best) | ((score == best) & (lane < token)):
            best = score
            token = lane
        rough = tl.where(offs == lane, -float("inf"), rough)
        top = tl.max(rough)
    return best, token


@triton.jit
def heat_of(temperature, request):
    """Whether a request samples at all, ``1 / T`` and ``log2(e) / T``."""
    heat = tl.load(temperature + request).to(tl.float32)
    inverse = 1.0 / tl.where(heat <= 0.0, 1.0, heat)
    # A NaN is no temperature of a greedy request: its rows have no law.
    return (heat <= 0.0) == 0, inverse, inverse * LOG2E


@triton.jit
def filters_of(top_k, top_p, min_p, request, vocabulary):
    """A request's filters, and whether they filter anything."""
    most = tl.maximum(tl.load(top_k + request).to(tl.int32), 1)
    nucleus = tl.load(top_p + request).to(tl.float32)
    least = tl.load(min_p + request).to(tl.float32)
    return most, nucleus, least, (most < vocabulary) | (nucleus < 1.0) | (least > 0.0)


@triton.jit
def fits_inside(first, lens, drafted, request, rows, vocabulary, gamma, PLACES: tl.constexpr):
    """A request's first row, drafted tokens, and whether both are inside the operands."""
    length = tl.load(lens + request).to(tl.int32)
    start = tl.load(first + request).to(tl.int64)
    place = tl.arange(0, PLACES)
    block = tl.load(
        drafted + request * gamma + place, mask=place < tl.minimum(length, gamma), other=0
    )
    outside = tl.max(((block < 0) | (block >= vocabulary)).to(tl.int32)) > 0
    fits = (length <= gamma) & (start >= 0) & (start + length < rows)
    return start, length, fits & (outside == 0)


@triton.jit
def row_pass(
    row, width, base, scale, inverse, state, coupled,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr, COUPLED: tl.constexpr,
):  # fmt: skip
    """Read a row once: its maximum, argmax, sums of exponentials by block, seeded draw.

    Args:
        row: pointer to ``width`` logits.
        base: token of the first (the columns of a shard do not start at 0).
        scale: float32 ``log2(e) / T``; inverse: float32 ``1 / T``.
        state: :func:`noise_state`; coupled: whether this row draws with it.

    Returns:
        largest logit (float32), its first column, ``[SLOTS]`` float32 sums of
        ``exp((x - largest) / T)`` of every block, seeded score (float64) and column. As for
        ``torch.max`` a NaN is larger than all others; the sum of its block is NaN.
    """
    slot = tl.arange(0, SLOTS)
    tops = tl.full([SLOTS], -float("inf"), tl.float32)
    sums = tl.zeros([SLOTS], tl.float32)
    best = -float("inf")
    arg = 0
    odd = 2147483647
    score = tl.full([], -float("inf"), tl.float64)
    drawn = 0
    for block in tl.range(0, tl.cdiv(width, BLOCK), num_stages=STAGES):
        offs = block * BLOCK + tl.arange(0, BLOCK)
        inside = offs < width
        x = tl.load(row + offs, mask=inside, other=-float("inf")).to(tl.float32)
        top = tl.max(x)
        if top > best:
            best = top
            arg = tl.min(tl.where(x == top, offs, 2147483647))
        if COUPLED:  # noqa: SIM102
            if coupled:
                score, drawn = seeded_best(x, offs + base, inside, inverse, state, score, drawn)
        # An empty block has weights 0; NaN stays NaN and reaches the sum.
        level = tl.where(top == -float("inf"), 0.0, top)
        weight = tl.sum(tl.exp2((x - level) * scale))
        # Maxima keep a NaN or drop it, as the compiler likes; the sum shows where to look for one.
        if weight != weight:
            odd = tl.minimum(odd, tl.min(tl.where(x != x, offs, 2147483647)))
        tops = tl.where(slot == block, top, tops)
        sums = tl.where(slot == block, weight, sums)
    sums = tl.where(tops > -float("inf"), sums * tl.exp2((tops - best) * scale), sums)
    if odd < 2147483647:
        best = float("nan")
        arg = odd
    return best, arg, sums, score, drawn
