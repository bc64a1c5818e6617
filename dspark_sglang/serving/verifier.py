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
from sglang.srt.speculative.dspark_components.dspark_verify import (
    AcceptOuts,
    TargetVerifyExecutor,
    TargetVerifyResult,
)

from dspark_sglang.core.accept import stop_at
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
        self.penalties = RunningPenalties()
        self._requests: Sequence[Req] = ()
        #: ``[R, gamma + 1]`` int64 tokens of the last step as the scheduler is told them.
        self.reported: torch.Tensor | None = None
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
        width = self.verify_num_draft_tokens
        index = self._planner.rows
        if index is None:  # every row of every block
            index = torch.arange(bs * width, device=layout.verify_lens.device)
        block = torch.cat([draft_block_ids[:, :1], draft_tokens], dim=1)
        window = self._pad(
            RaggedVerifyWindow(
                positions=verify_window.positions_2d.reshape(-1)[index],
                verify_cache_loc=verify_window.verify_cache_loc[index],
                verify_ids=block.view(-1)[index],
                window_index=index,
            ),
            layout.graph_num_tokens,
        )
        result = self._run_ragged(
            batch=batch,
            layout=layout,
            ragged_window=window,
            sampling_info=sampling_info,
            kv_loc_plan=verify_window.kv_loc_plan,
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
        self._penalise(batch, output.next_token_logits, block)
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
        self._penalise(batch, logits, verify_ids_2d)
        return result

    def _batch_stops(self, batch: ScheduleBatch, device: torch.device | str) -> torch.Tensor | None:
        """:func:`batch_stops`, made again only when the batch changes."""
        if batch.reqs != self._stopping:
            self._stopping, self._known_stops = list(batch.reqs), batch_stops(batch.reqs, device)
        return self._known_stops

    @staticmethod
    def _pad(window: RaggedVerifyWindow, rows: int) -> RaggedVerifyWindow:
        """Pad to the rows of the graph that will run; padded lanes write to the dummy slot 0."""
        missing = rows - window.window_index.shape[0]
        if missing <= 0:
            return window
        pad = torch.nn.functional.pad
        return RaggedVerifyWindow(
            positions=pad(window.positions, (0, missing)),
            verify_cache_loc=pad(window.verify_cache_loc, (0, missing)),
            verify_ids=pad(window.verify_ids, (0, missing)),
            window_index=pad(window.window_index, (0, missing), value=-1),
        )

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

    def _first_rows(self, lens: torch.Tensor) -> torch.Tensor:
        """``[R]`` logits row of each request's anchor, in the layout of this step."""
        if self._packed is None:
            return torch.arange(len(lens), device=lens.device) * int(self.verify_num_draft_tokens)
        rows = lens + 1
        first: torch.Tensor = rows.cumsum(0) - rows
        return first

    def _penalise(
        self,
        batch: ScheduleBatch,
        logits: torch.Tensor,
        block: torch.Tensor,
    ) -> None:
        """What plain decoding does to logits before a grammar masks them, at every row of the blocks.

        Args:
            block: ``[R, gamma + 1]`` int64 anchors and drafted tokens.
        """
        self._requests = batch.reqs
        if self._adjusting:
            self._telemetry.ran["adjust:exact"] += 1
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
        lens = self._drafted_lens(layout, bs, target_logits.device)
        first = self._first_rows(lens)
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
            if self._stops is not None:
                # SGLang prefers a stop string anywhere in a run to a stop token before it.
                outcome = stop_at(outcome, drafted, self._stops)
        packed = torch.stack([outcome.count, outcome.token])
        count, token = self._sharding.ranks.broadcast(packed, "outcome").unbind(0)
        self._rounds.outcome(torch.stack([lens, count]))
        if self._adjusting:
            self.penalties.extend(count)
        commit = (count + 1).to(torch.int32)
        out = torch.cat([draft_tokens, draft_tokens.new_zeros((bs, 1))], dim=1)
        self.reported = out.scatter(1, count[:, None], told(token, self._requests)[:, None])
        token = token.clamp(min=0)
        return AcceptOuts(
            correct_len=count.to(torch.int32),
            bonus=token,
            cap_trim_lens=torch.zeros_like(commit),
            commit_lens=commit,
            new_seq_lens=prefix_lens + commit.to(prefix_lens.dtype),
            out_tokens=out.scatter_(1, count[:, None], token[:, None]),
        )

    def _drafted_lens(
        self, layout: VerifyLayout | None, bs: int, device: torch.device | str
    ) -> torch.Tensor:
        if layout is None:  # more requests than graphs were captured for: whole blocks run
            admitted = self._planner.lens
            if admitted is not None:
                return admitted.to(device=device, dtype=torch.int64)
            return torch.full((bs,), self.gamma, dtype=torch.int64, device=device)
        lens: torch.Tensor = layout.verify_lens[:bs].to(device=device, dtype=torch.int64) - 1
        return lens

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
        width = self.verify_num_draft_tokens
        row = torch.div(self._packed, width, rounding_mode="floor")
        accepted = self._packed - row * width < commit_lens[row]
        packed = self._packed
        slots = injector.ids_for(verify_window.kv_loc_plan)[packed]
        positions = verify_window.positions_2d.reshape(-1)[packed]
        slots = self._sharding.draft.slots(injector, slots)
        states = States(logits_output.hidden_states, slots, positions)
        running = self._rounds.running
        if running.depth and not running.alone:
            self._write(states, accepted)
            return
        # Nothing reads it before the next draft; many steps at once cost little more than one.
        if running.alone:  # a decode step keeps every row
            states = States(*(part[accepted] for part in states))
        self.deferred.keep(states)

    @functools.cached_property
    def _writes(self) -> bool:
        """Whether the draft's KV pool is written here; SGLang writes pools that are rings."""
        return self._sharding.draft.writes(self.kv_injector)

    @property
    def defers(self) -> bool:
        """Whether states may be left in :attr:`deferred`: the draft's KV is here, and written here."""
        return self._sharding.drafts and self._writes

    def _write(self, states: States, chosen: torch.Tensor | None) -> None:
        """Write the draft's KV of target states: of all, or of a ``[N]`` bool mask."""
        faults = self._rounds.faults
        if not faults.broken:
            with faults.contained("writing the draft's KV"):
                self._put(states, chosen)

    def _put(self, states: States, chosen: torch.Tensor | None) -> None:
        hidden, slots, places = states
        self._telemetry.ran["commit:torch" if self._kv_writer is None else "commit:triton"] += 1
        with self._telemetry.timed("commit"):
            if self._kv_writer is not None:
                if chosen is not None:
                    slots = torch.where(chosen, slots, -1)
                self._kv_writer(hidden, places, slots)
                return
            on_cpu = hidden.device.type == "cpu"
            if chosen is not None or on_cpu:
                rows = torch.arange(len(slots)) if chosen is None else chosen.nonzero().view(-1)
                rows = pad_index(rows) if on_cpu else rows
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
