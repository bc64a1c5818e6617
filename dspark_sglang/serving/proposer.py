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
from dspark_sglang.serving.ahead import Ahead
from dspark_sglang.serving.control import Control
from dspark_sglang.serving.lookup import Copies, Lookup
from dspark_sglang.serving.ops import Ops, SampledRows
from dspark_sglang.serving.planner import Planner
from dspark_sglang.serving.seat import Seat
from dspark_sglang.serving.telemetry import Telemetry


class OurDraftBlock(DraftBlockResult, frozen=True):  # type: ignore[call-arg]
    """SGLang's draft result plus what our acceptance reads."""

    rows: SampledRows | None = None
    #: Drafted laws, see :class:`dspark_sglang.core.draft.DraftBlock`.
    laws: torch.Tensor | None = None
    support: torch.Tensor | None = None
    lse: torch.Tensor | None = None


class Proposer(DraftBlockProposer):
    """Overrides the head of a round; the draft forward itself stays SGLang's."""

    def bind(
        self,
        *,
        ops: Ops,
        telemetry: Telemetry,
        seat: Seat,
        control: Control,
        planner: Planner,
        lookup: Lookup | None,
        ahead: Ahead | None,
    ) -> None:
        """Attach what our part needs; called once after construction.

        Args:
            seat: where the drafter lives.
            lookup: finds what greedy requests can copy; None: nothing is copied.
            planner: decides how much is verified; with ranks, as soon as the block is drafted.
            ahead: decided that before, and decides which tokens; None: the planner does.
        """
        self._ahead = ahead
        self._control = control
        self._lookup = lookup
        self._planner = planner
        self._seat = seat
        self._ops = ops
        self._telemetry = telemetry
        #: Requests of the last step, and those of them that sample.
        self._requests: list[Any] = []
        self._rows: SampledRows | None = None
        #: What the running step can copy although it does not draft.
        self._found: Copies | None = None

    def can_copy(self, requests: Sequence[Any]) -> bool:
        """Whether the running step, whose plan does not draft, can copy; called once before it."""
        allowed = self._control.running.plan.copies and self._seat.ranks.count == 1
        found = self._copies(requests, self.gamma) if allowed else None
        self._found = found if found is not None and len(found.rows) else None
        return self._found is not None

    def _sampled_rows(self, batch: Any, sampling_info: Any) -> SampledRows | None:
        """Which requests sample and how; read again only when the batch changes."""
        if batch.reqs != self._requests:
            self._requests, self._rows = list(batch.reqs), SampledRows.of(sampling_info)
        return self._rows

    def attach_draft_sampler(self, draft_sampler: Any) -> None:
        """SGLang's sampler is folded into the draft graph; ours runs after it, so it stays out."""

    def propose(
        self,
        *,
        batch: Any,
        draft_input: Any,
        verify_window: Any,
        bs: int,
        device: Any,
        target_model: Any,
        sampling_info: Any,
        anchor_prepared: bool = False,
    ) -> DraftProposal:
        rows = self._sampled_rows(batch, sampling_info)
        if self._control.running.plan.draft:
            with self._control.faults.contained("drafting"):
                return self._drafted(
                    batch, draft_input, verify_window, target_model, sampling_info, anchor_prepared
                )
            self._control.running.abandon()
            self._found = None
        return self._without_draft(draft_input, bs, rows)

    def _drafted(
        self,
        batch: Any,
        draft_input: Any,
        verify_window: Any,
        target_model: Any,
        sampling_info: Any,
        anchor_prepared: bool,
    ) -> DraftProposal:
        """A proposal of a step whose plan drafts."""
        depth, bs = self._control.running.plan.depth, len(batch.seq_lens)
        rows = self._sampled_rows(batch, sampling_info)
        ids = self.draft_block_ids_view(bs=bs, device=batch.seq_lens.device)
        copies = self._copies(batch.reqs, max(depth, self._reach))
        # An operator's budget is a share of what is drafted, so something is.
        alone = self._seat.ranks.count == 1 and self._control.forced is None
        if copies is not None and len(copies.rows) and alone and self._suffice(copies, bs):
            return self._copied(draft_input, bs, copies, rows)
        if self._seat.drafts:
            embed = target_model.get_input_embeddings() if self.sample_from_anchor else None
            forward = self._run_forward(
                batch=batch,
                draft_input=draft_input,
                verify_window=verify_window,
                bs=bs,
                device=batch.seq_lens.device,
                embed_module=self._seat.embedding or embed or self.draft_model.embed_tokens,
                sampling_info=sampling_info,
                anchor_prepared=anchor_prepared,
            )
            states = self._seat.sent(self._seat.draft.states(forward.raw_hidden))
        else:
            ids[:, 0].copy_(draft_input.bonus_tokens.view(-1))
            states = self._seat.received(ids, self.gamma)
        hidden = states.view(bs, self.gamma, -1)[:, :depth]
        with self._telemetry.timed("draft_head"):
            block = self._block(hidden, ids[:, 0], verify_window.positions_2d[:, 0], rows)
            confidence, raw = self._ops.confidence(hidden, block.previous)
            self._control.running.logits = raw
        tokens, missing = block.tokens, self.gamma - depth
        if missing:  # never verified: the plan admits no more than it drafts
            tokens, confidence, raw = (
                torch.nn.functional.pad(part, (0, missing)) for part in (tokens, confidence, raw)
            )
        if copies is not None and len(copies.rows):
            copies = copies.better(confidence.cpu().numpy())
            tokens, confidence = self._replaced(copies, tokens, confidence)
        if self._ahead is None:
            tokens = self._agreed(tokens, confidence)
        else:
            tokens = self._agreed_ahead(self._ahead, tokens, confidence, raw)
        return self._proposal(ids, tokens, block, rows, (confidence, raw))

    def _block(
        self,
        hidden: torch.Tensor,
        anchors: torch.Tensor,
        positions: torch.Tensor,
        rows: SampledRows | None,
    ) -> DraftBlock:
        """A block of draft states ``[R, depth, d]``, after anchors ``[R]`` at positions ``[R]``."""
        base = self._base_logits(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)
        return self._ops.draft(base, hidden, anchors, positions, rows, self._seat.tokens)

    def _agreed(self, tokens: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
        """Rank 0's block on every rank, and how much of it is verified: one broadcast for both."""
        if self._seat.ranks.count == 1:
            return tokens
        planned = tokens.new_empty(0)
        if self._control.adaptive:
            self._planner.decide(confidence)
            planned = self._planner.packed().to(tokens.device)
        packed = torch.cat([planned, tokens.flatten()])
        packed = self._seat.ranks.broadcast(packed, "block")
        if self._control.adaptive:
            self._planner.agree(packed[: len(planned)], len(tokens))
        return packed[len(planned) :].view(tokens.shape)

    def _agreed_ahead(
        self, ahead: Ahead, tokens: torch.Tensor, confidence: torch.Tensor, raw: torch.Tensor
    ) -> torch.Tensor:
        """The same where the budget is known: rank 0's survivals are what every rank admits by."""
        survival = ahead.survive(confidence, raw)
        if self._seat.ranks.count == 1:
            return tokens
        packed = torch.cat([survival.view(torch.int64).flatten(), tokens.flatten()])
        packed = self._seat.ranks.broadcast(packed, "block").view(2, *tokens.shape)
        ahead.survival = packed[0].view(torch.float64)
        return packed[1]

    @property
    def _reach(self) -> int:
        """Tokens that a copy may have whatever is drafted; 0: no more than are drafted, as our kernels and ranks expect."""
        return self.gamma if self._ops.name == "torch" and self._seat.ranks.count == 1 else 0

    def _copies(self, requests: Sequence[Any], depth: int) -> Copies | None:
        """What requests of this step can copy from their own text."""
        if self._lookup is None or self._control.running.plan.profile:
            return None
        with self._telemetry.timed("lookup"):
            return self._lookup.find(requests, self._control.running.sampled, depth)

    def _suffice(self, copies: Copies, requests: int) -> bool:
        """Whether the draft forward can be skipped beside these."""
        known = self._control.copying.skip_draft(self._control.running, copies.rows, copies.chances)
        return copies.suffice(requests) if known is None else known

    def _replaced(
        self, copies: Copies, tokens: torch.Tensor, confidence: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Drafted ``[R, depth]`` tokens and confidences with copies in their requests' places."""
        self._control.copy(copies.rows, copies.tokens.shape[1])
        self._telemetry.ran["draft:copied-requests"] += len(copies.rows)
        return copies.replace(tokens, confidence)

    def _without_draft(self, draft_input: Any, bs: int, rows: SampledRows | None) -> DraftProposal:
        """A step whose plan does not draft: copies where there are any."""
        if self._found is None:
            return self._nothing(draft_input, bs, rows)
        self._control.copy_only(self.gamma)
        return self._copied(draft_input, bs, self._found, rows)

    def _copied(
        self, draft_input: Any, bs: int, copies: Copies, rows: SampledRows | None
    ) -> DraftProposal:
        """A proposal of copies alone: the draft forward is skipped."""
        given = self._nothing(draft_input, bs, rows)
        tokens, confidence = self._replaced(
            copies, given.draft_block.draft_tokens, given.confidence
        )
        self._control.running.logits, self._control.running.undrafted = given.confidence_raw, True
        self._telemetry.ran["draft:copies-alone"] += 1
        block = self._ops.nothing(rows, bs, self.gamma)
        return self._proposal(
            given.draft_block_ids, tokens, block, rows, (confidence, given.confidence_raw)
        )

    def _nothing(self, draft_input: Any, bs: int, rows: SampledRows | None) -> DraftProposal:
        """A proposal of no tokens, for a step that does not draft: only anchors are verified."""
        ids = self.draft_block_ids_view(bs=bs, device=draft_input.bonus_tokens.device)
        ids[:, 0].copy_(draft_input.bonus_tokens.view(-1))
        none = torch.zeros((bs, self.gamma), device=ids.device)
        # Where whole blocks are verified, these tokens are too.
        block = self._ops.nothing(rows, bs, 1 if self._control.adaptive else self.gamma)
        return self._proposal(ids, none.long(), block, rows, (none, none))

    def _proposal(
        self,
        ids: torch.Tensor,
        tokens: torch.Tensor,
        block: DraftBlock,
        rows: SampledRows | None,
        confidence: tuple[torch.Tensor, torch.Tensor],
    ) -> DraftProposal:
        """What SGLang and our acceptance are given.

        Args:
            ids: ``[R, >= gamma]`` int64 rows of the draft forward, the anchors first.
            tokens: ``[R, gamma]`` int64 drafted.
            block: the laws they were drawn from.
            confidence: ``[R, gamma]`` float32 each, calibrated and as logits.
        """
        greedy = torch.ones(len(tokens), dtype=torch.bool, device=ids.device)
        if rows is not None:
            greedy[rows.index] = False
        calibrated, raw = confidence
        return DraftProposal(
            draft_block_ids=ids[:, : self.gamma],
            draft_block=OurDraftBlock(
                draft_tokens=tokens,
                corrected_logits=None,
                greedy_mask=greedy,  # read by SGLang where a request asks for its sampling mask
                temperatures=None,
                greedy_draft=rows is None,
                rows=rows,
                laws=block.probs,
                support=block.support,
                lse=block.lse,
            ),
            # SGLang would carry them to the next steps' budgets of its own planner.
            confidence=calibrated if self._ahead is None else None,
            confidence_raw=raw,
            folded=False,
            verify_ids=torch.cat([ids[:, :1], tokens], dim=1),
        )

    def _base_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[N, M]`` of the parallel stage: of the draft vocabulary, this rank's, or all."""
        if self._seat.head is not None:
            return self._seat.head.logits(hidden)
        if self._seat.vocabulary is not None:
            return self._seat.vocabulary.logits(hidden)
        with self._base_logits_context():
            return self._seat.draft.logits(hidden)
