"""V4's attention over listed slots of paged latents, with a sink.

Every head reads the same latents, as keys and as values. A row sees the slots of its window and, in layers that
compress, slots of a second cache. Written from SGLang 0.5.23, ``kernels/ops/attention/flash_mla_interface.py``
(``flash_mla_with_kvcache``) as ``layers/attention/deepseek_v4_backend.py`` calls it.
"""

from __future__ import annotations

from typing import Any

import torch

from dspark_sglang.serving.cpu.v4 import pages

#: Rows of queries whose scores are held at a time.
_ROWS = 256


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    *,
    head_dim_v: int,
    softmax_scale: float,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
    attn_sink: torch.Tensor,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one query row a token.

    Args:
        q: ``[n, 1, heads, 512]``.
        k_cache, extra_k_cache: ``[pages, page, 1, 584]`` views of packed pages.
        head_dim_v: first dimensions of a latent that are the value.
        indices, extra_indices_in_kvcache: ``[n, 1, k]`` slots; negative where there are none.
        topk_length, extra_topk_length: ``[n]`` how many of a row's slots count; None: all.
        attn_sink: ``[heads]`` logits that take a share and add nothing.

    Returns:
        ``[n, 1, heads, head_dim_v]``, and None for the softmax's normaliser, which nobody reads.
    """
    out = q.new_zeros((*q.shape[:3], head_dim_v))
    heads = min(q.shape[2], attn_sink.shape[0])  # the rest pads
    sink = attn_sink[:heads].float().view(1, -1, 1)
    for start in range(0, len(q), _ROWS):
        rows = slice(start, start + _ROWS)
        found = [_seen(k_cache, indices[rows], topk_length, rows)]
        if extra_k_cache is not None:
            assert extra_indices_in_kvcache is not None
            found.append(
                _seen(extra_k_cache, extra_indices_in_kvcache[rows], extra_topk_length, rows)
            )
        keys = torch.cat([latents for latents, _ in found])
        seen = torch.cat([mask for _, mask in found], dim=1)
        scores = torch.einsum("nhd,kd->nhk", q[rows, 0, :heads].float(), keys) * softmax_scale
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        shares = torch.cat([scores, sink.expand(len(scores), -1, 1)], dim=-1).softmax(dim=-1)
        made = torch.einsum("nhk,kd->nhd", shares[..., :-1], keys[:, :head_dim_v])
        out[rows, 0, :heads] = made.to(q.dtype)
    return out, None


def _seen(
    cache: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor | None, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[k, 512]`` latents that some row sees, and ``[n, k]`` bool which row sees which."""
    slots = table.squeeze(1).long()
    valid = slots >= 0
    if lengths is not None:
        valid &= torch.arange(slots.shape[1]) < lengths[rows].view(-1, 1)
    unique, place = torch.unique(slots[valid], return_inverse=True)
    seen = torch.zeros((len(slots), len(unique)), dtype=torch.bool)
    seen[valid.nonzero()[:, 0], place] = True
    return pages.load(cache, unique, cache.shape[1]), seen
