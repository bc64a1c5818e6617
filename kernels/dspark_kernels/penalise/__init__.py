"""Penalties of plain decoding at every row of verified blocks, by one launch, and the counts of outputs, by another.

References are in :mod:`dspark_sglang.core.penalties`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from dspark_kernels.penalise.kernel import extend_kernel, penalise_kernel
from dspark_kernels.support.backend import launched, resolve
from dspark_kernels.support.checks import operand
from dspark_kernels.support.errors import OperandError

#: Columns of a program.
BLOCK, NUM_WARPS = 1024, 4


class Counts(NamedTuple):
    """Outputs of ``P`` requests."""

    #: ``[P, V]`` int32 occurrences of each token.
    times: torch.Tensor
    #: ``[P]`` int64 tokens.
    length: torch.Tensor


class Terms(NamedTuple):
    """Penalties of ``R`` requests."""

    #: ``[R]`` int64 row of :class:`Counts`, of the same stride as the next but two and the last.
    slot: torch.Tensor
    #: ``[R]`` bool: only these are looked at.
    active: torch.Tensor
    #: ``[3, R]`` float64 frequency, presence and repetition.
    weights: torch.Tensor
    #: ``[R]`` int64.
    min_new_tokens: torch.Tensor
    #: ``[R, S]`` int64 tokens that are excluded before so many.
    stops: torch.Tensor


def penalise(
    logits: torch.Tensor, cells: torch.Tensor, counts: Counts, terms: Terms, block: torch.Tensor
) -> None:
    """Change the logits of verified rows in place.

    Args:
        logits: ``[N, V]`` float32.
        cells: ``[N]`` int64 cell ``r * W + j`` of each row.
        block: ``[R, W]`` int64 anchors and drafted tokens.

    Raises:
        OperandError: an operand of the wrong shape, dtype, device or stride.
    """
    resolve("triton", logits)
    requests, width = block.shape
    rows, vocabulary = logits.shape
    device = logits.device
    _check(counts, terms, block, vocabulary, device)
    operand("logits", logits, shape=(rows, vocabulary), dtype=torch.float32)
    operand("cells", cells, shape=(rows,), dtype=torch.int64, device=device)
    penalise_kernel[(rows, triton.cdiv(vocabulary, BLOCK))](
        logits,
        cells,
        *counts,
        *terms,
        block,
        terms.stops.shape[1],
        terms.slot.stride(0),
        requests,
        vocabulary,
        WIDTH=width,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    launched("penalise")


def extend(counts: Counts, terms: Terms, block: torch.Tensor, kept: torch.Tensor) -> None:
    """Add the anchors and what was kept of the blocks to the outputs.

    Args:
        block: ``[R, W]`` int64 anchors and drafted tokens.
        kept: ``[R]`` int64 drafted tokens kept.

    Raises:
        OperandError: an operand of the wrong shape, dtype, device or stride.
    """
    resolve("triton", block)
    requests, width = block.shape
    vocabulary = counts.times.shape[1]
    _check(counts, terms, block, vocabulary, block.device)
    operand("kept", kept, shape=(requests,), dtype=torch.int64, device=block.device)
    extend_kernel[(requests,)](
        *counts,
        terms.slot,
        terms.active,
        block,
        kept,
        terms.slot.stride(0),
        vocabulary,
        WIDTH=width,
        PLACES=triton.next_power_of_2(width),
        num_warps=1,
    )
    launched("extend")


def _check(
    counts: Counts, terms: Terms, block: torch.Tensor, vocabulary: int, device: torch.device
) -> None:
    requests = len(block)
    operand("block", block, shape=(requests, None), dtype=torch.int64, device=device)
    shape = (None, vocabulary)
    operand("counts.times", counts.times, shape=shape, dtype=torch.int32, device=device)
    slots = (len(counts.times),)
    operand("counts.length", counts.length, shape=slots, dtype=torch.int64, device=device)
    operand("terms.active", terms.active, shape=(requests,), dtype=torch.bool, device=device)
    operand("terms.weights", terms.weights, shape=(3, requests), dtype=torch.float64, device=device)
    stride = terms.slot.stride(0)
    for name in ("slot", "min_new_tokens", "stops"):
        tensor = getattr(terms, name)
        sizes = (requests,) if tensor.dim() == 1 else (requests, None)
        operand(
            f"terms.{name}", tensor, shape=sizes, dtype=torch.int64, device=device, contiguous=False
        )
        if tensor.numel() and tensor.stride(0) != stride:
            raise OperandError(
                f"terms.{name} has stride {tensor.stride(0)}.",
                expected=f"{stride}, as terms.slot",
                fix="Cut all three from one tensor.",
            )
