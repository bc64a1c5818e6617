"""Drafting inside SGLang: its draft forward, our Markov sampling and confidence."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from sglang.srt.speculative.dspark_components.dspark_draft import (
    DraftBlockProposer,
    DraftBlockResult,
    DraftProposal,
)
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite

from dspark_sglang.core.draft import SHORTLIST, draft_block
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.core.sampling import Filters
from dspark_sglang.core.seeded import Noise
from dspark_sglang.serving.draft_head import DraftHead
from dspark_sglang.serving.telemetry import Telemetry


class SampledRows(msgspec.Struct, frozen=True):
    """The rows of a batch that sample, and their parameters."""

    #: ``[S]`` int64 indices into the batch.
    index: torch.Tensor
    #: ``[S]`` float32 temperatures.
    temperatures: torch.Tensor
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None
    #: ``[S]`` int64 where SGLang samples by seed (``--enable-deterministic-inference``), else None.
    seeds: torch.Tensor | None = None

    @classmethod
    def of(cls, info: Any) -> SampledRows | None:
        """The sampled rows of SGLang's sampling information; None when every row is greedy."""
        if info is None or info.is_all_greedy:
            return None
        # SGLang expresses temperature 0 as top_k = 1.
        index = (info.top_ks.view(-1) > 1).nonzero().view(-1)

        def rows(values: torch.Tensor) -> torch.Tensor:
            return values.view(-1)[index]

        return cls(
            index=index,
            temperatures=rows(info.temperatures).float(),
            top_k=rows(info.top_ks) if info.need_top_k_sampling else None,
            top_p=rows(info.top_ps) if info.need_top_p_sampling else None,
            min_p=rows(info.min_ps) if info.need_min_p_sampling else None,
            seeds=None if info.sampling_seed is None else rows(info.sampling_seed),
        )

    def noise(
        self, like: torch.Tensor, positions: torch.Tensor, owner: torch.Tensor | None = None
    ) -> Noise | None:
        """Keys of seeded draws; None where SGLang does not sample by seed.

        Args:
            like: ``[N, M]`` logits of the rows that draw.
            positions: ``[N]`` position of each row's input token.
            owner: ``[N]`` int64 sampled row that each belongs to; None: each its own.
        """
        if self.seeds is None:
            return None

        def spread(values: torch.Tensor | None) -> torch.Tensor | None:
            return values if values is None or owner is None else values[owner]

        seeds = self.seeds if owner is None else self.seeds[owner]
        filters = Filters.of(like, spread(self.top_k), spread(self.top_p), spread(self.min_p))
        return Noise(seeds, positions.to(torch.int64), filters)


class OurDraftBlock(DraftBlockResult, frozen=True):  # type: ignore[call-arg]
    """SGLang's draft result plus what our acceptance reads."""

    rows: SampledRows | None = None
    #: ``[S, gamma, M]`` drafted laws of the sampled rows over the tokens of ``support``.
    laws: torch.Tensor | None = None
    support: torch.Tensor | None = None


class Proposer(DraftBlockProposer):
    """Overrides the head of a round; the draft forward itself stays SGLang's."""

    def bind(
        self,
        *,
        telemetry: Telemetry,
        generator: torch.Generator,
        confidence: ConfidenceHead,
        head: DraftHead | None,
        implementation: str,
    ) -> None:
        """Attach what our part needs; called once after construction."""
        self._telemetry = telemetry
        self._generator = generator
        self._confidence = confidence
        self._head = head
        self._markov = MarkovHead.from_module(self.draft_model.markov_head)
        self._implementation = implementation

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
            logits, features = self._base_logits(forward.raw_hidden)
            rows = SampledRows.of(sampling_info)
            anchors = forward.draft_block_ids[:, 0]
            noise = uniforms = None
            if rows is not None:
                start = verify_window.positions_2d[rows.index, 0]
                noise = rows.noise(logits[: len(rows.index)], start)
                uniforms = self._uniforms(len(rows.index)) if noise is None else None
            block = draft_block(
                logits.view(bs, self.gamma, -1),
                anchors,
                forward.draft_hidden_3d,
                self._markov,
                temperatures=None if rows is None else rows.temperatures,
                sampled=None if rows is None else rows.index,
                uniforms=uniforms,
                noise=noise,
                shortlist=SHORTLIST,
                vocabulary=None if self._head is None else self._head.tokens,
            )
            # One broadcast of the block, so that no rank verifies another rank's draft.
            tokens = self._tp_sync.sync(SpecTpSyncSite.DSPARK_DRAFT, block.tokens)
            previous = torch.cat([anchors[:, None], tokens[:, :-1]], dim=1)
            raw = self._confidence.logits(features.view(bs, self.gamma, -1), previous, self._markov)
        greedy = torch.ones(bs, dtype=torch.bool, device=anchors.device)
        if rows is not None:
            greedy[rows.index] = False
        self._telemetry.ran[f"draft:{self._implementation}-{self._markov.kind}"] += 1
        self._telemetry.ran["confidence:torch"] += 1
        return DraftProposal(
            draft_block_ids=forward.draft_block_ids[:, : self.gamma],
            draft_block=OurDraftBlock(
                draft_tokens=block.tokens,
                corrected_logits=None,
                greedy_mask=greedy,  # read by SGLang where a request asks for its sampling mask
                temperatures=None,
                greedy_draft=rows is None,
                rows=rows,
                laws=block.probs,
                support=block.support,
            ),
            confidence=self._confidence.calibrate(raw),
            confidence_raw=raw,
            folded=False,
            verify_ids=torch.cat([anchors[:, None], block.tokens], dim=1),
        )

    def _base_logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the parallel stage and the features that confidence reads."""
        if self._head is not None:
            return self._head.logits(hidden), hidden
        with self._base_logits_context():
            logits, features = self.draft_model.compute_base_logits(hidden)
        return logits, features

    def _uniforms(self, rows: int) -> torch.Tensor:
        return torch.rand(
            (rows, self.gamma),
            dtype=torch.float64,
            device=self._generator.device,
            generator=self._generator,
        )
