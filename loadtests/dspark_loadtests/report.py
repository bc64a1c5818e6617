"""From records to a summary, with intervals, and from a summary to lines for a person.

Percentiles interpolate linearly between neighbouring ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dspark_loadtests.acceptance import Acceptance, ServerIdentity
from dspark_loadtests.schema import (
    Counts,
    Distribution,
    ErrorCount,
    Estimate,
    Goodput,
    Latency,
    RunSettings,
    Slo,
    Summary,
    Throughput,
    Tokens,
    UserSpeed,
)
from dspark_loadtests.stream import Outcome, RequestRecord

_MAX_ERRORS = 20
_DRAWS = 1000
#: Values drawn at once, which bounds the memory.
_AT_ONCE = 2_000_000
#: Neighbouring seconds share requests, so that blocks of them are drawn, not seconds.
_BLOCK_S = 5.0


def distribution(values: Iterable[float | None]) -> Distribution | None:
    """Describe the values that are there; None when none is."""
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return None
    least, p50, p90, p99, most = np.percentile(known, [0, 50, 90, 99, 100]).tolist()
    return Distribution(
        count=len(known), mean=float(known.mean()), min=least, p50=p50, p90=p90, p99=p99, max=most
    )


class Window(NamedTuple):
    """The steady part of a run, on the recorder's clock, and every request of the run, measured or not."""

    begin: float
    end: float
    records: Sequence[RequestRecord]


def chunk_tokens(record: RequestRecord) -> list[float]:
    """Tokens of each content chunk; evenly spread where the server tells usage only at the end."""
    count = record.content_chunks
    if not record.chunk_tokens:
        return [(record.completion_tokens or 0) / max(1, count)] * count
    return [*record.chunk_tokens, *[0] * (count - len(record.chunk_tokens))]


def tokens_in(record: RequestRecord, begin: float, end: float) -> float:
    """Tokens of a request that arrived in ``[begin, end)``."""
    pairs = zip(record.arrivals, chunk_tokens(record), strict=True)
    return math.fsum(count for at, count in pairs if begin <= at < end)


def _interval(drawn: np.ndarray, value: float) -> Estimate:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(low=float(low), value=value, high=float(high))


def over_requests(
    values: Sequence[float], statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> Estimate | None:
    """A statistic over the last axis with its interval; None for fewer than two values."""
    if len(values) < 2:
        return None
    found, rng = np.asarray(values), np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // len(found))
    drawn = [
        statistic(found[rng.integers(0, len(found), (min(rows, _DRAWS - done), len(found)))])
        for done in range(0, _DRAWS, rows)
    ]
    return _interval(np.concatenate(drawn), float(statistic(found)))


def _throughput_estimate(window: Window, seed: int = 0) -> Estimate | None:
    """Tokens a second, by blocks of the window that follow one another."""
    seconds = window.end - window.begin
    count = min(40, int(seconds // 0.5))
    if count < 4:
        return None
    edges = np.linspace(window.begin, window.end, count + 1)
    brought = np.zeros(count)
    for record in window.records:
        brought += np.histogram(record.arrivals, edges, weights=chunk_tokens(record))[0]
    length = max(1, min(count // 2, round(_BLOCK_S * count / seconds)))
    starts = np.random.default_rng(seed).integers(0, count, (_DRAWS, -(-count // length)))
    # circular blocks, so that every second is drawn as often as any other
    chosen = (starts[..., None] + np.arange(length)) % count
    drawn = brought[chosen.reshape(_DRAWS, -1)[:, :count]].mean(axis=1) * count / seconds
    return _interval(drawn, float(brought.sum() / seconds))


def estimates(measured: Sequence[RequestRecord], window: Window, slo: Slo) -> dict[str, Estimate]:
    """The metrics a regression gate compares, each with its interval; those without enough data are left out."""
    done = [record for record in measured if record.outcome is Outcome.COMPLETED]
    ttft = [r.ttft_from_schedule_s * 1e3 for r in done if r.ttft_from_schedule_s is not None]
    tpot = [r.tpot_s * 1e3 for r in done if r.tpot_s is not None]

    def quantile(fraction: float) -> Callable[[np.ndarray], np.ndarray]:
        return lambda sample: np.asarray(np.quantile(sample, fraction, axis=-1))

    def mean(sample: np.ndarray) -> np.ndarray:
        return np.asarray(sample.mean(axis=-1))

    # The same draw of requests for all: what one resample says it says of one set of requests.
    found = {
        "output_tok_s": _throughput_estimate(window),
        "ttft_ms_p50": over_requests(ttft, quantile(0.5)),
        "ttft_ms_p99": over_requests(ttft, quantile(0.99)),
        "tpot_ms_mean": over_requests(tpot, mean),
        "tpot_ms_p99": over_requests(tpot, quantile(0.99)),
        "e2e_ms_p50": over_requests([r.e2e_s * 1e3 for r in done], quantile(0.5)),
        "goodput_ratio": over_requests([float(slo.met_by(r)) for r in measured], mean),
    }
    return {name: value for name, value in found.items() if value is not None}


def _goodput(records: Sequence[RequestRecord], slo: Slo, duration_s: float) -> Goodput:
    good = sum(slo.met_by(record) for record in records)
    note = ""
    ttfts = [r.ttft_from_schedule_s for r in records if r.ttft_from_schedule_s is not None]
    if not good and ttfts:
        tpots = [record.tpot_s for record in records if record.tpot_s is not None]
        fastest = f"{min(ttfts) * 1e3:.0f} ms to its first token"
        speed = f", {min(tpots) * 1e3:.1f} ms a token" if tpots else ""
        note = f"no request met the limits; the fastest took {fastest}{speed}"
    return Goodput(
        slo=slo,
        good=good,
        sent=len(records),
        ratio=good / len(records) if records else None,
        per_s=_per_s(good, duration_s),
        note=note,
    )


def summarize(
    records: Sequence[RequestRecord],
    *,
    settings: RunSettings,
    started_at: str,
    server: ServerIdentity,
    acceptance: Acceptance,
    window: Window | None = None,
) -> Summary:
    """Aggregate one run.

    Args:
        records: the measured requests.
        started_at: ISO 8601 in UTC.
        window: what rates are taken over; None: completed requests, from the first send to the last end.
    """
    completed = [record for record in records if record.outcome is Outcome.COMPLETED]
    failed = [record for record in records if record.outcome is Outcome.FAILED]
    reasons = Counter(record.error or "no reason recorded" for record in failed)
    rate = _throughput(records, completed, window)
    return Summary(
        started_at=started_at,
        settings=settings,
        server=server,
        counts=Counts(
            sent=len(records),
            completed=len(completed),
            failed=len(failed),
            unfinished=len(records) - len(completed) - len(failed),
            empty=sum(record.ttft_s is None for record in completed),
            unmeasured=0 if window is None else len(window.records) - len(records),
        ),
        latency=Latency(
            ttft_ms=distribution(_ms(record.ttft_s) for record in completed),
            tpot_ms=distribution(_ms(record.tpot_s) for record in completed),
            inter_chunk_ms=distribution(gap * 1e3 for r in completed for gap in r.gaps_s),
            e2e_ms=distribution(record.e2e_s * 1e3 for record in completed),
            itl_ms=distribution(each for record in completed for each in itl_ms(record)),
            ttft_from_schedule_ms=distribution(_ms(r.ttft_from_schedule_s) for r in completed),
        ),
        tokens=_tokens(records, completed),
        throughput=rate,
        goodput=_goodput(records, settings.slo, rate.duration_s),
        acceptance=acceptance,
        errors=[
            ErrorCount(message=text, count=count)
            for text, count in reasons.most_common(_MAX_ERRORS)
        ],
        estimates={} if window is None else estimates(records, window, settings.slo),
    )


def itl_ms(record: RequestRecord) -> list[float]:
    """One sample for each token after the first chunk: its chunk's gap over the chunk's tokens."""
    found: list[float] = []
    for gap, tokens in zip(record.gaps_s, record.chunk_tokens[1:], strict=False):
        found += [gap * 1e3 / tokens] * tokens if tokens > 0 else []
    return found


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _per_s(amount: float, duration_s: float) -> float:
    return amount / duration_s if duration_s > 0 else 0.0


def _tokens(records: Sequence[RequestRecord], completed: Sequence[RequestRecord]) -> Tokens:
    completion = sum(record.completion_tokens or 0 for record in completed)
    chunks = sum(record.content_chunks for record in completed)
    cached = [record.cached_tokens for record in completed if record.cached_tokens is not None]
    return Tokens(
        prompt=sum(record.prompt_tokens or 0 for record in completed),
        completion=completion,
        partial=sum(record.completion_tokens or 0 for record in records) - completion,
        cached=sum(cached) if completed and len(cached) == len(completed) else None,
        per_chunk=completion / chunks if chunks else None,
    )


def _throughput(
    records: Sequence[RequestRecord], completed: Sequence[RequestRecord], window: Window | None
) -> Throughput:
    if window is None:
        begin = min((record.sent_at for record in records), default=0.0)
        end = max((record.ended_at for record in records), default=0.0)
        output: float = sum(record.completion_tokens or 0 for record in completed)
        ended = len(completed)
    else:
        begin, end = window.begin, window.end
        output = math.fsum(tokens_in(record, begin, end) for record in window.records)
        ended = sum(
            record.outcome is Outcome.COMPLETED and begin <= record.ended_at < end
            for record in window.records
        )
    # A zero (all chunks in one network read) is below the clock's reach, not infinite speed.
    speeds = distribution(1 / record.tpot_s for record in completed if record.tpot_s)
    slow = distribution(-1 / record.tpot_s for record in completed if record.tpot_s)
    return Throughput(
        duration_s=end - begin,
        requests_per_s=_per_s(ended, end - begin),
        output_tok_s=_per_s(output, end - begin),
        user_tok_s=None
        if speeds is None or slow is None
        else UserSpeed(mean=speeds.mean, p50=speeds.p50, p90=-slow.p90, p99=-slow.p99),
    )


# --- for a person ----------------------------------------------------------------------------------------


def print_summaries(summaries: Sequence[Summary], console: Console) -> None:
    """A row for each stage, and below it what a table cannot hold."""
    settings = summaries[0].settings
    table = Table(
        title=f"{Path(settings.model).name} at {settings.host}",
        caption="tok/s of all and of one user; TTFT from schedule and TPOT in ms; accepted length; verified a request",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    headings = ("stage", "sent", "fail", "tok/s", "user", "TTFT", "p99", "TPOT", "p99", "good", "acc", "ver")  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "stage" else "right", no_wrap=True)
    for one in summaries:
        good, speed = one.goodput.ratio, one.throughput.user_tok_s
        ttft, tpot = one.latency.ttft_from_schedule_ms, one.latency.tpot_ms
        table.add_row(
            (one.name or "run") + ("" if one.complete else " (cut)"),
            str(one.counts.sent),
            str(one.counts.failed),
            _number(one.throughput.output_tok_s, 1),
            _number(speed.mean if speed else None, 1),
            _number(ttft.p50 if ttft else None, 0),
            _number(ttft.p99 if ttft else None, 0),
            _number(tpot.p50 if tpot else None, 1),
            _number(tpot.p99 if tpot else None, 1),
            "-" if good is None else f"{good:.0%}",
            _number(one.acceptance.accepted_length, 2),
            _number(one.acceptance.budget, 2),
        )
    console.print(table)
    for one in summaries:
        counts, acceptance = one.counts, one.acceptance
        lines = [
            f"{counts.sent} sent = {counts.completed} completed + {counts.failed} failed + "
            f"{counts.unfinished} unfinished, in {one.throughput.duration_s:.2f} s",
            f"no accepted length: {acceptance.note}"
            if acceptance.accepted_length is None
            else f"{acceptance.accepted_length:.3f} tokens a round, bonus included "
            f"({acceptance.source}: {acceptance.note})",
            *([one.goodput.note] if one.goodput.note else []),
            *(f"{error.count} x {error.message}" for error in one.errors),
        ]
        for line in lines:
            # Plain text: error messages and model names may hold square brackets.
            text = f"{one.name}: {line}" if one.name else line
            console.print(text, markup=False, highlight=False, soft_wrap=True)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def verdict(summary: Summary) -> tuple[bool, str]:
    """Whether the run passed, and the line that says so."""
    counts = summary.counts
    if counts.failed:
        first = summary.errors[0].message
        return (
            False,
            f"FAILED: {counts.failed} of {counts.sent} requests failed, most often: {first}",
        )
    if not counts.completed:
        return False, (
            f"FAILED: no request completed ({counts.sent} sent), so nothing was measured. "
            "Run longer, or allow more time to drain."
        )
    return True, f"OK: {counts.completed} of {counts.sent} requests completed, none failed"
