"""Budgeted best-first admission and the ragged layout, by one program in one launch.

Candidates ``(r, j)`` have survivals ``a_{r,j}``; admitted are the ``K`` first in the order: larger
``a``, then smaller ``j``, then smaller ``r``. Nothing is sorted. What matters is the ``K``-th largest
value ``t``::

    t        = the largest value with  #{a >= t} >= K
    admitted = {a > t}  and, of {a = t} in scan order (position by position, request by request in
               each), the first  K - #{a > t}

Survivals are not negative, so their float64 bits as integers stand in the same order, and ``t`` is
found by halving an interval of integers: at most 62 counts over values that stay in registers. It
stops early at any ``t`` with exactly ``K`` values from ``t`` on, about 20 counts for untied survivals.
Ties are then ranked by one prefix sum.

With ``l_r`` admitted tokens request ``r`` sends ``1 + l_r`` rows, packed from ``o_r = sum_{q<r} (1 + l_q)``
on: window cell ``(r, j)`` goes to packed row ``o_r + j`` if ``j <= l_r``. The other cells, in order, take
the rows behind the last packed one and write -1 there, so every output element is written once.

Survival never rises along a request, so what is admitted of a request is a prefix of it; the
kernel does not depend on that for ``l_r``, which is a count.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _threshold(bits, wanted):
    """An integer ``t`` that the ``wanted`` largest of ``bits`` reach, and no more than ties do.

    Either exactly ``wanted`` values are at least ``t``, or ``t`` is the ``wanted``-th largest value.
    """
    # Invariant: low is reached by at least `wanted` values, high by fewer.
    low = tl.zeros((), tl.int64)
    high = tl.max(tl.max(bits, axis=1), axis=0) + 1
    searching = wanted < tl.sum(tl.sum((bits >= 0).to(tl.int32), axis=1), axis=0)
    while searching & (low + 1 < high):
        middle = low + (high - low) // 2
        reached = tl.sum(tl.sum((bits >= middle).to(tl.int32), axis=1), axis=0)
        low = tl.where(reached >= wanted, middle, low)
        high = tl.where(reached >= wanted, high, middle)
        searching = reached != wanted
    return low


@triton.jit
def _admitted(bits, wanted):
    """0 or 1 for each candidate of a ``[positions, requests]`` tile; padding holds negative bits."""
    threshold = _threshold(bits, wanted)
    above = (bits > threshold).to(tl.int32)
    tied = (bits == threshold).to(tl.int32)
    left = wanted - tl.sum(tl.sum(above, axis=1), axis=0)
    # Ties before each one: those of earlier positions, then those of earlier requests.
    by_position = tl.sum(tied, axis=1)
    earlier = tl.cumsum(by_position, axis=0) - by_position
    before = earlier[:, None] + tl.cumsum(tied, axis=1) - tied
    return above + tl.where(before < left, tied, 0)


@triton.jit(do_not_specialize=["requests"])
def admit_kernel(
    survival,
    budget,
    lens,
    sent_rows,
    offsets,
    rows,
    requests,
    GAMMA: tl.constexpr,
    POSITIONS: tl.constexpr,
    WINDOW: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    """One program does it all.

    ``POSITIONS``, ``WINDOW`` and ``REQUESTS`` are ``GAMMA``, ``GAMMA + 1`` and ``requests`` rounded up
    to powers of two.
    """
    request = tl.arange(0, REQUESTS)
    real = request < requests

    position = tl.arange(0, POSITIONS)
    candidate = (position < GAMMA)[:, None] & real[None, :]
    chance = tl.load(
        survival + request[None, :] * GAMMA + position[:, None], mask=candidate, other=0.0
    )
    # NaN, negative values and -0.0, whose bits would be out of order, become 0.
    bits = tl.where(chance > 0.0, chance, 0.0).to(tl.int64, bitcast=True)
    bits = tl.where(candidate, bits, -1)
    wanted = tl.minimum(tl.maximum(tl.load(budget), 0), requests * GAMMA)
    length = tl.sum(_admitted(bits, wanted), axis=0)
    tl.store(lens + request, length, mask=real)

    sent = tl.where(real, 1 + length, 0)
    tl.store(sent_rows + request, sent, mask=real)
    end = tl.cumsum(sent, axis=0)
    total = tl.sum(sent, axis=0)
    tl.store(offsets + request, end - sent, mask=real)
    tl.store(offsets + requests, total)

    column = tl.arange(0, WINDOW)[:, None]
    cell = request[None, :] * (GAMMA + 1) + column
    packed = column < sent[None, :]
    target = tl.where(packed, (end - sent)[None, :] + column, total + cell - end[None, :])
    inside = (column <= GAMMA) & real[None, :]
    tl.store(rows + target, tl.where(packed, cell, -1).to(tl.int64), mask=inside)
