"""Penalties, stop exclusion and bias in Triton, written into the row before it is judged.

l <- l - (frequency * n + presence), then l / repetition where l > 0 and l * repetition elsewhere,
     for tokens with n > 0 occurrences in the output and in the drafted tokens before the row
l <- -inf for stop tokens while the output is shorter than min_new_tokens
l <- l + bias
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Listed tokens worked on at a time.
CHUNK = tl.constexpr(128)


@triton.jit
def _penalised(x, times, frequency, presence, repetition):
    lower = x - (frequency * times.to(tl.float32) + presence)
    scaled = tl.where(lower > 0, lower / repetition, lower * repetition)
    return tl.where(times > 0, scaled, x)


@triton.jit
def adjust_row(
    row, width, base, drafted, position, tokens, counts, bias, stops, size,
    frequency, presence, repetition, excluded, PLACES: tl.constexpr,
):  # fmt: skip
    """Change one row in place; each row must be changed once.

    Args:
        base: token of the first column (of a shard).
        drafted: pointer to the request's drafted tokens; ``position`` of them come before the row.
        tokens, counts, bias, stops: pointers to ``size`` listed tokens (unique, padded with -1).
        excluded: whether stop tokens are excluded here.
        PLACES: a power of two of at least the drafted tokens of a request.
    """
    place = tl.arange(0, PLACES)
    mine = tl.load(drafted + place, mask=place < position, other=-1) - base
    known = tl.zeros([PLACES], tl.int32)
    for start in tl.range(0, size, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        token = tl.load(tokens + entry, mask=entry < size, other=-1) - base
        live = (token >= 0) & (token < width)
        same = ((token[:, None] == mine[None, :]) & live[:, None]).to(tl.int32)
        times = tl.load(counts + entry, mask=live, other=0) + tl.sum(same, 1)
        known += tl.sum(same, 0)
        x = tl.load(row + token, mask=live, other=0.0)
        x = _penalised(x, times, frequency, presence, repetition)
        stop = tl.load(stops + entry, mask=live, other=0) != 0
        x = tl.where(stop & excluded, -float("inf"), x)
        tl.store(row + token, x + tl.load(bias + entry, mask=live, other=0.0), mask=live)
    equal = (mine[:, None] == mine[None, :]).to(tl.int32)
    repeated = tl.sum(tl.where(place[None, :] < place[:, None], equal, 0), 1)
    own = (place < position) & (mine >= 0) & (mine < width) & (known == 0) & (repeated == 0)
    x = tl.load(row + mine, mask=own, other=0.0)
    x = _penalised(x, tl.sum(equal, 1), frequency, presence, repetition)
    tl.store(row + mine, x, mask=own)
    # The whole program reads what some of its threads wrote.
    tl.debug_barrier()
