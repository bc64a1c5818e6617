"""How many drafted tokens a step should verify.

With ``R`` requests, admitting the ``K`` likeliest drafted tokens gives an expected
``τ(K) = R + Σ a`` tokens from a forward of ``B = R + K``; throughput is ``Θ(K) = τ(K) / T(B)``.
"""

from __future__ import annotations

import numpy as np

from dspark_sglang.core.round import Float64, Int64
from dspark_sglang.core.schedule.cost_model import StepCost


def _throughput(gains: Float64, requests: int, cost: StepCost) -> Float64:
    tokens = np.arange(requests, requests + len(gains) + 1)
    result: Float64 = _expected(gains, requests) / cost.seconds(tokens)
    return result


def _expected(gains: Float64, requests: int) -> Float64:
    """τ of every budget from 0 to all."""
    expected = np.empty(len(gains) + 1)
    expected[0] = 0.0
    np.cumsum(gains, out=expected[1:])
    expected += requests
    return expected


def early_stop_budget(
    survival: Float64, order: Int64, cost: StepCost, buckets: Int64 | None = None
) -> int:
    """Algorithm 1: admit best first, stop at the first admission that does not raise Θ.

    Safe with the confidences of the step that is being scheduled: whether a token is admitted
    depends only on candidates that rank before it, never on what its own value leads to. A global
    maximum over the same step would not be (the paper's appendix A).

    With ``buckets``, what stops within one fills it: its rows run anyway. Also then a token is admitted
    by what ranks before it alone. (Giving up a bucket that hardly began would not be safe: its
    first tokens would be admitted by what later ones are worth.)

    Args:
        survival: ``[R, gamma]`` of the current step.
        order: its admission order.
        cost: the step cost; smooth, since the walk cannot cross a cliff.
        buckets: ascending numbers of tokens that forwards run with; None: every number runs as it is.
    """
    if not order.size:
        return 0
    requests = survival.shape[0]
    theta = _throughput(survival.T.reshape(-1)[order], requests, cost)
    falls = theta[1:] <= theta[:-1]
    first = int(falls.argmax())
    stop = first if falls[first] else len(order)
    if buckets is not None:
        stop = int(_run(np.array([requests + stop]), buckets)[0]) - requests
    return min(stop, len(order))


def global_budget(survival: Float64, cost: StepCost, buckets: Int64 | None = None) -> int:
    """The asynchronous form: the global argmax of Θ over confidences **two steps old**.

    With ``buckets``, a forward of ``B`` tokens runs and costs as the smallest bucket that holds
    it; the budget then fills the bucket it pays for. Must not be given anything of the current step.

    Args:
        survival: ``[R, gamma]`` carried from two steps earlier.
        cost: the step cost.
        buckets: ascending numbers of tokens that forwards run with; None: every number runs as it is.
    """
    gains = -np.sort(-survival.T.reshape(-1))
    if not gains.size:
        return 0
    requests = survival.shape[0]
    tokens = requests + np.arange(len(gains) + 1)
    if buckets is None:
        return int(np.argmax(_throughput(gains, requests, cost)))
    run = _run(tokens, buckets)
    best = int(np.argmax(_expected(gains, requests) / cost.seconds(run)))
    return int(min(run[best] - requests, len(gains)))


def _run(tokens: Int64, buckets: Int64) -> Int64:
    """The tokens that forwards of ``tokens`` run with."""
    place = np.searchsorted(buckets, tokens)
    # Beyond the last bucket a forward runs at its own size.
    return np.where(place < len(buckets), buckets[np.minimum(place, len(buckets) - 1)], tokens)


class History:
    """The last survivals that every slot was noted with.

    A slot is a row of the server's request pool; its generation tells one owner from the next, so
    that no request is budgeted by the confidences of the one that had its slot before. A
    request without a past of its own is taken for the mean of those that had one.
    """

    def __init__(self, *, gamma: int, slots: int = 0, smoothing: float = 0.1) -> None:
        """Args:
        gamma: drafted tokens a request.
        slots: rows of the request pool, as far as known; it grows.
        smoothing: weight of a step in the mean that stands for unknown requests.
        """
        self._values = np.zeros((slots, gamma))
        self._generations = np.full(slots, -1, dtype=np.int64)
        self._mean = np.ones(gamma)
        self._smoothing = smoothing

    def recall(self, slots: Int64, generations: Int64) -> Float64:
        """The survivals to budget a step by.

        Args:
            slots: ``[R]`` slot of each request, all different.
            generations: ``[R]`` generation of each slot, at least 0.

        Returns:
            ``[R, gamma]`` survivals, non-increasing along each row.
        """
        self._hold(slots)
        known = self._generations[slots] == generations
        earlier = np.where(known[:, None], self._values[slots], self._mean)
        if known.any():
            mean = earlier[known].mean(axis=0)
            self._mean += self._smoothing * (mean - self._mean)
        return earlier

    def note(self, slots: Int64, generations: Int64, survival: Float64) -> None:
        """Keep the survivals ``[R, gamma]`` of a step that is over.

        Where one is 0 nothing was drafted: what was known of that position stays.
        """
        self._hold(slots)
        known = self._generations[slots] == generations
        before = np.where(known[:, None], self._values[slots], self._mean)
        found = np.where(survival > 0.0, survival, before)
        self._values[slots] = np.minimum.accumulate(found, axis=1)
        self._generations[slots] = generations

    def _hold(self, slots: Int64) -> None:
        """Make room for these slots."""
        missing = int(slots.max(initial=-1)) + 1 - len(self._values)
        if missing > 0:
            missing = max(missing, len(self._values))
            self._values = np.pad(self._values, ((0, missing), (0, 0)))
            self._generations = np.pad(self._generations, (0, missing), constant_values=-1)
