"""The locustfile, run as a user runs it, against a server whose answers are known."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import httpx
import msgspec
import pytest

from dspark_loadtests.schema import Summary
from dspark_sglang.artifacts import read_artifact
from dspark_sglang.server import free_port
from tests.fake_server import Chunk, FakeServer, Script

# Importing locust would patch ssl under the whole test process.
pytestmark = [
    pytest.mark.costly,
    pytest.mark.skipif(find_spec("locust") is None, reason="locust is not installed"),
]
ROOT = Path(__file__).resolve().parents[2]

# 1 token, then 3 rounds with 9 tokens: 10 tokens, accepted length exactly 3. One chunk is
# about 300 bytes, so a reader that waits for 1024 sees the first one 0.3 s late.
SCRIPT = Script(chunks=(Chunk(0.1, 1), Chunk(0.15, 4), Chunk(0.15, 2), Chunk(0.15, 3)))
QUICK = Script(chunks=(Chunk(0.02, 1), Chunk(0.02, 3)))


def locust(host: str, folder: Path, *options: str, installed: bool = True) -> tuple[int, str]:
    """Run the locustfile from the repository root; its exit code and output."""
    command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless"]
    command += ["--host", host, "--dspark-summary", str(folder / "deep" / "summary.json")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if not installed:
        # Without `site` no .pth file is read, hence no editable install.
        command.insert(1, "-S")
        environment["PYTHONPATH"] = sysconfig.get_path("purelib")
    done = subprocess.run(
        [*command, *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout


def summary_in(folder: Path) -> Summary:
    return read_artifact(folder / "deep" / "summary.json", Summary, "a summary", "")


def test_a_clean_run_reports_what_the_server_did(tmp_path: Path) -> None:
    options = ["-u", "3", "-r", "3", "-t", "2s", "--csv", str(tmp_path / "out")]
    options += ["--dspark-temperature", "0.5", "--dspark-max-tokens", "64"]
    with FakeServer(lambda _: SCRIPT) as server:
        code, output = locust(server.url, tmp_path, *options)
    summary = summary_in(tmp_path)
    sent = len(server.served)
    assert code == 0, output
    assert f"OK: {sent} of {sent} requests completed, none failed" in output
    # 2 s of 0.55 s each for 3 users, and the drain lets the last ones end.
    assert 9 <= sent <= 12
    assert (summary.counts.sent, summary.counts.completed) == (sent, sent)
    assert (summary.tokens.completion, summary.tokens.prompt) == (10 * sent, 20 * sent)
    assert summary.tokens.per_chunk == 2.5
    acceptance = summary.acceptance
    assert (acceptance.source, acceptance.accepted_length) == ("window", 3.0)
    assert (acceptance.rounds, acceptance.committed_tokens) == (3 * sent, 9 * sent)
    assert "3.000 tokens a round" in output
    latency = summary.latency
    assert latency.ttft_ms and latency.tpot_ms and latency.inter_chunk_ms and latency.e2e_ms
    assert 100 <= latency.ttft_ms.p50 < 220, "read when it arrived, not when 1024 bytes had"
    assert latency.tpot_ms.p50 == pytest.approx(450 / 9, abs=8)
    assert latency.inter_chunk_ms.count == 3 * sent
    assert latency.inter_chunk_ms.p50 == pytest.approx(150, abs=20)
    assert 550 <= latency.e2e_ms.p50 < 720
    assert summary.goodput.sent == sent
    assert (summary.settings.model, summary.settings.users) == ("fake-model", 3)
    assert "must-not-be-reported" not in msgspec.json.encode(summary).decode()
    bodies = [served.body for served in server.served]
    assert {(body["temperature"], body["max_tokens"]) for body in bodies} == {(0.5, 64)}
    assert len({json.dumps(body["messages"]) for body in bodies}) == sent, "no prompt twice"
    with (tmp_path / "out_stats.csv").open() as file:
        rows = {row["Type"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"TTFT", "TPOT", "INTER-CHUNK", "E2E", ""}
    assert int(rows["E2E"]["Request Count"]) == int(rows["TTFT"]["Request Count"]) == sent
    assert float(rows["TTFT"]["Average Response Time"]) == pytest.approx(latency.ttft_ms.mean)


def test_failures_are_counted_named_and_set_the_exit_code(tmp_path: Path) -> None:
    endings = ("error", "truncate", "http_500")

    def script_for(index: int) -> Script:
        return Script(chunks=QUICK.chunks, ending=endings[index] if index < 3 else "done")

    with FakeServer(script_for, speculation="lifetime") as server:
        code, output = locust(server.url, tmp_path, "-u", "3", "-r", "3", "-t", "1s")
    summary = summary_in(tmp_path)
    assert code == 1, output
    assert f"FAILED: 3 of {len(server.served)} requests failed, most often: " in output
    assert (summary.counts.sent, summary.counts.failed) == (len(server.served), 3)
    assert summary.counts.completed == len(server.served) - 3 > 0
    messages = sorted(error.message for error in summary.errors)
    assert len(messages) == 3
    assert messages[0].startswith("HTTP 500: ") and "out of luck" in messages[0]
    assert messages[1] == "error in the stream: 503 X no memory left"
    assert messages[2].startswith("truncated stream: ")
    # The broken ones had streamed 4 tokens each before they broke.
    assert summary.tokens.partial == 8
    assert summary.acceptance.source == "lifetime_average"


def test_requests_in_flight_at_the_end_are_unfinished(tmp_path: Path) -> None:
    def script_for(index: int) -> Script:
        return Script(chunks=QUICK.chunks, ending="hang" if index == 0 else "done")

    with FakeServer(script_for, speculation="off") as server:
        options = ["-u", "2", "-r", "2", "-t", "1s", "--stop-timeout", "1"]
        code, output = locust(server.url, tmp_path, *options)
    summary = summary_in(tmp_path)
    assert code == 0, output
    assert summary.counts.sent == len(server.served)
    assert (summary.counts.unfinished, summary.counts.failed) == (1, 0)
    assert summary.counts.completed == len(server.served) - 1 > 0
    assert summary.tokens.partial == 4
    assert summary.goodput.ratio is not None and summary.goodput.ratio < 1
    assert summary.throughput.duration_s > 1.4, "1 s of load, then 1 s of drain"
    assert "UNFINISHED" in output
    assert "no accepted length: the server runs without speculation" in output


def test_an_open_loop_waits_for_nobody(tmp_path: Path) -> None:
    slow = Script(chunks=(Chunk(0.7, 1), Chunk(0.7, 3)))
    with FakeServer(lambda _: slow) as server:
        code, output = locust(
            server.url, tmp_path, "-u", "2", "-r", "2", "-t", "4s", "--dspark-rate", "10"
        )
    summary = summary_in(tmp_path)
    assert code == 0, output
    # Two users of a closed loop would have sent 6; 40 are expected, less what starting takes.
    assert 15 < summary.counts.sent == len(server.served) < 60
    assert (summary.settings.arrival, summary.settings.rate) == ("open_loop", 10.0)
    assert summary.counts.completed == summary.counts.sent, "the drain let the last ones end"
    latency = summary.latency
    assert latency.ttft_from_schedule_ms and latency.ttft_ms
    assert latency.ttft_from_schedule_ms.mean >= latency.ttft_ms.mean >= 700


def test_no_server_is_said_in_one_line_also_when_not_installed(tmp_path: Path) -> None:
    with FakeServer(lambda _: QUICK) as server:
        address = server.url
    code, output = locust(address, tmp_path, "-u", "1", "-t", "30s", installed=False)
    assert code == 2, output
    assert f"error: GET {address}/v1/models failed" in output
    assert "Start the server or correct its address." in output
    assert "Traceback" not in output
    assert not (tmp_path / "deep").exists()


def test_the_web_ui_starts_and_stops_two_runs(tmp_path: Path) -> None:
    report = tmp_path / "summary.json"
    port = free_port()
    command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py"]
    command += ["--web-host", "127.0.0.1", "--web-port", str(port), "--dspark-summary", str(report)]
    with FakeServer(lambda _: QUICK) as server, (tmp_path / "log").open("w") as log:
        child = subprocess.Popen([*command, "--host", server.url], cwd=ROOT, stdout=log, stderr=log)
        try:
            page = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10.0)
            assert wait_for(lambda: page.get("/").status_code == 200)
            for users, rate in ((2, 0.0), (1, 20.0)):
                begun = len(server.served)
                form = {
                    "user_count": users,
                    "spawn_rate": 5,
                    "host": server.url,
                    "dspark_rate": rate,
                }
                assert page.post("/swarm", data=form).json()["success"]
                assert wait_for(lambda begun=begun: len(server.served) > begun + 3)
                rows = page.get("/stats/requests").json()["stats"]
                assert {row["method"] for row in rows} >= {"TTFT", "TPOT", "E2E"}
                report.unlink(missing_ok=True)
                assert page.post("/stop").status_code == 200
                assert wait_for(report.exists)
                summary = read_artifact(report, Summary, "a summary", "")
                assert (summary.settings.users, summary.settings.rate) == (users, rate or None)
                assert summary.counts.sent == len(server.served) - begun
                assert summary.counts.failed == 0
        finally:
            child.terminate()
            child.wait(20)


def wait_for(condition: Callable[[], bool], seconds: float = 40.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if condition():
                return True
        time.sleep(0.1)
    return False
