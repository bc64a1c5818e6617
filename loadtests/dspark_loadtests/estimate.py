"""How sure a stage's numbers are: bootstrap intervals over requests, and over seconds for throughput."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_loadtests.report import tokens_in
from dspark_loadtests.schema import Bin, Estimate, Slo
from dspark_loadtests.stream import Outcome, RequestRecord

DRAWS = 1000
#: Neighbouring seconds share requests, so that blocks of them are drawn, not seconds.
_BLOCK_S = 5.0


def _interval(drawn: np.ndarray, value: float) -> Estimate:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(low=float(low), value=value, high=float(high))


def _over_requests(values: Sequence[float], fraction: float | None, seed: int) -> Estimate | None:
    """Of a mean (``fraction`` None) or a quantile."""
    if len(values) < 2:
        return None
    found = np.asarray(values)
    chosen = np.random.default_rng(seed).integers(0, len(found), (DRAWS, len(found)))
    if fraction is None:
        return _interval(found[chosen].mean(axis=1), float(found.mean()))
    drawn = np.quantile(found[chosen], fraction, axis=1)
    return _interval(drawn, float(np.quantile(found, fraction)))


def _throughput(
    records: Sequence[RequestRecord], begin: float, end: float, seed: int
) -> Estimate | None:
    """Tokens a second, by blocks of the window that follow one another."""
    count = min(40, int((end - begin) // 0.5))
    if count < 4:
        return None
    edges = np.linspace(begin, end, count + 1)
    width = (end - begin) / count
    brought = np.zeros(count)
    for record in records:
        for place in range(count):
            if record.sent_at < edges[place + 1] and record.ended_at >= edges[place]:
                brought[place] += tokens_in(record, float(edges[place]), float(edges[place + 1]))
    length = max(1, min(count // 2, round(_BLOCK_S / width)))
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, count, (DRAWS, -(-count // length)))
    # circular blocks, so that every second is drawn as often as any other
    chosen = (starts[..., None] + np.arange(length)) % count
    drawn = brought[chosen.reshape(DRAWS, -1)[:, :count]].mean(axis=1) / width
    return _interval(drawn, float(brought.mean() / width))


def estimates(
    measured: Sequence[RequestRecord],
    every: Sequence[RequestRecord],
    *,
    begin: float,
    end: float,
    slo: Slo,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The metrics a regression gate compares, each with its interval; those without enough data are left out.

    Args:
        measured: requests sent in the window.
        every: whatever brought tokens in it.
    """
    done = [record for record in measured if record.outcome is Outcome.COMPLETED]
    ttft = [r.ttft_from_schedule_s * 1e3 for r in done if r.ttft_from_schedule_s is not None]
    tpot = [r.tpot_s * 1e3 for r in done if r.tpot_s is not None]
    good = [float(slo.met_by(record)) for record in measured]
    # The same draw of requests for all: what one resample says it says of one set of requests.
    found = {
        "output_tok_s": _throughput(every, begin, end, seed),
        "ttft_ms_p50": _over_requests(ttft, 0.5, seed),
        "ttft_ms_p99": _over_requests(ttft, 0.99, seed),
        "tpot_ms_mean": _over_requests(tpot, None, seed),
        "tpot_ms_p99": _over_requests(tpot, 0.99, seed),
        "e2e_ms_p50": _over_requests([r.e2e_s * 1e3 for r in done], 0.5, seed),
        "goodput_ratio": _over_requests(good, None, seed),
    }
    return {name: value for name, value in found.items() if value is not None}


def timeline(records: Sequence[RequestRecord], begin: float, end: float) -> list[Bin]:
    """Tokens, sends and requests in flight by the second, from the load's first send to its end."""
    found = []
    at = begin
    while at < end:
        until = min(at + 1.0, end)
        open_ = [r for r in records if r.sent_at < until and r.ended_at >= at]
        found.append(
            Bin(
                at_s=round(at - begin, 3),
                tokens=round(sum(tokens_in(record, at, until) for record in open_)),
                sent=sum(at <= record.sent_at < until for record in records),
                in_flight=sum(r.sent_at <= at < r.ended_at for r in open_),
            )
        )
        at = until
    return found
