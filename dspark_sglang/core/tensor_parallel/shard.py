"""A rank's part of the vocabulary, and what ranks find together."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, TypeVar

import torch

Result = TypeVar("Result")


class Sum(NamedTuple):
    """Yielded in place of a record: is sent the sum of every rank's ``values``."""

    values: torch.Tensor
    #: What it is for, as it is counted.
    what: str


#: Yields this rank's record and is sent ``[W, ...]`` of every rank's, or a :class:`Sum`; returns the result.
Exchange = Generator[torch.Tensor | Sum, torch.Tensor, Result]


class Shard(NamedTuple):
    """The columns of one rank: tokens ``start .. start + width``; ranks hold them in rank order."""

    rank: int
    start: int
    width: int
    #: Tokens of all ranks.
    vocabulary: int

    def columns(self, device: torch.device) -> torch.Tensor:
        """``[width]`` int64 tokens of this rank's columns."""
        return torch.arange(self.start, self.start + self.width, device=device)

    def best(self, scores: torch.Tensor) -> torch.Tensor:
        """``[N, 2]`` float64: the best of ``scores`` ``[N, width]`` and its token, the lowest of equals."""
        score, column = scores.max(dim=-1)
        return torch.stack([score.double(), (column + self.start).double()], dim=-1)

    def pick(self, values: torch.Tensor, tokens: torch.Tensor, rest: float) -> torch.Tensor:
        """``values[..., token]`` where the token is this rank's, ``rest`` elsewhere.

        Args:
            values: ``[..., width]``.
            tokens: ``[...]`` int64.
        """
        column = tokens - self.start
        own = (column >= 0) & (column < self.width)
        found = values.gather(-1, column.clamp(0, self.width - 1)[..., None]).squeeze(-1)
        return torch.where(own, found, rest)

    def cut(self, table: torch.Tensor) -> torch.Tensor:
        """This rank's rows ``[width, ...]`` of a whole ``[vocabulary, ...]`` table, or of one cut before."""
        if len(table) < self.vocabulary:
            return table
        return table[self.start : self.start + self.width]

    def rows(self, table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """``[..., n]`` rows of ``tokens`` ``[...]`` int64, zeros where another rank has them.

        Args:
            table: ``[width, n]`` rows of this rank's tokens.
        """
        if not self.width:
            return table.new_zeros((*tokens.shape, table.shape[-1]))
        column = tokens - self.start
        own = (column >= 0) & (column < self.width)
        return table[column.clamp(0, self.width - 1)] * own[..., None].to(table.dtype)


def best_of(record: torch.Tensor) -> torch.Tensor:
    """The token of the best score of any rank, the lowest among equals.

    Args:
        record: ``[W, N, >= 2]`` float64: score, token.

    Returns:
        ``[N]`` int64.
    """
    winner = record[..., 0].argmax(dim=0)
    return record[..., 1].gather(0, winner[None])[0].long()
