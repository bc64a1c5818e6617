"""SGLang's ``pytorch`` sampling backend, without sorting the vocabulary for rows that filter nothing.

The builtin sorts every row of a batch as soon as one row filters, and a greedy row in a mixed
batch counts as a filter (top-k 1). On a processor that sort is most of a step of 128 requests.
The distributions are the builtin's: greedy rows take the most probable token, unfiltered ones are drawn by
inverting the cumulative sum, the rest go through the same joint filter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dspark_sglang.core.sampling import Filters, filter_weights, probabilities, sample
from dspark_sglang.core.seeded import Noise, gumbel, seeded_draw


def draw(
    probs: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor | None,
    uniforms: torch.Tensor,
) -> torch.Tensor:
    """Draw one token a row.

    Args:
        probs: ``[N, V]`` float32 probabilities.
        top_ks, top_ps, min_ps: ``[N]`` filters; ``min_ps`` None where no row uses it.
        uniforms: ``[N]`` in [0, 1).

    Returns:
        ``[N]`` int32 tokens.
    """
    tokens = probs.new_empty(probs.shape[0], dtype=torch.int64)
    greedy = top_ks == 1
    plain = (top_ks >= probs.shape[-1]) & (top_ps >= 1.0)
    if min_ps is not None:
        plain &= min_ps <= 0.0
    for rows, kind in ((greedy, "greedy"), (plain & ~greedy, "plain"), (~plain & ~greedy, "rest")):
        index = rows.nonzero().view(-1)
        if not len(index):
            continue
        taken = probs if len(index) == len(tokens) else probs[index]
        if kind == "greedy":
            drawn = taken.max(dim=-1).indices
        elif kind == "plain":
            drawn = _sample(taken, uniforms[index])
        else:
            floor = taken.new_zeros(len(index)) if min_ps is None else min_ps[index]
            weights = filter_weights(taken, top_ks[index], top_ps[index], floor)
            drawn = _sample(weights, uniforms[index])
        tokens[index] = drawn
    return tokens.to(torch.int32)


def softmax(logits: torch.Tensor, temperatures: None = None) -> torch.Tensor:
    """In place of SGLang's, whose rows with an infinite logit are NaN: greedy rows of a mixed batch read these, too."""
    return probabilities(logits)


def filtered(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In place of SGLang's filtered sampling where nothing but a token is asked for."""
    names = ("probs", "top_ks", "top_ps", "min_ps", "need_min_p_sampling", "sampling_seed")
    given = {**dict(zip((*names, "positions"), args, strict=False)), **kwargs}
    if given.get("return_filtered_probs"):
        return original(*args, **kwargs)
    probs, top_ks, top_ps = given["probs"], given["top_ks"], given["top_ps"]
    min_ps = given["min_ps"] if given["need_min_p_sampling"] else None
    seeds = given.get("sampling_seed")
    if seeds is not None:
        filters = Filters.of(probs, top_ks, top_ps, min_ps)
        noise = Noise(seeds, given["positions"].to(torch.int64), filters)
        return seeded_draw(probs, noise).to(torch.int32)
    uniforms = torch.rand(probs.shape[0], dtype=torch.float64)
    return draw(probs.float(), top_ks, top_ps, min_ps, uniforms)


def unfiltered(
    original: Callable[..., Any],
    probs: torch.Tensor,
    sampling_seed: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """In place of SGLang's unfiltered sampling."""
    if sampling_seed is not None:
        return torch.as_tensor(original(probs, sampling_seed, positions))
    uniforms = torch.rand(probs.shape[0], dtype=torch.float64)
    return _sample(probs, uniforms).to(torch.int32)


def _sample(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """One token a row; 0 where there is no distribution, as the builtin's largest of nothing but NaN."""
    return sample(weights, uniforms).clamp_(min=0)


def seeded(logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """In place of SGLang's seeded draw, whose hash is a kernel of sgl_kernel.

    Args:
        logprobs: ``[N, V]``.
        seed, positions: ``[N]`` integers.

    Returns:
        ``[N, 1]`` int64 columns.
    """
    columns = torch.arange(logprobs.shape[1], device=logprobs.device)
    noise = gumbel(seed.to(torch.int64), positions.to(torch.int64), columns)
    return (noise + logprobs.to(torch.float64)).max(dim=1, keepdim=True).indices
