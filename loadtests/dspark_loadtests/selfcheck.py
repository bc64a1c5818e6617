"""Whether the generator can be believed on this machine: many streams from a server whose truth is known.

The fake server runs on one core and the generator on another. A record's times are compared with those the server wrote
down, on the same monotonic clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import uvloop

from dspark_loadtests.bench import Endpoint, connect
from dspark_loadtests.chat import ChatClient
from dspark_loadtests.client import RequestSettings
from dspark_loadtests.fake_server import Served
from dspark_loadtests.generator import Generator, Load, Ran
from dspark_loadtests.prompts import load_prompts
from dspark_loadtests.report import itl_ms, tokens_in
from dspark_loadtests.session import LoadSession
from dspark_loadtests.stream import Outcome, RequestRecord
from dspark_sglang.errors import ServerError

CHUNKS_PER_S = 10.0
_CHUNKS = 40
_TIMES = ("ttft_ms", "tpot_ms", "itl_ms", "inter_chunk_ms", "e2e_ms")


class SelfCheck(msgspec.Struct, frozen=True, kw_only=True, tag="bench-self-check", tag_field="kind"):  # fmt: skip
    """What came of it.

    Attributes:
        streams: chats at once, each of ``chunks_per_s`` chunks a second.
        lag_ms: p99 over all chunks of the window, from the server's write to the client's stamp.
        metric_error_pct: largest relative error of a metric's mean, p50 or p99, or of a rate.
        worst: which metric that was, and its difference in its own unit.
        loop_lag_ms: p99 of how late the generator's event loop was.
        busy: share of its core that the generator used.
    """

    schema_version: int = 1
    streams: int
    chunks_per_s: float
    seconds: float
    chunks: int
    requests: int
    failed: int
    lag_ms: float
    lag_p50_ms: float
    lag_max_ms: float
    metric_error_pct: float
    worst: str
    loop_lag_ms: float
    busy: float
    errors_pct: dict[str, float]
    incidents: list[str]


@contextlib.contextmanager
def _server(core: int | None) -> Iterator[str]:
    command = [sys.executable, "-m", "dspark_loadtests.fake_server", "--port", "0"]
    command += ["--chunks", str(_CHUNKS), "--chunk-s", str(1 / CHUNKS_PER_S)]
    if core is not None:
        command += ["--core", str(core)]
    paths = [str(Path(__file__).resolve().parents[1]), *sys.path]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        if "http://" not in line:
            raise ServerError(
                f"The fake server said {line!r} and ended.",
                expected="its address",
                fix="Start it by hand: python -m dspark_loadtests.fake_server --port 0.",
            )
        yield line.split()[3]
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait()


async def _run(
    endpoint: Endpoint, load: Load, told: Callable[[LoadSession], None]
) -> tuple[Ran, float]:
    client = ChatClient(endpoint.url)
    times = os.times()
    began = asyncio.get_running_loop().time()
    try:
        ran = await Generator(client, load_prompts(), load, told=told).run()
    finally:
        await client.close()
    took = asyncio.get_running_loop().time() - began
    now = os.times()
    return ran, (now.user + now.system - times.user - times.system) / took


def self_check(
    streams: int = 500,
    seconds: float = 10.0,
    *,
    told: Callable[[LoadSession], None] = lambda _: None,
) -> SelfCheck:
    """Keep that many streams running for that long and compare with the server's notes."""
    cores = sorted(os.sched_getaffinity(0))
    apart = len(cores) > 1
    if apart:
        os.sched_setaffinity(0, {cores[0]})
    try:
        with _server(cores[-1] if apart else None) as url:
            endpoint = connect(url)
            load = Load(
                settings=RequestSettings(model="fake-model", temperature=1.0, max_tokens=100),
                users=streams,
                # Everyone connects at once; the first answers are no steady state.
                warm_s=1.5 * _CHUNKS / CHUNKS_PER_S,
                window_s=seconds,
                drain_s=2 * _CHUNKS / CHUNKS_PER_S,
            )
            ran, busy = uvloop.run(_run(endpoint, load, told))
            truth = msgspec.json.decode(endpoint.api.get("/truth"), type=list[Served])
    finally:
        os.sched_setaffinity(0, set(cores))
    return compare(ran, truth, streams=streams, busy=busy)


def compare(ran: Ran, truth: Sequence[Served], *, streams: int, busy: float) -> SelfCheck:
    """Measured against true, request by request and metric by metric."""
    measured = ran.sent_between(ran.begin, ran.closed)
    done = [record for record in measured if record.outcome is Outcome.COMPLETED]
    real = [_as_record(record, truth) for record in done]
    everyone = [_as_record(r, truth) for r in ran.records if r.outcome is Outcome.COMPLETED]
    late = [
        (arrived - written) * 1e3
        for record, true in zip(done, real, strict=True)
        for arrived, written in zip(record.arrivals, true.arrivals, strict=True)
    ]
    errors, differences = _errors(done, real)
    # Rates: of those that completed, on both sides, over the window's first part, which all of them cover.
    both = [
        sum(tokens_in(record, ran.begin, ran.closed) for record in side)
        for side in ([r for r in ran.records if r.outcome is Outcome.COMPLETED], everyone)
    ]
    errors["output_tok_s"] = 100 * abs(both[0] / both[1] - 1) if both[1] else 100.0
    differences["output_tok_s"] = f"{(both[0] - both[1]) / max(1e-9, ran.closed - ran.begin):+.2f} tok/s"  # fmt: skip
    worst = max(errors, key=lambda name: errors[name])
    lags = [probe * 1e3 for at, probe in ran.lags if ran.begin <= at < ran.end]
    return SelfCheck(
        streams=streams,
        chunks_per_s=CHUNKS_PER_S,
        seconds=round(ran.closed - ran.begin, 2),
        chunks=len(late),
        requests=len(measured),
        failed=sum(record.outcome is Outcome.FAILED for record in ran.records),
        lag_ms=round(float(np.percentile(late, 99)), 3),
        lag_p50_ms=round(float(np.percentile(late, 50)), 3),
        lag_max_ms=round(max(late), 3),
        metric_error_pct=round(errors[worst], 4),
        worst=f"{worst}: {differences[worst]}",
        loop_lag_ms=round(float(np.percentile(lags, 99)), 3),
        busy=round(busy, 3),
        errors_pct={name: round(value, 4) for name, value in errors.items()},
        incidents=ran.incidents,
    )


def _as_record(record: RequestRecord, truth: Sequence[Served]) -> RequestRecord:
    """The same request as the server saw it."""
    assert record.server_id is not None, "the fake server names every answer"
    served = truth[int(record.server_id.removeprefix("fake-"))]
    assert served.ended_at is not None
    times = served.chunk_times
    return msgspec.structs.replace(
        record,
        sent_at=served.received_at,
        first_content_at=times[0],
        last_content_at=times[-1],
        ended_at=served.ended_at,
        gaps_s=tuple(later - earlier for earlier, later in itertools.pairwise(times)),
        chunk_tokens=tuple(served.chunk_tokens),
        content_chunks=len(times),
        completion_tokens=served.tokens,
    )


def _errors(
    measured: Sequence[RequestRecord], true: Sequence[RequestRecord]
) -> tuple[dict[str, float], dict[str, str]]:
    errors: dict[str, float] = {}
    differences: dict[str, str] = {}
    statistics: dict[str, Callable[[np.ndarray], float]] = {
        "mean": lambda values: float(values.mean()),
        "p50": lambda values: float(np.percentile(values, 50)),
        "p99": lambda values: float(np.percentile(values, 99)),
    }
    for name in _TIMES:
        ours, theirs = (np.array(_values(name, side)) for side in (measured, true))
        for label, statistic in statistics.items():
            found, wanted = statistic(ours), statistic(theirs)
            errors[f"{name} {label}"] = 100 * abs(found / wanted - 1)
            differences[f"{name} {label}"] = f"{found - wanted:+.3f} ms"
    tokens = [sum(r.completion_tokens or 0 for r in side) for side in (measured, true)]
    errors["tokens"] = 100 * abs(tokens[0] / tokens[1] - 1)
    differences["tokens"] = f"{tokens[0] - tokens[1]:+d}"
    return errors, differences


def _values(name: str, records: Sequence[RequestRecord]) -> list[float]:
    if name == "itl_ms":
        return [value for record in records for value in itl_ms(record)]
    if name == "inter_chunk_ms":
        return [gap * 1e3 for record in records for gap in record.gaps_s]
    field = name.removesuffix("_ms") + "_s"
    seconds: list[float | None] = [getattr(record, field) for record in records]
    return [value * 1e3 for value in seconds if value is not None]
