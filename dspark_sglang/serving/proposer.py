"""Drafting inside SGLang: its draft forward, our Markov sampling and confidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.speculative.dspark_components.dspark_draft import (
    DraftBlockProposer,
    DraftBlockResult,
    DraftProposal,
)

from dspark_sglang.core.draft import DraftBlock
from dspark_sglang.serving.ops import Ops, SampledRows
from dspark_sglang.serving.prompt_lookup import Copies, Lookup
from dspark_sglang.serving.rounds import Block, Rounds
from dspark_sglang.serving.sglang_types import (
    DraftInput,
    Req,
    SamplingBatchInfo,
    ScheduleBatch,
    TargetModel,
    VerifyWindow,
)
from dspark_sglang.serving.tensor_parallel import DraftSharding


class OurDraftBlock(DraftBlockResult, frozen=True):  # type: ignore[call-arg]
    """SGLang's draft result plus what our acceptance reads."""

    rows: SampledRows | None = None
    #: Drafted distributions, see :class:`dspark_sglang.core.draft.DraftBlock`.
    probs: torch.Tensor | None = None
    support: torch.Tensor | None = None
    lse: torch.Tensor | None = None


class Proposer(DraftBlockProposer):
    """Overrides the head of a round; the draft forward itself stays SGLang's."""

    def __init__(
        self,
        *,
        ops: Ops,
        sharding: DraftSharding,
        rounds: Rounds,
        lookup: Lookup | None,
        **sglang: Any,
    ) -> None:
        """Args:
        sharding: where the drafter lives.
        rounds: has decided what is drafted, and is given the block.
        lookup: finds what greedy requests can copy; None: nothing is copied.
        sglang: arguments of SGLang's proposer.
        """
        super().__init__(**sglang)
        self._lookup = lookup
        self._sharding = sharding
        self._ops = ops
        self._rounds = rounds
        self._telemetry = rounds.telemetry
        #: Requests of the last step, and those of them that sample.
        self._requests: list[Req] = []
        self._rows: SampledRows | None = None
        #: ``[R]`` bool the others of them, made when they are first needed.
        self._greedy: torch.Tensor | None = None
        #: What the running step can copy although it does not draft.
        self._found: Copies | None = None

    def can_copy(self, requests: Sequence[Req]) -> bool:
        """Whether the running step, whose plan does not draft, can copy; called once before it."""
        allowed = self._rounds.running.plan.prompt_lookup and self._sharding.ranks.count == 1
        found = self._copies(requests, self.gamma) if allowed else None
        self._found = found if found is not None and len(found.rows) else None
        return self._found is not None

    def _sampled_rows(
        self, batch: ScheduleBatch, sampling_info: SamplingBatchInfo | None
    ) -> SampledRows | None:
        """Which requests sample and how; read again only when the batch changes."""
        if batch.reqs != self._requests:
            self._requests, self._rows = list(batch.reqs), SampledRows.of(sampling_info, batch.reqs)
            self._greedy = None
        return self._rows

    def attach_draft_sampler(self, draft_sampler: object) -> None:
        """SGLang's sampler is folded into the draft graph; ours runs after it, so it stays out."""

    def propose(
        self,
        *,
        batch: ScheduleBatch,
        draft_input: DraftInput,
        verify_window: VerifyWindow,
        bs: int,
        device: torch.device | str,
        target_model: TargetModel,
        sampling_info: SamplingBatchInfo | None,
        anchor_prepared: bool = False,
    ) -> DraftProposal:
        rows = self._sampled_rows(batch, sampling_info)
        if self._rounds.running.plan.drafts:
            drafted = None
            with self._rounds.faults.contained("drafting"):
                drafted = self._drafted(
                    batch, draft_input, verify_window, target_model, sampling_info, anchor_prepared
                )
            if drafted is not None:
                return drafted
            self._rounds.running.decodes()
            self._found = None
        return self._without_draft(draft_input, bs, rows)

    def _drafted(
        self,
        batch: ScheduleBatch,
        draft_input: DraftInput,
        verify_window: VerifyWindow,
        target_model: TargetModel,
        sampling_info: SamplingBatchInfo | None,
        anchor_prepared: bool,
    ) -> DraftProposal:
        """A proposal of a step whose plan drafts."""
        depth, bs = self._rounds.running.plan.depth, len(batch.seq_lens)
        rows = self._sampled_rows(batch, sampling_info)
        ids = self.draft_block_ids_view(bs=bs, device=batch.seq_lens.device)
        copies = self._copies(batch.reqs, max(depth, self._reach))
        # An operator's budget is a share of what is drafted, so something is.
        alone = self._sharding.ranks.count == 1 and self._rounds.scheduler.fixed_budget is None
        if copies is not None and len(copies.rows) and alone and self._suffice(copies, bs):
            return self._copied(draft_input, bs, copies, rows, depth)
        if self._sharding.drafts:
            embed = target_model.get_input_embeddings() if self.sample_from_anchor else None
            forward = self._run_forward(
                batch=batch,
                draft_input=draft_input,
                verify_window=verify_window,
                bs=bs,
                device=batch.seq_lens.device,
                embed_module=self._sharding.embedding or embed or self.draft_model.embed_tokens,
                sampling_info=sampling_info,
                anchor_prepared=anchor_prepared,
            )
            states = self._sharding.sent(self._sharding.draft.states(forward.raw_hidden))
        else:
            ids[:, 0].copy_(draft_input.bonus_tokens.view(-1))
            states = self._sharding.received(ids, self.gamma)
        hidden = states.view(bs, self.gamma, -1)[:, :depth]
        with self._telemetry.timed("draft_head"):
            anchors = draft_input.bonus_tokens.view(-1).to(torch.int64)
            block = self._block(hidden, anchors, batch.seq_lens, rows)
            scores = self._ops.confidence(hidden, block.previous)
        tokens, missing = block.tokens, self.gamma - depth
        if missing:  # never verified: the plan admits no more than it drafts
            tokens, scores = (
                torch.nn.functional.pad(part, (0, missing)) for part in (tokens, scores)
            )
        if copies is not None and len(copies.rows):
            copies = copies.better(scores[0].cpu().numpy())
            tokens, scores = self._replaced(copies, tokens, scores)
        tokens = self._rounds.take(Block(tokens, scores, depth, copies))
        return self._proposal(ids, tokens, block, rows, scores[1])

    def _block(
        self,
        hidden: torch.Tensor,
        anchors: torch.Tensor,
        positions: torch.Tensor,
        rows: SampledRows | None,
    ) -> DraftBlock:
        """A block of draft states ``[R, depth, d]``, after anchors ``[R]`` at positions ``[R]``."""
        base = self.base_logits(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)
        return self._ops.draft(base, hidden, anchors, positions, rows, self._sharding.tokens)

    @property
    def _reach(self) -> int:
        """Tokens that a copy may have whatever is drafted; 0: no more than are drafted, as our kernels and ranks expect."""
        return self.gamma if self._ops.name == "torch" and self._sharding.ranks.count == 1 else 0

    def _copies(self, requests: Sequence[Req], depth: int) -> Copies | None:
        """What requests of this step can copy from their own text."""
        plan = self._rounds.running.plan
        if self._lookup is None or plan.profile:
            return None
        with self._telemetry.timed("lookup"):
            return self._lookup.find(requests, plan.load.sampled, depth)

    def _suffice(self, copies: Copies, requests: int) -> bool:
        """Whether the draft forward can be skipped beside these."""
        plan, lookup = self._rounds.running.plan, self._rounds.scheduler.lookup
        known = lookup.skip_draft(plan, copies.rows, copies.chances)
        return copies.suffice(requests) if known is None else known

    def _replaced(
        self, copies: Copies, tokens: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Drafted ``[R, gamma]`` tokens and ``[2, R, gamma]`` scores with copies in their requests' places."""
        self._telemetry.ran["draft:copied-requests"] += len(copies.rows)
        tokens, confidence = copies.replace(tokens, scores[0])
        return tokens, torch.stack([confidence, scores[1]])

    def _without_draft(
        self, draft_input: DraftInput, bs: int, rows: SampledRows | None
    ) -> DraftProposal:
        """A step whose plan does not draft: prompt lookup where it finds anything."""
        if self._found is None:
            return self._nothing(draft_input, bs, rows)
        return self._copied(draft_input, bs, self._found, rows, self.gamma)

    def _copied(
        self, draft_input: DraftInput, bs: int, copies: Copies, rows: SampledRows | None, depth: int
    ) -> DraftProposal:
        """A proposal of prompt lookup alone, counted as ``depth`` tokens a request: the draft forward is skipped."""
        given = self._nothing(draft_input, bs, rows)
        nothing = given.confidence_raw
        tokens, scores = self._replaced(
            copies, given.draft_block.draft_tokens, nothing.expand(2, *nothing.shape)
        )
        self._telemetry.ran["draft:copies-alone"] += 1
        block = self._ops.nothing(rows, bs, self.gamma)
        tokens = self._rounds.take(Block(tokens, scores, depth, copies, alone=True))
        return self._proposal(given.draft_block_ids, tokens, block, rows, nothing)

    def _nothing(self, draft_input: DraftInput, bs: int, rows: SampledRows | None) -> DraftProposal:
        """A proposal of no tokens, for a step that does not draft: only anchors are verified."""
        ids = self.draft_block_ids_view(bs=bs, device=draft_input.bonus_tokens.device)
        ids[:, 0].copy_(draft_input.bonus_tokens.view(-1))
        none = torch.zeros((bs, self.gamma), device=ids.device)
        # Where whole blocks are verified, these tokens are too.
        block = self._ops.nothing(rows, bs, 1 if self._rounds.scheduler.adaptive else self.gamma)
        return self._proposal(ids, none.long(), block, rows, none)

    def _proposal(
        self,
        ids: torch.Tensor,
        tokens: torch.Tensor,
        block: DraftBlock,
        rows: SampledRows | None,
        logits: torch.Tensor,
    ) -> DraftProposal:
        """What SGLang and our acceptance are given.

        Args:
            ids: ``[R, >= gamma]`` int64 rows of the draft forward, the anchors first.
            tokens: ``[R, gamma]`` int64 drafted.
            block: the distributions they were drawn from.
            logits: ``[R, gamma]`` float32 of the confidences.
        """
        greedy = self._greedy
        if greedy is None or len(greedy) != len(tokens):
            greedy = torch.ones(len(tokens), dtype=torch.bool, device=ids.device)
            self._greedy = greedy if rows is None else greedy.index_fill_(0, rows.index, False)
        return DraftProposal(
            draft_block_ids=ids[:, : self.gamma],
            draft_block=OurDraftBlock(
                draft_tokens=tokens,
                corrected_logits=None,
                greedy_mask=greedy,  # read by SGLang where a request asks for its sampling mask
                temperatures=None,
                greedy_draft=rows is None,
                rows=rows,
                probs=block.probs,
                support=block.support,
                lse=block.lse,
            ),
            # SGLang would carry them to the next steps' budgets of its own planner.
            confidence=None,
            confidence_raw=logits,
            folded=False,
            verify_ids=torch.cat([ids[:, :1], tokens], dim=1),
        )

    def base_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[N, M]`` of the parallel stage: of the draft vocabulary, this rank's, or all."""
        if self._sharding.head is not None:
            return self._sharding.head.logits(hidden)
        if self._sharding.vocabulary is not None:
            return self._sharding.vocabulary.logits(hidden)
        with self._base_logits_context():
            return self._sharding.draft.logits(hidden)
