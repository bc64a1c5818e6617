"""V4's compressors of ratio 4 (overlapping) and 128: their plans, their weighted means, and their metadata.

Scores and values of recent positions lie in rings: of a request (ratio 128), or of a page of the window's cache
(ratio 4), which prefixes share. When a block ends, its latent is a softmax-weighted mean over its positions, each
dimension by itself; ratio 4 looks at the block before as well. A plan says, row by row, what is computed and what is
written, in the bytes of SGLang's kernels, so whatever reads a plan stays SGLang's.

Written from SGLang 0.5.23, ``kernels/ops/attention/dsv4/compress.py``, ``metadata_kernel.py`` and their CUDA sources.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dspark_sglang.serving.cpu.v4 import pages, require
from dspark_sglang.serving.cpu.v4.indexer import hadamard
from dspark_sglang.serving.cpu.v4.rotary import norm, rotate_tail

#: Place of a row of a plan that is not used.
UNUSED = -1


class _Rings(NamedTuple):
    """Where a compressor's state of a position lies."""

    ratio: int
    req_to_token: torch.Tensor
    full_to_state: torch.Tensor
    swa_page: int
    ring: int
    by_request: bool

    def __call__(self, request: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """``[n]`` int64 rows of the state buffer, of positions of requests (rows of ``req_to_token``)."""
        if self.by_request or self.ratio == 128:
            return request * self.ring + position % self.ring
        slot = self.full_to_state[self.req_to_token[request, position].long()].long()
        return slot // self.swa_page * self.ring + slot % self.ring


def decode_plan(
    compress_ratio: int,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    full_to_state: torch.Tensor,
    seq_lens: torch.Tensor,
    swa_page_size: int,
    ring_size: int,
    use_req_ring: bool = False,
) -> Any:
    """Plan of one new position a request: ``CompressorDecodePlan.generate``.

    A row is four int32: length, row written, and the rows' blocks that hold the block before and this one.
    """
    from sglang.kernels.ops.attention.dsv4.compress import CompressorDecodePlan

    rings = _Rings(
        compress_ratio, req_to_token, full_to_state, swa_page_size, ring_size, use_req_ring
    )
    request, last = req_pool_indices.long(), seq_lens.long() - 1
    written = rings(request, last)
    before = rings(request, (last - compress_ratio).clamp_min(0))
    words = [seq_lens.long(), written, before // compress_ratio, written // compress_ratio]
    plan = torch.stack(words, dim=1).to(torch.int32)
    return CompressorDecodePlan(compress_ratio, plan.view(torch.uint8))


def prefill_plan(
    compress_ratio: int,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_lens: torch.Tensor,
    req_to_token: torch.Tensor,
    full_to_state: torch.Tensor,
    swa_page_size: int,
    ring_size: int,
    num_q_tokens: int,
    use_cuda_graph: bool = False,
    use_req_ring: bool = False,
) -> Any:
    """Plan of several new positions a request: ``CompressorPrefillPlan.generate``.

    ``plan_c`` has a row (four int32) for every block that ends: length there, row of the batch with the number of
    positions to take from the rings above it (16 bits each), blocks of rings. ``plan_w`` has a row (two) for every
    position that is kept: row of the batch, row of the rings.
    """
    from sglang.kernels.ops.attention.dsv4.compress import CompressorPrefillPlan

    ratio, overlap = compress_ratio, compress_ratio == 4
    window = ratio * (2 if overlap else 1)
    rings = _Rings(ratio, req_to_token, full_to_state, swa_page_size, ring_size, use_req_ring)
    extend = extend_lens.long()
    owner = torch.repeat_interleave(torch.arange(len(extend)), extend)
    row = torch.arange(len(owner))
    within = row - (extend.cumsum(0) - extend)[owner]
    length = seq_lens.long()[owner]
    position = length - extend[owner] + within
    request = req_pool_indices.long()[owner]

    ends = ((position + 1) % ratio == 0).nonzero().view(-1)
    stored = window - (within[ends] + 1).clamp(max=window)
    before = rings(request[ends], (position[ends] - ratio).clamp_min(0)) // ratio
    own = rings(request[ends], position[ends]) // ratio
    computed = torch.stack([position[ends] + 1, row[ends] | stored << 16, before, own], dim=1)

    # A ring wider than a window keeps what a verified block may take back.
    spare = ring_size - window + 2 if ring_size > window else 0
    first = torch.minimum(length // ratio * ratio - (ratio if overlap else 0), length - spare)
    kept = position >= first
    if overlap and not use_req_ring:  # what a prefix that ends with a page needs
        kept |= position % swa_page_size >= swa_page_size - ratio
    kept = kept.nonzero().view(-1)
    written = torch.stack([row[kept], rings(request[kept], position[kept])], dim=1)

    def made(plan: torch.Tensor, unused: list[int]) -> torch.Tensor:
        if use_cuda_graph and len(plan) < num_q_tokens:
            plan = torch.cat([plan, torch.tensor(unused).expand(num_q_tokens - len(plan), -1)])
        return plan.to(torch.int32).contiguous().view(torch.uint8)

    return CompressorPrefillPlan(
        ratio, made(computed, [UNUSED, 0, -1, -1]), made(written, [UNUSED, -1]), None
    )


def compress_forward(
    kv_score_buffer: torch.Tensor,
    kv_score_input: torch.Tensor,
    ape: torch.Tensor,
    plan: Any,
    *,
    head_dim: int,
    compress_ratio: int,
    out: torch.Tensor | None = None,
    is_online: bool = False,
) -> torch.Tensor:
    """Latents of the blocks that end, and the rings brought up to date.

    Args:
        kv_score_buffer: ``[blocks, ratio, 2 c D]`` rings; ``c`` is 2 for ratio 4, where the first half of values
            and of scores is what the next block reads, and 1 otherwise.
        kv_score_input: ``[n, 2 c D]`` values and scores of the batch.
        ape: ``[c ratio, D]`` added to scores by place in the window.
        plan: of :func:`decode_plan` or :func:`prefill_plan`.

    Returns:
        ``[rows of the plan, D]``; rows at which no block ends are zero.
    """
    require(not is_online, "the online compressor")
    words = plan[1].view(torch.int32).long()
    if out is None:
        out = kv_score_input.new_zeros((len(words), head_dim))
    buffer = kv_score_buffer.view(-1, kv_score_buffer.shape[-1])
    if plan.is_decode:
        buffer[words[:, 1]] = kv_score_input.to(buffer.dtype)
        at = (words[:, 0] % compress_ratio == 0).nonzero().view(-1)
        row, stored = at, torch.full_like(at, 2 * compress_ratio)
    else:
        at = (words[:, 0] != UNUSED).nonzero().view(-1)
        row, stored = words[at, 1] & 0xFFFF, words[at, 1] >> 16 & 0xFFFF
    if len(at):
        given = _Window(buffer, kv_score_input, words[at], row, stored)
        out[at] = given.mean(ape, head_dim, compress_ratio).to(out.dtype)
    if not plan.is_decode:
        kept = plan[2].view(torch.int32).long()
        kept = kept[kept[:, 0] != UNUSED]
        buffer[kept[:, 1]] = kv_score_input[kept[:, 0]].to(buffer.dtype)
    return out


class _Window(NamedTuple):
    """What the latents of some blocks are made of."""

    #: ``[rows, 2 c D]`` rings, and ``[n, 2 c D]`` the batch's own.
    buffer: torch.Tensor
    given: torch.Tensor
    #: ``[b, 4]`` int64 rows of the plan.
    words: torch.Tensor
    #: ``[b]`` int64 row of the batch at which the block ends; how many positions come from the rings.
    row: torch.Tensor
    stored: torch.Tensor

    def mean(self, ape: torch.Tensor, d: int, ratio: int) -> torch.Tensor:
        """``[b, D]`` float32 softmax-weighted means, each dimension by itself."""
        overlap = ratio == 4
        step = torch.arange(ratio * (2 if overlap else 1))
        earlier = step < ratio if overlap else torch.zeros_like(step, dtype=torch.bool)
        block = torch.where(earlier, self.words[:, 2:3], self.words[:, 3:4])
        rings = self.buffer[block * ratio + step % ratio].to(self.given.dtype)
        own = self.given[(self.row[:, None] - (len(step) - 1) + step).clamp_min(0)]
        taken = torch.where((step < self.stored[:, None])[..., None], rings, own)
        if overlap:
            # Values or scores; for the next block, for its own.
            halves = torch.unflatten(taken, -1, (2, 2, d))
            taken = torch.where(earlier[:, None, None], halves[..., 0, :], halves[..., 1, :])
            kv, score = taken.unbind(-2)
            none = (self.words[:, 0] <= ratio)[:, None, None] & earlier[:, None]
            kv = kv.masked_fill(none, 0.0)
            score = score.float().masked_fill(none, torch.finfo(torch.float32).min)
        else:
            kv, score = taken[..., :d], taken[..., d:]
        share = (score.float() + ape.float()).softmax(dim=1)
        return (share * kv.float()).sum(dim=1)


def compress_norm_rope_store(
    kv: torch.Tensor,
    plan: Any,
    *,
    norm_weight: torch.Tensor,
    norm_eps: float,
    freq_cis: torch.Tensor,
    out_loc: torch.Tensor,
    kvcache: torch.Tensor,
    page_size: int,
    use_fp4: bool = False,
    bf16_store: bool = False,
    fp8_2buff: bool = False,
    **_: Any,
) -> None:
    """Norm of the latents of :func:`compress_forward`, RoPE at the first position of their block, and the cache.

    Args:
        kv: ``[rows of the plan, D]``; 128 wide they are the indexer's keys.
        out_loc: ``[n]`` slots of the compressed cache by row of the batch.
    """
    require(
        not (use_fp4 or bf16_store or fp8_2buff),
        "a compressed cache of fp4, bfloat16 or two buffers",
    )
    words = plan[1].view(torch.int32).long()
    ratio = plan.compress_ratio
    if plan.is_decode:
        at = (words[:, 0] % ratio == 0).nonzero().view(-1)
        slots = out_loc[at]
    else:
        at = (words[:, 0] != UNUSED).nonzero().view(-1)
        slots = out_loc[words[at, 1] & 0xFFFF]
    x = rotate_tail(norm(kv[at], norm_eps, norm_weight), freq_cis, words[at, 0] - ratio)
    if kv.shape[-1] == 128:
        pages.store_index_keys(kvcache, slots, hadamard(x), page_size)
    else:
        pages.store(kvcache, slots, x, page_size)


def init_compression_metadata(
    seq_lens: torch.Tensor,
    positions: torch.Tensor,
    raw_out_loc: torch.Tensor,
    page_table: torch.Tensor | None = None,
    page_size: int = 0,
    compute_page_indices: bool = True,
) -> tuple[torch.Tensor | None, ...]:
    """Slots, positions and lengths of the compressed caches, for ratio 4 and then for 128.

    Args:
        seq_lens, positions: ``[n]`` of every row.
        raw_out_loc: ``[w]`` slots of the whole cache, of the first ``w`` rows.
        page_table: ``[n, m]`` pages of ``page_size`` positions.

    Returns:
        For each ratio ``[w]`` int64 slots (0 where no block ends), ``[n]`` int32 first positions of blocks, ended
        blocks, and those but at least 1; then ``[n, m page_size / 128]`` int32 slots of ratio 128, or None.
    """
    found: list[torch.Tensor | None] = []
    written = len(raw_out_loc)
    for ratio in (4, 128):
        ended = seq_lens // ratio
        slots = torch.where(seq_lens[:written] % ratio == 0, raw_out_loc // ratio, 0)
        found += [
            slots.to(torch.int64),
            (positions - positions % ratio).to(torch.int32),
            ended.to(torch.int32),
            ended.clamp_min(1).to(torch.int32),
        ]
    if not compute_page_indices:
        return (*found, None)
    assert page_table is not None
    each = page_size // 128
    column = torch.arange(each * page_table.shape[1])
    slots = page_table[:, column // each].long() * each + column % each
    slots = slots.masked_fill(column >= (seq_lens // 128)[:, None], -1)
    return (*found, slots.to(torch.int32))
