"""Random operands of the drafting kernels, and runs whose outputs are poisoned before."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from dspark_kernels.markov_step import (
    Head,
    Sampling,
    launch,
    reference,
)
from dspark_kernels.markov_step.plan import Plan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


#: Chunks of three tiles: several tiles a chunk and several chunks at the vocabularies used here.
CUT = Plan(block_v=32, tiles=3, chunks=0)


#: Columns a program of ``select``.
SPAN = 128


class Shape(NamedTuple):
    batch: int
    gamma: int
    columns: int
    rank: int
    kind: str = "vanilla"
    dtype: torch.dtype = torch.float32
    width: int = 20
    size: int = 12


class Operands(NamedTuple):
    base: torch.Tensor
    anchors: torch.Tensor
    head: Head
    hidden: torch.Tensor | None
    sampling: Sampling | None
    vocabulary: torch.Tensor | None = None

    def named(self) -> dict[str, Any]:
        """Keyword operands of the public functions."""
        return {key: getattr(self, key) for key in ("hidden", "sampling", "vocabulary")}


def operands(shape: Shape, seed: int = 0, *, words: int | None = None) -> Operands:
    """Random operands: greedy and sampled rows in turn; ``words`` rows of the head's vocabulary."""
    random = torch.Generator().manual_seed(seed)
    batch, gamma, columns, rank, kind, dtype, width, _ = shape
    size = words or columns

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=random).to(dtype).to(DEVICE)

    parts, inputs = {"vanilla": (0, 1), "gated": (1, width + rank), "rnn": (3, 2 * rank + width)}[
        kind
    ]
    weight = (normal(parts * rank, inputs) / inputs**0.5) if parts else None
    bias = normal(parts * rank) if parts else None
    head = Head(normal(size, rank), normal(size, rank) / rank**0.5, weight, bias)
    keys = torch.randint(-(2**62), 2**62, (batch,), generator=random)
    positions = torch.randint(0, 2**32 - 9, (batch,), generator=random)
    temperatures = torch.tensor([0.8, 0.0, 1.0, 1.5, -1.0]).repeat(batch // 5 + 1)[:batch]
    sampling = Sampling(temperatures.to(DEVICE), keys.to(DEVICE), positions.to(DEVICE))
    anchors = torch.randint(0, size, (batch,), generator=random).to(DEVICE)
    names = torch.randperm(size, generator=random)[:columns].to(DEVICE) if words else None
    hidden = normal(batch, gamma, width) if parts else None
    return Operands(2 * normal(batch, gamma, columns), anchors, head, hidden, sampling, names)


def poisoned(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory that shows where nothing was written."""
    value = float("nan") if dtype.is_floating_point else -1
    return torch.full(shape, value, dtype=dtype, device=like.device)


def cut_of(columns: int) -> Plan:
    return CUT._replace(chunks=triton.cdiv(columns, CUT.block_v * CUT.tiles))


def run_block(given: Operands, out: torch.Tensor | None = None, cut: Plan | None = None) -> Any:
    cut = cut or cut_of(given.base.shape[2])
    base, anchors, head, hidden, sampling, names = given
    return launch.Block(base, anchors, head, sampling, names, out, cut).run(hidden)[0]


def run_shortlist(given: Operands, size: int, span: int = SPAN) -> Any:
    base, anchors, head, hidden, sampling, names = given
    return launch.draft_shortlist(
        base, anchors, head, hidden, sampling, names, size, torch.int32, span=span
    )


def assert_block(given: Operands, result: Any, out: torch.Tensor | None, close: float) -> None:
    """The result of the kernels is the float64 reference's."""
    stored = None if out is None else torch.full_like(given.base, 77.0)
    wanted, _ = reference.draft(*given, stored, dtype=torch.float64)
    assert torch.equal(result.tokens, wanted.tokens)
    assert torch.equal(result.previous, wanted.previous)
    torch.testing.assert_close(result.logit.double(), wanted.logit, atol=close, rtol=0)
    torch.testing.assert_close(result.lse.double(), wanted.lse, atol=close, rtol=0)
    if out is not None and stored is not None:
        # float32 and float64 logits may round to neighbours.
        spacing = 2 * torch.finfo(given.base.dtype).eps
        torch.testing.assert_close(out, stored, atol=close, rtol=spacing)
