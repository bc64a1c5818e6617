"""What the ops of this folder take and return, and the checks of it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dspark_kernels.support.checks import operand
from dspark_kernels.support.errors import OperandError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
MAX_RANK = 512
MAX_SHORTLIST = 256
#: Successors of a token, K.
SUCCESSORS = (16, 32, 64, 128)
#: Columns that share one draw of :func:`dspark_kernels.markov_step.draft_shortlist`'s base tail.
SPAN = 8192


class Head(NamedTuple):
    """A Markov head; the weights that are set decide its kind. All of one floating dtype."""

    #: ``[V, r]`` embedding of the previous token, r at most 512.
    w1: torch.Tensor
    #: ``[V, r]`` projection to vocabulary logits.
    w2: torch.Tensor
    #: None: vanilla; ``[r, d + r]`` over ``[h; e]``: gated; ``[3r, 2r + d]`` over ``[s; e; h]``: rnn.
    weight: torch.Tensor | None = None
    #: ``[r]`` or ``[3r]``, with ``weight``.
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.w1.shape[1]

    @property
    def kind(self) -> str:
        """``vanilla``, ``gated`` or ``rnn``."""
        if self.weight is None:
            return "vanilla"
        return "gated" if self.weight.shape[0] == self.rank else "rnn"


class Sampling(NamedTuple):
    """How each of ``B`` rows is drawn; all tensors ``[B]``, on the operands' device."""

    #: float32; 0 and below: greedy.
    temperatures: torch.Tensor
    #: int64 keys of the noise, taken as 64 bits. A request with a seed passes it; for the others the
    #: caller draws a fresh one each round.
    seeds: torch.Tensor
    #: int64 in 0..2^32-1, position of the first step's draw; step k adds k.
    positions: torch.Tensor
    #: uint8, nonzero where a sampled row's law is wanted; None: all of them. Coupled rows need none.
    recorded: torch.Tensor | None = None


class Step(NamedTuple):
    """One drafted token a row."""

    #: ``[B]`` int64.
    token: torch.Tensor
    #: ``[B]`` float32 the token's logit before the temperature, as stored where it is stored.
    logit: torch.Tensor
    #: ``[B]`` float32 log-sum-exp of ``logits / T`` of sampled rows, 0 of greedy ones.
    lse: torch.Tensor
    #: ``[B, r]`` float32 state for the next step of an rnn head, else None.
    state: torch.Tensor | None


class Draft(NamedTuple):
    """A drafted block."""

    #: ``[B, gamma]`` int64.
    tokens: torch.Tensor
    #: ``[B, gamma]`` int64 the token before each, the anchor first.
    previous: torch.Tensor
    #: ``[B, gamma]`` float32, as in :class:`Step`.
    logit: torch.Tensor
    #: ``[B, gamma]`` float32, as in :class:`Step`.
    lse: torch.Tensor
    #: The ``out`` that was passed: the law of a recorded row is ``exp(logits / T - lse)``.
    logits: torch.Tensor | None


class ShortlistDraft(NamedTuple):
    """A block drafted from ``n`` candidates a position: the M best base logits, then K successors.

    A successor that is among the M best counts there only: in its own place it has token -1, base
    logit -inf and probability 0, which a law over ``support`` takes as nothing.
    """

    #: ``[B, gamma]`` int64.
    tokens: torch.Tensor
    #: ``[B, gamma]`` int64 the token before each, the anchor first.
    previous: torch.Tensor
    #: ``[B, gamma, n]`` candidates: the M best in order of their columns, the K in the table's order.
    support: torch.Tensor
    #: ``[B, gamma, n]`` their base logits, in the base's dtype.
    base: torch.Tensor
    #: ``[B, gamma, n]`` float32 laws over ``support``, written for recorded rows only; None where
    #: ``sampling`` is None, and with ``out``.
    probs: torch.Tensor | None
    #: The ``out`` that was passed: the law of a recorded row is ``exp(logits / T - lse)``.
    logits: torch.Tensor | None = None
    #: ``[B, gamma]`` float32 log-sum-exp of ``logits / T`` of recorded rows, 0 of others; with ``out``.
    lse: torch.Tensor | None = None


def check_head(head: Head, device: torch.device) -> None:
    """Refuse a head whose tensors do not fit each other."""
    operand("head.w1", head.w1, shape=(None, None), dtype=FLOATS, device=device)
    size, rank = head.w1.shape
    operand("head.w2", head.w2, shape=(size, rank), dtype=head.w1.dtype, device=device)
    if not 1 <= rank <= MAX_RANK:
        raise OperandError(
            f"head.w1 has rank {rank}.",
            expected=f"a rank of 1..{MAX_RANK}",
            fix="Use backend='torch', or raise MAX_RANK and compile the kernels for it.",
        )
    if (head.weight is None) != (head.bias is None):
        raise OperandError(
            "Only one of head.weight and head.bias is set.",
            expected="both (gated, rnn) or none (vanilla)",
            fix="Pass a zero bias if the layer has none.",
        )
    if head.weight is None:
        return
    operand("head.weight", head.weight, shape=(None, None), dtype=head.w1.dtype, device=device)
    outputs, inputs = head.weight.shape
    least = {rank: rank, 3 * rank: 2 * rank}.get(outputs)
    if least is None or inputs <= least:
        raise OperandError(
            f"head.weight has shape {[outputs, inputs]} and the rank is {rank}.",
            expected=f"[{rank}, d + {rank}] (gated) or [{3 * rank}, {2 * rank} + d] (rnn)",
            fix="Pass the joint layer's weight as it is in the checkpoint.",
        )
    operand("head.bias", head.bias, shape=(outputs,), dtype=head.w1.dtype, device=device)


def hidden_width(head: Head) -> int:
    """d of a gated or rnn head, 0 of a vanilla one."""
    if head.weight is None:
        return 0
    return head.weight.shape[1] - head.rank * (1 if head.kind == "gated" else 2)


class JointWeight(NamedTuple):
    """Columns of the joint weight of a gated or rnn head; W1 stands in for those there are not."""

    #: ``[3r, ...]`` columns that meet the state.
    state: torch.Tensor
    #: ``[r or 3r, ...]`` columns that meet the embedding.
    embedded: torch.Tensor
    #: ``[r or 3r, ...]`` columns that meet the hidden state.
    hidden: torch.Tensor
    #: Elements from one row to the next.
    stride: int


def joint_weight(head: Head) -> JointWeight:
    """Views of a head's joint weight."""
    joint, rank = head.weight, head.rank
    if joint is None:
        return JointWeight(head.w1, head.w1, head.w1, 0)
    if head.kind == "gated":
        return JointWeight(head.w1, joint[:, hidden_width(head) :], joint, joint.stride(0))
    return JointWeight(joint, joint[:, rank:], joint[:, 2 * rank :], joint.stride(0))


def check(
    base: torch.Tensor,
    anchors: torch.Tensor,
    head: Head,
    hidden: torch.Tensor | None,
    sampling: Sampling | None,
    vocabulary: torch.Tensor | None,
) -> None:
    """Refuse operands of a block that the kernels would read wrongly; ``base`` [B, gamma, columns]."""
    operand("base", base, shape=(None, None, None), dtype=FLOATS, contiguous=False)
    device = base.device
    check_inner("base", base)
    check_head(head, device)
    rows, steps, columns = base.shape
    if vocabulary is not None:
        operand("vocabulary", vocabulary, shape=(columns,), dtype=torch.int64, device=device)
    elif columns != head.w2.shape[0]:
        raise OperandError(
            f"base has {columns} columns and head.w2 {head.w2.shape[0]} rows.",
            expected="one row of head.w2 for each column, or a vocabulary that names the columns",
            fix="Cut the padding columns off the base logits, or pass vocabulary.",
        )
    if not columns:
        raise OperandError(
            "base has no columns.", expected="at least one token", fix="Check the LM head."
        )
    operand("anchors", anchors, shape=(rows,), dtype=torch.int64, device=device)
    if head.weight is not None:
        shape = (rows, steps, hidden_width(head))
        operand("hidden", hidden, shape=shape, dtype=FLOATS, device=device)
    if sampling is None:
        return
    for name, dtype in (
        ("temperatures", torch.float32),
        ("seeds", torch.int64),
        ("positions", torch.int64),
        ("recorded", torch.uint8),
    ):
        tensor = getattr(sampling, name)
        if tensor is not None:
            operand(f"sampling.{name}", tensor, shape=(rows,), dtype=dtype, device=device)


def check_inner(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor whose last dimension is not contiguous; the others may have any stride."""
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise OperandError(
            f"{name} has strides {list(tensor.stride())}.",
            expected="a last stride of 1",
            fix=f"Call {name}.contiguous().",
        )


def check_out(out: torch.Tensor, base: torch.Tensor, sampling: Sampling | None) -> None:
    """Refuse an ``out`` that cannot take the step logits."""
    operand(
        "out", out, shape=tuple(base.shape), dtype=base.dtype, device=base.device, contiguous=False
    )
    check_inner("out", out)
    if sampling is None:
        raise OperandError(
            "out is given and sampling is not.",
            expected="out only where rows are sampled: greedy rows store nothing",
            fix="Leave out as None.",
        )


def check_successors(successors: torch.Tensor, base: torch.Tensor, head: Head) -> None:
    """Refuse a table of successors that does not fit the head or the columns of ``base``."""
    if head.kind != "vanilla":
        raise OperandError(
            f"successors are given and the head is {head.kind}.",
            expected="successors only with a vanilla head, whose bias depends on the token alone",
            fix="Leave successors as None.",
        )
    shape = (head.w1.shape[0], None)
    operand("successors", successors, shape=shape, dtype=torch.int32, device=base.device)
    check_table(successors.shape[1], base.shape[2])


def check_table(size: int, columns: int) -> None:
    """Refuse a number of successors that the kernels are not compiled for."""
    if size not in SUCCESSORS or size > columns:
        raise OperandError(
            f"There are {size} successors of a token and {columns} columns.",
            expected=f"{', '.join(map(str, SUCCESSORS))}, and no more than the columns",
            fix="Make the table with successor_table and one of these sizes.",
        )
