"""Whether the load generator can be believed on this machine: many streams from a server whose truth is known.

The fake server runs on one core and the generator on another. A record's times are compared with those the server wrote
down, on the same monotonic clock. Nothing else may run on these cores.

    python -m tests.selfcheck --streams 500 --seconds 30 --out runs/bench/selfcheck.json
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvloop

from dspark_loadtests.client import ChatClient, Endpoint, RequestSettings, connect
from dspark_loadtests.generator import Generator, Load, Ran
from dspark_loadtests.prompts import load_prompts
from dspark_loadtests.report import itl_ms, tokens_in
from dspark_loadtests.stream import Outcome, RequestRecord
from dspark_sglang.artifacts import SCHEMA_VERSION, write_json
from tests.fake_server import Served

CHUNKS_PER_S = 10.0
#: Bounds of the lag at its 99th percentile, and of a metric's error.
LAG_MS, ERROR_PCT = 5.0, 1.0
_CHUNKS = 40


@contextlib.contextmanager
def _server(core: int | None) -> Iterator[Endpoint]:
    command = [sys.executable, "-m", "tests.fake_server", "--port", "0"]
    command += ["--chunks", str(_CHUNKS), "--chunk-s", str(1 / CHUNKS_PER_S)]
    command += [] if core is None else ["--core", str(core)]
    root = Path(__file__).resolve().parents[1]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert child.stdout is not None
        yield connect(child.stdout.readline().split()[3])
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait()


async def _load(endpoint: Endpoint, streams: int, seconds: float) -> Ran:
    load = Load(
        settings=RequestSettings(model="fake-model", temperature=1.0, max_tokens=100),
        users=streams,
        # Everyone connects at once; the first answers are no steady state.
        warm_s=1.5 * _CHUNKS / CHUNKS_PER_S,
        window_s=seconds,
        drain_s=2 * _CHUNKS / CHUNKS_PER_S,
    )
    client = ChatClient(endpoint.url)
    try:
        return await Generator(client, load_prompts(), load).run()
    finally:
        await client.close()


def self_check(streams: int, seconds: float) -> dict[str, Any]:
    """Keep that many streams running for that long and compare with the server's notes."""
    cores = sorted(os.sched_getaffinity(0))
    apart = len(cores) > 1
    os.sched_setaffinity(0, {cores[0]})
    try:
        with _server(cores[-1] if apart else None) as endpoint:
            ran = uvloop.run(_load(endpoint, streams, seconds))
            truth = msgspec.json.decode(endpoint.api.get("/truth"), type=list[Served])
    finally:
        os.sched_setaffinity(0, set(cores))
    return {"streams": streams, "chunks_per_s": CHUNKS_PER_S} | compare(ran, truth)


def compare(ran: Ran, truth: Sequence[Served]) -> dict[str, Any]:
    """Measured against true: how late chunks were stamped, and how far off every metric is (percent)."""
    done = [record for record in ran.measured() if record.outcome is Outcome.COMPLETED]
    real = [as_served(record, truth) for record in done]
    late = [
        (arrived - written) * 1e3
        for record, true in zip(done, real, strict=True)
        for arrived, written in zip(record.arrivals, true.arrivals, strict=True)
    ]
    errors = {}
    for name, ours in _metrics(done, ran).items():
        theirs = _metrics(real, ran)[name]
        errors[name] = round(100 * abs(ours / theirs - 1), 4)
    worst = max(errors, key=lambda name: errors[name])
    return {
        "seconds": round(ran.closed - ran.begin, 2),
        "chunks": len(late),
        "requests": len(ran.measured()),
        "failed": sum(record.outcome is Outcome.FAILED for record in ran.records),
        "lag_ms": round(float(np.percentile(late, 99)), 3),
        "lag_p50_ms": round(float(np.percentile(late, 50)), 3),
        "lag_max_ms": round(max(late), 3),
        "metric_error_pct": errors[worst],
        "worst": worst,
        "loop_lag_ms": round(float(np.percentile(ran.lags, 99)) * 1e3, 3),
        "errors_pct": errors,
        "incidents": ran.incidents,
    }


def as_served(record: RequestRecord, truth: Sequence[Served]) -> RequestRecord:
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


def _metrics(records: Sequence[RequestRecord], ran: Ran) -> dict[str, float]:
    samples = {
        "ttft_ms": [(r.ttft_s or 0.0) * 1e3 for r in records],
        "tpot_ms": [(r.tpot_s or 0.0) * 1e3 for r in records],
        "itl_ms": [value for r in records for value in itl_ms(r)],
        "inter_chunk_ms": [gap * 1e3 for r in records for gap in r.gaps_s],
        "e2e_ms": [r.e2e_s * 1e3 for r in records],
    }
    found = {
        "tokens": float(sum(r.completion_tokens or 0 for r in records)),
        "output_tok_s": sum(tokens_in(r, ran.begin, ran.closed) for r in records),
    }
    for name, values in samples.items():
        found[f"{name} mean"] = float(np.mean(values))
        found[f"{name} p50"] = float(np.percentile(values, 50))
        found[f"{name} p99"] = float(np.percentile(values, 99))
    return found


def main() -> int:
    """Exit code 1: the lag or an error is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--streams", type=int, default=500, help="chats at once")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the window")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/selfcheck.json"))
    options = parser.parse_args()
    found = self_check(options.streams, options.seconds)
    write_json(options.out, {"kind": "bench-self-check", "schema_version": SCHEMA_VERSION, **found})
    good = found["lag_ms"] < LAG_MS and found["metric_error_pct"] < ERROR_PCT and not found["failed"]  # fmt: skip
    print(
        f"{found['streams']} streams, {found['chunks']} chunks: lag {found['lag_p50_ms']:.2f} ms p50, "
        f"{found['lag_ms']:.2f} ms p99, {found['lag_max_ms']:.1f} ms at most; largest error of a metric "
        f"{found['metric_error_pct']:.3f}% ({found['worst']})"
    )
    print(
        f"{'OK' if good else 'FAILED'}: p99 lag below {LAG_MS:g} ms and every metric within {ERROR_PCT:g}%"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
