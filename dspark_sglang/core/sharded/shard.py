"""A rank's part of the vocabulary, and what ranks find together."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, TypeVar

import torch

Result = TypeVar("Result")
#: Yields this rank's record, is sent ``[W, ...]`` of every rank's, returns the result.
Exchange = Generator[torch.Tensor, torch.Tensor, Result]


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


def best_of(record: torch.Tensor) -> torch.Tensor:
    """The token of the best score of any rank, the lowest among equals.

    Args:
        record: ``[W, N, >= 2]`` float64: score, token.

    Returns:
        ``[N]`` int64.
    """
    winner = record[..., 0].argmax(dim=0)
    return record[..., 1].gather(0, winner[None])[0].long()
