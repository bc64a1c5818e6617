"""SGLang's paged cache formats for V4: packed latents (584 bytes a slot) and indexer keys (132).

A page of ``n`` latents is ``n`` rows of 576 bytes (448 fp8 values, then 64 bfloat16 values), then ``n`` rows of 8
scale bytes: 7 exponents of powers of two, one for 64 values each, and one spare. A page of ``n`` indexer keys is
``n`` rows of 128 fp8 values, then ``n`` float32 scales. Pages may be padded at the end.

Written from SGLang 0.5.23, ``kernels/ops/attention/dsv4/attn.py`` (``fused_store_cache``) and its CUDA sources.
"""

from __future__ import annotations

import torch

#: Values of a latent that are stored as fp8, as bfloat16, and that share a scale.
NOPE, ROPE, TILE = 448, 64, 64
LATENT_BYTES, SCALE_BYTES = NOPE + 2 * ROPE, 8
FP8_MAX = 448.0
#: Smallest magnitude that a scale stands for.
FLOOR = 1e-4


def to_fp8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``values / scale`` as float8_e4m3fn, saturated; ``scale`` broadcasts with ``values``."""
    return (values / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def fp8_scale(values: torch.Tensor) -> torch.Tensor:
    """``[..., 1]`` float32 by which the last dimension fills the range of fp8."""
    return values.float().abs().amax(-1, keepdim=True).clamp_min(FLOOR) / FP8_MAX


def _exponent(scale: torch.Tensor) -> torch.Tensor:
    """int32 biased exponent of the smallest power of two that is at least ``scale`` (float32, normal)."""
    bits = scale.contiguous().view(torch.int32)
    return ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).to(torch.int32)


def pack(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n, 512]`` latents as ``[n, 576]`` row bytes and ``[n, 8]`` scale bytes."""
    tiles = torch.unflatten(latents[:, :NOPE].float(), 1, (-1, TILE))
    exponent = _exponent(fp8_scale(tiles).squeeze(-1))
    values = to_fp8(tiles, torch.exp2(exponent.float() - 127.0)[..., None]).flatten(1)
    rope = latents[:, NOPE:].to(torch.bfloat16).contiguous()
    rows = torch.cat([values.view(torch.uint8), rope.view(torch.uint8)], dim=1)
    scales = rows.new_zeros((len(rows), SCALE_BYTES))
    scales[:, : NOPE // TILE] = exponent.to(torch.uint8)
    return rows, scales


def unpack(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``[n, 512]`` float32 latents of what :func:`pack` made."""
    values = rows[:, :NOPE].contiguous().view(torch.float8_e4m3fn).float()
    factor = torch.exp2(scales[:, : NOPE // TILE].float() - 127.0)
    nope = torch.unflatten(values, 1, (-1, TILE)) * factor[..., None]
    rope = rows[:, NOPE:].contiguous().view(torch.bfloat16).float()
    return torch.cat([nope.flatten(1), rope], dim=1)


def _page_views(
    cache: torch.Tensor, page_size: int, row: int, scale: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes ``[pages, page_size, row]`` and ``[pages, page_size, scale]`` of a cache with one page a row."""
    raw = cache if cache.dtype == torch.uint8 else cache.view(torch.uint8)
    pages, stride, start = raw.shape[0], raw.stride(0), raw.storage_offset()
    rows = raw.as_strided((pages, page_size, row), (stride, row, 1), start)
    scales = raw.as_strided((pages, page_size, scale), (stride, scale, 1), start + page_size * row)
    return rows, scales


def store(cache: torch.Tensor, slots: torch.Tensor, latents: torch.Tensor, page_size: int) -> None:
    """Write ``[n, 512]`` latents at ``[n]`` slots of a latent cache; negative slots are skipped."""
    kept = (slots >= 0).nonzero().view(-1)
    if not len(kept):
        return
    slots = slots[kept].long()
    rows, scales = _page_views(cache, page_size, LATENT_BYTES, SCALE_BYTES)
    packed, exponents = pack(latents[kept])
    rows[slots // page_size, slots % page_size] = packed
    scales[slots // page_size, slots % page_size] = exponents


def load(cache: torch.Tensor, slots: torch.Tensor, page_size: int) -> torch.Tensor:
    """``[n, 512]`` float32 latents at ``[n]`` int64 slots, none negative."""
    rows, scales = _page_views(cache, page_size, LATENT_BYTES, SCALE_BYTES)
    page, within = slots // page_size, slots % page_size
    return unpack(rows[page, within], scales[page, within])


def store_index_keys(
    cache: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, page_size: int
) -> None:
    """Write ``[n, 128]`` indexer keys at ``[n]`` slots of an indexer cache; negative slots are skipped."""
    kept = (slots >= 0).nonzero().view(-1)
    if not len(kept):
        return
    slots, keys = slots[kept].long(), keys[kept].float()
    rows, scales = _page_views(cache, page_size, keys.shape[1], 4)
    scale = fp8_scale(keys)
    rows[slots // page_size, slots % page_size] = to_fp8(keys, scale).view(torch.uint8)
    scales[slots // page_size, slots % page_size] = scale.contiguous().view(torch.uint8)


def load_index_keys(
    cache: torch.Tensor, pages: torch.Tensor, page_size: int, width: int
) -> torch.Tensor:
    """``[p, page_size, width]`` float32 indexer keys of ``[p]`` int64 pages."""
    rows, scales = _page_views(cache, page_size, width, 4)
    keys = rows[pages].contiguous().view(torch.float8_e4m3fn).float()
    return keys * scales[pages].contiguous().view(torch.float32)
