"""Best-first admission of drafted tokens by survival."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

#: From so many values on the vectorised sort gains more than looking for ties costs.
_VECTORISED = 1024


def admission_order(survival: Float64) -> Int64:
    """All candidates ``(r, j)`` from most to least likely to survive.

    Ties go to the earlier position, then to the earlier request. Survival never rises along a
    request, so every prefix of this order holds a prefix of every request. The order reads
    survivals only, never drafted tokens: ``a_{r,j}`` depends on tokens before ``j``, which is what
    keeps admission non-anticipating.

    Args:
        survival: ``[R, gamma]``, non-increasing along each row.

    Returns:
        ``[R * gamma]`` candidates as ``j * R + r``, which index ``survival.T`` flattened.
    """
    # Ties stay in the order of the scan.
    values = -survival.T.reshape(-1)
    if len(values) < _VECTORISED:
        return np.argsort(values, kind="stable")
    # Several times faster, but ties come in any order. They are rare: then sort again.
    order = np.argsort(values)
    falling = values[order]
    tied = (falling[1:] == falling[:-1]).any()
    return np.argsort(values, kind="stable") if tied else order


def lengths(order: Int64, budget: int, *, requests: int) -> Int64:
    """Drafted tokens each request sends to verification when ``budget`` are admitted.

    Args:
        order: the admission order.
        budget: tokens to admit over all requests.
        requests: R.

    Returns:
        ``[R]`` int64 in 0..gamma.
    """
    if not requests:
        return np.zeros(0, dtype=np.int64)
    return np.bincount(order[: max(budget, 0)] % requests, minlength=requests)
