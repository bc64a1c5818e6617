"""Confidence of each drafted token, and the survival of each prefix."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from dspark_kernels.confidence.kernel import confidence_kernel
from dspark_kernels.confidence.reference import reference
from dspark_kernels.support.backend import Backend, launched, resolve
from dspark_kernels.support.checks import in_units, operand
from dspark_kernels.support.errors import OperandError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

#: Elements of each row that a program reads at a time.
BLOCK = 512
NUM_WARPS = 4


class Confidence(NamedTuple):
    """What the op computes; every tensor ``[B, gamma]`` on the operands' device."""

    #: float32, before the temperature.
    logits: torch.Tensor
    #: float32 in [0, 1], or NaN.
    confidence: torch.Tensor
    #: float64 in [0, 1], never NaN, non-increasing along each row bit for bit.
    survival: torch.Tensor


def confidence(
    hidden: torch.Tensor,
    previous: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    temperatures: torch.Tensor,
    *,
    w1: torch.Tensor | None = None,
    backend: Backend = "auto",
    out: Confidence | None = None,
) -> Confidence:
    """``c_j = sigmoid((w . [h_j; W1[x_{j-1}]] + b) / t_j)`` and ``a_j = c_1 ... c_j``.

    The product is taken left to right in float64 over the float32 confidences. Where a logit is
    NaN, or ``w1`` is given and the token is outside its vocabulary, the logit and the confidence
    are NaN and survival is 0 from there on: nothing raises on the device, the host can see it.

    Args:
        hidden: ``[B, gamma, d]`` bfloat16, float16 or float32 draft hidden states; the last
            dimension contiguous, the others of any stride.
        previous: ``[B, gamma]`` int64 token before each position, the anchor first. Not read
            without ``w1``.
        weight: ``[d]``, or ``[d + r]`` with ``w1``; float32.
        bias: ``[]`` float32.
        temperatures: ``[gamma]`` float32 above 0, from sequential temperature scaling.
        w1: ``[V, r]`` bfloat16, float16 or float32 Markov embeddings; None: no Markov part.
        backend: what runs; see :func:`dspark_kernels.support.backend.resolve`.
        out: tensors to write, of the result's shapes and dtypes; None: new ones.

    All tensors are on one device. One launch, of ``B`` programs; no host sync.

    Raises:
        OperandError: an operand of the wrong shape, dtype, device or stride.
    """
    chosen = resolve(backend, hidden)
    _check(hidden, previous, weight, bias, temperatures, w1)
    batch, gamma, width = hidden.shape
    if out is None:
        out = Confidence(
            logits=hidden.new_empty((batch, gamma), dtype=torch.float32),
            confidence=hidden.new_empty((batch, gamma), dtype=torch.float32),
            survival=hidden.new_empty((batch, gamma), dtype=torch.float64),
        )
    for name, tensor in out._asdict().items():
        dtype = torch.float64 if name == "survival" else torch.float32
        operand(f"out.{name}", tensor, shape=(batch, gamma), dtype=dtype, device=hidden.device)
    if chosen == "torch":
        found = reference(hidden, previous, weight, bias, temperatures, w1)
        for target, source in zip(out, found, strict=True):
            target.copy_(source)
        return out
    if batch:
        unit, strides = in_units(hidden.stride()[:2])
        confidence_kernel[(batch,)](
            hidden,
            previous,
            # Without a Markov part nothing is read through it.
            weight if w1 is None else w1,
            weight,
            bias,
            temperatures,
            *out,
            *strides,
            0 if w1 is None else w1.shape[0],
            gamma,
            UNIT=unit,
            # Every block of up to 8 positions runs the same kernel.
            POSITIONS=max(8, triton.next_power_of_2(gamma)),
            WIDTH=width,
            RANK=0 if w1 is None else w1.shape[1],
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
        launched("confidence")
    return out


def _check(
    hidden: torch.Tensor,
    previous: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    temperatures: torch.Tensor,
    w1: torch.Tensor | None,
) -> None:
    operand("hidden", hidden, shape=(None, None, None), dtype=FLOATS, contiguous=False)
    batch, gamma, width = hidden.shape
    if not 1 <= gamma <= 16:
        raise OperandError(
            f"hidden has {gamma} positions a request.",
            expected="1 to 16",
            fix="Pass a block of the drafter's gamma positions.",
        )
    if hidden.numel() and hidden.stride(2) != 1:
        raise OperandError(
            f"hidden has stride {hidden.stride(2)} in its last dimension.",
            expected="1",
            fix="Call hidden.contiguous(), or keep the hidden size last.",
        )
    device = hidden.device
    rank = 0
    if w1 is not None:
        operand("w1", w1, shape=(None, None), dtype=FLOATS, device=device)
        rank = w1.shape[1]
    operand("previous", previous, shape=(batch, gamma), dtype=torch.int64, device=device)
    operand("weight", weight, shape=(width + rank,), dtype=torch.float32, device=device)
    operand("bias", bias, shape=(), dtype=torch.float32, device=device)
    operand("temperatures", temperatures, shape=(gamma,), dtype=torch.float32, device=device)
