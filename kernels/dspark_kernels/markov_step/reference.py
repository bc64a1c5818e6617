"""The Markov stage in plain torch, one row and one step at a time, in any precision."""

from __future__ import annotations

import math

import torch

from dspark_kernels.markov_step.operands import (
    SPAN,
    Draft,
    Head,
    Sampling,
    ShortlistDraft,
    Step,
)

_WORD = 2**32


def murmur3(words: list[torch.Tensor]) -> torch.Tensor:
    """MurmurHash3, 32 bits, seed 0, of a key of 32-bit words.

    Args:
        words: int64 tensors of values in 0..2^32-1, broadcast against each other.

    Returns:
        int64 hashes in 0..2^32-1.
    """

    def rotate(x: torch.Tensor, bits: int) -> torch.Tensor:
        return (x << bits | x >> (32 - bits)) % _WORD

    h = torch.zeros(1, dtype=torch.int64, device=words[0].device)
    for word in words:
        k = word * 0xCC9E2D51 % _WORD
        k = rotate(k, 15) * 0x1B873593 % _WORD
        h = (rotate(h ^ k, 13) * 5 + 0xE6546B64) % _WORD
    h = h ^ 4 * len(words)
    h = (h ^ h >> 16) * 0x85EBCA6B % _WORD
    h = (h ^ h >> 13) * 0xC2B2AE35 % _WORD
    return h ^ h >> 16


def noise(seed: torch.Tensor, position: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """``-log(-log(u))`` float64, ``u = murmur3(seed, position, token) / (2^32 - 1)``.

    Args:
        seed, position: one int64.
        tokens: ``[n]`` int64.
    """
    words = [seed % _WORD, (seed >> 32) % _WORD, position % _WORD, tokens]
    u = murmur3(words).double() / (_WORD - 1)
    smallest = torch.finfo(torch.float64).min
    return -torch.log(-torch.log(u).clamp(min=smallest, max=-1 / _WORD))


def latent(
    head: Head, token: torch.Tensor, hidden: torch.Tensor | None, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The latent of one row and its next state, in the dtype of ``state`` [r]."""
    kind = state.dtype
    e = head.w1[token].to(kind)
    if head.weight is None or head.bias is None:
        return e, state
    assert hidden is not None
    h = hidden.to(kind)
    weight, bias = head.weight.to(kind), head.bias.to(kind)
    if head.kind == "gated":
        return torch.sigmoid(weight @ torch.cat([h, e]) + bias) * e, state
    g, c, o = torch.split(weight @ torch.cat([state, e, h]) + bias, head.rank)
    keep = torch.sigmoid(g)
    return torch.tanh(o), keep * state + (1 - keep) * torch.tanh(c)


def draw(
    z: torch.Tensor, names: torch.Tensor, sampling: Sampling | None, row: int, step: int
) -> torch.Tensor:
    """Index of the token that row ``row`` takes from logits ``z`` [n] of tokens ``names``."""
    if sampling is None or not bool(sampling.temperatures[row] > 0):
        return z.max(0).indices
    scaled = z / sampling.temperatures[row].to(z.dtype)
    gumbel = noise(sampling.seeds[row], sampling.positions[row] + step, names)
    return (scaled + gumbel.to(z.dtype)).max(0).indices


def is_recorded(sampling: Sampling | None, row: int) -> bool:
    """Whether a row is sampled and its law wanted."""
    if sampling is None or not bool(sampling.temperatures[row] > 0):
        return False
    return sampling.recorded is None or bool(sampling.recorded[row])


def names_of(base: torch.Tensor, vocabulary: torch.Tensor | None) -> torch.Tensor:
    """Token of each column of ``base``."""
    if vocabulary is not None:
        return vocabulary
    return torch.arange(base.shape[-1], device=base.device)


def draft(
    base: torch.Tensor,
    anchors: torch.Tensor,
    head: Head,
    hidden: torch.Tensor | None,
    sampling: Sampling | None,
    vocabulary: torch.Tensor | None,
    out: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
    state: torch.Tensor | None = None,
) -> tuple[Draft, torch.Tensor]:
    """Draft over the whole vocabulary; also returns the rows' final states ``[B, r]``."""
    rows, steps, _ = base.shape
    names = names_of(base, vocabulary)
    weights = head.w2[names].to(dtype)
    tokens = anchors.new_empty((rows, steps))
    previous = anchors.new_empty((rows, steps))
    logit = torch.empty((rows, steps), dtype=dtype, device=base.device)
    lse = torch.zeros((rows, steps), dtype=dtype, device=base.device)
    states = torch.zeros((rows, head.rank), dtype=dtype, device=base.device)
    if state is not None:
        states += state
    for row in range(rows):
        token = anchors[row]
        for step in range(steps):
            previous[row, step] = token
            h = None if hidden is None else hidden[row, step]
            vector, states[row] = latent(head, token, h, states[row])
            z = base[row, step].to(dtype) + weights @ vector
            if out is not None and is_recorded(sampling, row):
                z = z.to(out.dtype).to(dtype)
                out[row, step] = z
            chosen = draw(z, names, sampling, row, step)
            token = names[chosen]
            tokens[row, step] = token
            logit[row, step] = z[chosen]
            if sampling is not None and bool(sampling.temperatures[row] > 0):
                lse[row, step] = torch.logsumexp(z / sampling.temperatures[row].to(dtype), 0)
    return Draft(tokens, previous, logit, lse, out), states


def step(
    base: torch.Tensor,
    previous: torch.Tensor,
    head: Head,
    hidden: torch.Tensor | None,
    sampling: Sampling | None,
    vocabulary: torch.Tensor | None,
    out: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
    state: torch.Tensor | None = None,
) -> Step:
    """One step of :func:`draft`: ``base`` [B, V], ``hidden`` [B, d]."""
    block, states = draft(
        base[:, None],
        previous,
        head,
        None if hidden is None else hidden[:, None],
        sampling,
        vocabulary,
        None if out is None else out[:, None],
        dtype,
        state,
    )
    after = states if head.kind == "rnn" else None
    return Step(block.tokens[:, 0], block.logit[:, 0], block.lse[:, 0], after)


def best(values: torch.Tensor, size: int) -> torch.Tensor:
    """Columns of the ``size`` largest of ``values`` [n], ascending; ties by lower column."""
    # A stable descending sort keeps equal values in column order; NaN is largest.
    return values.sort(descending=True, stable=True).indices[:size].sort().values


def candidates(logits: torch.Tensor, size: int, following: torch.Tensor | None) -> torch.Tensor:
    """Columns to draft from: the ``size`` best, then those ``following``, -1 where one is both."""
    found = best(logits, size)
    if following is None:
        return found
    again = (following[:, None] == found).any(1)
    return torch.cat([found, torch.where(again, -1, following.long())])


def draw_with_tail(
    scaled: torch.Tensor,
    listed: torch.Tensor,
    names: torch.Tensor,
    words: int,
    sampling: Sampling,
    row: int,
    step: int,
    span: int,
) -> torch.Tensor:
    """Column drawn from ``softmax(scaled)``, ``scaled`` [V], in two stages.

    First one of the ``listed`` columns or one span of the others, a span with the log of its mass
    and the noise of word ``words + its number``; then, if it is a span, one of its columns.

    Args:
        listed: ``[n]`` columns, ascending.
        names: ``[V]`` token of each column.
        words: tokens there are, so that no span has the noise of a token.
        span: columns of a span.
    """
    kind, columns = scaled.dtype, len(scaled)
    tail = torch.ones(columns, dtype=torch.bool, device=scaled.device)
    tail[listed] = False

    def scores(values: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        gumbel = noise(sampling.seeds[row], sampling.positions[row] + step, keys)
        return values + gumbel.to(kind)

    whole = torch.split(torch.where(tail, scaled, -math.inf), span)
    masses = torch.stack([torch.logsumexp(part, 0) for part in whole])
    spans = scores(masses, words + torch.arange(len(whole), device=scaled.device))
    first = scores(scaled[listed], names[listed]).max(0)
    if not bool(spans.max() > first.values):
        return listed[first.indices]
    start = int(spans.max(0).indices) * span
    inside = torch.arange(start, min(start + span, columns), device=scaled.device)
    inside = inside[tail[inside]]
    return inside[scores(scaled[inside], names[inside]).max(0).indices]


def draft_shortlist(
    base: torch.Tensor,
    anchors: torch.Tensor,
    head: Head,
    hidden: torch.Tensor | None,
    sampling: Sampling | None,
    vocabulary: torch.Tensor | None,
    size: int,
    support_dtype: torch.dtype = torch.int32,
    successors: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    span: int = SPAN,
    dtype: torch.dtype = torch.float32,
) -> ShortlistDraft:
    """Draft from the ``size`` best base logits and the successors of each position."""
    rows, steps, _ = base.shape
    names = names_of(base, vocabulary)
    shape = (rows, steps, size + (0 if successors is None else successors.shape[1]))
    support = torch.empty(shape, dtype=torch.int64, device=base.device)
    kept = torch.empty(shape, dtype=base.dtype, device=base.device)
    probs = torch.full(shape, math.nan, dtype=dtype, device=base.device)
    lse = torch.zeros((rows, steps), dtype=dtype, device=base.device)
    tokens = anchors.new_empty((rows, steps))
    previous = anchors.new_empty((rows, steps))
    for row in range(rows):
        token = anchors[row]
        state = torch.zeros(head.rank, dtype=dtype, device=base.device)
        recorded = is_recorded(sampling, row)
        for step in range(steps):
            previous[row, step] = token
            logits = base[row, step]
            columns = candidates(logits, size, None if successors is None else successors[token])
            held = columns >= 0
            support[row, step] = torch.where(held, names[columns], -1)
            kept[row, step] = torch.where(held, logits[columns], -math.inf)
            # Candidates once each, by column: the first of equals wins.
            lanes = held.nonzero().view(-1)
            lanes = lanes[columns[lanes].argsort()]
            listed = columns[lanes]
            h = None if hidden is None else hidden[row, step]
            vector, state = latent(head, token, h, state)
            z = logits[listed].to(dtype) + head.w2[names[listed]].to(dtype) @ vector
            if out is not None and sampling is not None and recorded:
                z = z.to(out.dtype).to(dtype)
                law = logits.to(dtype, copy=True)
                law[listed] = z
                out[row, step, listed] = z.to(out.dtype)
                scaled = law / sampling.temperatures[row].to(dtype)
                lse[row, step] = torch.logsumexp(scaled, 0)
                words = head.w2.shape[0]
                chosen = draw_with_tail(scaled, listed, names, words, sampling, row, step, span)
            else:
                chosen = listed[draw(z, names[listed], sampling, row, step)]
            token = names[chosen]
            tokens[row, step] = token
            if sampling is not None and recorded:
                probs[row, step] = 0
                law = torch.softmax(z / sampling.temperatures[row].to(dtype), 0)
                probs[row, step, lanes] = law
    return ShortlistDraft(
        tokens,
        previous,
        support.to(support_dtype),
        kept,
        None if sampling is None or out is not None else probs,
        out,
        None if out is None else lse,
    )
