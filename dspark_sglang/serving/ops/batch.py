"""Parameters of a batch's requests as the kernels read them: one number a request."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dspark_kernels.accept import Filters
from dspark_sglang.serving.ops.rows import SampledRows

#: As a top_k: more than any vocabulary, filters nothing.
_ALL_TOKENS = 2**31 - 1


class Batch(NamedTuple):
    """Parameters spread over all requests of a batch, greedy ones included."""

    #: What they were spread from; None: all requests are greedy.
    rows: SampledRows | None
    #: ``[R]`` float32; 0: greedy.
    temperatures: torch.Tensor
    #: ``[R]`` uint8: whether the law a request drafts from is kept for acceptance.
    recorded: torch.Tensor
    #: None where no request has any.
    filters: Filters | None
    #: ``[R]`` int64 and int32: seeds, and whether a request draws by its own; None: none does.
    seeds: torch.Tensor | None
    coupled: torch.Tensor | None

    @classmethod
    def of(cls, rows: SampledRows | None, requests: int, device: torch.device) -> Batch:
        """Spread the parameters of ``rows``."""
        if rows is None:
            greedy = torch.zeros(requests, device=device)
            return cls(None, greedy, greedy.to(torch.uint8), None, None, None)
        own = rows.seeds is not None
        ones = torch.ones(len(rows.index), dtype=torch.int32, device=device)
        return cls(
            rows=rows,
            temperatures=_spread(rows.temperatures, rows.index, requests, 0.0),
            recorded=torch.full((requests,), not own, dtype=torch.uint8, device=device),
            filters=_filters(rows, requests),
            seeds=_spread(rows.seeds, rows.index, requests, 0) if rows.seeds is not None else None,
            coupled=_spread(ones, rows.index, requests, 0) if own else None,
        )


def _spread(values: torch.Tensor, index: torch.Tensor, count: int, rest: float) -> torch.Tensor:
    """``[count]`` with ``values`` at ``index`` and ``rest`` elsewhere."""
    whole = torch.full((count,), rest, dtype=values.dtype, device=values.device)
    return whole.index_copy_(0, index, values)


def _filters(rows: SampledRows, requests: int) -> Filters | None:
    if rows.top_k is None and rows.top_p is None and rows.min_p is None:
        return None
    device = rows.index.device

    def whole(values: torch.Tensor | None, rest: float, dtype: torch.dtype) -> torch.Tensor:
        if values is None:
            return torch.full((requests,), rest, dtype=dtype, device=device)
        return _spread(values.to(dtype), rows.index, requests, rest)

    return Filters(
        top_k=whole(rows.top_k, _ALL_TOKENS, torch.int32),
        top_p=whole(rows.top_p, 1.0, torch.float32),
        min_p=whole(rows.min_p, 0.0, torch.float32),
    )
