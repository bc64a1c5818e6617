"""Configurations and bytes of ``confidence``; the protocol is in :mod:`benchmarks.report`."""

from __future__ import annotations

import torch
import triton

from benchmarks.report import Build, Case, Example
from dspark_kernels.confidence import BLOCK, NUM_WARPS, Confidence, confidence
from dspark_kernels.confidence.kernel import confidence_kernel
from dspark_kernels.confidence.reference import reference

#: gamma, d, r and V of what is served: V4 Flash and Pro, Qwen3-8B, SmolLM2, and no Markov part.
_SIZES = (
    (5, 4096, 256, 129280),
    (5, 7168, 512, 129280),
    (7, 4096, 256, 151936),
    (7, 960, 256, 49152),
    (7, 4096, 0, 151936),
)


def cases() -> list[Case]:
    """The configurations served, hidden states and embeddings in bfloat16."""
    return [_case(gamma, d, r, vocabulary) for gamma, d, r, vocabulary in _SIZES]


def _case(gamma: int, d: int, r: int, vocabulary: int) -> Case:
    build = Build(
        kernel=confidence_kernel,
        signature={
            "hidden": "*bf16",
            "previous": "*i64",
            # Without a Markov part the weight stands in for W1.
            "w1": "*bf16" if r else "*fp32",
            "weight": "*fp32",
            "bias": "*fp32",
            "temperatures": "*fp32",
            "logits": "*fp32",
            "confidence": "*fp32",
            "survival": "*fp64",
            "request_stride": "i32",
            "position_stride": "i32",
            "vocabulary": "i32",
        },
        constants={
            "GAMMA": gamma,
            "POSITIONS": triton.next_power_of_2(gamma),
            "WIDTH": d,
            "RANK": r,
            "BLOCK": BLOCK,
        },
        num_warps=NUM_WARPS,
        aligned=("request_stride", "position_stride", "vocabulary"),
    )
    sizes = {"gamma": gamma, "d": d, "r": r, "V": vocabulary}
    return Case(f"gamma{gamma}-d{d}-r{r}-V{vocabulary}-bf16", sizes, (build,))


def _row_bytes(case: Case) -> int:
    """What one request needs of its own: states, tokens, embeddings; logits, confidence, survival."""
    gamma, d, r = (case.sizes[name] for name in ("gamma", "d", "r"))
    return gamma * (2 * d + (8 + 2 * r if r else 0) + 4 + 4 + 8)


def _shared_bytes(case: Case) -> int:
    """What every request needs: weight, bias and temperatures."""
    return 4 * (case.sizes["d"] + case.sizes["r"] + 1 + case.sizes["gamma"])


def floor_bytes(case: Case, batch: int) -> int:
    """The weight is read once."""
    return batch * _row_bytes(case) + _shared_bytes(case)


def formula_bytes(case: Case, batch: int) -> int:
    """Every program reads the weight; on a GPU all but the first find it in cache."""
    return batch * (_row_bytes(case) + _shared_bytes(case))


def example(case: Case, batch: int) -> Example:
    """Random operands; the scores are of order 1."""
    gamma, d, r, vocabulary = (case.sizes[name] for name in ("gamma", "d", "r", "V"))
    random = torch.Generator().manual_seed(7)
    hidden = torch.randn(batch, gamma, d, generator=random).bfloat16()
    previous = torch.randint(vocabulary, (batch, gamma), generator=random)
    weight = torch.randn(d + r, generator=random) / d**0.5
    bias = torch.randn((), generator=random)
    temperatures = torch.rand(gamma, generator=random) + 0.5
    w1 = torch.randn(vocabulary, r, generator=random).bfloat16() if r else None

    def run() -> Confidence:
        return confidence(hidden, previous, weight, bias, temperatures, w1=w1, backend="triton")

    def max_error(result: Confidence) -> float:
        exact = reference(hidden, previous, weight, bias, temperatures, w1, dtype=torch.float64)
        pairs = zip(result[1:], exact[1:], strict=True)
        return max(float((found.double() - right).abs().max()) for found, right in pairs)

    return Example(run, max_error)
