"""Random operands of drafting with successors and the base tail."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dspark_kernels.markov_step import (
    Head,
    Sampling,
    ShortlistDraft,
    launch,
    reference,
    successor_table,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


#: Columns a program of ``select``, and of an item of the tail.
SPAN = 128


class Shape(NamedTuple):
    batch: int
    gamma: int
    columns: int
    dtype: torch.dtype = torch.float32
    size: int = 8
    follow: int = 16
    rank: int = 8
    #: Rows of the head's vocabulary, of which the columns are some in any order; 0: all of them.
    words: int = 0


class Operands(NamedTuple):
    """In the order that the reference takes them."""

    base: torch.Tensor
    anchors: torch.Tensor
    head: Head
    hidden: None
    sampling: Sampling | None
    vocabulary: torch.Tensor | None
    #: Not of the reference's first arguments.
    table: torch.Tensor

    @property
    def first(self) -> tuple[Any, ...]:
        """All but the table."""
        return self[:-1]


def operands(shape: Shape, seed: int = 0) -> Operands:
    """Random operands: greedy, sampled and unrecorded rows in turn; the table is of the head."""
    random = torch.Generator().manual_seed(seed)
    words = shape.words or shape.columns

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=random).to(shape.dtype).to(DEVICE)

    head = Head(normal(words, shape.rank), normal(words, shape.rank) / shape.rank**0.5)
    names = torch.randperm(words, generator=random)[: shape.columns].to(DEVICE)
    vocabulary = names if shape.words else None

    def each(values: list[float]) -> torch.Tensor:
        return torch.tensor(values * shape.batch)[: shape.batch].to(DEVICE)

    sampling = Sampling(
        each([0.8, 0.0, 1.0, 1.5, -1.0]),
        torch.randint(-(2**62), 2**62, (shape.batch,), generator=random).to(DEVICE),
        torch.randint(0, 2**32 - 9, (shape.batch,), generator=random).to(DEVICE),
        each([1, 1, 0, 1, 1]).to(torch.uint8),
    )
    return Operands(
        normal(shape.batch, shape.gamma, shape.columns),
        torch.randint(0, words, (shape.batch,), generator=random).to(DEVICE),
        head,
        None,
        sampling,
        vocabulary,
        successor_table(head, shape.follow, vocabulary),
    )


def poisoned(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory that shows where nothing was written."""
    value = float("nan") if dtype.is_floating_point else -7
    return torch.full(shape, value, dtype=dtype, device=like.device)


def run(given: Operands, size: int, out: torch.Tensor | None = None) -> ShortlistDraft:
    return launch.draft_shortlist(*given.first, size, torch.int64, given.table, out, SPAN)


def wanted(given: Operands, size: int, out: torch.Tensor | None = None) -> ShortlistDraft:
    return reference.draft_shortlist(
        *given.first, size, torch.int64, given.table, out, SPAN, dtype=torch.float64
    )


def assert_same(found: ShortlistDraft, known: ShortlistDraft) -> None:
    """Candidates, tokens and the numbers of the law."""
    for name in ("support", "base", "tokens", "previous"):
        assert torch.equal(getattr(found, name), getattr(known, name)), name
    for name in ("probs", "lse"):
        mine, theirs = getattr(found, name), getattr(known, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=0, equal_nan=True)
    assert (found.logits is None) == (known.logits is None)


def share_of_tail(found: ShortlistDraft) -> float:
    """Of the drafted tokens, those that were no candidates."""
    return 1.0 - (found.support == found.tokens[..., None]).any(-1).double().mean().item()
