"""From records to a summary: one versioned JSON document.

Percentiles interpolate linearly between neighbouring ranks. Latencies are milliseconds over
completed requests; counts and goodput are over requests *sent*, so a server cannot improve
its score by failing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from dspark_loadtests.acceptance import Acceptance, ServerIdentity
from dspark_loadtests.stream import Outcome, RequestRecord
from dspark_sglang.errors import ArtifactError

SCHEMA_VERSION = 1
_MAX_ERRORS = 20


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What a request must meet to count as good, in milliseconds."""

    ttft_ms: float
    tpot_ms: float

    def met_by(self, record: RequestRecord) -> bool:
        """Whether ``record`` completed, within both limits.

        A single-chunk answer has no time per token and needs only the first limit.
        """
        if record.outcome is not Outcome.COMPLETED or record.ttft_s is None:
            return False
        if record.ttft_s * 1e3 > self.ttft_ms:
            return False
        return record.tpot_s is None or record.tpot_s * 1e3 <= self.tpot_ms


class RunSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the load was made."""

    host: str
    model: str
    temperature: float
    max_tokens: int
    users: int
    seed: int
    slo: Slo
    arrival: str = "closed_loop"


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """A sample in the unit of its field name."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p99: float
    max: float


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """``sent == completed + failed + unfinished``; ``empty`` are completed without any text."""

    sent: int
    completed: int
    failed: int
    unfinished: int
    empty: int


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Over completed requests; None where no request has the quantity."""

    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    inter_chunk_ms: Distribution | None
    e2e_ms: Distribution | None


class UserSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens a second that one user sees while an answer streams: 1000 / TPOT.

    The percentiles name the slow side: 99 of 100 requests are at least as fast as ``p99``.
    """

    mean: float
    p50: float
    p90: float
    p99: float


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """Sums. ``partial`` are tokens of failed and unfinished requests, in no other number."""

    prompt: int
    completion: int
    partial: int
    #: None unless every completed request was told its cached tokens.
    cached: int | None
    #: Completion tokens for each content chunk; not the accepted length.
    per_chunk: float | None


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """``duration_s`` runs from the first send to the last end, the drain included."""

    duration_s: float
    requests_per_s: float
    output_tok_s: float
    user_tok_s: UserSpeed | None


class Goodput(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that completed within the SLO, against requests sent."""

    slo: Slo
    good: int
    sent: int
    ratio: float | None
    per_s: float


class ErrorCount(msgspec.Struct, frozen=True, kw_only=True):
    """One error message and how many requests it ended."""

    message: str
    count: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    schema_version: int = SCHEMA_VERSION
    kind: str = "dspark-loadtest-summary"
    started_at: str
    settings: RunSettings
    server: ServerIdentity
    counts: Counts
    latency: Latency
    tokens: Tokens
    throughput: Throughput
    goodput: Goodput
    acceptance: Acceptance
    #: The most frequent ones first, at most 20.
    errors: list[ErrorCount]


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


def summarize(
    records: Sequence[RequestRecord],
    *,
    settings: RunSettings,
    started_at: str,
    server: ServerIdentity,
    acceptance: Acceptance,
) -> Summary:
    """Aggregate one run. ``started_at`` is ISO 8601 in UTC."""
    completed = [record for record in records if record.outcome is Outcome.COMPLETED]
    failed = [record for record in records if record.outcome is Outcome.FAILED]
    duration_s = _duration_s(records)
    good = sum(settings.slo.met_by(record) for record in records)
    reasons = Counter(record.error or "no reason recorded" for record in failed)
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
        ),
        latency=Latency(
            ttft_ms=distribution(_ms(record.ttft_s) for record in completed),
            tpot_ms=distribution(_ms(record.tpot_s) for record in completed),
            inter_chunk_ms=distribution(_ms(gap) for record in completed for gap in record.gaps_s),
            e2e_ms=distribution(_ms(record.e2e_s) for record in completed),
        ),
        tokens=_tokens(records, completed),
        throughput=_throughput(completed, duration_s),
        goodput=Goodput(
            slo=settings.slo,
            good=good,
            sent=len(records),
            ratio=good / len(records) if records else None,
            per_s=_per_s(good, duration_s),
        ),
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


def _throughput(completed: Sequence[RequestRecord], duration_s: float) -> Throughput:
    # A zero (all chunks in one network read) is below the clock's reach, not infinite speed.
    speeds = sorted(1 / record.tpot_s for record in completed if record.tpot_s)
    output = sum(record.completion_tokens or 0 for record in completed)
    return Throughput(
        duration_s=duration_s,
        requests_per_s=_per_s(len(completed), duration_s),
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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")


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
