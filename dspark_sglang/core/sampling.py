"""Token laws: what plain decoding would sample from, and sampling with given uniforms."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dspark_sglang.errors import NumericsError


def sample(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw one token a row by inverting the cumulative sum in float64.

    A token of weight zero is never drawn: the first index whose cumulative weight exceeds
    ``u * total`` has a positive weight.

    Args:
        weights: ``[N, V]`` non-negative, not necessarily normalised.
        uniforms: ``[N]`` in [0, 1).

    Returns:
        ``[N]`` int64 tokens.

    Raises:
        NumericsError: a row without finite positive mass (checked where it needs no device sync).
    """
    cumulative = weights.to(torch.float64).cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    if weights.device.type == "cpu" and not bool(((total > 0) & total.isfinite()).all()):
        raise NumericsError(
            "A token law has no finite positive mass (NaN or infinite logits, or every token "
            "filtered out).",
            expected="finite logits with at least one allowed token",
            fix="Check the model's weights and dtype, and the request's grammar and logit_bias.",
        )
    wanted = uniforms.to(torch.float64)[:, None] * total
    tokens = torch.searchsorted(cumulative, wanted, right=True)
    # u * total can round up to total; the last positive weight is then the right answer.
    last = torch.searchsorted(cumulative, total, right=False)
    # On a device nothing was checked: keep even a broken row inside the vocabulary.
    return torch.minimum(tokens, last).squeeze(1).clamp_(max=weights.shape[-1] - 1)


def best(logits: torch.Tensor) -> torch.Tensor:
    """The most probable token of each row, the first among equals.

    Args:
        logits: ``[N, V]``.

    Returns:
        ``[N]`` int64.

    Raises:
        NumericsError: a row whose largest logit is not finite (checked where it needs no device
            sync).
    """
    # max() beats argmax() threefold on CPU and breaks ties the same way; NaN counts as largest.
    values, tokens = logits.max(dim=-1)
    require_finite(values)
    return tokens


def require_finite(largest: torch.Tensor) -> None:
    """Check the largest logit of each row, where that needs no device sync.

    Raises:
        NumericsError: one is not finite.
    """
    if largest.device.type == "cpu" and not bool(largest.isfinite().all()):
        raise NumericsError(
            "The target's logits are NaN or infinite, or every token is excluded.",
            expected="finite logits with at least one allowed token",
            fix="Check the model's weights and dtype, and the request's grammar and logit_bias.",
        )


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

    All three thresholds refer to the unfiltered law: a token stays when its rank is below
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
    """The law that plain decoding samples from, unnormalised where filters apply.

    Args:
        logits: ``[N, V]`` float32, adjustments (penalties, bias, masks) already applied.
        temperature: ``[N]`` above 0.
        top_k, top_p, min_p: ``[N]`` filters; None where no row uses that filter.

    Returns:
        ``[N, V]`` float32 weights.
    """
    probs = torch.softmax(logits / temperature[:, None], dim=-1)
    filters = Filters.of(probs, top_k, top_p, min_p)
    return probs if filters is None else filter_weights(probs, *filters)
