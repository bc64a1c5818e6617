"""A Markov head that starts out knowing which token follows which.

The head's embeddings learn slowly in the main loss: a row is moved only when its token comes
by, and ``W2`` starts at zero. Here ``W1`` and ``W2`` are fitted alone, before training, to the
neighbours ``(x, y)`` in the text, as the low-rank part of a bigram model

    log p(y | x) = b[y] + W1[x] . W2[y] - log Z(x)

with ``b`` starting at the logarithm of the frequencies. ``W1 W2^T`` is kept: how ``x`` changes the
chance of ``y``, which is what the head adds to logits that do not know ``x``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from dspark_sglang.training.chat import TokenSequence
from dspark_sglang.training.model import Markov

#: Steps of the fit, pairs of a step at most, and how often a pair is drawn at most in the mean.
_STEPS = 300
_DRAWN = 4096
_EPOCHS = 2
#: One pair in so many is kept to judge the fit by.
_HELD = 50


class Pairs(NamedTuple):
    """Neighbouring tokens, the second written by the target."""

    #: ``[n]`` int64 tokens.
    before: torch.Tensor
    #: ``[n]`` int64 tokens that follow them.
    after: torch.Tensor


class Fit(NamedTuple):
    """Embeddings and how good they are."""

    #: ``[V, r]`` float32, zero for tokens that no pair begins with.
    w1: torch.Tensor
    #: ``[V, r]`` float32.
    w2: torch.Tensor
    #: Mean ``-log p`` of pairs kept aside, nats: by frequency alone, and with the embeddings.
    unigram: float
    bigram: float


def pairs_of(sequences: Sequence[TokenSequence]) -> Pairs:
    """All neighbours in some sequences."""
    before = np.concatenate([s.tokens[:-1][s.written[1:]] for s in sequences])
    after = np.concatenate([s.tokens[1:][s.written[1:]] for s in sequences])
    return Pairs(torch.from_numpy(before).long(), torch.from_numpy(after).long())


@torch.enable_grad()
def fit(
    pairs: Pairs,
    size: int,
    rank: int,
    *,
    tokens: torch.Tensor | None = None,
    lr: float = 0.03,
    seed: int = 0,
) -> Fit:
    """Fit the embeddings with Adam on the cross-entropy of pairs drawn at random.

    Tokens that are not fitted get the mean ``W2`` of the rarest fitted ones: they follow nothing in
    particular either.

    Args:
        pairs: what follows what.
        size: tokens in the vocabulary.
        rank: width of the embeddings.
        tokens: ``[M]`` int64, fit ``W2`` to these only; None: to all.
        lr: learning rate at first; it falls linearly to zero.
        seed: of first values and draws.
    """
    generator = torch.Generator().manual_seed(seed)
    known = torch.arange(size) if tokens is None else tokens
    rows = torch.full((size,), -1, dtype=torch.int64)
    rows[known] = torch.arange(len(known))
    inside = rows[pairs.after] >= 0
    before, after = pairs.before[inside], rows[pairs.after[inside]]
    order = torch.randperm(len(before), generator=generator)
    held, drawn = order[: len(order) // _HELD], order[len(order) // _HELD :]
    counts = torch.bincount(after[drawn], minlength=len(known)) + 0.5
    seen = torch.bincount(before[drawn], minlength=size) > 0
    w1 = (torch.randn((size, rank), generator=generator) * rank**-0.5).mul_(seen[:, None])
    w2, bias = torch.zeros((len(known), rank)), torch.log(counts / counts.sum())

    def judge() -> float:
        total = 0.0
        for part in torch.split(held, 1024):
            logits = bias + w1[before[part]] @ w2.T
            at = logits.gather(1, after[part][:, None]).squeeze(1)
            total += float((torch.logsumexp(logits, dim=1) - at).sum())
        return total / max(len(held), 1)

    unigram = judge()
    parameters = [w1.requires_grad_(), w2.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99), fused=True)
    batch = max(1, min(_DRAWN, _EPOCHS * len(drawn) // _STEPS))
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / _STEPS)
        chosen = drawn[torch.randint(len(drawn), (batch,), generator=generator)]
        # Pairs that begin alike share their row of logits.
        firsts, which = torch.unique(before[chosen], return_inverse=True)
        logits = bias + w1[firsts] @ w2.T
        weight = torch.bincount(which).float()
        loss = weight @ torch.logsumexp(logits, dim=1) - logits[which, after[chosen]].sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss / batch)
        optimizer.step()
    with torch.no_grad():
        bigram = judge()
        rarest = counts.argsort()[: max(1, len(known) // 4)]
        whole = w2[rarest].mean(0).repeat(size, 1)
        whole[known] = w2
        return Fit(w1.detach(), whole, unigram, bigram)


@torch.no_grad()
def start_head(head: Markov, found: Fit) -> None:
    """Give a Markov head of any kind the embeddings.

    A gated head's gate starts open halfway, which ``W2`` makes up for; an rnn head starts out
    reading ``W1[x]`` alone.
    """
    head.markov_w1.weight.copy_(found.w1)
    head.markov_w2.weight.copy_(found.w2)
    rank = found.w1.shape[1]
    if hasattr(head, "gate_proj"):
        head.gate_proj.weight.zero_()
        head.gate_proj.bias.zero_()
        head.markov_w2.weight.mul_(2.0)
    elif hasattr(head, "joint_proj"):
        head.joint_proj.bias[2 * rank :] = 0.0
        output = head.joint_proj.weight[2 * rank :]
        output.zero_()
        output[:, rank : 2 * rank].fill_diagonal_(1.0)
