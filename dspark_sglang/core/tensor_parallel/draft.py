"""Drafting a block over a sharded vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import linear

from dspark_sglang.core.draft import DraftBlock
from dspark_sglang.core.heads import MarkovHead
from dspark_sglang.core.seeded import gumbel
from dspark_sglang.core.tensor_parallel.heads import HeldHeads, embed
from dspark_sglang.core.tensor_parallel.shard import Exchange, Shard, best_of


class Keys(NamedTuple):
    """Keys of the noise that sampled rows draw with."""

    #: ``[S]`` int64 seeds.
    seeds: torch.Tensor
    #: ``[S]`` int64 position of each row's anchor.
    positions: torch.Tensor
    #: Whether these are the requests' own. The target then draws with the same noise, and acceptance
    #: needs no drafted law.
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
        logits_of_all: give laws as the kernels read them: logits of all rows, greedy ones included, and the
            log-sum-exp of them over their temperature.
        held: the rows of W1 that ``head.w1`` ``[held.rows.width, r]`` has; None: it has all.

    Returns:
        The block. Its laws ``[S, gamma, width]`` are this rank's columns of the drafted ones; with
        ``logits_of_all`` the logits ``[B, gamma, width]`` beside ``lse`` ``[B, gamma]`` float32.
    """
    columns = shard.columns(base_logits.device)
    state = head.start(anchors.shape[0])
    previous = anchors
    tokens, before, laws, sums = [], [], [], []
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
                laws.append(logits)
                sums.append(logits.new_zeros(len(logits)).index_copy_(0, sampled, total.float()))
            else:
                laws.append((scaled - total[:, None]).exp().float())
    return DraftBlock(
        tokens=torch.stack(tokens, dim=1),
        previous=torch.stack(before, dim=1),
        probs=torch.stack(laws, dim=1) if laws else None,
        lse=torch.stack(sums, dim=1) if sums else None,
    )
