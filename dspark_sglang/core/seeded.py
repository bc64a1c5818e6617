"""Seeded sampling: the target's own draw at a position, the same in plain decoding and in a block.

A seeded draw is ``argmax_x log p(x) + g(seed, position, x)`` with Gumbel noise ``g`` hashed from its
arguments (the Gumbel-max trick), so the token at a position does not depend on how the tokens before
it were found. Verification then *couples*: it takes the target's draw at every row and keeps a
drafted token exactly when it is that draw, and the drafter uses the same noise to be right often.

The hash and the noise are SGLang's (``layers/sampler.py``, ``multinomial_with_seed``): MurmurHash3 over
the seed's two halves, the position and the column. The column is the token; where a filter
applies, its rank in the sorted distribution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dspark_sglang.core.sampling import Filters, sorted_weights

_MASK = 0xFFFFFFFF


def _rotate(value: torch.Tensor, bits: int) -> torch.Tensor:
    return ((value << bits) | (value >> (32 - bits))) & _MASK


def _mix(state: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    key = (_rotate((key * 0xCC9E2D51) & _MASK, 15) * 0x1B873593) & _MASK
    return (_rotate(state ^ key, 13) * 5 + 0xE6546B64) & _MASK


def hash32(seeds: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (32 bits) of (seed, position, column).

    Args:
        seeds: ``[N]`` int64, taken as 64 bits.
        positions: ``[N]`` int64 in 0..2^32-1.
        columns: ``[M]`` or ``[N, M]`` int64 in 0..2^32-1.

    Returns:
        ``[N, M]`` int64 in 0..2^32-1.
    """
    # Products wrap modulo 2^64; only their low 32 bits are kept.
    state = _mix(torch.zeros_like(seeds), seeds & _MASK)
    state = _mix(state, (seeds >> 32) & _MASK)
    state = _mix(state, positions & _MASK)[:, None]
    state = _mix(state, columns & _MASK) ^ 16
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = ((state ^ (state >> shift)) * factor) & _MASK
    return state ^ (state >> 16)


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise ``[N, M]`` float64; arguments as in :func:`hash32`."""
    uniform = hash32(seeds, positions, columns).to(torch.float64) / _MASK
    # Both ends stay finite; the cap below 0 is the spacing of the hash.
    negative_log = -uniform.log().clamp(min=torch.finfo(torch.float64).min, max=-(2.0**-32))
    return -negative_log.log()


class Noise(NamedTuple):
    """Keys of the draws of some requests."""

    #: ``[S]`` int64 seeds.
    seeds: torch.Tensor
    #: ``[S]`` int64 position of each row's input token (of the anchor, where a block is drafted).
    positions: torch.Tensor
    #: Filters of the rows; None where no row filters.
    filters: Filters | None = None


def seeded_draw(
    probs: torch.Tensor, noise: Noise, tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """Draw one token a row.

    A row that filters nothing is drawn the same whatever the other rows do.

    Args:
        probs: ``[N, M]`` float32 probabilities.
        noise: keys of the rows.
        tokens: ``[N, M]`` int64 token of each probability; None: every token in order.

    Returns:
        ``[N]`` int64 columns of ``probs``.
    """
    columns = torch.arange(probs.shape[-1], device=probs.device)
    keyed = columns if tokens is None else tokens
    if noise.filters is None:
        return _by_column(probs, noise.seeds, noise.positions, keyed)
    drawn = torch.empty(len(probs), dtype=torch.int64, device=probs.device)
    idle = noise.filters.idle(probs.shape[-1])
    plain, filtered = (rows.nonzero().view(-1) for rows in (idle, ~idle))
    if len(plain):
        own = keyed if tokens is None else keyed[plain]
        drawn[plain] = _by_column(probs[plain], noise.seeds[plain], noise.positions[plain], own)
    if len(filtered):
        ordered, index = sorted_weights(probs[filtered], noise.filters.take(filtered))
        keys = noise.seeds[filtered], noise.positions[filtered]
        rank = _by_column(ordered.to(torch.float64), *keys, columns)
        drawn[filtered] = index.gather(-1, rank[:, None]).squeeze(-1)
    return drawn


def _by_column(
    weights: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    # The logarithm in the type of the weights, as SGLang takes it.
    score = gumbel(seeds, positions, columns) + weights.log().to(torch.float64)
    return score.max(dim=-1).indices
