"""The sequential Markov stage: drafting a block left to right over the base logits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dspark_kernels.markov_step import launch, reference
from dspark_kernels.markov_step.operands import (
    FLOATS,
    MAX_SHORTLIST,
    Draft,
    Head,
    Sampling,
    ShortlistDraft,
    Step,
    check,
    check_out,
    check_successors,
)
from dspark_kernels.markov_step.successors import successor_table
from dspark_kernels.support.backend import Backend, resolve
from dspark_kernels.support.checks import operand
from dspark_kernels.support.errors import OperandError

__all__ = [
    "Candidates",
    "Draft",
    "Head",
    "Sampling",
    "ShortlistDraft",
    "Step",
    "draft_among",
    "draft_block",
    "draft_shortlist",
    "find_candidates",
    "markov_step",
    "successor_table",
]


def draft_block(
    base: torch.Tensor,
    anchors: torch.Tensor,
    head: Head,
    *,
    hidden: torch.Tensor | None = None,
    sampling: Sampling | None = None,
    vocabulary: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> Draft:
    """Draft ``gamma`` tokens a row over the whole vocabulary, each step given the token before.

    ``z_k(v) = base[b, k, v] + W2[v] . l_k`` with the latent ``l_k`` of ``e = W1[x_{k-1}]``:

    - vanilla: ``l = e``
    - gated: ``l = sigmoid(W [h_k; e] + bias) * e``
    - rnn: ``(g, c, o) = W [s; e; h_k] + bias``, ``s' = sigmoid(g) s + (1 - sigmoid(g)) tanh(c)``,
      ``l = tanh(o)``, starting from ``s = 0``

    A greedy row takes the first argmax of ``z_k``; a sampled row draws from ``softmax(z_k / T)`` as
    the first argmax of ``z_k / T + g``, ``g`` the Gumbel noise of (seed, position + k, token):
    MurmurHash3 of the four words, the same as SGLang's seeded sampling and the acceptance's
    coupled draws. A row's result does not depend on the rows beside it. NaN logits count as +inf.

    Launches: ``gamma + 1``; for gated and rnn heads ``2 gamma + 2`` (a step's latents need every
    column of a weight that would otherwise be read by each of the step's programs). W2 is read once
    a step for up to 64 rows.

    Args:
        base: ``[B, gamma, V]`` bfloat16, float16 or float32 logits of the parallel stage; last
            dimension contiguous, the others of any stride.
        anchors: ``[B]`` int64 last committed tokens, inside the vocabulary (not checked).
        head: the Markov head.
        hidden: ``[B, gamma, d]`` floating draft hidden states; not read by vanilla heads.
        sampling: temperatures and keys; None: all rows are greedy.
        vocabulary: ``[V]`` int64 token of each column, inside the head's vocabulary (not checked);
            None: every token in order.
        out: ``[B, gamma, V]`` of base's dtype, may be ``base`` itself: the step logits of recorded
            rows, rounded to its dtype *before* they are drawn from, so what is stored is the law
            exactly. Other rows are left as they are. None: nothing is stored or rounded.
        backend: what runs; see :func:`dspark_kernels.support.backend.resolve`.

    Raises:
        OperandError: an operand of the wrong shape, dtype, device or strides, or a backend that
            cannot run.
    """
    check(base, anchors, head, hidden, sampling, vocabulary)
    if out is not None:
        check_out(out, base, sampling)
    if resolve(backend, base) == "torch":
        return reference.draft(base, anchors, head, hidden, sampling, vocabulary, out)[0]
    if not base.shape[0] or not base.shape[1]:
        return _nothing(base, anchors, out)
    block = launch.Block(base, anchors, head, sampling, vocabulary, out)
    return block.run(hidden)[0]


def _nothing(base: torch.Tensor, anchors: torch.Tensor, out: torch.Tensor | None) -> Draft:
    tokens = anchors.new_empty(base.shape[:2])
    logit = tokens.to(torch.float32)
    return Draft(tokens, tokens.clone(), logit, logit.clone(), out)


def markov_step(
    base: torch.Tensor,
    previous: torch.Tensor,
    head: Head,
    *,
    hidden: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    sampling: Sampling | None = None,
    vocabulary: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> Step:
    """One step of :func:`draft_block`: the token after ``previous`` of each row.

    Launches: 2; 4 for gated and rnn heads.

    Args:
        base: ``[B, V]`` base logits of this step, else as in :func:`draft_block`.
        previous: ``[B]`` int64 token before each.
        head: the Markov head.
        hidden: ``[B, d]`` draft hidden states of this step; not read by vanilla heads.
        state: ``[B, r]`` float32 state of an rnn head; None: zeros.
        sampling: temperatures and keys; positions are this step's.
        vocabulary: ``[V]`` int64 token of each column, or None.
        out: ``[B, V]`` step logits of recorded rows, as in :func:`draft_block`.
        backend: what runs.

    Raises:
        OperandError: as :func:`draft_block`.
    """
    if not isinstance(base, torch.Tensor) or base.dim() != 2:
        operand("base", base, shape=(None, None), dtype=torch.float32, contiguous=False)
    whole = base[:, None]
    every = None if hidden is None else hidden[:, None]
    stored = None if out is None else out[:, None]
    check(whole, previous, head, every, sampling, vocabulary)
    if stored is not None:
        check_out(stored, whole, sampling)
    rows = base.shape[0]
    if state is not None:
        shape = (rows, head.rank)
        operand("state", state, shape=shape, dtype=torch.float32, device=base.device)
        if head.kind != "rnn":
            raise OperandError(
                f"state is given and the head is {head.kind}.",
                expected="a state only with an rnn head",
                fix="Leave state as None.",
            )
    if resolve(backend, base) == "torch":
        return reference.step(base, previous, head, hidden, sampling, vocabulary, out, state=state)
    if not rows:
        empty = _nothing(whole, previous, stored)
        after = base.new_empty((0, head.rank), dtype=torch.float32) if head.kind == "rnn" else None
        return Step(empty.tokens[:, 0], empty.logit[:, 0], empty.lse[:, 0], after)
    block, after = launch.Block(whole, previous, head, sampling, vocabulary, stored).run(
        every, state
    )
    return Step(block.tokens[:, 0], block.logit[:, 0], block.lse[:, 0], after)


def draft_shortlist(
    base: torch.Tensor,
    anchors: torch.Tensor,
    head: Head,
    *,
    size: int = 128,
    hidden: torch.Tensor | None = None,
    sampling: Sampling | None = None,
    vocabulary: torch.Tensor | None = None,
    successors: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    support_dtype: torch.dtype = torch.int32,
    backend: Backend = "auto",
) -> ShortlistDraft:
    """Draft as :func:`draft_block` does, with the Markov bias of few candidates a position only.

    The candidates ``C`` are the columns of the ``size`` best base logits, those of ``torch.topk`` (the
    lower column among equals), and the successors of the token before, each once. Then

    - a greedy row takes the first argmax of ``z`` over ``C``, in column order;
    - a sampled row draws from ``softmax(z / T)`` over ``C``;
    - a recorded sampled row with ``out`` draws from ``softmax(y / T)`` over every column, the base
      tail included: ``y = z`` on ``C``, rounded to out's dtype before it is drawn from, and
      ``y = base`` elsewhere.

    What is returned of a recorded row is the law it was drawn from, so acceptance stays exact. With
    ``out`` the draw is made in two stages, of the same law: a candidate or a span of 8192 columns,
    by its mass, then a column of that span. Masses are float32 sums, so chances are exact to about
    1e-6. Reads M + K rows of W2 a row and step, and a span of base logits again where one is drawn.

    Rows with NaN or +inf, or with nothing but -inf, draw a token inside the vocabulary, and their
    lse is not finite.

    Launches: 3 (select, merge, chain); 4 for gated and rnn heads.

    Args:
        base: ``[B, gamma, V]``, as in :func:`draft_block`; V at least ``size``.
        anchors: ``[B]`` int64 last committed tokens.
        head: the Markov head.
        size: M, 1..256.
        hidden: ``[B, gamma, d]`` draft hidden states; not read by vanilla heads.
        sampling: temperatures and keys; None: all rows are greedy.
        vocabulary: ``[V]`` int64 token of each column, or None.
        successors: ``[V_head, K]`` int32 from :func:`successor_table`: row x holds *columns* of base,
            distinct and inside it (not checked). Vanilla heads only. None: K is 0.
        out: ``[B, gamma, V]`` of base's dtype: ``base`` itself or a tensor that holds a copy of it,
            since of recorded rows only the candidates are written, the tail is left as it is. Other
            rows are not written at all. None: recorded rows draw from candidates, and their laws
            are returned as ``probs`` over ``support``.
        support_dtype: int32 or int64, of the candidates returned.
        backend: what runs.

    Raises:
        OperandError: as :func:`draft_block`, a size out of range, or successors that do not fit.
    """
    check(base, anchors, head, hidden, sampling, vocabulary)
    if not 1 <= size <= min(MAX_SHORTLIST, base.shape[2]):
        raise OperandError(
            f"size is {size} and base has {base.shape[2]} columns.",
            expected=f"1..{MAX_SHORTLIST}, and no more than the columns",
            fix="Pass a smaller size, or use draft_block.",
        )
    if support_dtype not in (torch.int32, torch.int64):
        raise OperandError(
            f"support_dtype is {support_dtype}.",
            expected="torch.int32 or torch.int64",
            fix="Pass one of these.",
        )
    if successors is not None:
        check_successors(successors, base, head)
    if out is not None:
        check_out(out, base, sampling)
    operands = (
        base, anchors, head, hidden, sampling, vocabulary, size, support_dtype, successors, out,
    )  # fmt: skip
    if resolve(backend, base) == "torch":
        return reference.draft_shortlist(*operands)
    if not base.shape[0] or not base.shape[1]:
        return _no_shortlist(base, anchors, sampling, size, support_dtype, successors, out)
    return launch.draft_shortlist(*operands)


class Candidates(NamedTuple):
    """The best of each position, of one rank's columns or of all."""

    #: ``[B, gamma, M]`` base logits.
    logits: torch.Tensor
    #: ``[B, gamma, M]`` tokens: int32 of one rank, int64 of all.
    tokens: torch.Tensor


def find_candidates(base: torch.Tensor, tokens: torch.Tensor, out: Candidates) -> None:
    """The best base logits of each position, those of ``torch.topk``: what a rank has to offer.

    Launches: 2.

    Args:
        base: ``[B, gamma, V]`` logits of this rank's columns, as in :func:`draft_block`.
        tokens: ``[V]`` int64 token of each column.
        out: as many as are wanted, no more than the columns and 256; of base's dtype.

    Raises:
        OperandError: an operand of the wrong shape, dtype, device or strides.
    """
    resolve("triton", base)
    operand("base", base, shape=(None, None, None), dtype=FLOATS, contiguous=False)
    rows, steps, columns = base.shape
    operand("tokens", tokens, shape=(columns,), dtype=torch.int64, device=base.device)
    shape = (rows, steps, None)
    operand("out.logits", out.logits, shape=shape, dtype=base.dtype, device=base.device)
    operand("out.tokens", out.tokens, shape=out.logits.shape, dtype=torch.int32, device=base.device)
    size = out.logits.shape[2]
    if not 1 <= size <= min(MAX_SHORTLIST, columns):
        raise OperandError(
            f"{size} candidates are wanted of {columns} columns.",
            expected=f"1..{MAX_SHORTLIST}, and no more than the columns",
            fix="Pass a smaller out.",
        )
    if rows and steps:
        launch.candidates(base, tokens, size, *out)


def draft_among(
    candidates: Candidates,
    anchors: torch.Tensor,
    head: Head,
    *,
    hidden: torch.Tensor | None = None,
    sampling: Sampling | None = None,
) -> ShortlistDraft:
    """Draft as :func:`draft_shortlist` does without successors, over candidates that are known.

    Launches: 1; 2 for gated and rnn heads.

    Args:
        candidates: the same on every rank, up to 256 a position.

    Raises:
        OperandError: as :func:`draft_shortlist`.
    """
    best, tokens = candidates
    resolve("triton", best)
    check(best, anchors, head, hidden, sampling, tokens.view(-1)[: best.shape[2]])
    operand("candidates.tokens", tokens, shape=best.shape, dtype=torch.int64, device=best.device)
    if not best.shape[0] or not best.shape[1]:
        return _no_shortlist(best, anchors, sampling, best.shape[2], torch.int64, None, None)
    return launch.draft_among(best, tokens, anchors, head, hidden, sampling)


def _no_shortlist(
    base: torch.Tensor,
    anchors: torch.Tensor,
    sampling: Sampling | None,
    size: int,
    support_dtype: torch.dtype,
    successors: torch.Tensor | None,
    out: torch.Tensor | None,
) -> ShortlistDraft:
    shape = (*base.shape[:2], size + (0 if successors is None else successors.shape[1]))
    tokens = anchors.new_empty(base.shape[:2])
    law = base.new_empty(shape, dtype=torch.float32)
    return ShortlistDraft(
        tokens,
        tokens.clone(),
        anchors.new_empty(shape, dtype=support_dtype),
        base.new_empty(shape),
        None if sampling is None or out is not None else law,
        out,
        None if out is None else base.new_empty(base.shape[:2], dtype=torch.float32),
    )
