"""Budgeted best-first admission of drafted tokens, and the layout of what is verified."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from dspark_kernels.admit.kernel import admit_kernel
from dspark_kernels.admit.reference import reference
from dspark_kernels.support.backend import Backend, launched, resolve
from dspark_kernels.support.checks import operand
from dspark_kernels.support.errors import OperandError

#: One program holds every candidate in registers.
MAX_REQUESTS = 1024
MAX_GAMMA = 8


class Admission(NamedTuple):
    """What is verified, on the operands' device."""

    #: ``[R]`` int32 admitted tokens of each request, 0..gamma.
    lens: torch.Tensor
    #: ``[R]`` int32 rows of each request: its anchor's beside them.
    sent: torch.Tensor
    #: ``[R + 1]`` int32: request ``r`` owns packed rows ``offsets[r]`` to ``offsets[r + 1] - 1``.
    offsets: torch.Tensor
    #: ``[R * (gamma + 1)]`` int64: the cell ``r * (gamma + 1) + j`` of each packed row, then -1.
    rows: torch.Tensor


def num_warps(requests: int) -> int:
    """Warps that keep the candidates of so many requests in registers without spills."""
    return 4 if requests <= 256 else 8 if requests <= 512 else 16


def admit(
    survival: torch.Tensor,
    budget: torch.Tensor,
    *,
    backend: Backend = "auto",
    out: Admission | None = None,
) -> Admission:
    """Admit the ``budget`` candidates of largest survival; lay out the rows to verify.

    The order is descending ``a_{r,j}``, then smaller ``j``, then smaller ``r``: the first ``K`` of it
    are admitted, all if there are fewer, none if ``K <= 0``. Request ``r`` then sends ``1 + lens[r]``
    rows, its anchor first, packed request by request.

    Args:
        survival: ``[R, gamma]`` float64, contiguous, non-increasing along each row, R at most 1024,
            gamma 1 to 8. NaN and negative values count as 0.
        budget: ``[1]`` int32 tokens to admit over all requests, on the device: nothing syncs.
        backend: what runs; see :func:`dspark_kernels.support.backend.resolve`.
        out: tensors to write, of the result's shapes and dtypes; None: new ones.

    All tensors are on one device. One launch of one program for every R, 0 included.

    Raises:
        OperandError: an operand of the wrong shape, dtype, device or stride.
    """
    chosen = resolve(backend, survival)
    operand("survival", survival, shape=(None, None), dtype=torch.float64)
    requests, gamma = survival.shape
    if requests > MAX_REQUESTS or not 1 <= gamma <= MAX_GAMMA:
        raise OperandError(
            f"survival has {requests} requests of {gamma} positions.",
            expected=f"at most {MAX_REQUESTS} requests of 1 to {MAX_GAMMA} positions",
            fix="Plan fewer requests at a time.",
        )
    device = survival.device
    operand("budget", budget, shape=(1,), dtype=torch.int32, device=device)
    cells = requests * (gamma + 1)
    if out is None:
        out = Admission(
            lens=torch.empty(requests, dtype=torch.int32, device=device),
            sent=torch.empty(requests, dtype=torch.int32, device=device),
            offsets=torch.empty(requests + 1, dtype=torch.int32, device=device),
            rows=torch.empty(cells, dtype=torch.int64, device=device),
        )
    operand("out.lens", out.lens, shape=(requests,), dtype=torch.int32, device=device)
    operand("out.sent", out.sent, shape=(requests,), dtype=torch.int32, device=device)
    operand("out.offsets", out.offsets, shape=(requests + 1,), dtype=torch.int32, device=device)
    operand("out.rows", out.rows, shape=(cells,), dtype=torch.int64, device=device)
    if chosen == "torch":
        for target, source in zip(out, reference(survival, int(budget)), strict=True):
            target.copy_(source)
        return out
    padded = triton.next_power_of_2(max(requests, 1))
    admit_kernel[(1,)](
        survival,
        budget,
        *out,
        requests,
        GAMMA=gamma,
        POSITIONS=triton.next_power_of_2(gamma),
        WINDOW=triton.next_power_of_2(gamma + 1),
        REQUESTS=padded,
        num_warps=num_warps(padded),
    )
    launched("admit")
    return out
