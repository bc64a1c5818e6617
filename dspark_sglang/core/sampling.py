"""Token distributions: what plain decoding would sample from, and sampling with given uniforms."""

from __future__ import annotations

from typing import NamedTuple

import torch

#: In place of a token: nothing could be drawn, for want of a distribution (NaN or infinite logits, every token excluded).
UNDECIDED = -1


def sample(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw one token a row by inverting the cumulative sum in float64.

    A token of weight zero is never drawn: the first index whose cumulative weight exceeds
    ``u * total`` has a positive weight.

    Args:
        weights: ``[N, V]`` non-negative, not necessarily normalised.
        uniforms: ``[N]`` in [0, 1).

    Returns:
        ``[N]`` int64 tokens, :data:`UNDECIDED` of rows without finite positive mass.
    """
    cumulative = weights.to(torch.float64).cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    wanted = uniforms.to(torch.float64)[:, None] * total
    tokens = torch.searchsorted(cumulative, wanted, right=True)
    # u * total can round up to total; the last positive weight is then the right answer.
    last = torch.searchsorted(cumulative, total, right=False)
    sound = (total > 0) & (total < torch.inf)
    return torch.where(sound, torch.minimum(tokens, last), UNDECIDED).squeeze(1)


def best(logits: torch.Tensor) -> torch.Tensor:
    """The most probable token of each row as plain decoding takes it, whatever the row holds.

    That is the first among equals; NaN counts as largest; of a row that excludes every token it is token 0.

    Args:
        logits: ``[N, V]``.

    Returns:
        ``[N]`` int64.
    """
    # max() beats argmax() threefold on CPU and breaks ties the same way.
    return logits.max(dim=-1).indices


def probabilities(scaled: torch.Tensor) -> torch.Tensor:
    """Softmax of ``[N, V]`` logits over their temperatures; overwrites them.

    Infinity counts as the largest number: what an infinite ``logit_bias`` prefers has all of the probability.
    A row without a distribution (NaN, or minus infinity throughout) is NaN throughout.
    """
    return torch.softmax(scaled.clamp_(max=torch.finfo(scaled.dtype).max), dim=-1)


class Filters(NamedTuple):
    """Sampling filters of some rows."""

    #: ``[N]`` integers, at least 1; ``V`` or more filters nothing.
    top_k: torch.Tensor
    #: ``[N]`` in (0, 1]; 1 filters nothing.
    top_p: torch.Tensor
    #: ``[N]`` in [0, 1]; 0 filters nothing.
    min_p: torch.Tensor

    @classmethod
    def of(
        cls,
        like: torch.Tensor,
        top_k: torch.Tensor | None,
        top_p: torch.Tensor | None,
        min_p: torch.Tensor | None,
    ) -> Filters | None:
        """Filters of the rows of ``like`` ``[N, V]``; None where no row uses any."""
        if top_k is None and top_p is None and min_p is None:
            return None
        rows, size = like.shape
        return cls(
            torch.full((rows,), size, device=like.device) if top_k is None else top_k,
            torch.ones(rows, device=like.device) if top_p is None else top_p,
            torch.zeros(rows, device=like.device) if min_p is None else min_p,
        )

    def idle(self, size: int) -> torch.Tensor:
        """``[N]`` bool: rows that filter nothing of a vocabulary of ``size``."""
        return (self.top_k >= size) & (self.top_p >= 1.0) & (self.min_p <= 0.0)

    def take(self, rows: torch.Tensor) -> Filters:
        """The filters of some rows, ``[M]`` int64."""
        return Filters(self.top_k[rows], self.top_p[rows], self.min_p[rows])


def sorted_weights(probs: torch.Tensor, filters: Filters) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the filters to each row's probabilities in descending order.

    All three thresholds refer to the unfiltered distribution: a token stays when its rank is below
    ``top_k``, the mass of the tokens ranked before it is at most ``top_p``, and its probability
    is at least ``min_p`` times the largest. So does SGLang's ``pytorch`` sampling backend.

    Args:
        probs: ``[N, V]`` probabilities.

    Returns:
        ``[N, V]`` descending probabilities with those filtered set to 0, not renormalised, and
        ``[N, V]`` int64 token of each.
    """
    ordered, index = probs.sort(dim=-1, descending=True)
    rank = torch.arange(probs.shape[-1], device=probs.device)
    before = ordered.cumsum(-1) - ordered
    drop = (rank >= filters.top_k[:, None]) | (before > filters.top_p[:, None])
    drop |= ordered < ordered[:, :1] * filters.min_p[:, None]
    return ordered.masked_fill(drop, 0.0), index


def filter_weights(
    probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """:func:`sorted_weights` in the order of the vocabulary: ``[N, V]`` weights."""
    ordered, index = sorted_weights(probs, Filters(top_k, top_p, min_p))
    return torch.zeros_like(probs).scatter_(-1, index, ordered)


def target_weights(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    *,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """The distribution that plain decoding samples from, unnormalised where filters apply.

    Args:
        logits: ``[N, V]`` float32, adjustments (penalties, bias, masks) already applied.
        temperature: ``[N]`` above 0.
        top_k, top_p, min_p: ``[N]`` filters; None where no row uses that filter.

    Returns:
        ``[N, V]`` float32 weights.
    """
    probs = probabilities(logits / temperature[:, None])
    filters = Filters.of(probs, top_k, top_p, min_p)
    return probs if filters is None else filter_weights(probs, *filters)
