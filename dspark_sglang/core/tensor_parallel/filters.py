"""Top-k, top-p and min-p over a sharded vocabulary: what each shard keeps of a row."""

from __future__ import annotations

import torch

from dspark_sglang.core.sampling import Filters
from dspark_sglang.core.tensor_parallel.shard import Exchange, Shard

#: Weights relative to the largest lie in [0, 1]; as bits of float32 that is a range of 2^30, and each
#: exchange of the search leaves a quarter of it.
_ONE = 0x3F800000
_ROUNDS = 16


def keep(weights: torch.Tensor, filters: Filters, shard: Shard) -> Exchange[torch.Tensor]:
    """Weights with those set to 0 that the filters drop, as ``sorted_weights`` drops them.

    Where a row filters by top-k or top-p, 17 exchanges: of ``[F, 3, 2]`` float32, then one of
    ``[F, 3]`` float64, ``F`` the rows given. Equal weights at the edge are kept by token.

    Args:
        weights: ``[F, width]`` float64 weights of this rank's columns, relative to the row's largest.
        filters: of the rows; all thresholds refer to the unfiltered law.
    """
    values = weights.float()
    kept = values >= filters.min_p[:, None].to(values.dtype)
    if bool((filters.top_p < 1.0).any() or (filters.top_k < shard.vocabulary).any()):
        kept &= yield from _searched(values, filters, shard)
    return torch.where(kept, weights, 0.0)


class _Sorted:
    """Counts and masses above a weight, of one shard."""

    def __init__(self, values: torch.Tensor) -> None:
        self._ascending = values.sort(dim=-1).values
        self._width = values.shape[-1]
        tail = self._ascending.flip(-1).double().cumsum(-1)
        self._masses = torch.nn.functional.pad(tail, (1, 0))

    def above(self, bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many weights lie above ``bounds`` ``[F, n]`` float32, and their sum."""
        index = torch.searchsorted(self._ascending, bounds.contiguous(), right=True)
        count = self._width - index
        return count, self._masses.gather(-1, count)


def _searched(values: torch.Tensor, filters: Filters, shard: Shard) -> Exchange[torch.Tensor]:
    """``[F, width]`` bool: what top-k and top-p keep.

    A token of weight ``t`` stays if fewer than ``top_k`` tokens, of at most ``top_p`` of the mass, weigh
    more; the least such ``t`` is searched for.
    """
    known = _Sorted(values)
    own = known.above(torch.full_like(values[:, :1], -1.0))[1].squeeze(-1)
    low = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    high = torch.full_like(low, _ONE)
    most, share = filters.top_k.double()[:, None], filters.top_p.double()[:, None]
    limit = torch.full_like(share, float("inf"))
    for round_ in range(_ROUNDS):
        gap = high - low
        keys = torch.stack([low + gap * part // 4 for part in (1, 2, 3)], dim=-1)
        count, mass = known.above(keys.int().view(torch.float32))
        record = torch.stack([count.float(), mass.float()], dim=-1)
        if not round_:  # the row's whole mass travels with the first
            record = torch.cat([record, own.float()[:, None, None].expand(-1, 1, 2)], dim=1)
        total = (yield record).double().sum(dim=0)
        if not round_:
            limit = torch.where(share < 1.0, share * total[:, 3:, 1], limit)
        fits = (total[:, :3, 0] < most) & (total[:, :3, 1] <= limit)
        high = torch.where(fits, keys, high[:, None]).amin(dim=-1)
        low = torch.where(fits, low[:, None], keys + 1).amax(dim=-1)
    edge = high.int().view(torch.float32)[:, None]
    ties = values == edge
    count, mass = known.above(edge)
    record = torch.stack([count[:, 0].double(), mass[:, 0], ties.sum(-1).double()], dim=-1)
    every = yield record
    above = every.sum(dim=0)
    room = most[:, 0] - above[:, 0]
    fitting = ((limit[:, 0] - above[:, 1]) / edge[:, 0].double().clamp(min=1e-300)).floor() + 1
    room = torch.minimum(room, fitting) - every[: shard.rank, :, 2].sum(dim=0)
    kept: torch.Tensor = (values > edge) | (ties & (ties.cumsum(-1) <= room[:, None]))
    return kept
