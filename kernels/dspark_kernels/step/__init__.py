"""What a step does with single numbers between its forwards: survival, the rows to verify, the outcome.

PyTorch's way takes dozens of launches for a few bytes each; every operation here takes one. References are in
:mod:`dspark_sglang.core.step`.
"""

from __future__ import annotations

import torch
import triton

from dspark_kernels.step.kernel import (
    finish_kernel,
    kept_kernel,
    survival_kernel,
    window_kernel,
)
from dspark_kernels.support.backend import launched, resolve
from dspark_kernels.support.checks import operand

#: Rows of a program, and stop tokens that it looks at together.
BLOCK, STOPS = 128, 8


def _pitch(count: int) -> int:
    """Elements between vectors of ``count`` that share an allocation: each begins at a multiple of 16 bytes."""
    return -(-count // 4) * 4


def _check(operands: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device) -> None:
    for name, tensor in operands.items():
        operand(name, tensor, shape=(None,) * tensor.dim(), dtype=dtype, device=device)


def survival(
    confidence: torch.Tensor,
    known: torch.Tensor,
    shift: torch.Tensor,
    whole: torch.Tensor,
    *,
    least: float,
) -> torch.Tensor:
    """Survivals ``[R, gamma]`` float64 by which drafted tokens are admitted; 0 where none may be.

    Args:
        confidence: ``[R, gamma]`` float32; NaN counts as 0.
        known: ``[3, R]`` int64: tokens that may be verified, the request's kind (0 greedy, 1 sampled), and whether its
            block ranks before all.
        shift: ``[2, gamma, bins]`` float32 correction by kind, position and ``confidence * bins``.
        whole: ``[gamma]`` float64 survivals of a block that ranks before all.
        least: the smallest survival of a token that may be verified.

    Raises:
        OperandError: an operand of the wrong shape, dtype, device or stride.
    """
    resolve("triton", confidence)
    requests, gamma = confidence.shape
    device = confidence.device
    operand("confidence", confidence, shape=(requests, gamma), dtype=torch.float32)
    operand("known", known, shape=(3, requests), dtype=torch.int64, device=device)
    operand("shift", shift, shape=(2, gamma, None), dtype=torch.float32, device=device)
    operand("whole", whole, shape=(gamma,), dtype=torch.float64, device=device)
    out = torch.empty((requests, gamma), dtype=torch.float64, device=device)
    survival_kernel[(requests,)](
        confidence,
        known,
        shift,
        whole,
        out,
        requests,
        GAMMA=gamma,
        POSITIONS=triton.next_power_of_2(gamma),
        BINS=shift.shape[2],
        LEAST=least,
        num_warps=1,
    )
    launched("survival")
    return out


def window(
    cells: torch.Tensor,
    anchors: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    *,
    rows: int,
) -> tuple[torch.Tensor, ...]:
    """The packed rows of a verification, padded to ``rows``.

    Args:
        cells: ``[n]`` int64 cells ``r * (gamma + 1) + j`` that are verified, ``n <= rows``.
        anchors: ``[R]`` int64 of any stride.
        tokens: ``[R, gamma]`` int64 drafted.
        positions, slots: ``[R * (gamma + 1)]`` int64 of every cell.

    Returns:
        What :class:`dspark_sglang.core.step.Window` has, in its order.

    Raises:
        OperandError: an operand of the wrong shape, dtype, device or stride.
    """
    resolve("triton", cells)
    requests, gamma = tokens.shape
    every, device = requests * (gamma + 1), cells.device
    operand(
        "anchors", anchors, shape=(requests,), dtype=torch.int64, device=device, contiguous=False
    )
    operand("positions", positions, shape=(every,), dtype=torch.int64, device=device)
    operand("slots", slots, shape=(every,), dtype=torch.int64, device=device)
    _check({"cells": cells, "tokens": tokens}, torch.int64, device)
    pitch = _pitch(rows)
    out = torch.empty((4, pitch), dtype=torch.int64, device=device)
    window_kernel[(triton.cdiv(rows, BLOCK),)](
        cells,
        anchors,
        tokens,
        positions,
        slots,
        out,
        anchors.stride(0),
        pitch,
        len(cells),
        rows,
        GAMMA=gamma,
        BLOCK=BLOCK,
        num_warps=1,
    )
    launched("window")
    return tuple(part[:rows] for part in out.unbind(0))


def finish(
    count: torch.Tensor,
    token: torch.Tensor,
    drafted: torch.Tensor,
    stops: torch.Tensor | None,
    lens: torch.Tensor,
    before: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """End each run at its first stop token and lay out what the round brought.

    Args:
        count: ``[R]`` int64 drafted tokens kept.
        token: ``[R]`` int64 the token after them; negative: there is none.
        drafted: ``[R, gamma]`` int64.
        stops: ``[R, S]`` int64 stop tokens, padded with -1; None: nothing ends a run.
        lens: ``[R]`` int32 or int64 drafted tokens verified.
        before: ``[R]`` int64 length of each request before the round.

    Returns:
        What :class:`dspark_sglang.core.step.Finished` has, in its order.

    Raises:
        OperandError: an operand of the wrong shape, dtype, device or stride.
    """
    resolve("triton", count)
    requests, gamma = drafted.shape
    device = count.device
    for name, tensor in {"count": count, "token": token, "before": before}.items():
        operand(name, tensor, shape=(requests,), dtype=torch.int64, device=device)
    operand("drafted", drafted, shape=(requests, gamma), dtype=torch.int64, device=device)
    operand("lens", lens, shape=(requests,), dtype=(torch.int32, torch.int64), device=device)
    if stops is not None:
        operand("stops", stops, shape=(requests, None), dtype=torch.int64, device=device)

    def made(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    kinds = (torch.int64, torch.int32, torch.int32, torch.int64, torch.int64)
    shapes = ((2, requests), *((requests,),) * 4)
    out = [made(*shape, dtype=kind) for shape, kind in zip(shapes, kinds, strict=True)]
    out += [made(requests, gamma + 1) for _ in range(2)]
    finish_kernel[(requests,)](
        count,
        token,
        drafted,
        drafted if stops is None else stops,  # nothing is read through it
        lens,
        before,
        *out,
        requests,
        0 if stops is None else stops.shape[1],
        GAMMA=gamma,
        WINDOW=triton.next_power_of_2(gamma + 1),
        STOPS=STOPS,
        num_warps=1,
    )
    launched("finish")
    return tuple(out)


def kept(
    cells: torch.Tensor, committed: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n]`` int64 slots of packed rows, -1 of those that were not kept, and their positions.

    Args:
        cells: ``[n]`` int64 cells ``r * width + j`` that were verified.
        committed: ``[R]`` int32 cells of each request that were kept.
        slots, positions: ``[R * width]`` int64 of every cell.

    Raises:
        OperandError: an operand of the wrong shape, dtype, device or stride.
    """
    resolve("triton", cells)
    requests, device = len(committed), cells.device
    operand("committed", committed, shape=(requests,), dtype=torch.int32, device=device)
    _check({"cells": cells, "slots": slots, "positions": positions}, torch.int64, device)
    rows = len(cells)
    pitch = _pitch(rows)
    out = torch.empty((2, pitch), dtype=torch.int64, device=device)
    kept_kernel[(triton.cdiv(rows, BLOCK),)](
        cells,
        committed,
        slots,
        positions,
        out,
        pitch,
        rows,
        WIDTH=len(slots) // requests,
        BLOCK=BLOCK,
        num_warps=1,
    )
    launched("kept")
    kept_slots, places = (part[:rows] for part in out.unbind(0))
    return kept_slots, places
