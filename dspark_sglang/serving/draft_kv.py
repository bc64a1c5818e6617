"""The draft's KV: slots of the next step, and target states that are kept until a draft reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sglang.srt.runtime_context import get_disagg, get_memory, get_schedule, get_spec

from dspark_sglang.serving.draft_model import DraftModel
from dspark_sglang.serving.faults import Faults
from dspark_sglang.serving.sglang_types import (
    DraftInput,
    KvInjector,
    PrefillPlacement,
    ScheduleBatch,
)


def prepare(
    original: Callable[[Any, Any], None], draft_input: DraftInput, batch: ScheduleBatch
) -> None:
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


#: Rows kept until they are written together: enough that weights are not read for a few rows.
_MOST_ROWS = 512


class States(NamedTuple):
    """Target states of ``N`` tokens and where the draft's KV of them goes."""

    #: ``[N, layers read * d]``.
    hidden: torch.Tensor
    #: ``[N]`` int64 slots of the draft's pool; -1: not to be written.
    slots: torch.Tensor
    #: ``[N]`` int64 absolute positions.
    places: torch.Tensor


def may_defer() -> bool:
    """Whether nothing but the draft reads its KV: copies to other machines or tiers are made after each step."""
    return get_disagg().disaggregation_mode == "null" and not get_memory().enable_hierarchical_cache


def latest(slots: torch.Tensor) -> torch.Tensor:
    """``[N]`` bool: the last row of each slot, without a wait for the device.

    Args:
        slots: ``[N]`` in the order of writing.
    """
    ordered, index = torch.sort(slots, stable=True)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return torch.empty_like(last).scatter_(0, index, last)


class DeferredStates:
    """States that are not in the draft's KV yet."""

    def __init__(self, write: Callable[[States], None]) -> None:
        """Args:
        write: puts states into the draft's KV.
        """
        self._write = write
        self._kept: list[States] = []
        self._rows = 0

    def __bool__(self) -> bool:
        return bool(self._kept)

    @property
    def full(self) -> bool:
        """Whether so much is kept that it should be written."""
        return self._rows >= _MOST_ROWS

    def keep(self, states: States) -> None:
        """Take in states of slots that may have been another request's, kept before."""
        self._rows += len(states.slots)
        if states.slots.is_cuda:
            # Some are the scheduler's own, of another stream, and live until they are written.
            for part in (states.slots, states.places):
                part.record_stream(torch.cuda.current_stream())
        if states.hidden.is_cuda and not self.full:  # full: written before the next forward
            # The next graph replay writes its states to the same place.
            states = states._replace(hidden=states.hidden.clone())
        self._kept.append(states)

    def flush(self) -> None:
        """Write what is kept, of each slot the newest."""
        if not self._kept:
            return
        parts, self._kept, self._rows = self._kept, [], 0
        together = States(*(torch.cat(part) for part in zip(*parts, strict=True)))
        if len(parts) > 1:
            slots = torch.where(latest(together.slots), together.slots, -1)
            together = together._replace(slots=slots)
        self._write(together)


def contain_prefills(injector: KvInjector, faults: Faults) -> None:
    """Make what goes wrong while a prefill writes the draft's KV a fault of the drafter.

    Args:
        injector: SGLang's ``TargetHiddenKvInjector``.
    """
    inject = injector.inject_prefill

    def guarded(*args: Any, **kwargs: Any) -> None:
        if not faults.broken:
            with faults.contained("writing the draft's KV"):
                inject(*args, **kwargs)

    injector.inject_prefill = guarded


def keep_prefills(injector: KvInjector, deferred: DeferredStates, draft: DraftModel) -> None:
    """Let prefills leave their states to ``deferred``.

    Args:
        injector: SGLang's ``TargetHiddenKvInjector``.
        draft: whose KV it is.
    """
    inject = injector.inject_prefill

    def keep(
        placement: PrefillPlacement,
        *,
        target_hidden: torch.Tensor,
        token_indices: torch.Tensor | None,
        target_hidden_is_projected: bool,
    ) -> None:
        if target_hidden_is_projected:
            deferred.flush()
            inject(
                placement,
                target_hidden=target_hidden,
                token_indices=token_indices,
                target_hidden_is_projected=True,
            )
            return
        if token_indices is not None:
            placement = placement.select(token_indices)
        places = placement.positions.to(torch.int64)
        slots = draft.slots(injector, placement.cache_loc.to(torch.int64))
        deferred.keep(States(target_hidden[: len(places)], slots, places))

    injector.inject_prefill = keep
