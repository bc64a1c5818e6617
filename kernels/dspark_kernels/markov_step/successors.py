"""Which tokens a vanilla head follows each token with: a table made once, when weights are loaded."""

from __future__ import annotations

import torch

from dspark_kernels.markov_step.operands import Head, check_head, check_table
from dspark_kernels.support.checks import operand
from dspark_kernels.support.errors import OperandError

#: Biases that are held at once, float32: 256 MiB.
_HELD = 2**26


def successor_table(head: Head, size: int, vocabulary: torch.Tensor | None = None) -> torch.Tensor:
    """The columns of largest Markov bias after each token, for ``draft_shortlist``.

    Row x holds the ``size`` columns v of largest ``W2[token of v] . W1[x]``, the largest first and
    distinct; among equals any of them. They are the tokens that the bias can bring up from below the
    best base logits.

    Cost, once: ``2 V_head V r`` floating-point operations in float32 (8.6e12 for V = 129280, r = 256:
    below a second on an H100, minutes on a CPU) and a top-k of as many rows; beside the weights it
    holds ``V r`` floats and two blocks of at most 256 MiB (one row where a row is longer). The table
    takes ``4 V_head size`` bytes.

    Args:
        head: a vanilla head, on the CPU or a CUDA device.
        size: K: 16, 32, 64 or 128.
        vocabulary: ``[V]`` int64 token of each column of the base logits; None: every token in order.

    Returns:
        ``[V_head, K]`` int32 columns, on the head's device.

    Raises:
        OperandError: a head that is not vanilla (its bias depends on more than the token), tensors
            that do not fit each other, or a size that cannot be.
    """
    device = head.w1.device
    check_head(head, device)
    if head.kind != "vanilla":
        raise OperandError(
            f"The head is {head.kind}.",
            expected="a vanilla head, whose bias depends on the token alone",
            fix="Draft without successors.",
        )
    if vocabulary is not None:
        operand("vocabulary", vocabulary, shape=(None,), dtype=torch.int64, device=device)
    weights = (head.w2 if vocabulary is None else head.w2[vocabulary]).float()
    check_table(size, len(weights))
    words = head.w1.shape[0]
    table = torch.empty((words, size), dtype=torch.int32, device=device)
    for rows in torch.split(torch.arange(words, device=device), max(1, _HELD // len(weights))):
        biases = head.w1[rows].float() @ weights.T
        table[rows] = biases.topk(size, dim=1).indices.int()
    return table
