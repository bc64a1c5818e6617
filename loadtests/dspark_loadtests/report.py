"""From records to a summary.

Percentiles interpolate linearly between neighbouring ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from dspark_loadtests.acceptance import Acceptance, ServerIdentity
from dspark_loadtests.schema import (
    SCHEMA_VERSION,
    BenchResult,
    Counts,
    Distribution,
    ErrorCount,
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
from dspark_sglang.artifacts import read_artifact, write_json
from dspark_sglang.errors import ArtifactError

_MAX_ERRORS = 20


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """The ``fraction`` quantile of a sorted, non-empty sample."""
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def distribution(values: Iterable[float | None]) -> Distribution | None:
    """Describe the values that are there; None when none is."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    return Distribution(
        count=len(ordered),
        mean=math.fsum(ordered) / len(ordered),
        min=ordered[0],
        p50=percentile(ordered, 0.50),
        p90=percentile(ordered, 0.90),
        p99=percentile(ordered, 0.99),
        max=ordered[-1],
    )


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """The steady part of a run, on the recorder's clock: what arrived in it, of whichever request."""

    begin: float
    end: float
    tokens: float
    completed: int

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.begin


def tokens_in(record: RequestRecord, begin: float, end: float) -> float:
    """Tokens of a request that arrived in ``[begin, end)``.

    Where the server tells usage only at the end, its tokens count evenly over the chunks.
    """
    arrivals = record.arrivals
    tokens: Sequence[float] = record.chunk_tokens
    if not tokens and record.completion_tokens and arrivals:
        tokens = [record.completion_tokens / len(arrivals)] * len(arrivals)
    pairs = zip(arrivals, tokens, strict=False)
    return math.fsum(count for at, count in pairs if begin <= at < end)


def window_of(records: Sequence[RequestRecord], begin: float, end: float) -> Window:
    """What all requests of a run, measured or not, brought in ``[begin, end)``."""
    return Window(
        begin=begin,
        end=end,
        tokens=math.fsum(tokens_in(record, begin, end) for record in records),
        completed=sum(
            record.outcome is Outcome.COMPLETED and begin <= record.ended_at < end
            for record in records
        ),
    )


def itl_ms(record: RequestRecord) -> list[float]:
    """One sample for each token after the first chunk: its chunk's gap over the chunk's tokens."""
    found: list[float] = []
    for gap, tokens in zip(record.gaps_s, record.chunk_tokens[1:], strict=False):
        found += [gap * 1e3 / tokens] * tokens if tokens > 0 else []
    return found


def latency(completed: Sequence[RequestRecord]) -> Latency:
    """Every latency of completed requests."""
    return Latency(
        ttft_ms=distribution(_ms(record.ttft_s) for record in completed),
        tpot_ms=distribution(_ms(record.tpot_s) for record in completed),
        inter_chunk_ms=distribution(_ms(gap) for record in completed for gap in record.gaps_s),
        e2e_ms=distribution(_ms(record.e2e_s) for record in completed),
        itl_ms=distribution(each for record in completed for each in itl_ms(record)),
        ttft_from_schedule_ms=distribution(_ms(r.ttft_from_schedule_s) for r in completed),
    )


def _counts(
    records: Sequence[RequestRecord],
    completed: Sequence[RequestRecord],
    failed: Sequence[RequestRecord],
) -> Counts:
    return Counts(
        sent=len(records),
        completed=len(completed),
        failed=len(failed),
        unfinished=len(records) - len(completed) - len(failed),
        empty=sum(record.ttft_s is None for record in completed),
    )


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
        window: what rates are taken over; None: from the first send to the last end.
    """
    completed = [record for record in records if record.outcome is Outcome.COMPLETED]
    failed = [record for record in records if record.outcome is Outcome.FAILED]
    duration_s = _duration_s(records) if window is None else window.seconds
    reasons = Counter(record.error or "no reason recorded" for record in failed)
    return Summary(
        started_at=started_at,
        settings=settings,
        server=server,
        counts=_counts(records, completed, failed),
        latency=latency(completed),
        tokens=_tokens(records, completed),
        throughput=_throughput(completed, duration_s, window),
        goodput=_goodput(records, settings.slo, duration_s),
        acceptance=acceptance,
        errors=[
            ErrorCount(message=text, count=count)
            for text, count in reasons.most_common(_MAX_ERRORS)
        ],
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _per_s(amount: float, duration_s: float) -> float:
    return amount / duration_s if duration_s > 0 else 0.0


def _duration_s(records: Sequence[RequestRecord]) -> float:
    if not records:
        return 0.0
    return max(record.ended_at for record in records) - min(record.sent_at for record in records)


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
    completed: Sequence[RequestRecord], duration_s: float, window: Window | None
) -> Throughput:
    # A zero (all chunks in one network read) is below the clock's reach, not infinite speed.
    speeds = sorted(1 / record.tpot_s for record in completed if record.tpot_s)
    output: float = sum(record.completion_tokens or 0 for record in completed)
    ended = len(completed)
    if window is not None:
        output, ended = window.tokens, window.completed
    return Throughput(
        duration_s=duration_s,
        requests_per_s=_per_s(ended, duration_s),
        output_tok_s=_per_s(output, duration_s),
        user_tok_s=UserSpeed(
            mean=math.fsum(speeds) / len(speeds),
            p50=percentile(speeds, 0.50),
            p90=percentile(speeds, 0.10),
            p99=percentile(speeds, 0.01),
        )
        if speeds
        else None,
    )


def write_summary(summary: Summary, path: Path) -> None:
    """Write the summary as indented JSON, creating the folder."""
    write_json(path, summary)


def read_summary(path: Path) -> Summary:
    """Read what :func:`write_summary` wrote.

    Raises:
        ArtifactError: the file is missing, damaged, or of another schema version.
    """
    expected = f"a load-test summary of schema_version {SCHEMA_VERSION}"
    fix = "Run the load test again with this version of dspark-sglang."
    try:
        summary = msgspec.json.decode(path.read_bytes(), type=Summary)
    except (OSError, msgspec.DecodeError) as error:
        raise ArtifactError(f"Cannot read {path}: {error}.", expected=expected, fix=fix) from error
    if summary.schema_version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema_version {summary.schema_version}.", expected=expected, fix=fix
        )
    return summary


def read_result(path: Path) -> BenchResult:
    """Read the ``result.json`` of ``dspark bench``.

    Raises:
        ArtifactError: the file is missing, damaged, or of another kind or schema.
    """
    return read_artifact(path, BenchResult, "a result", "Make one with `dspark bench`.")
