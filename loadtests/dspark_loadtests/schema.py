"""The result of a load test: one versioned JSON schema for locust and ``dspark bench``.

A :class:`Summary` is one run at one load; a :class:`BenchResult` is the stages of one command. Latencies are
milliseconds over measured requests that completed; counts and goodput are over measured requests *sent*.
"""

from __future__ import annotations

import msgspec

from dspark_loadtests.acceptance import Acceptance, ServerIdentity
from dspark_loadtests.stream import Outcome, RequestRecord
from dspark_sglang.artifacts import SCHEMA_VERSION, Provenance


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What a request must meet to count as good, in milliseconds."""

    ttft_ms: float
    tpot_ms: float

    def met_by(self, record: RequestRecord) -> bool:
        """Whether ``record`` completed, within both limits.

        TTFT is taken from the schedule where there is one: a user waits from when they asked. A
        single-chunk answer has no time per token and needs only the first limit.
        """
        ttft_s = record.ttft_from_schedule_s
        if record.outcome is not Outcome.COMPLETED or ttft_s is None:
            return False
        if ttft_s * 1e3 > self.ttft_ms:
            return False
        return record.tpot_s is None or record.tpot_s * 1e3 <= self.tpot_ms


class RunSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the load was made."""

    host: str
    model: str
    temperature: float
    max_tokens: int
    #: Concurrent users of a closed loop; None in an open one.
    users: int | None
    seed: int
    slo: Slo
    arrival: str = "closed_loop"
    #: Requests a second of an open loop: the mean over the stage.
    rate: float | None = None
    prompts: str = "packaged"


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
    """``sent == completed + failed + unfinished``; ``empty`` are completed without any text.

    ``unmeasured`` were sent before the window or after it, to keep the load up, and are in no other number.
    """

    sent: int
    completed: int
    failed: int
    unfinished: int
    empty: int
    unmeasured: int = 0


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Over completed requests; None where no request has the quantity.

    ``itl_ms`` is a sample for each token: a chunk's gap over its tokens, as often as it has tokens.
    """

    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    inter_chunk_ms: Distribution | None
    e2e_ms: Distribution | None
    itl_ms: Distribution | None = None
    #: From when the request was due; equals ``ttft_ms`` in a closed loop.
    ttft_from_schedule_ms: Distribution | None = None


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


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A value with its 95% bootstrap interval."""

    low: float
    value: float
    high: float

    def rounded(self) -> list[float]:
        """``[low, value, high]`` for a result."""
        return [round(self.low, 4), round(self.value, 4), round(self.high, 4)]


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """Locust: over ``duration_s``, from the first send to the last end, the drain included. ``dspark bench``: tokens
    that arrived in the window over its length, whichever request they belong to.
    """

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
    #: Why nothing can be good, where no request came near: an SLA no server of this kind meets.
    note: str = ""


class ErrorCount(msgspec.Struct, frozen=True, kw_only=True):
    """One error message and how many requests it ended."""

    message: str
    count: int


class GeneratorHealth(msgspec.Struct, frozen=True, kw_only=True):
    """How well the generator kept its own time; large numbers make the others suspect.

    Attributes:
        send_lag_ms: from when a request was due to its send; None in a closed loop.
        loop_lag_ms: how late a timer of the event loop fired, looked at fifty times a second: a bound for how late a
            chunk was stamped.
    """

    send_lag_ms: Distribution | None
    loop_lag_ms: Distribution | None
    peak_streams: int


class Summary(
    msgspec.Struct, frozen=True, kw_only=True, tag="dspark-loadtest-summary", tag_field="kind"
):
    """One run at one load."""

    schema_version: int = SCHEMA_VERSION
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
    #: What follows is of ``dspark bench``.
    name: str = ""
    generator: GeneratorHealth | None = None
    #: What happened that a reader must know: the server died, the generator was stopped.
    incidents: list[str] = []
    #: False where the run ended before its time: the numbers are of what there was.
    complete: bool = True
    #: By metric; what the regression gate compares.
    estimates: dict[str, Estimate] = {}


class BenchResult(msgspec.Struct, frozen=True, kw_only=True, tag="bench", tag_field="kind"):
    """Every stage of one ``dspark bench``."""

    schema_version: int = SCHEMA_VERSION
    name: str
    pattern: str
    gpus: int
    machine: str
    stages: list[Summary]
    complete: bool
    incidents: list[str]
    provenance: Provenance
