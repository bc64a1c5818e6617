"""Token laws: what plain decoding would sample from, and sampling with given uniforms."""

from __future__ import annotations

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


def filter_weights(
    probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Apply top-k, top-p and min-p jointly, as SGLang's ``pytorch`` sampling backend does.

    All three thresholds refer to the unfiltered law: a token stays when its rank is below
    ``top_k``, the mass of the tokens ranked before it is at most ``top_p``, and its probability
    is at least ``min_p`` times the largest.

    Args:
        probs: ``[N, V]`` probabilities.
        top_k: ``[N]`` integers, at least 1.
        top_p: ``[N]`` in (0, 1].
        min_p: ``[N]`` in [0, 1].

    Returns:
        ``[N, V]`` weights: ``probs`` with the filtered tokens set to 0, not renormalised.
    """
    ordered, index = probs.sort(dim=-1, descending=True)
    rank = torch.arange(probs.shape[-1], device=probs.device)
    before = ordered.cumsum(-1) - ordered
    drop = (rank >= top_k[:, None]) | (before > top_p[:, None])
    drop |= ordered < ordered[:, :1] * min_p[:, None]
    return torch.zeros_like(probs).scatter_(-1, index, ordered.masked_fill(drop, 0.0))


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
    if top_k is None and top_p is None and min_p is None:
        return probs
    rows = probs.shape[0]
    if top_k is None:
        top_k = torch.full((rows,), probs.shape[-1], device=probs.device)
    if top_p is None:
        top_p = torch.ones(rows, device=probs.device)
    if min_p is None:
        min_p = torch.zeros(rows, device=probs.device)
    return filter_weights(probs, top_k, top_p, min_p)
