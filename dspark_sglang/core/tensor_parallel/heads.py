"""The Markov head's W1 and the confidence head where no rank, or only one, has the whole of them.

W2 needs no choice: its rows are those of the base logits, so every rank has those of its own tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dspark_sglang.core.heads import ConfidenceHead
from dspark_sglang.core.placement import Placement
from dspark_sglang.core.tensor_parallel.shard import Exchange, Shard, Sum


class HeldHeads(NamedTuple):
    """What a rank has of both heads; the other ranks have the rest."""

    #: Rows of W1.
    rows: Shard
    #: The draft states' columns that this rank scores.
    features: slice


def held_heads(placement: Placement, shard: Shard, ranks: int, width: int) -> HeldHeads | None:
    """What a rank has of the heads; None where every rank has all of them (``replicate``).

    Args:
        placement: ``shard``: the rows of its tokens and an even share of the draft states' columns.
            ``single``: rank 0 has all, the others nothing.
        shard: this rank's part of the vocabulary.
        width: of draft states.
    """
    if placement == "replicate":
        return None
    if placement == "shard":
        bounds = [width * rank // ranks for rank in (shard.rank, shard.rank + 1)]
        return HeldHeads(shard, slice(*bounds))
    everything = shard.rank == 0
    rows = shard._replace(start=0, width=shard.vocabulary if everything else 0)
    return HeldHeads(rows, slice(0, width if everything else 0))


def embed(w1: torch.Tensor, tokens: torch.Tensor, held: HeldHeads) -> Exchange[torch.Tensor]:
    """``W1[x]`` of ``tokens`` ``[B]`` int64: ``[B, r]``, one all-reduce, exact since all terms but one are 0.

    Args:
        w1: ``[width, r]`` this rank's rows.
    """
    return (yield Sum(held.rows.rows(w1, tokens), "markov"))


def confidence_logits(
    head: ConfidenceHead,
    hidden: torch.Tensor,
    previous: torch.Tensor,
    w1: torch.Tensor,
    held: HeldHeads,
) -> Exchange[torch.Tensor]:
    """:meth:`dspark_sglang.core.heads.ConfidenceHead.logits` from the ranks' parts, in one all-reduce.

    The score is linear in its features, so each rank scores those it has, and the sum is the score
    up to rounding.

    Args:
        hidden: ``[B, gamma, d]`` draft states, whole on every rank.
        previous: ``[B, gamma]`` int64 tokens before each position.
        w1: ``[width, r]`` this rank's rows.

    Returns:
        ``[B, gamma]`` float32.
    """
    width, own = hidden.shape[-1], held.features
    score = hidden[..., own].float() @ head.weight[:width][own]
    if head.with_markov:
        score = score + held.rows.rows(w1, previous).float() @ head.weight[width:]
    return (yield Sum(score, "confidence")) + head.bias
