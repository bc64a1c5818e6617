"""KV slots of the next step: SGLang's allocation, skipped where nothing would be allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.runtime_context import get_schedule, get_spec


def prepare(original: Callable[[Any, Any], None], draft_input: Any, batch: Any) -> None:
    """Prepare a batch for its next step.

    SGLang tops every request up to the slots of two blocks before every step, because under overlap
    scheduling it does not know yet what the last step has used. Without overlap a step needs the
    slots of one block, and what was allocated lasts for several.

    Args:
        original: ``DFlashDraftInputV2.prepare_for_decode``.
        draft_input: of the batch; is told how many slots its requests have.
        batch: SGLang's ``ScheduleBatch``; is told the lengths of its requests.
    """
    if not get_schedule().disable_overlap_schedule:
        original(draft_input, batch)
        return
    requests, block = batch.reqs, int(get_spec().speculative_num_draft_tokens)
    committed = [request.kv.kv_committed_len for request in requests]
    allocated = [request.kv.kv_allocated_len for request in requests]
    lasts = all(have >= used + block for have, used in zip(allocated, committed, strict=True))
    if not requests or not lasts:
        original(draft_input, batch)
        return
    batch.maybe_evict_swa()
    for request in requests:
        request.decode_batch_idx += 1
    batch.seq_lens_cpu, batch.seq_lens_sum = torch.tensor(committed), sum(committed)
    draft_input.nxt_kv_lens_cpu = torch.tensor(allocated, dtype=torch.int32)
    draft_input.nxt_kv_lens_sum = sum(allocated)
    tops = [int(request.sampling_params.top_k) for request in requests]
    draft_input.max_top_k = max(tops)  # read where a request asks for its sampling mask
    draft_input.uniform_top_k_value = tops[0] if len(set(tops)) == 1 else None
