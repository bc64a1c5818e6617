"""Keys and values of accepted rows into the draft's pool, in plain torch, one row at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def rope_table(positions: int, width: int, theta: float) -> torch.Tensor:
    """Rotations of plain rotary embedding: ``[positions, width]`` float32.

    Row ``p`` holds ``cos(p f_i)`` for ``i < width / 2`` and then ``sin(p f_i)``, with
    ``f_i = theta^(-2i / width)``. Computed in float64.
    """
    half = width // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


def reference(
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    *,
    eps: float,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write ``rope(norm(k))`` and ``v`` of every row with a slot to that slot of every layer.

    Args:
        k: ``[N, L, heads * dim]`` projected keys.
        v: ``[N, L, heads * dim]`` projected values.
        positions: ``[N]`` absolute positions.
        slots: ``[N]`` slots; a row whose slot is outside the pool is skipped.
        weight: ``[L, dim]`` gain of the key norm.
        table: ``[P, rotary]`` cosines, then sines.
        keys: ``[slots, heads, dim]`` pool of each layer.
        values: ``[slots, heads, dim]`` pool of each layer.
        eps: added to the mean square.
        dtype: what is computed in. With float64 the normed key is not rounded to ``k``'s dtype
            before it turns.
    """
    for row in range(k.shape[0]):
        slot, position = int(slots[row]), int(positions[row])
        for layer in range(k.shape[1]):
            if not 0 <= slot < keys[layer].shape[0]:
                continue
            _, heads, dim = keys[layer].shape
            for head in range(heads):
                part = slice(head * dim, (head + 1) * dim)
                x = k[row, layer, part].to(dtype)
                x = x / torch.sqrt((x * x).mean() + eps) * weight[layer].to(dtype)
                if dtype != torch.float64:
                    x = x.to(k.dtype).to(dtype)
                keys[layer][slot, head] = _turned(x, position, table.to(dtype)).to(k.dtype)
                values[layer][slot, head] = v[row, layer, part]


def _turned(x: torch.Tensor, position: int, table: torch.Tensor) -> torch.Tensor:
    half = table.shape[1] // 2
    if 0 <= position < table.shape[0]:
        cos, sin = table[position, :half], table[position, half:]
    else:
        cos = sin = table.new_full((half,), torch.nan)
    low, high, rest = x[:half], x[half : 2 * half], x[2 * half :]
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest])
