"""Streaming chat load with locust.

    locust -f loadtests/locustfile.py --headless -u 4 -r 2 -t 20s --host http://127.0.0.1:30000

Closed loop: each user sends its next request when the last one ended. With ``--dspark-rate`` an open loop: requests
leave at Poisson instants and wait for nobody. See README.md beside this file for the metrics, and dspark_loadtests for
how they are taken.
"""

from __future__ import annotations

import random
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Group
from locust import constant, events, task
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS, FastHttpUser
from locust.exception import CatchResponseError, StopUser
from locust.runners import STATE_CLEANUP, STATE_STOPPED, STATE_STOPPING, MasterRunner, WorkerRunner
from locust.stats import CSV_STATS_INTERVAL_SEC
from rich.console import Console

# Not installed, started from anywhere: the packages lie beside this file and above it. At
# the end of the path, so that an installed copy and the real `packaging` library win.
_HERE = Path(__file__).resolve().parent
sys.path.extend([str(_HERE), str(_HERE.parent)])

from dspark_loadtests.acceptance import Snapshot, accepted_length, take_snapshot  # noqa: E402
from dspark_loadtests.client import (  # noqa: E402
    CHAT_PATH,
    RequestSettings,
    ServerApi,
    chat_payload,
    read_api_key,
    request_headers,
)
from dspark_loadtests.generator import LoadSession  # noqa: E402
from dspark_loadtests.prompts import cycle, load_prompts  # noqa: E402
from dspark_loadtests.report import print_summaries, summarize, verdict  # noqa: E402
from dspark_loadtests.schema import RunSettings, Slo, Summary  # noqa: E402
from dspark_loadtests.stream import Outcome, RequestRecord, StreamRecorder  # noqa: E402
from dspark_sglang.artifacts import write_json  # noqa: E402
from dspark_sglang.errors import ConfigError, DSparkError  # noqa: E402

# A dead server refuses in microseconds; without a pause every user would spin on it and the
# failures would measure the generator.
_PAUSE_AFTER_FAILURE_S = 0.5
_DRAIN_S = "10"


# Importing took seconds that gevent's clock has not seen: a short --run-time would be over before it began.
gevent.get_hub().loop.update_now()


class _Run:
    """One test from start to stop."""

    def __init__(self, environment: Any) -> None:
        options = environment.parsed_options
        self.host = environment.host
        if not self.host:
            raise ConfigError(
                "No server was named.",
                expected="its base URL",
                fix="Give --host http://127.0.0.1:30000.",
            )
        self.api_key = read_api_key(options.dspark_api_key_file)
        self.api = ServerApi(self.host, api_key=self.api_key)
        self.requests = RequestSettings(
            model=options.dspark_model or self.api.model(),
            temperature=options.dspark_temperature,
            max_tokens=options.dspark_max_tokens,
        )
        self.settings = RunSettings(
            host=self.host,
            model=self.requests.model,
            temperature=self.requests.temperature,
            max_tokens=self.requests.max_tokens,
            users=environment.runner.target_user_count,
            seed=options.dspark_seed,
            arrival="open_loop" if options.dspark_rate else "closed_loop",
            rate=options.dspark_rate or None,
            slo=Slo(ttft_ms=options.dspark_slo_ttft_ms, tpot_ms=options.dspark_slo_tpot_ms),
        )
        self.summary_path: Path = options.dspark_summary
        self.session = LoadSession(cycle(load_prompts(), random.Random(options.dspark_seed)))
        self.started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self.before: Snapshot = take_snapshot(self.api)

    def summary(self) -> Summary:
        after = take_snapshot(self.api)
        return summarize(
            self.session.records,
            settings=self.settings,
            started_at=self.started_at,
            server=after.identity,
            acceptance=accepted_length(self.before, after),
        )


class _State:
    """The run in progress, and the exit code of the process."""

    run: _Run | None = None
    exit_code: int | None = None


@events.init_command_line_parser.add_listener
def _add_options(parser: Any) -> None:
    group = parser.add_argument_group("DSpark load test")
    group.add_argument("--dspark-model", default=None, help="model name; default: the server's")
    group.add_argument("--dspark-temperature", type=float, default=1.0)
    group.add_argument(
        "--dspark-rate",
        type=float,
        default=0.0,
        help="requests/s of all users together, at Poisson instants; 0: a closed loop",
    )
    group.add_argument("--dspark-max-tokens", type=int, default=128)
    group.add_argument("--dspark-seed", type=int, default=0, help="order of the prompts")
    group.add_argument("--dspark-slo-ttft-ms", type=float, default=1000.0)
    group.add_argument("--dspark-slo-tpot-ms", type=float, default=50.0)
    group.add_argument("--dspark-api-key-file", type=Path, default=None)
    group.add_argument(
        "--dspark-summary", type=Path, default=Path("runs/load/summary.json"), help="JSON report"
    )
    # Locust's own default kills requests in flight at the end of the run.
    parser.set_defaults(stop_timeout=_DRAIN_S)


@events.init.add_listener
def _refuse_distributed(environment: Any, **_: Any) -> None:
    if isinstance(environment.runner, MasterRunner | WorkerRunner):
        error = ConfigError(
            "Locust runs distributed (--master, --worker or --processes).",
            expected="one process, because the summary is made from the records of one",
            fix="Leave these options out.",
        )
        print(f"error: {error}", file=sys.stderr)
        # An exception here would end in a traceback; SystemExit passes through locust's hooks.
        sys.exit(2)


@events.test_start.add_listener
def _start(environment: Any, **_: Any) -> None:
    _State.run, _State.exit_code = None, None
    try:
        _State.run = _Run(environment)
    except DSparkError as error:
        print(f"error: {error}", file=sys.stderr)
        _State.exit_code = 2
        # Not from here: locust is in the middle of starting.
        gevent.spawn(environment.runner.quit)


@events.test_stop.add_listener
def _stop(environment: Any, **_: Any) -> None:
    run = _State.run
    if run is None:
        return
    for record in run.session.abandon_in_flight():
        _fire(environment, "UNFINISHED", record.e2e_s)
    summary = run.summary()
    console = Console()
    print_summaries([summary], console)
    passed, line = verdict(summary)
    _State.exit_code = 0 if passed else 1
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    try:
        write_json(run.summary_path, summary)
    except OSError as error:
        _State.exit_code = 2
        print(
            f"error: Cannot write {run.summary_path}: {error}. Expected a writable path. "
            "Give one with --dspark-summary.",
            file=sys.stderr,
        )
    else:
        console.print(f"report: {run.summary_path}", markup=False, highlight=False, soft_wrap=True)


@events.quitting.add_listener
def _set_exit_code(environment: Any, **_: Any) -> None:
    # After Ctrl-C locust asks for the exit code before it stops the users; stopping twice is
    # harmless.
    environment.runner.stop()
    if environment.parsed_options.csv_prefix:
        # Locust writes its CSV files once a second and not at the end, so they would lack
        # the requests that ended last: let it write once more.
        gevent.sleep(CSV_STATS_INTERVAL_SEC + 0.2)
    if _State.exit_code is not None:
        environment.process_exit_code = _State.exit_code


def _fire(environment: Any, kind: str, seconds: float, error: str | None = None) -> None:
    environment.events.request.fire(
        request_type=kind,
        name=CHAT_PATH,
        response_time=seconds * 1e3,
        response_length=0,
        exception=None if error is None else CatchResponseError(error),
        context={},
    )


def _report(environment: Any, record: RequestRecord) -> None:
    _fire(environment, "E2E", record.e2e_s, record.error)
    if record.outcome is not Outcome.COMPLETED:
        return
    if record.ttft_s is not None:
        _fire(environment, "TTFT", record.ttft_s)
    if record.tpot_s is not None:
        _fire(environment, "TPOT", record.tpot_s)
    for gap in record.gaps_s:
        _fire(environment, "INTER-CHUNK", gap)


class ChatUser(FastHttpUser):
    """Sends one chat after another and reads each to its end."""

    wait_time = constant(0)
    # Between two reads; a queued request may wait long for its first token.
    network_timeout = 300.0
    # Connections of one user: an open loop has as many as it needs.
    concurrency = 10_000

    @task
    def chat(self) -> None:
        run = _State.run
        if run is None:
            # The start was refused, and locust is about to quit.
            raise StopUser
        if run.settings.rate:
            self._dispatch(run, run.settings.rate)
        elif self._chat(run).outcome is Outcome.FAILED:
            gevent.sleep(_PAUSE_AFTER_FAILURE_S)

    def _dispatch(self, run: _Run, rate: float) -> None:
        """Send at Poisson instants until the test stops. Those of several users together are Poisson again."""
        share = rate / max(1, run.settings.users or 1)
        rng = random.Random(f"{run.settings.seed}/{id(self)}")
        stopping = (STATE_STOPPING, STATE_STOPPED, STATE_CLEANUP)
        chats, due = Group(), time.perf_counter()
        try:
            while True:
                due += rng.expovariate(share)
                while (left := due - time.perf_counter()) > 0:
                    gevent.sleep(min(left, 0.1))
                    if self.environment.runner.state in stopping:
                        chats.join()  # locust ends this at --stop-timeout
                        return
                chats.spawn(self._chat, run, due)
        finally:
            chats.kill(block=False)

    def _chat(self, run: _Run, due: float | None = None) -> RequestRecord:
        prompt, recorder = run.session.begin(due)
        record = self._send(run, chat_payload(prompt, run.requests), recorder)
        run.session.end(recorder, record)
        _report(self.environment, record)
        return record

    def _send(self, run: _Run, payload: dict[str, Any], recorder: StreamRecorder) -> RequestRecord:
        # With catch_response and no `with` block locust reports nothing by itself: its time
        # for a streamed response is the time to the headers.
        response = self.client.post(
            CHAT_PATH,
            json=payload,
            headers=request_headers(run.api_key),
            stream=True,
            catch_response=True,
        )
        try:
            if response.status_code != 200:
                error = getattr(response, "error", None)
                body = (response.text or "") if response.status_code else repr(error)
                return recorder.fail(f"HTTP {response.status_code}: {body[:200]}")
            # Not iter_lines or iter_content: they wait for 1024 bytes, several chunks.
            while line := response._response.readline(b"\n"):
                recorder.feed(line)
        except FAILURE_EXCEPTIONS as error:
            return recorder.fail(f"{type(error).__name__}: {error}")
        return recorder.finish()
