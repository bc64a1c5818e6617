"""Drafting a block: the sequential Markov stage over the parallel stage's base logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import linear

from dspark_sglang.core.heads import MarkovHead
from dspark_sglang.core.sampling import sample
from dspark_sglang.core.seeded import Noise, seeded_draw

#: Candidates a position in serving: the Markov stage reads this many rows of W2, not all.
SHORTLIST = 128
#: Tokens of largest bias after each token that our kernels draft from beside those, whatever their
#: base logits. With them, and the other tokens at their base logits, sampled requests lose 1% of
#: the accepted length instead of 7.5% (docs/explanation/kernels.md).
FOLLOWING = 128
#: A vocabulary up to here is drafted from whole: on a CPU, finding candidates takes longer.
WHOLE_VOCABULARY = 16384
#: Candidates on a CPU where some request samples. A small target's distribution at temperature 1 has a long
#: tail, and what it puts outside the list can never be drafted: 128 candidates cost 7.5% of the
#: accepted length of the drafter for SmolLM2 there, and 0.7% of greedy requests.
SAMPLED_SHORTLIST = 1024


def cpu_shortlist(columns: int, *, sampled: bool) -> int | None:
    """Candidates a position on a CPU; None: all tokens are drafted from.

    Args:
        columns: tokens that can be drafted.
        sampled: whether some request samples.
    """
    if columns <= WHOLE_VOCABULARY:
        return None
    return SAMPLED_SHORTLIST if sampled else SHORTLIST


class DraftBlock(NamedTuple):
    """A drafted block and the distribution each token was drawn from."""

    #: ``[B, gamma]`` int64.
    tokens: torch.Tensor
    #: ``[B, gamma]`` int64: the token before each drafted one, the anchor first.
    previous: torch.Tensor
    #: ``[S, gamma, V]`` float32 drafted distributions of the sampled rows in order; None if all greedy.
    #: With a shortlist or a draft vocabulary ``[S, gamma, M]``, over the tokens of ``support``.
    probs: torch.Tensor | None
    #: ``[S, gamma, M]`` int64 tokens the distributions are over, or ``[M]`` ascending where all distributions share
    #: them; None: the whole vocabulary.
    support: torch.Tensor | None = None
    #: ``[B, gamma]`` float32 where ``probs`` are logits of all rows instead: the log-sum-exp of them over the
    #: row's temperature.
    lse: torch.Tensor | None = None


def undrafted(
    requests: int, *, sampled: int | None, device: torch.device, depth: int = 1
) -> DraftBlock:
    """A block of ``depth`` tokens, all of them token 0 for certain, for steps without drafting.

    Args:
        sampled: requests that have a drafted distribution, 0 in a batch whose sampling ones have just left;
            None: no distributions are wanted.
    """
    tokens = torch.zeros((requests, depth), dtype=torch.int64, device=device)
    shape = (sampled or 0, depth, 1)
    return DraftBlock(
        tokens=tokens,
        previous=tokens,
        probs=None if sampled is None else torch.ones(shape, device=device),
        support=None if sampled is None else torch.zeros(shape, dtype=torch.int64, device=device),
    )


def draft_block(
    base_logits: torch.Tensor,
    anchors: torch.Tensor,
    hidden: torch.Tensor,
    head: MarkovHead,
    *,
    temperatures: torch.Tensor | None = None,
    sampled: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    noise: Noise | None = None,
    shortlist: int | None = None,
    vocabulary: torch.Tensor | None = None,
    vocabulary_rows: torch.Tensor | None = None,
) -> DraftBlock:
    """Draft ``gamma`` tokens a request, left to right.

    ``p_k(v) ∝ exp((U_k(v) + B_k(v)) / T)`` with ``B_k`` from the Markov head; greedy rows take
    the argmax. The drafted distribution is recorded for sampled rows only: acceptance needs nothing of it
    for greedy ones.

    With a ``shortlist`` of ``M``, only the ``M`` tokens of largest base logit can be drafted at a
    position; with a ``vocabulary``, only its tokens. The drafted distribution is ours to choose, so
    acceptance stays exact; the Markov stage then reads ``M`` rows of ``W2`` a step instead of
    ``V``, the LM head only the rows of the vocabulary.

    Args:
        base_logits: ``[B, gamma, V]`` logits of the parallel stage, of the ``vocabulary`` if given.
        anchors: ``[B]`` int64 last committed tokens.
        hidden: ``[B, gamma, d]`` draft hidden states.
        head: the Markov head.
        temperatures: ``[S]`` above 0, of the sampled rows; None when all rows are greedy.
        sampled: ``[S]`` int64 indices of the sampled rows.
        uniforms: ``[S, gamma]`` in [0, 1); not read with ``noise``.
        noise: keys of the sampled rows where they are seeded: each token is then the drafted distribution's
            draw with the target's own noise, and no distribution is recorded.
        shortlist: candidates a position; None for all of them.
        vocabulary: int64 token of each base logit, ascending; None: every token in order.
        vocabulary_rows: ``[M, r]`` rows of ``W2`` of the vocabulary, so that they need not be
            gathered at every step.

    Returns:
        The block. Tokens of sampled row ``i`` were drawn from ``probs[i]``.
    """
    gamma = base_logits.shape[1]
    state = head.start(anchors.shape[0])
    support = None
    base = base_logits.float()
    if shortlist is not None and shortlist < base.shape[-1]:
        base, support = base.topk(shortlist, dim=-1, sorted=False)
        support = support if vocabulary is None else vocabulary[support]
    elif vocabulary is not None and vocabulary_rows is None:
        vocabulary_rows = head.w2[vocabulary]
    previous = anchors
    tokens, before, dists = [], [], []
    for step in range(gamma):
        before.append(previous)
        latent, state = head.step(previous, hidden[:, step], state)
        if support is None:
            bias = linear(latent, head.w2 if vocabulary_rows is None else vocabulary_rows)
        else:
            bias = torch.bmm(head.w2[support[:, step]], latent[..., None]).squeeze(-1)
        logits = base[:, step] + bias
        # max() beats argmax() threefold on CPU and breaks ties the same way.
        chosen = logits.max(dim=-1).indices
        if sampled is not None and temperatures is not None:
            dist = torch.softmax(logits[sampled] / temperatures[:, None], dim=-1)
            if noise is not None:
                known = _known(support, vocabulary, sampled, step, dist)
                keys = noise._replace(positions=noise.positions + step)
                drawn = seeded_draw(dist, keys, known)
            else:
                assert uniforms is not None
                # A distribution that is NaN is the drafter's fault, and acceptance sees it: any token stands for it.
                drawn = sample(dist, uniforms[:, step]).clamp_(min=0)
                dists.append(dist)
            chosen = chosen.index_copy(0, sampled, drawn)
        if support is not None:
            chosen = support[:, step].gather(-1, chosen[:, None]).squeeze(-1)
        elif vocabulary is not None:
            chosen = vocabulary[chosen]
        tokens.append(chosen)
        previous = chosen
    shared = vocabulary if support is None else support[sampled]
    return DraftBlock(
        tokens=torch.stack(tokens, dim=1),
        previous=torch.stack(before, dim=1),
        probs=torch.stack(dists, dim=1) if dists else None,
        support=shared if dists else None,
    )


def _known(
    support: torch.Tensor | None,
    vocabulary: torch.Tensor | None,
    sampled: torch.Tensor,
    step: int,
    dist: torch.Tensor,
) -> torch.Tensor | None:
    """Tokens of a distribution's entries; None: every token in order."""
    if support is not None:
        return support[sampled, step]
    return None if vocabulary is None else vocabulary.expand(dist.shape)
