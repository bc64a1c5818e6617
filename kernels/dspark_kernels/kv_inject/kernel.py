"""Keys and values of accepted rows into the draft's paged pool, all layers in one launch.

For row ``n`` at position ``p`` with slot ``s``, layer ``l`` and head ``h`` (``x = k[n, l, h]``, ``g`` the
layer's gain, ``m`` the rotary width, ``c_i`` and ``s_i`` the table's cosines and sines of ``p``)::

    y       = x / sqrt(mean(x^2) + eps) * g                    (float32, then rounded to k's dtype)
    K[i]        = y[i] c_i - y[i + m/2] s_i                    for i < m/2
    K[i + m/2]  = y[i + m/2] c_i + y[i] s_i                    for i < m/2
    K[i]        = y[i]                                         for i >= m
    pool_K[l][s, h] = K,  pool_V[l][s, h] = v[n, l, h]

The normed key is rounded before it turns, as the draft layers round it for their own block: a
token's key must not depend on which of the two wrote it.

A row whose slot is negative was not accepted: its program reads the slot and stops. So does one
whose slot is behind the pool's end, where a write would go into foreign memory. A position outside
the table has no rotation: its key is written as NaN, which shows at the next confidence, instead
of being turned by what happens to lie behind the table.

The pools of the layers are separate tensors, reached through a table of their addresses.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _normed(x, gain, scale):
    """``x * scale * gain`` rounded to ``x``'s dtype, back in float32."""
    y = x.to(tl.float32) * scale[:, None] * gain.to(tl.float32)[None, :]
    return y.to(x.dtype).to(tl.float32)


@triton.jit
def _write_keys(
    k,
    weight,
    table,
    pool,
    position,
    positions,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """Every head of one row and layer: ``k`` and ``pool`` point at its first element."""
    HALF: tl.constexpr = ROTARY // 2
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, HALF_BLOCK)
    turning = column < HALF
    mask = (head < HEADS) & turning[None, :]
    at = head * DIM + column[None, :]
    low = tl.load(k + at, mask=mask, other=0.0)
    high = tl.load(k + at + HALF, mask=mask, other=0.0)
    squares = tl.sum(low.to(tl.float32) * low.to(tl.float32), axis=1)
    squares += tl.sum(high.to(tl.float32) * high.to(tl.float32), axis=1)
    if ROTARY < DIM:
        rest_column = ROTARY + tl.arange(0, REST_BLOCK)
        rest_mask = (head < HEADS) & (rest_column < DIM)[None, :]
        rest_at = head * DIM + rest_column[None, :]
        rest = tl.load(k + rest_at, mask=rest_mask, other=0.0)
        squares += tl.sum(rest.to(tl.float32) * rest.to(tl.float32), axis=1)
    scale = tl.div_rn(1.0, tl.sqrt_rn(squares / DIM + eps))

    known = turning & (position >= 0) & (position < positions)
    turn = table + position * ROTARY + column
    cos = tl.load(turn, mask=known, other=float("nan")).to(tl.float32)[None, :]
    sin = tl.load(turn + HALF, mask=known, other=float("nan")).to(tl.float32)[None, :]
    low = _normed(low, tl.load(weight + column, mask=turning, other=0.0), scale)
    high = _normed(high, tl.load(weight + HALF + column, mask=turning, other=0.0), scale)
    kind = pool.dtype.element_ty
    tl.store(pool + at, (low * cos - high * sin).to(kind), mask=mask)
    tl.store(pool + at + HALF, (high * cos + low * sin).to(kind), mask=mask)
    if ROTARY < DIM:
        gain = tl.load(weight + rest_column, mask=rest_column < DIM, other=0.0)
        tl.store(pool + rest_at, _normed(rest, gain, scale).to(kind), mask=rest_mask)


@triton.jit(
    do_not_specialize=["capacity", "positions_held"],
    do_not_specialize_on_alignment=["positions", "slots"],
)
def kv_inject_kernel(
    k,
    v,
    positions,
    slots,
    weight,
    table,
    addresses,
    k_row_stride,
    k_layer_stride,
    v_row_stride,
    v_layer_stride,
    k_slot_stride,
    v_slot_stride,
    capacity,
    positions_held,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    FLAT_BLOCK: tl.constexpr,
):
    """Program ``(n, l)``: row ``n`` of layer ``l``. ``*_BLOCK`` are sizes rounded up to powers of two."""
    row = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    if (slot < 0) | (slot >= capacity):
        return
    # Pools are allocated by torch and checked to be aligned: full-width stores.
    k_pool = tl.multiple_of(tl.load(addresses + layer * 2).to(k.dtype), 16)
    v_pool = tl.multiple_of(tl.load(addresses + layer * 2 + 1).to(v.dtype), 16)
    _write_keys(
        k + row * k_row_stride + layer * k_layer_stride,
        weight + layer * DIM,
        table,
        k_pool + slot * k_slot_stride,
        tl.load(positions + row),
        positions_held,
        eps,
        HEADS,
        DIM,
        ROTARY,
        HEADS_BLOCK,
        HALF_BLOCK,
        REST_BLOCK,
    )
    flat = tl.arange(0, FLAT_BLOCK)
    inside = flat < HEADS * DIM
    value = tl.load(v + row * v_row_stride + layer * v_layer_stride + flat, mask=inside)
    tl.store(v_pool + slot * v_slot_stride + flat, value, mask=inside)
