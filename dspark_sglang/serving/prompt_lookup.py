"""Prompt lookup in service: which greedy requests of a step repeat their own text, and whether that is the better draft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dspark_sglang.core.round import Float64
from dspark_sglang.core.schedule.prompt_lookup import Follower, LookupRates

if TYPE_CHECKING:
    from dspark_sglang.serving.sglang_types import Req

_FOLLOWER = "_dspark_follower"
#: Share of the tokens of a block that prompt lookup of all requests must be expected to get right for the draft
#: forward to be skipped: hardly any draft is expected to be as good.
_SURE = 0.7


class Copies(NamedTuple):
    """Copied blocks of some requests of a step; ``n`` of ``R``."""

    #: ``[n]`` int64 requests.
    rows: npt.NDArray[np.int64]
    #: ``[n, depth]`` int64.
    tokens: npt.NDArray[np.int64]
    #: ``[n, depth]`` chance of each token, given those before it.
    chances: Float64

    @property
    def expected(self) -> Float64:
        """``[n]`` tokens expected to be right."""
        found: Float64 = self.chances.cumprod(axis=1).sum(axis=1)
        return found

    def suffice(self, requests: int) -> bool:
        """Whether every request of the step copies so surely that nothing needs to be drafted."""
        depth = self.tokens.shape[1]
        return len(self.rows) == requests and bool((self.expected >= _SURE * depth).all())

    def better(self, confidence: Float64) -> Copies:
        """Those that are expected to get more tokens right than the draft.

        Args:
            confidence: ``[R, gamma]`` of the drafted tokens, 0 beyond their depth.
        """
        drafted = confidence[self.rows].cumprod(axis=1).sum(axis=1)
        keep = self.expected > drafted
        return Copies(self.rows[keep], self.tokens[keep], self.chances[keep])

    def replace(
        self, tokens: torch.Tensor, confidence: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Drafted ``[R, gamma]`` tokens and confidences with these in their requests' places."""
        missing = (0, 0), (0, tokens.shape[1] - self.tokens.shape[1])
        rows = torch.from_numpy(self.rows).to(tokens.device)
        copied = torch.from_numpy(np.pad(self.tokens, missing)).to(tokens.device)
        chances = torch.from_numpy(np.pad(self.chances, missing)).to(confidence)
        return tokens.index_copy(0, rows, copied), confidence.index_copy(0, rows, chances)


class Lookup:
    """Follows the greedy requests of one scheduler process."""

    def __init__(self) -> None:
        self.rates = LookupRates()

    def find(self, requests: Sequence[Req], sampled: npt.NDArray[np.bool_], depth: int) -> Copies:
        """Copies of ``depth`` tokens for the requests whose text repeats.

        Args:
            requests: SGLang's, with every token they have committed.
            sampled: ``[R]`` which of them sample; they are left out.
        """
        rows, tokens, chances = [], [], []
        for row, request in enumerate(requests):
            if sampled[row]:
                continue
            follower: Follower | None = getattr(request, _FOLLOWER, None)
            if follower is None:
                follower = Follower(request.origin_input_ids, self.rates)
                setattr(request, _FOLLOWER, follower)
            follower.read(request.output_ids)
            found = follower.continuation(depth)
            if found:
                rows.append(row)
                tokens.append(found)
                chances.append(self.rates.chances(follower.matched, depth))
        return Copies(
            np.array(rows, dtype=np.int64),
            np.array(tokens, dtype=np.int64).reshape(len(rows), depth),
            np.array(chances, dtype=np.float64).reshape(len(rows), depth),
        )
