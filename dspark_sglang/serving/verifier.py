"""Verification inside SGLang: its target forward over ragged rows, our acceptance and commit."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from sglang.kernels.ops.speculative.dspark.dspark_verify_window import (
    RaggedVerifyWindow,
    ScatterCompactToStrided,
)
from sglang.srt.layers.sampler import apply_custom_logit_processor
from sglang.srt.mem_cache.kv_loc_plan import KVLocPlan
from sglang.srt.speculative.dspark_components.dspark_verify import (
    AcceptOuts,
    TargetVerifyExecutor,
    TargetVerifyResult,
)

from dspark_sglang.core.accept import Accepted
from dspark_sglang.serving.cpu.packing import pad_index
from dspark_sglang.serving.draft_kv import DeferredStates, States
from dspark_sglang.serving.ops import Ops, Verified, WriteKv
from dspark_sglang.serving.planner import Planner
from dspark_sglang.serving.proposer import OurDraftBlock
from dspark_sglang.serving.requests import RunningPenalties, batch_stops, request_penalties, told
from dspark_sglang.serving.rounds import Rounds
from dspark_sglang.serving.sglang_types import (
    DraftInput,
    LogitsOutput,
    Req,
    SamplingBatchInfo,
    ScheduleBatch,
    VerifyLayout,
    VerifyWindow,
)
from dspark_sglang.serving.tensor_parallel import DraftSharding


class _PackedPlan(KVLocPlan):
    """SGLang's slots of a step, with those of the packed rows looked up already."""

    def __init__(self, plan: KVLocPlan, window: RaggedVerifyWindow) -> None:
        self.__dict__.update(plan.__dict__)
        self._window = window

    def _cols(self, ids: torch.Tensor | None, cols: object) -> torch.Tensor | None:
        if ids is self.write_virtual and cols is self._window.window_index:
            found: torch.Tensor = self._window.verify_cache_loc
            return found
        looked_up: torch.Tensor | None = super()._cols(ids, cols)
        return looked_up


class Verifier(TargetVerifyExecutor):
    """Overrides packing, acceptance and commit; the target forward stays SGLang's."""

    def __init__(
        self, *, planner: Planner, ops: Ops, sharding: DraftSharding, rounds: Rounds, **sglang: Any
    ) -> None:
        """Args:
        planner: knows which rows a step verifies.
        ops: decide what is accepted.
        sharding: which part of the vocabulary this rank has.
        rounds: is told what is accepted.
        sglang: arguments of SGLang's executor.
        """
        super().__init__(**sglang)
        self._sharding = sharding
        self._planner = planner
        self._ops = ops
        self._rounds = rounds
        self._telemetry = rounds.telemetry
        #: Positions of the packed rows in the window of the running step; None: strided rows.
        self._packed: torch.Tensor | None = None
        #: Target states that steps without a draft have not committed yet.
        self.deferred = DeferredStates(self._write)
        #: Whether plain decoding would adjust the running step's logits.
        self._adjusting = False
        self.penalties = RunningPenalties(ops.step)
        self._requests: Sequence[Req] = ()
        #: ``[R, gamma + 1]`` int64 tokens of the last step as the scheduler is told them.
        self.reported: torch.Tensor | None = None
        #: See :meth:`_nothing`.
        self._zeros: torch.Tensor | None = None
        #: Stop tokens of the running step's requests; those of the last requests, and whose they are.
        self._stops: torch.Tensor | None = None
        self._known_stops: torch.Tensor | None = None
        self._stopping: list[Req] = []

    def run_compact(
        self,
        *,
        batch: ScheduleBatch,
        layout: VerifyLayout,
        draft_block_ids: torch.Tensor,
        draft_tokens: torch.Tensor,
        bs: int,
        device: torch.device | str,
        sampling_info: SamplingBatchInfo | None,
        verify_window: VerifyWindow,
        inject_gate: bool = False,
    ) -> tuple[TargetVerifyResult, torch.Tensor]:
        admitted = self._planner.admitted
        if admitted is None:  # every row of every block
            width = self.verify_num_draft_tokens
            index = torch.arange(bs * width, device=layout.verify_lens.device)
        else:
            index = admitted.rows
        window = self._ops.step.window(
            index,
            draft_block_ids[:, 0],
            draft_tokens,
            verify_window.positions_2d.reshape(-1),
            verify_window.verify_cache_loc,
            rows=layout.graph_num_tokens,
        )
        window = RaggedVerifyWindow(
            positions=window.positions,
            verify_cache_loc=window.slots,
            verify_ids=window.ids,
            window_index=window.cells,
        )
        result = self._run_ragged(
            batch=batch,
            layout=layout,
            ragged_window=window,
            sampling_info=sampling_info,
            kv_loc_plan=_PackedPlan(verify_window.kv_loc_plan, window),
        )
        output = result.logits_output
        if output.hidden_states is None:
            raise RuntimeError(
                "The target returned no hidden states in verification; DSpark needs the layers "
                "in target_layer_ids captured."
            )
        output.next_token_logits = output.next_token_logits[: len(index)]
        output.hidden_states = output.hidden_states[: len(index)]
        self._packed = index
        self._stops = self._batch_stops(batch, device)
        self._adjusting = self._adjusts(batch, sampling_info)
        self._gather(batch, output, sampling_info)
        if self._needs_strided(batch, sampling_info):
            self._spread(output, layout)
        self._penalise(batch, output.next_token_logits, draft_block_ids, draft_tokens)
        return result, output.hidden_states

    def run_non_compact(
        self,
        *,
        batch: ScheduleBatch,
        draft_input: DraftInput,
        verify_ids_2d: torch.Tensor,
        verify_window: VerifyWindow,
        sampling_info: SamplingBatchInfo | None,
    ) -> TargetVerifyResult:
        """SGLang's way for batches beyond its captured graphs: whole blocks, strided rows."""
        self._packed = None
        self._stops = self._batch_stops(batch, verify_ids_2d.device)
        self._adjusting = self._adjusts(batch, sampling_info)
        result = super().run_non_compact(
            batch=batch,
            draft_input=draft_input,
            verify_ids_2d=verify_ids_2d,
            verify_window=verify_window,
            sampling_info=None,  # its own adjustments are not exact
        )
        self._gather(batch, result.logits_output, sampling_info)
        logits = result.logits_output.next_token_logits
        self._penalise(batch, logits, verify_ids_2d, verify_ids_2d[:, 1:])
        return result

    def _batch_stops(self, batch: ScheduleBatch, device: torch.device | str) -> torch.Tensor | None:
        """:func:`batch_stops`, made again only when the batch changes."""
        if batch.reqs != self._stopping:
            self._stopping, self._known_stops = list(batch.reqs), batch_stops(batch.reqs, device)
        return self._known_stops

    @staticmethod
    def _needs_strided(batch: ScheduleBatch, sampling_info: SamplingBatchInfo | None) -> bool:
        """Whether SGLang code that expects ``[R * (gamma + 1)]`` rows will read the logits."""
        return bool(
            batch.has_grammar
            or batch.return_logprob
            or getattr(sampling_info, "has_custom_logit_processor", False)
            or getattr(sampling_info, "sampling_mask_batch_indices", None) is not None
        )

    def _gather(
        self, batch: ScheduleBatch, output: LogitsOutput, info: SamplingBatchInfo | None
    ) -> None:
        """Make whole rows of sharded logits where something reads whole rows."""
        vocabulary = self._sharding.vocabulary
        if vocabulary is None:
            return
        filters = ("need_top_k_sampling", "need_top_p_sampling", "need_min_p_sampling")
        # The noise of a seeded draw that filters is keyed by the token's rank in the whole row.
        ranked = getattr(info, "sampling_seed", None) is not None and any(
            getattr(info, name) for name in filters
        )
        if ranked or self._needs_strided(batch, info) or self._adjusting:
            output.next_token_logits = vocabulary.gathered(output.next_token_logits, "logits")
            self._telemetry.ran["logits:gathered"] += 1
        else:
            output.next_token_logits = vocabulary.own(output.next_token_logits)
            self._telemetry.ran["logits:sharded"] += 1

    @staticmethod
    def _adjusts(batch: ScheduleBatch, info: SamplingBatchInfo | None) -> bool:
        """Whether plain decoding adds anything to the logits of some request."""
        return bool(
            getattr(info, "logit_bias", None) is not None
            or getattr(info, "has_custom_logit_processor", False)
            or any(request_penalties(request).active for request in batch.reqs)
        )

    def untouched(self, batch: ScheduleBatch, info: SamplingBatchInfo | None) -> bool:
        """Whether a step's logits are sampled as they are, and nothing else reads them."""
        return not self._needs_strided(batch, info) and not self._adjusts(batch, info)

    def _spread(self, output: LogitsOutput, layout: VerifyLayout) -> None:
        output.next_token_logits = self._strided(output.next_token_logits, layout)
        output.hidden_states = self._strided(output.hidden_states, layout)
        self._packed = None
        self._telemetry.ran["rows:strided"] += 1

    def _penalise(
        self,
        batch: ScheduleBatch,
        logits: torch.Tensor,
        anchors: torch.Tensor,
        drafted: torch.Tensor,
    ) -> None:
        """What plain decoding does to logits before a grammar masks them, at every row of the blocks.

        Args:
            anchors: ``[R, >= 1]`` int64, in the first column.
            drafted: ``[R, gamma]`` int64.
        """
        self._requests = batch.reqs
        if self._adjusting:
            self._telemetry.ran["adjust:exact"] += 1
            block = torch.cat([anchors[:, :1], drafted], dim=1)
            self.penalties.apply(batch.reqs, logits, block, self._packed)

    def _bias(
        self, logits: torch.Tensor, lens: torch.Tensor, info: SamplingBatchInfo | None
    ) -> None:
        """What plain decoding does to logits once a grammar has masked them.

        The order counts where a bias is infinite, or a processor allows what the grammar excludes.

        Args:
            logits: the rows of this step, changed in place.
            lens: ``[R]`` int64 drafted tokens verified.
        """
        bias = getattr(info, "logit_bias", None)
        if bias is not None:
            width = int(self.verify_num_draft_tokens)
            rows = torch.full_like(lens, width) if self._packed is None else lens + 1
            owner = torch.arange(len(lens), device=lens.device)
            logits += bias[owner.repeat_interleave(rows, output_size=len(logits))]
        if getattr(info, "has_custom_logit_processor", False):  # in plain decoding's sampler
            apply_custom_logit_processor(
                logits, info, num_tokens_in_batch=self.verify_num_draft_tokens
            )
        # An infinite bias stands for the largest number, of which there is a distribution.
        logits.clamp_(max=torch.finfo(logits.dtype).max)

    def accept_and_finalize(
        self,
        *,
        folded_accept: bool,
        bs: int,
        verify_ids_2d: torch.Tensor,
        target_logits: torch.Tensor,
        draft_block: OurDraftBlock,
        sampling_info: SamplingBatchInfo | None,
        draft_input: DraftInput,
        layout: VerifyLayout | None,
        prefix_lens: torch.Tensor,
        draft_tokens: torch.Tensor,
        simulate_bonus_sampling_info: object = None,
    ) -> AcceptOuts:
        assert not folded_accept, "SGLang's folded acceptance must stay off"
        lens, first = self._sent(layout, bs, target_logits.device)
        if self._adjusting:
            self._bias(target_logits, lens, sampling_info)
        # Beyond the depth drafted there are no distributions, and nothing was verified.
        whole = not self._rounds.scheduler.adaptive
        width = self.gamma if whole else max(1, self._rounds.running.width)
        drafted = draft_block.draft_tokens[:, :width]
        with self._telemetry.timed("accept"):
            outcome = self._ops.accept(
                Verified(
                    logits=target_logits,
                    drafted=drafted,
                    rows=draft_block.rows,
                    probs=draft_block.probs,
                    support=draft_block.support,
                    lse=draft_block.lse,
                    lens=lens,
                    first=first,
                    anchors=prefix_lens,
                )
            )
            if self._sharding.ranks.count > 1:
                packed = torch.stack([outcome.count, outcome.token])
                outcome = Accepted(*self._sharding.ranks.broadcast(packed, "outcome").unbind(0))
            # SGLang prefers a stop string anywhere in a run to a stop token before it.
            found = self._ops.step.finish(outcome, draft_tokens, self._stops, lens, prefix_lens)
        self._rounds.outcome(found.pair)
        if self._adjusting:
            self.penalties.extend(found.pair[1])
        self.reported = told(found.reported, self._requests)
        return AcceptOuts(
            correct_len=found.correct,
            bonus=found.bonus,
            cap_trim_lens=self._nothing(bs, target_logits.device),
            commit_lens=found.committed,
            new_seq_lens=found.lens,
            out_tokens=found.tokens,
        )

    def _nothing(self, requests: int, device: torch.device) -> torch.Tensor:
        """``[R]`` int32 zeros that nobody writes."""
        if self._zeros is None or len(self._zeros) < requests:
            self._zeros = torch.zeros(max(64, requests), dtype=torch.int32, device=device)
        return self._zeros[:requests]

    def _sent(
        self, layout: VerifyLayout | None, bs: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[R]`` drafted tokens of each request that ran, and the logits row of its anchor."""
        admitted, width = self._planner.admitted, int(self.verify_num_draft_tokens)
        if admitted is not None:
            lens = admitted.lens
            if self._packed is not None:
                return lens, admitted.first
        elif layout is None:  # more requests than graphs were captured for: whole blocks run
            lens = torch.full((bs,), self.gamma, dtype=torch.int64, device=device)
        else:
            lens = layout.verify_lens[:bs].to(device=device, dtype=torch.int64) - 1
        if self._packed is not None:
            return lens, (lens + 1).cumsum(0) - (lens + 1)
        return lens, torch.arange(bs, device=device) * width

    def commit_hidden(
        self,
        *,
        batch: ScheduleBatch,
        layout: VerifyLayout | None,
        hidden_strided: torch.Tensor | None,
        verify_window: VerifyWindow,
        logits_output: LogitsOutput,
        commit_lens: torch.Tensor,
        bs: int,
        run_compact: bool,
    ) -> None:
        if not self._sharding.drafts or self._rounds.faults.broken:
            return  # the draft's KV is another rank's, or nobody's
        injector = self.kv_injector
        if self._packed is None or not self._writes:
            if self._packed is not None:
                hidden_strided = self._strided(hidden_strided, layout)
            self.deferred.flush()  # of slots that may be these
            with self._rounds.faults.contained("writing the draft's KV"):
                super().commit_hidden(
                    batch=batch,
                    layout=layout,
                    hidden_strided=hidden_strided,
                    verify_window=verify_window,
                    logits_output=logits_output,
                    commit_lens=commit_lens,
                    bs=bs,
                    run_compact=run_compact,
                )
            return
        slots, positions = self._ops.step.kept(
            self._packed,
            commit_lens,
            injector.ids_for(verify_window.kv_loc_plan),
            verify_window.positions_2d.reshape(-1),
        )
        states = States(logits_output.hidden_states, slots, positions)
        running = self._rounds.running
        if running.alone:  # a decode step keeps every row
            states = States(*(part[slots >= 0] for part in states))
        states = states._replace(slots=self._sharding.draft.slots(injector, states.slots))
        if running.depth and not running.alone:
            self._write(states)
            return
        # Nothing reads it before the next draft; many steps at once cost little more than one.
        self.deferred.keep(states)

    @functools.cached_property
    def _writes(self) -> bool:
        """Whether the draft's KV pool is written here; SGLang writes pools that are rings."""
        return self._sharding.draft.writes(self.kv_injector)

    @property
    def defers(self) -> bool:
        """Whether states may be left in :attr:`deferred`: the draft's KV is here, and written here."""
        return self._sharding.drafts and self._writes

    def _write(self, states: States) -> None:
        """Write the draft's KV of target states that have a slot."""
        faults = self._rounds.faults
        if not faults.broken:
            with faults.contained("writing the draft's KV"):
                self._put(states)

    def _put(self, states: States) -> None:
        hidden, slots, places = states
        self._telemetry.ran["commit:torch" if self._kv_writer is None else "commit:triton"] += 1
        with self._telemetry.timed("commit"):
            if self._kv_writer is not None:
                self._kv_writer(hidden, places, slots)
                return
            if hidden.device.type == "cpu":  # on CUDA to select rows would wait for the device
                rows = pad_index((slots >= 0).nonzero().view(-1))
                hidden, slots, places = hidden[rows], slots[rows], places[rows]
            self._sharding.draft.write(self.kv_injector, hidden, slots, places)

    @functools.cached_property
    def _kv_writer(self) -> WriteKv | None:
        """What writes the draft's KV where our kernels run; None leaves it to SGLang.

        Made at the first commit: the pool does not exist before the worker does.
        """
        if not self._sharding.draft.kernel_writes:
            return None
        pool = self.kv_injector.draft_model_runner.token_to_kv_pool
        return self._ops.kv_writer(self.kv_injector.draft_model, pool)

    def rehearse(self) -> None:
        """Have what writes the draft's KV compiled, without a write."""
        projection = self._sharding.draft.projection
        writer = self._kv_writer if self._sharding.drafts else None
        if writer is not None and projection.element_size() > 1:  # not quantised
            hidden = projection.new_zeros((1, projection.shape[1]))
            place = torch.zeros(1, dtype=torch.int64, device=projection.device)
            writer(hidden, place, place - 1)

    def renew(self) -> None:
        """The drafter's weights have changed."""
        self.__dict__.pop("_kv_writer", None)

    def _strided(self, compact: torch.Tensor | None, layout: VerifyLayout | None) -> Any:
        return ScatterCompactToStrided.execute(
            compact=compact,
            layout=layout,
            fill_value=0.0,
            verify_num_draft_tokens=self.verify_num_draft_tokens,
        )
