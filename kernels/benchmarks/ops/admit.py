"""Configurations and bytes of ``admit``; the protocol is in :mod:`benchmarks.report`."""

from __future__ import annotations

import torch
import triton

from benchmarks.report import Build, Case, Example
from dspark_kernels.admit import Admission, admit, num_warps
from dspark_kernels.admit.kernel import admit_kernel
from dspark_kernels.admit.reference import reference


def cases() -> list[Case]:
    """Gamma from least to most, and every power of two that a batch is rounded up to.

    ``R`` is that capacity; bytes depend on the batch alone, and mean something up to ``R``.
    """
    return [_case(gamma, 2**power) for gamma in (1, 5, 7, 8) for power in range(11)]


def _case(gamma: int, most: int) -> Case:
    build = Build(
        kernel=admit_kernel,
        signature={
            "survival": "*fp64",
            "budget": "*i32",
            "lens": "*i32",
            "offsets": "*i32",
            "rows": "*i64",
            "requests": "i32",
        },
        constants={
            "GAMMA": gamma,
            "POSITIONS": triton.next_power_of_2(gamma),
            "WINDOW": triton.next_power_of_2(gamma + 1),
            "REQUESTS": most,
        },
        num_warps=num_warps(most),
    )
    return Case(f"gamma{gamma}-R{most}", {"gamma": gamma, "R": most}, (build,))


def floor_bytes(case: Case, batch: int) -> int:
    """Survivals and the budget in; lengths, offsets and row indices out."""
    gamma = case.sizes["gamma"]
    return batch * gamma * 8 + 4 + batch * 4 + (batch + 1) * 4 + batch * (gamma + 1) * 8


def formula_bytes(case: Case, batch: int) -> int:
    """The floor: every input is read once and every output element written once."""
    return floor_bytes(case, batch)


def example(case: Case, batch: int) -> Example:
    """Random survivals, some of them tied, and half of the candidates admitted."""
    gamma = case.sizes["gamma"]
    random = torch.Generator().manual_seed(7)
    confidence = torch.rand(batch, gamma, generator=random).mul(8).ceil() / 8
    survival = confidence.double().cumprod(1)
    budget = torch.tensor([batch * gamma // 2], dtype=torch.int32)

    def run() -> Admission:
        return admit(survival, budget, backend="triton")

    def max_error(result: Admission) -> float:
        for found, right in zip(result, reference(survival, int(budget)), strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=0)
        return 0.0

    return Example(run, max_error)
