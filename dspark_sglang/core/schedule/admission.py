"""Best-first admission of drafted tokens by survival."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


def admission_order(survival: Float64) -> Int64:
    """All candidates ``(r, j)`` from most to least likely to survive.

    Ties go to the earlier position, then to the earlier request. Survival never rises along a
    request, so every prefix of this order holds a prefix of every request. The order reads
    survivals only, never drafted tokens: ``a_{r,j}`` depends on tokens before ``j``, which is what
    keeps admission non-anticipating.

    Args:
        survival: ``[R, gamma]``, non-increasing along each row.

    Returns:
        ``[R * gamma]`` flat indices ``r * gamma + j``.
    """
    requests, gamma = survival.shape
    # Column-major scan order is (position, request); a stable sort keeps it among ties.
    by_position = np.argsort(-survival.T.reshape(-1), kind="stable")
    position, request = np.divmod(by_position, requests) if requests else (by_position, by_position)
    order: Int64 = (request * gamma + position).astype(np.int64)
    return order


def lengths(order: Int64, budget: int, *, requests: int, gamma: int) -> Int64:
    """Drafted tokens each request sends to verification when ``budget`` are admitted.

    Args:
        order: the admission order.
        budget: tokens to admit over all requests.

    Returns:
        ``[R]`` int64 in 0..gamma.
    """
    if not requests:
        return np.zeros(0, dtype=np.int64)
    return np.bincount(order[: max(budget, 0)] // gamma, minlength=requests).astype(np.int64)
