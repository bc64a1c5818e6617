"""The operations of a round where every rank holds a part of the vocabulary."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from dspark_sglang.config import Verification
from dspark_sglang.core.accept import Accepted
from dspark_sglang.core.draft import DraftBlock
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.core.sampling import Filters
from dspark_sglang.core.tensor_parallel import (
    HeldHeads,
    Keys,
    Sampling,
    accept,
    confidence_logits,
    draft_block,
)
from dspark_sglang.serving.ops import Admitted, Ops, SampledRows, Verified, WriteKv
from dspark_sglang.serving.ops.supply import Supply
from dspark_sglang.serving.sglang_types import DenseDraft, KvPool
from dspark_sglang.serving.telemetry import Telemetry
from dspark_sglang.serving.tensor_parallel import Vocabulary

#: Candidates of all ranks together for a position of a block, as many as a program holds.
_CANDIDATES = 256


class ShardedOps(Ops):
    """Over shards: drafting and acceptance here, the rest inside.

    Base and target logits are this rank's columns. Blocks of a draft vocabulary are drafted inside:
    every rank has the whole of it. Acceptance is that of the inner operations where they have one of shards, except of
    blocks that are verified together (``verification="block"``).

    Args:
        inner: the operations of one rank.
        held: what this rank has of W1 and the confidence head; None: all of both.
        generator: of the same seed on every rank, in the same state.
    """

    def __init__(
        self,
        inner: Ops,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
        verification: Verification,
        telemetry: Telemetry,
        held: HeldHeads | None = None,
    ) -> None:
        super().__init__(
            markov=inner.markov,
            confidence=inner.confidence_head,
            generator=generator,
            verification=verification,
            telemetry=telemetry,
        )
        self.name, self.covers_greedy, self.step = inner.name, inner.covers_greedy, inner.step
        self._inner = inner
        self._vocabulary = vocabulary
        self._supply = Supply(generator)
        self._held = held
        shard = vocabulary.shard
        own = shard.cut(inner.markov.w2)
        self._head: MarkovHead = dataclasses.replace(inner.markov, w2=own)
        self._accepts = None if verification == "block" else inner.shards(own.device)
        widths = torch.tensor([shard.width], device=own.device)
        self._widths = tuple(vocabulary.ranks.gather(widths, "start").view(-1).tolist())
        #: Candidates of each rank for a position of a block; 0: a rank has not all rows of the heads.
        self._listed = 0
        if held is None and len(inner.markov.w2) == shard.vocabulary:
            # A multiple of 4, where there are so many: what is gathered begins at multiples of 16 bytes.
            share = min(_CANDIDATES // len(self._widths), *self._widths)
            self._listed = share - share % 4 or share

    def renew(self, markov: MarkovHead, confidence: ConfidenceHead) -> None:
        super().renew(markov, confidence)
        self._inner.renew(markov, confidence)
        self._head = dataclasses.replace(markov, w2=self._vocabulary.shard.cut(markov.w2))

    def set_temperatures(self, temperatures: torch.Tensor) -> None:
        super().set_temperatures(temperatures)
        self._inner.set_temperatures(temperatures)

    @property
    def launches(self) -> dict[str, int]:
        return self._inner.launches

    def kv_writer(self, draft: DenseDraft, pool: KvPool) -> WriteKv | None:
        return self._inner.kv_writer(draft, pool)

    def draft(
        self,
        base: torch.Tensor,
        hidden: torch.Tensor,
        anchors: torch.Tensor,
        positions: torch.Tensor,
        rows: SampledRows | None,
        vocabulary: torch.Tensor | None,
    ) -> DraftBlock:
        if vocabulary is not None:
            return self._inner.draft(base, hidden, anchors, positions, rows, vocabulary)
        shard, ranks = self._vocabulary.shard, self._vocabulary.ranks
        if self._listed:
            given = (base, hidden, anchors, positions, rows, shard, self._listed)
            listing = self._inner.sharded_draft(*given)
            if listing is not None:
                return ranks.run(listing, "draft")
        keys = None
        if rows is not None:
            seeds = self._supply.seeds(len(rows.index)) if rows.seeds is None else rows.seeds
            keys = Keys(seeds, positions[rows.index].to(torch.int64), rows.seeds is not None)
        self._telemetry.ran[f"draft:sharded-{self.markov.kind}"] += 1
        drafting = draft_block(
            base,
            anchors,
            hidden,
            self._head,
            shard,
            temperatures=None if rows is None else rows.temperatures,
            sampled=None if rows is None else rows.index,
            keys=keys,
            logits_of_all=self._accepts is not None,
            held=self._held,
        )
        return ranks.run(drafting, "draft")

    def confidence(self, features: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        if self._held is None:
            return self._inner.confidence(features, previous)
        head = self.confidence_head
        self._telemetry.ran["confidence:sharded"] += 1
        scoring = confidence_logits(head, features, previous, self._head.w1, self._held)
        raw = self._vocabulary.ranks.run(scoring, "confidence")
        return torch.stack([head.calibrate(raw), raw])

    def admit(
        self,
        survival: npt.NDArray[np.float64],
        order: npt.NDArray[np.int64],
        budget: int,
        device: torch.device,
    ) -> Admitted:
        return self._inner.admit(survival, order, budget, device)

    def admit_there(self, survival: torch.Tensor, budget: int) -> Admitted:
        return self._inner.admit_there(survival, budget)

    def anchors(self, requests: int, device: torch.device) -> Admitted:
        return self._inner.anchors(requests, device)

    def accept(self, given: Verified) -> Accepted:
        rows = given.rows
        if rows is not None and rows.seeds is not None and rows.filters:
            return self._inner.accept(given)  # the verifier has gathered whole rows for these
        shard, ranks = self._vocabulary.shard, self._vocabulary.ranks
        logits = self._vocabulary.own(given.logits)
        if self._accepts is not None:
            own = given._replace(logits=logits)
            return self._accepts(own, ranks.rank, self._widths, lambda it: ranks.run(it, "accept"))
        how = "greedy"
        sampling = None
        if rows is not None:
            sampling = self._sampling(given, rows)
            how = "seeded" if rows.seeds is not None else self._verification
        self._telemetry.ran[f"accept:sharded-{how}"] += 1
        lens, first = given.lens.long(), given.first.long()
        deciding = accept(logits, given.drafted, lens, first, shard, sampling)
        return ranks.run(deciding, "accept")

    def _sampling(self, given: Verified, rows: SampledRows) -> Sampling:
        if rows.seeds is not None:
            anchors = given.anchors[rows.index].to(torch.int64)
            return Sampling(rows.index, rows.temperatures, seeds=rows.seeds, anchors=anchors)
        like = rows.temperatures[:, None].expand(-1, self._vocabulary.shard.vocabulary)
        return Sampling(
            rows.index,
            rows.temperatures,
            probs=self._own_probs(given),
            uniforms=self._supply.uniforms(len(rows.index), given.drafted.shape[1] + 1),
            filters=Filters.of(like, rows.top_k, rows.top_p, rows.min_p),
            block=self._verification == "block",
        )

    def _own_probs(self, given: Verified) -> torch.Tensor:
        """This rank's columns ``[S, gamma, width]`` of the drafted distributions."""
        dists, support, shard = given.probs, given.support, self._vocabulary.shard
        assert dists is not None and given.rows is not None
        index = given.rows.index
        if self.covers_greedy and support is not None:
            dists, support = dists[index], support[index]
        if support is None:
            return dists
        column = support - shard.start
        own = (column >= 0) & (column < shard.width)
        places = column.clamp(0, shard.width - 1).expand(dists.shape)
        whole = dists.new_zeros((*dists.shape[:2], shard.width))
        return whole.scatter_add_(-1, places, dists * own)
