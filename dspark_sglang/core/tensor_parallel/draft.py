"""Drafting a block over a sharded vocabulary, and its heads where no rank, or only one, has the whole of them.

W2 needs no choice: its rows are those of the base logits, so every rank has those of its own tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import linear

from dspark_sglang.core.draft import DraftBlock
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.core.placement import Placement
from dspark_sglang.core.seeded import gumbel
from dspark_sglang.core.tensor_parallel.shard import Exchange, Shard, Sum, best_of


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


class Keys(NamedTuple):
    """Keys of the noise that sampled rows draw with."""

    #: ``[S]`` int64 seeds.
    seeds: torch.Tensor
    #: ``[S]`` int64 position of each row's anchor.
    positions: torch.Tensor
    #: Whether these are the requests' own. The target then draws with the same noise, and acceptance
    #: needs no drafted distribution.
    coupled: bool


def draft_block(
    base_logits: torch.Tensor,
    anchors: torch.Tensor,
    hidden: torch.Tensor,
    head: MarkovHead,
    shard: Shard,
    *,
    temperatures: torch.Tensor | None = None,
    sampled: torch.Tensor | None = None,
    keys: Keys | None = None,
    logits_of_all: bool = False,
    held: HeldHeads | None = None,
) -> Exchange[DraftBlock]:
    """Draft ``gamma`` tokens a request as :func:`dspark_sglang.core.draft.draft_block` does.

    One exchange a position, of ``[B, 2]`` float64, ``[B, 3]`` where some request samples; with ``held``
    also a sum of ``[B, r]``.

    Args:
        base_logits: ``[B, gamma, width]`` this rank's columns.
        anchors: ``[B]`` int64 last committed tokens.
        hidden: ``[B, gamma, d]`` draft hidden states.
        head: the Markov head; its ``w2`` ``[width, r]`` are the rows of this rank's tokens.
        temperatures: ``[S]`` above 0, of the sampled rows; None when all are greedy.
        sampled: ``[S]`` int64 indices of the sampled rows.
        keys: of the sampled rows' noise.
        logits_of_all: give distributions as the kernels read them: logits of all rows, greedy ones included, and the
            log-sum-exp of them over their temperature.
        held: the rows of W1 that ``head.w1`` ``[held.rows.width, r]`` has; None: it has all.

    Returns:
        The block. Its distributions ``[S, gamma, width]`` are this rank's columns of the drafted ones; with
        ``logits_of_all`` the logits ``[B, gamma, width]`` beside ``lse`` ``[B, gamma]`` float32.
    """
    columns = shard.columns(base_logits.device)
    state = head.start(anchors.shape[0])
    previous = anchors
    tokens, before, dists, sums = [], [], [], []
    for step in range(base_logits.shape[1]):
        before.append(previous)
        if held is None:
            embedded = head.embed(previous)
        else:
            embedded = yield from embed(head.w1, previous, held)
        latent, state = head.latent(embedded, hidden[:, step], state)
        logits = base_logits[:, step].float() + linear(latent, head.w2).float()
        record = shard.best(logits)
        if sampled is not None and temperatures is not None and keys is not None:
            scaled = (logits[sampled] / temperatures[:, None]).double()
            noise = gumbel(keys.seeds, keys.positions + step, columns)
            record = torch.nn.functional.pad(record, (0, 1))
            lse = scaled.logsumexp(dim=-1, keepdim=True)
            record[sampled] = torch.cat([shard.best(scaled + noise), lse], dim=-1)
        every = yield record
        previous = best_of(every)
        tokens.append(previous)
        if sampled is not None and keys is not None and not keys.coupled:
            total = every[:, sampled, 2].logsumexp(dim=0)
            if logits_of_all:
                dists.append(logits)
                sums.append(logits.new_zeros(len(logits)).index_copy_(0, sampled, total.float()))
            else:
                dists.append((scaled - total[:, None]).exp().float())
    return DraftBlock(
        tokens=torch.stack(tokens, dim=1),
        previous=torch.stack(before, dim=1),
        probs=torch.stack(dists, dim=1) if dists else None,
        lse=torch.stack(sums, dim=1) if sums else None,
    )
