"""V4's indexer: which compressed positions a row attends to where there are more than ``index_topk``.

A row scores every ended block by ``sum_h w_h relu(q_h . k)`` over fp8 queries and keys, both turned by an orthonormal
Hadamard transform, and takes the best. Written from SGLang 0.5.23, ``kernels/ops/attention/dsv4/norm_rope.py``
(``fused_q_indexer_rope_hadamard_quant``), ``topk.py``, and ``layers/attention/dsv4/indexer.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import pad

from dspark_sglang.serving.cpu.v4 import pages
from dspark_sglang.serving.cpu.v4.rotary import rotate_tail


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard transform of the last dimension (a power of two), natural order."""
    size, width = x.shape[-1], 1
    while width < size:
        even, odd = torch.unflatten(x, -1, (-1, 2, width)).unbind(-2)
        x = torch.stack([even + odd, even - odd], dim=-2).flatten(-3)
        width *= 2
    return x / math.sqrt(size)


def fused_q_indexer_rope_hadamard_quant(
    q_input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: float,
    freqs_cis: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of the indexer as fp8, and the weight of each head with the query's scale in it.

    Args:
        q_input: ``[n, heads, 128]``.
        weight: ``[n, heads]``.
        weight_scale: of every weight.

    Returns:
        ``[n, heads, 128]`` float8_e4m3fn and ``[n, heads, 1]`` float32.
    """
    q = hadamard(rotate_tail(q_input.float(), freqs_cis, positions))
    scale = pages.fp8_scale(q)
    return pages.to_fp8(q, scale), weight.float().unsqueeze(-1) * weight_scale * scale


def fp8_paged_mqa_logits(
    q_fp8: torch.Tensor,
    kvcache_fp8: torch.Tensor,
    weight: torch.Tensor,
    seq_lens: torch.Tensor,
    page_table: torch.Tensor,
    deep_gemm_metadata: object,
    max_seq_len: int,
    clean_logits: bool = True,
) -> torch.Tensor:
    """Scores of every block for every row.

    Args:
        q_fp8: ``[n, 1, heads, 128]`` float8_e4m3fn.
        kvcache_fp8: ``[pages, page, 1, 132]`` indexer keys.
        weight: ``[n, heads]``.
        seq_lens: ``[n]`` blocks that have ended for each row.
        page_table: ``[n, m]`` pages of its keys.

    Returns:
        ``[n, max_seq_len]`` float32; minus infinity from ``seq_lens`` on.
    """
    size, width = kvcache_fp8.shape[1], kvcache_fp8.shape[-1] - 4
    used = page_table[:, : -(-max_seq_len // size)].long()
    unique, place = torch.unique(used, return_inverse=True)
    keys = pages.load_index_keys(kvcache_fp8, unique, size, width)
    scores = torch.einsum("nhd,pbd->nphb", q_fp8[:, 0].float(), keys).relu_()
    every = torch.einsum("nphb,nh->npb", scores, weight.float())
    logits = every.gather(1, place[..., None].expand(-1, -1, size)).flatten(1)[:, :max_seq_len]
    logits = pad(logits, (0, max_seq_len - logits.shape[1]))
    ended = torch.arange(max_seq_len) < seq_lens.view(-1, 1)
    return logits.masked_fill(~ended, -torch.inf)


def topk_transform_paged(
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    page_tables: torch.Tensor,
    out_page_indices: torch.Tensor,
    page_size: int,
    *rest: Any,
    **more: Any,
) -> None:
    """Slots of the ``k`` best blocks of each row, of all in order where there are at most ``k``.

    Equal scores are taken by position, so that what a row sees does not depend on its batch.

    Args:
        scores: ``[n, blocks]``.
        seq_lens: ``[n]`` blocks that have ended.
        page_tables: ``[n, m]`` pages.
        out_page_indices: ``[n, k]`` int32, written; -1 where there are fewer.
        rest, more: may hold one more ``[n, k]`` tensor, which takes the blocks' numbers.
    """
    most = out_page_indices.shape[1]
    lens = seq_lens.view(-1, 1)
    masked = scores.float().masked_fill(torch.arange(scores.shape[1]) >= lens, -torch.inf)
    order = masked.sort(dim=1, descending=True, stable=True).indices[:, :most]
    order = pad(order, (0, most - order.shape[1]))
    rank = torch.arange(most)
    valid = rank < lens
    chosen = torch.where(lens <= most, rank, order).masked_fill(~valid, 0)
    page = page_tables.gather(1, (chosen // page_size).clamp(max=page_tables.shape[1] - 1))
    slots = page.long() * page_size + chosen % page_size
    out_page_indices.copy_(slots.masked_fill(~valid, -1))
    for numbers in (*rest, *more.values()):
        if isinstance(numbers, torch.Tensor) and numbers.shape == out_page_indices.shape:
            numbers.copy_(chosen.masked_fill(~valid, -1))


def plan_topk(
    seq_lens: torch.Tensor, static_threshold: int = -1, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """No plan is needed: the buffer as it is."""
    return seq_lens if out is None else out
