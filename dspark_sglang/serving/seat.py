"""What a rank knows of where the drafter lives: what it drafts with, and what it sends or receives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch

from dspark_sglang import config
from dspark_sglang.core.placement import Placement
from dspark_sglang.core.sharded import HeldHeads, held_heads
from dspark_sglang.errors import ConfigError
from dspark_sglang.serving.draft_head import DraftHead
from dspark_sglang.serving.draft_model import DraftModel
from dspark_sglang.serving.placement import settled
from dspark_sglang.serving.ranks import DraftEmbedding, Ranks, Vocabulary


class Seat(msgspec.Struct, frozen=True):
    """What a rank needs to know of where the drafter lives."""

    draft: DraftModel
    ranks: Ranks
    placement: Placement
    #: None where every rank has the whole LM head.
    vocabulary: Vocabulary | None
    head: DraftHead | None
    #: What the draft forward embeds with; None: as SGLang does.
    embedding: DraftEmbedding | None
    #: Where W1 and the confidence head live, and what this rank has of them; None: all of both.
    heads: Placement = "replicate"
    held: HeldHeads | None = None

    @property
    def tokens(self) -> torch.Tensor | None:
        """The draft vocabulary ``[M]``; None for all tokens."""
        return None if self.head is None else self.head.tokens

    @property
    def alone(self) -> bool:
        """Whether one rank drafts for all."""
        return self.placement == "single" and self.ranks.count > 1

    @property
    def drafts(self) -> bool:
        """Whether this rank runs the draft forward."""
        return not self.alone or self.ranks.rank == 0

    def sent(self, states: torch.Tensor) -> torch.Tensor:
        """Draft states ``[N, d]`` of this rank, which the others receive where it drafts for all."""
        return self.ranks.broadcast(states.contiguous(), "states") if self.alone else states

    def received(self, ids: torch.Tensor, gamma: int) -> torch.Tensor:
        """``[R * gamma, d]`` draft states of rank 0, on a rank that does not draft.

        Args:
            ids: ``[R, q]`` int64 rows of the draft forward, whose embedding needs every rank.
        """
        if self.embedding is not None:
            self.embedding(ids)
        shape = (len(ids) * gamma, self.draft.width)
        return self.ranks.broadcast(
            torch.empty(shape, dtype=self.draft.dtype, device=ids.device), "states"
        )

    def renew(self) -> None:
        """Copy again what was copied of the target's weights; every rank has to."""
        if self.head is not None:
            self.head.renew(self.draft.module.lm_head.weight)

    def forget(self, injector: Any) -> None:
        """Free what this rank does not read: rows of W1 and W2, and layers where it does not draft.

        A rank that does not draft writes no draft KV at prefill either.

        The KV pool stays: SGLang gives every rank as many slots as the fullest one. The projection of
        target states stays too: some targets run it themselves.
        """
        self._cut_heads(self.draft.module.markov_head)
        if self.drafts:
            return
        for name, parameter in self.draft.module.named_parameters():
            if name.startswith(self.draft.LAYERS):
                parameter.data = parameter.data.new_empty(0)
        injector.inject_prefill = lambda *args, **kwargs: None

    def _cut_heads(self, markov: Any) -> None:
        if self.vocabulary is None or self.head is not None:  # the draft vocabulary reads any row
            return
        cuts = [(markov.markov_w2.weight, self.vocabulary.shard)]
        if self.held is not None:
            cuts.append((markov.markov_w1.weight, self.held.rows))
        for weight, shard in cuts:
            weight.data = shard.cut(weight.data).clone()


def seat(
    draft: DraftModel,
    ranks: Ranks,
    *,
    folder: Path | None,
    mask: int,
    width: int,
    heads: config.Placement = "replicate",
) -> Seat:
    """The seat of this rank; the draft model then embeds with what is found here.

    Args:
        draft: the drafter.
        folder: of the drafter, where its draft vocabulary may be; None: it is not used.
        mask: the mask token.
        width: rows of the draft forward a request.
        heads: where W1 and the confidence head are wanted.

    Raises:
        CompatibilityError: an LM head sharded in an unknown way.
        ConfigError: ``heads`` that a draft vocabulary cannot be drafted with.
        ArtifactError: a draft vocabulary that is damaged or of another one.
    """
    vocabulary = Vocabulary.of(draft, ranks)
    embed = draft.module.embed_tokens
    embedding = None
    if vocabulary is not None and int(getattr(embed, "tp_size", 1)) > 1 and draft.embeds_by_module:
        draft.module.embed_tokens = embedding = DraftEmbedding(embed, mask, width, ranks)
    head = None if folder is None else DraftHead.beside(folder, draft, vocabulary)
    if vocabulary is None or heads == "auto":
        heads = "replicate"
    elif heads != "replicate" and head is not None:
        raise ConfigError(
            f"DSPARK_HEADS is {heads}, and the drafter has a draft vocabulary.",
            expected="replicate or auto: every rank drafts from all tokens of a draft vocabulary",
            fix="Unset DSPARK_HEADS, or set DSPARK_DRAFT_VOCAB=whole.",
        )
    held = None
    if vocabulary is not None:
        held = held_heads(heads, vocabulary.shard, ranks.count, draft.width)
    return Seat(
        draft=draft,
        ranks=ranks,
        placement=settled() if ranks.count > 1 else "replicate",
        vocabulary=vocabulary,
        head=head,
        embedding=embedding,
        heads=heads,
        held=held,
    )
