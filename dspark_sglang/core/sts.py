"""Sequential temperature scaling of confidences, and how far survival is from the truth.

Paper, section on calibration: for ``k = 1..gamma`` in turn, one temperature on the logit of
``c_k`` is chosen by grid search so that the cumulative product ``c_1 .. c_k`` has the smallest
expected calibration error against observed prefix survival, earlier temperatures held fixed.
Temperatures are positive, so the ranking of confidences at a position never changes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dspark_sglang.core.round import Float64

Floats = npt.NDArray[np.floating[Any]]

#: Candidate temperatures: from all but certain (1/20) to flat (20), 2% apart.
GRID: Float64 = np.geomspace(0.05, 20.0, 303)
BINS = 15


class STSFit(NamedTuple):
    """Fitted temperatures and the calibration error of survival at each position."""

    temperatures: Float64
    before: Float64
    after: Float64


def sigmoid(logits: Float64) -> Float64:
    """Logistic function."""
    result: Float64 = 0.5 * (1.0 + np.tanh(0.5 * logits))
    return result


def calibration_error(predicted: Floats, observed: Floats, *, bins: int = BINS) -> float:
    """Expected calibration error over equally wide bins of the prediction.

    Args:
        predicted: ``[N]`` in [0, 1].
        observed: ``[N]`` outcomes, 0 or 1 or probabilities.

    Returns:
        Mean over predictions of the distance between the mean prediction and the mean outcome of
        their bin; 0 for no predictions.
    """
    if not predicted.size:
        return 0.0
    index = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    gap = np.bincount(index, weights=predicted - observed, minlength=bins)
    return float(np.abs(gap).sum() / predicted.size)


def chance_error(predicted: Floats, observed: Floats, *, bins: int = BINS) -> float:
    """The calibration error that right predictions would show of as many outcomes, by chance.

    The sum of a bin's residuals is about normal with the sum of their squares as its variance, and a
    normal number is ``sqrt(2 / pi)`` standard deviations from 0 on average.

    Args:
        predicted, observed: as for :func:`calibration_error`.
    """
    if not predicted.size:
        return 0.0
    index = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    spread = np.bincount(index, weights=(predicted - observed) ** 2, minlength=bins)
    return float(np.sqrt(2.0 / np.pi * spread).sum() / predicted.size)


def area_under_curve(predicted: Floats, observed: Floats) -> float:
    """Area under the ROC curve: how well predictions rank, whatever their temperature.

    The chance that a random success was predicted above a random failure, ties counting half
    (Mann-Whitney). An outcome of ``o`` counts as ``o`` of a success and ``1 - o`` of a failure.

    Args:
        predicted: ``[N]`` scores.
        observed: ``[N]`` outcomes, 0 or 1 or probabilities.

    Returns:
        In [0, 1]; 0.5 where all succeed or all fail.
    """
    _, group = np.unique(predicted, return_inverse=True)
    won = np.bincount(group, weights=observed)
    lost = np.bincount(group, weights=1.0 - observed)
    pairs = won.sum() * lost.sum()
    if not pairs > 0:
        return 0.5
    below = np.cumsum(lost) - lost
    return float((won * (below + 0.5 * lost)).sum() / pairs)


def log_loss(predicted: Floats, observed: Floats) -> float:
    """Mean cross-entropy of predictions ``[N]`` in [0, 1] against outcomes, 0 for none."""
    if not predicted.size:
        return 0.0
    safe = np.clip(predicted, 1e-9, 1 - 1e-9)
    return float(-(observed * np.log(safe) + (1 - observed) * np.log1p(-safe)).mean())


def fit_sts(
    logits: Float64,
    acceptance: Float64,
    *,
    verified: npt.NDArray[np.bool_] | None = None,
    grid: Float64 = GRID,
) -> STSFit:
    """Fit one temperature a position.

    A flat prediction near the mean has next to no calibration error and says nothing. So only
    temperatures count under which survival is predicted no worse, in cross-entropy, than without;
    and of those whose error differs from the smallest by no more than chance, the one of least
    cross-entropy.

    Args:
        logits: ``[N, gamma]`` uncalibrated confidence logits of ``N`` blocks.
        acceptance: ``[N, gamma]`` chance that each drafted token is accepted given that those
            before it were: 0 or 1 as serving decided, or ``1 - ½‖p - q‖₁``.
        verified: ``[N, gamma]`` whether a token was verified, a prefix of each row; the others tell
            nothing. None: all were.
        grid: candidate temperatures.

    Returns:
        Temperatures and the error of survival before and after, on these blocks.
    """
    gamma = logits.shape[1]
    seen = np.ones(logits.shape, dtype=bool) if verified is None else verified
    truth = np.cumprod(acceptance, axis=1)
    plain = np.cumprod(sigmoid(logits), axis=1)
    product = np.ones(len(logits))
    temperatures, after = np.ones(gamma), np.zeros(gamma)
    for k in range(gamma):
        own = seen[:, k]
        if not own.any():  # nothing is known of it: it keeps its scale
            product = product * sigmoid(logits[:, k])
            continue
        before, scores, target = product[own], logits[own, k], truth[own, k]
        limit = log_loss(before * sigmoid(scores), target) + 1e-12
        best = _best(before, scores, target, grid=grid, limit=limit)
        temperatures[k] = grid[best]
        product = product * sigmoid(logits[:, k] / grid[best])
        after[k] = calibration_error(product[own], target)
    unscaled = [calibration_error(plain[seen[:, k], k], truth[seen[:, k], k]) for k in range(gamma)]
    return STSFit(temperatures=temperatures, before=np.array(unscaled), after=after)


def _best(before: Float64, scores: Float64, target: Float64, *, grid: Float64, limit: float) -> int:
    """Index of the temperature of one position, see :func:`fit_sts`.

    Args:
        before: ``[N]`` survival up to the position before.
        scores: ``[N]`` logits of this one.
        target: ``[N]`` observed survival.
        limit: largest cross-entropy of a temperature that counts.
    """
    survival = [before * sigmoid(scores / temperature) for temperature in grid]
    losses = np.array([log_loss(own, target) for own in survival])
    errors = np.array([calibration_error(own, target) for own in survival])
    errors[losses > limit] = np.inf
    if not np.isfinite(errors).any():  # 1 itself lies between two candidates
        return int(np.argmin(np.abs(np.log(grid))))
    least = int(np.argmin(errors))
    close = errors <= errors[least] + chance_error(survival[least], target)
    return int(np.argmin(np.where(close, losses, np.inf)))


def survival_errors(logits: Float64, acceptance: Float64, temperatures: Float64) -> Float64:
    """Calibration error of survival at each position under given temperatures, ``[gamma]``."""
    product = np.cumprod(sigmoid(logits / temperatures), axis=1)
    truth = np.cumprod(acceptance, axis=1)
    return np.array([calibration_error(product[:, k], truth[:, k]) for k in range(logits.shape[1])])
