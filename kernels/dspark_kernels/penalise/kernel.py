"""Penalties of plain decoding at every row of verified blocks, and the counts of outputs that they need.

For a token with ``n > 0`` occurrences in the output and in the block's tokens before the row::

    l <- l - (frequency * n + presence)
    l <- l / repetition  where l > 0,  l * repetition  elsewhere

and ``-inf`` for stop tokens while the output is shorter than ``min_new_tokens``. Products and sums are rounded one by
one, as PyTorch's are: nothing is fused.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["stop_count", "stride", "requests"],
    do_not_specialize_on_alignment=["slots", "least", "stops"],
)
def penalise_kernel(
    logits,
    cells,
    counts,
    lengths,
    slots,
    active,
    weights,
    least,
    stops,
    block,
    stop_count,
    stride,
    requests,
    vocabulary,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program ``(n, c)``: columns ``c * BLOCK`` on of row ``n``, in place. ``block`` is ``[R, WIDTH]``."""
    row = tl.program_id(0)
    cell = tl.load(cells + row)
    request = cell // WIDTH
    if tl.load(active + request) == 0:
        return
    before = cell - request * WIDTH + 1  # the anchor comes before every row
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    slot = tl.load(slots + request * stride)
    times = tl.load(counts + slot * vocabulary + column, mask=inside, other=0)
    for place in tl.static_range(WIDTH):
        token = tl.load(block + request * WIDTH + place)
        times += ((column == token) & (place < before)).to(tl.int32)
    frequency = tl.load(weights + request).to(tl.float32)
    presence = tl.load(weights + requests + request).to(tl.float32)
    repetition = tl.load(weights + 2 * requests + request).to(tl.float32)
    at = logits + row.to(tl.int64) * vocabulary + column
    own = tl.load(at, mask=inside, other=0.0)
    lower = own - (frequency * times.to(tl.float32) + presence)
    scaled = tl.where(lower > 0, tl.div_rn(lower, repetition), lower * repetition)
    found = tl.where(times > 0, scaled, own)
    if stop_count > 0:
        short = tl.load(lengths + slot) + before < tl.load(least + request * stride)
        for index in range(0, stop_count):
            stop = tl.load(stops + request * stride + index)
            found = tl.where((column == stop) & short, -float("inf"), found)
    tl.store(at, found, mask=inside)


@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=["slots", "kept"])
def extend_kernel(
    counts,
    lengths,
    slots,
    active,
    block,
    kept,
    stride,
    vocabulary,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Program ``r``: the anchor and ``kept`` drafted tokens of request ``r`` join its output."""
    request = tl.program_id(0)
    if tl.load(active + request) == 0:
        return
    place = tl.arange(0, PLACES)
    count = tl.load(kept + request)
    new = (place < WIDTH) & (place <= count)
    token = tl.load(block + request * WIDTH + place, mask=new, other=0)
    slot = tl.load(slots + request * stride)
    tl.atomic_add(counts + slot * vocabulary + token, 1, mask=new)
    tl.store(lengths + slot, tl.load(lengths + slot) + count + 1)
