"""Survival, the chance that the first ``j`` drafted tokens are all accepted, and best-first admission by it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dspark_sglang.core.round import Float64, Int64
from dspark_sglang.errors import NumericsError


def check(confidence: npt.NDArray[np.floating]) -> None:
    """Say what is wrong with numbers that are no confidences.

    Raises:
        NumericsError: one that is NaN or outside [0, 1].
    """
    # NaN is neither.
    if not confidence.size or (
        np.minimum.reduce(confidence, axis=None) >= 0.0
        and np.maximum.reduce(confidence, axis=None) <= 1.0
    ):
        return
    bad = confidence[~((confidence >= 0.0) & (confidence <= 1.0))][0]
    raise NumericsError(
        f"A drafter's confidence is {bad}.",
        expected="values in [0, 1]",
        fix="Check the drafter's confidence_head weights and the STS file with `dspark verify`.",
    )


def survival(confidence: npt.NDArray[np.floating]) -> Float64:
    """``a_{r,j} = prod_{i <= j} c_{r,i}``, non-increasing in ``j`` bit for bit.

    The product is taken left to right: for ``0 <= c <= 1`` the exact ``a * c`` is at most ``a``,
    and rounding to nearest cannot carry it above ``a``, which is representable. A tree-shaped
    (parallel) product has no such guarantee, and admission relies on it.

    Args:
        confidence: ``[R, gamma]`` in [0, 1].

    Raises:
        NumericsError: a confidence that is NaN or outside [0, 1].
    """
    # Positions first: that is the order in which admission scans candidates.
    values = np.array(np.asarray(confidence).T, dtype=np.float64, order="C")
    check(values.T)
    # An accumulation is sequential by definition: one product after the other, along each request.
    products: Float64 = np.multiply.accumulate(values, axis=0)
    return products.T


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
