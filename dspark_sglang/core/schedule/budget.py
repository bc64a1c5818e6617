"""How many drafted tokens a step should verify.

With ``R`` requests, admitting the ``K`` likeliest drafted tokens gives an expected
``τ(K) = R + Σ a`` tokens from a forward of ``B = R + K``; throughput is ``Θ(K) = τ(K) / T(B)``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dspark_sglang.core.schedule.cost_model import StepCost

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


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
