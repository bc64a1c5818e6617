"""Steps that verify nothing: the target's own decoding, its states kept for the draft."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.dspark_components.dspark_draft import make_next_draft_input

from dspark_sglang.serving.draft_kv import States
from dspark_sglang.serving.requests import told_sampled
from dspark_sglang.serving.rounds import Rounds
from dspark_sglang.serving.sglang_types import ScheduleBatch
from dspark_sglang.serving.verifier import Verifier

if TYPE_CHECKING:
    from dspark_sglang.serving.worker import DSparkWorker


class Decoder:
    """Runs a step as a server without speculation would: SGLang's decode forward and sampler.

    A verification of anchors alone computes the same, and costs more. SGLang captures graphs of verification only:
    where one may hold anchors alone, that stays the way; where it holds whole blocks, a step decodes without a graph.
    """

    def __init__(self, worker: DSparkWorker, verifier: Verifier, rounds: Rounds) -> None:
        """Args:
        worker: SGLang's, whose target decodes.
        verifier: keeps the target's states.
        rounds: counts the steps.
        """
        self._worker = worker
        self._verifier = verifier
        self._rounds = rounds

    @functools.cached_property
    def _served(self) -> bool:
        """Whether this server's steps may decode; known once its graphs are captured."""
        worker, runner = self._worker, self._worker.model_runner
        return bool(
            self._rounds.scheduler.adaptive
            and (
                runner.decode_cuda_graph_runner is None
                or not worker._verify_planner.is_compact_mode
            )
            and get_parallel().tp_size == 1
            and not get_parallel().attn_dp_enabled
            and not worker._need_mamba_verify_commit
            and not runner.ngram_embedding_manager.enabled
            and self._verifier.defers
        )

    def takes(self, batch: ScheduleBatch) -> bool:
        """Whether a step of ``batch`` that verifies nothing can be decoded.

        Requests whose logits are adjusted, masked by a grammar or returned need verification's
        way: SGLang keeps no state of penalties for speculative batches, and expects its rows.
        """
        return self._served and self._verifier.untouched(batch, batch.sampling_info)

    @contextlib.contextmanager
    def _without_graphs(self) -> Iterator[None]:
        """SGLang would replay a graph of verification for a decode step of as many requests."""
        runner = self._worker.model_runner
        graphs, runner.decode_cuda_graph_runner = runner.decode_cuda_graph_runner, None
        try:
            yield
        finally:
            runner.decode_cuda_graph_runner = graphs

    def decode(
        self, batch: ScheduleBatch, on_publish: Callable[[torch.Tensor], None] | None
    ) -> Any:
        """Decode one token of each of ``R`` requests.

        Args:
            batch: SGLang's ``ScheduleBatch``; its scheduler restores what is changed here.
            on_publish: told the new lengths, or None.

        Returns:
            SGLang's ``GenerationBatchResult`` of a speculative step.
        """
        worker = self._worker
        places = batch.seq_lens
        table = batch.req_to_token_pool.req_to_token
        batch.input_ids = batch.spec_info.bonus_tokens.view(-1)
        # Allocated already: speculative batches are given the slots of whole blocks.
        batch.out_cache_loc = table[batch.req_pool_indices, places].to(torch.int64)
        batch.spec_info = None  # type: ignore[assignment]
        batch.seq_lens = lens = places + 1
        if batch.seq_lens_cpu is not None:  # under overlap, where attention needs none
            batch.seq_lens_cpu = batch.seq_lens_cpu + 1
        batch.seq_lens_sum = None
        with self._without_graphs():
            result = worker.target_worker.forward_batch_generation(
                batch, capture_hidden_mode=CaptureHiddenMode.FULL, return_kv_loc_plan=True
            )
        output = result.logits_output
        if on_publish is not None:
            on_publish(lens)
        injector = worker._kv_injector
        slots = worker._sharding.draft.slots(injector, injector.ids_for(result.kv_loc_plan))
        self._verifier.deferred.keep(States(output.hidden_states, slots, places))
        output.hidden_states = None
        tokens = result.next_token_ids.to(torch.int64)
        result.next_token_ids = told_sampled(result, batch)
        result.accept_lens = result.cap_lens = torch.ones_like(tokens, dtype=torch.int32)
        result.next_draft_input = make_next_draft_input(bonus_tokens=tokens, new_seq_lens=lens)
        result.speculative_num_draft_tokens = int(worker.verify_num_draft_tokens)
        result.speculative_output_stride = 1
        result.new_seq_lens = lens
        self._rounds.telemetry.ran["step:decode"] += 1
        self._rounds.decoded(len(batch.reqs))
        return result
