"""Drafting inside SGLang: its draft forward, our Markov sampling and confidence."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.speculative.dspark_components.dspark_draft import (
    DraftBlockProposer,
    DraftBlockResult,
    DraftProposal,
)
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite

from dspark_sglang.core.draft import DraftBlock
from dspark_sglang.serving.control import Control
from dspark_sglang.serving.draft_head import DraftHead
from dspark_sglang.serving.ops import Ops, SampledRows
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
        head: DraftHead | None,
        control: Control,
    ) -> None:
        """Attach what our part needs; called once after construction."""
        self._control = control
        self._ops = ops
        self._telemetry = telemetry
        self._head = head
        #: Requests of the last step, and those of them that sample.
        self._requests: list[Any] = []
        self._rows: SampledRows | None = None

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
        depth = self._control.plan.depth
        rows = self._sampled_rows(batch, sampling_info)
        if not depth:
            return self._nothing(draft_input, bs, rows)
        embed = target_model.get_input_embeddings() if self.sample_from_anchor else None
        forward = self._run_forward(
            batch=batch,
            draft_input=draft_input,
            verify_window=verify_window,
            bs=bs,
            device=device,
            embed_module=embed or self.draft_model.embed_tokens,
            sampling_info=sampling_info,
            anchor_prepared=anchor_prepared,
        )
        with self._telemetry.timed("draft_head"):
            hidden = forward.raw_hidden.view(bs, self.gamma, -1)[:, :depth]
            logits, features = self._base_logits(hidden.reshape(bs * depth, -1))
            anchors = forward.draft_block_ids[:, 0]
            block = self._ops.draft(
                logits.view(bs, depth, -1),
                forward.draft_hidden_3d[:, :depth],
                anchors,
                verify_window.positions_2d[:, 0],
                rows,
                None if self._head is None else self._head.tokens,
            )
            # One broadcast of the block, so that no rank verifies another rank's draft.
            tokens = self._tp_sync.sync(SpecTpSyncSite.DSPARK_DRAFT, block.tokens)
            previous = torch.cat([anchors[:, None], tokens[:, :-1]], dim=1)
            confidence, raw = self._ops.confidence(features.view(bs, depth, -1), previous)
            self._control.logits = raw
        missing = self.gamma - depth
        if missing:  # never verified: the plan admits no more than it drafts
            tokens, confidence, raw = (
                torch.nn.functional.pad(part, (0, missing)) for part in (tokens, confidence, raw)
            )
        return self._proposal(forward.draft_block_ids, tokens, block, rows, (confidence, raw))

    def _nothing(self, draft_input: Any, bs: int, rows: SampledRows | None) -> DraftProposal:
        """A proposal of no tokens, for a step that does not draft: only anchors are verified."""
        ids = self.draft_block_ids_view(bs=bs, device=draft_input.bonus_tokens.device)
        ids[:, 0].copy_(draft_input.bonus_tokens.view(-1))
        none = torch.zeros((bs, self.gamma), device=ids.device)
        return self._proposal(ids, none.long(), self._ops.nothing(rows, bs), rows, (none, none))

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
            confidence=calibrated,
            confidence_raw=raw,
            folded=False,
            verify_ids=torch.cat([ids[:, :1], tokens], dim=1),
        )

    def _base_logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the parallel stage and the features that confidence reads."""
        if self._head is not None:
            return self._head.logits(hidden), hidden
        with self._base_logits_context():
            logits, features = self.draft_model.compute_base_logits(hidden)
        return logits, features
