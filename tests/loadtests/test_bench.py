"""``dspark bench``: what it measures is what the fake server did, and what goes wrong is said."""

from __future__ import annotations

import itertools
import json
import math
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from dspark_loadtests import bench, frontier, generator
from dspark_loadtests.bench import Stage
from dspark_loadtests.client import RequestSettings, connect
from dspark_loadtests.generator import Load, poisson
from dspark_loadtests.prompts import Prompt, Source, load_prompts, read_prompts
from dspark_loadtests.report import Window, estimates, over_requests, tokens_in
from dspark_loadtests.schema import BenchResult, Slo
from dspark_sglang.artifacts import read_artifact
from dspark_sglang.cli.main import app
from dspark_sglang.errors import ConfigError, DSparkError
from tests.fake_server import Chunk, FakeServer, Script
from tests.selfcheck import as_served, compare, self_check

PROMPTS = load_prompts()
SLO = Slo(ttft_ms=1000.0, tpot_ms=50.0)
SETTINGS = RequestSettings(model="fake-model", temperature=1.0, max_tokens=128)
#: TTFT 100 ms, then 4 rounds of 50 ms with 11 tokens: TPOT 200 / 11, accepted length 2.75.
SCRIPT = Script(
    chunks=(Chunk(0.1, 1), Chunk(0.05, 4), Chunk(0.05, 2), Chunk(0.05, 3), Chunk(0.05, 2))
)
#: A busy machine may stamp that much later than the server wrote.
LAG_MS = 60.0


def run(
    script: Callable[[int], Script] = lambda _: SCRIPT,
    *,
    dies_after: int | None = None,
    speculation: Any = "counters",
    prompts: Any = PROMPTS,
    slo: Slo = SLO,
    **load: Any,
) -> tuple[Stage, FakeServer]:
    load = {"drain_s": 5.0, "settings": SETTINGS} | load
    with FakeServer(script, speculation=speculation, dies_after=dies_after) as server:
        source = Source(list(prompts), "test")
        stage = bench.run(connect(server.url), source, Load(**load), slo=slo, name="s")
    return stage, server


# --- arrivals -------------------------------------------------------------------------------------


def test_poisson_instants_have_the_law_of_the_rate() -> None:
    found = np.array(list(itertools.takewhile(lambda t: t < 400.0, poisson(50.0, random.Random(0)))))  # fmt: skip
    gaps = np.diff(found)
    # 20,000 expected: five standard deviations
    assert abs(len(found) - 20_000) < 5 * math.sqrt(20_000)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05), "exponential, not regular"
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.04


# --- against known truth ------------------------------------------------------------------------------


def test_closed_loop_measures_what_the_server_did() -> None:
    stage, server = run(users=4, requests=24)
    summary = stage.summary
    counts, latency = summary.counts, summary.latency
    assert (counts.sent, counts.completed, counts.failed, counts.unfinished) == (24, 24, 0, 0)
    assert counts.sent + counts.unmeasured == len(server.served), "the load went on until the end"
    assert latency.ttft_ms and latency.tpot_ms and latency.itl_ms and latency.inter_chunk_ms and latency.e2e_ms  # fmt: skip
    # Script's times are lower bounds, and the server's own notes the truth.
    true = [as_served(record, server.served) for record in stage.ran.measured()]
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        ours = np.mean([getattr(record, name) for record in stage.ran.measured()])
        theirs = np.mean([getattr(record, name) for record in true])
        assert ours == pytest.approx(theirs, abs=LAG_MS / 1e3)
    assert latency.ttft_ms.p50 >= 99
    assert latency.tpot_ms.mean == pytest.approx(200 / 11, abs=LAG_MS / 11)
    # Every token has the gap of its chunk over the chunk's tokens.
    assert latency.itl_ms.count == 24 * 11 and latency.inter_chunk_ms.count == 24 * 4
    assert latency.itl_ms.mean == pytest.approx(200 / 11, rel=0.1)
    assert summary.tokens.completion == 24 * 12
    assert summary.acceptance.source == "window"
    assert summary.acceptance.accepted_length == pytest.approx(2.75, abs=0.3)
    assert summary.generator is not None and summary.generator.peak_streams == 4
    assert summary.goodput.ratio == 1.0 and summary.complete and not summary.incidents
    # 4 users of 12 tokens each 0.3 s.
    assert summary.throughput.output_tok_s == pytest.approx(4 * 12 / 0.3, rel=0.25)
    assert summary.throughput.output_tok_s == pytest.approx(
        sum(tokens_in(r, stage.ran.begin, stage.ran.end) for r in stage.ran.records)
        / (stage.ran.end - stage.ran.begin)
    )


def test_open_loop_keeps_its_schedule_against_a_slow_server() -> None:
    slow = Script(chunks=(Chunk(0.6, 1), Chunk(0.6, 2)))
    stage, _ = run(lambda _: slow, rate=20.0, requests=30)
    sent = np.array([record.sent_at for record in stage.ran.measured()])
    due = np.array([record.scheduled_at for record in stage.ran.measured()])
    assert (np.diff(due) > 0).all() and np.percentile(sent - due, 90) < LAG_MS / 1e3
    assert (sent >= due).all(), "never before its time"
    # A closed loop would send no more than it has users; here nobody waits for anybody.
    assert stage.summary.generator is not None and stage.summary.generator.peak_streams > 8
    wanted = np.diff(list(itertools.islice(poisson(20.0, random.Random(1)), 30)))
    assert np.diff(due) == pytest.approx(wanted), "the seed's instants"
    latency = stage.summary.latency
    assert latency.ttft_from_schedule_ms and latency.ttft_ms
    assert latency.ttft_from_schedule_ms.mean >= latency.ttft_ms.mean


def test_a_late_generator_does_not_hide_it() -> None:
    record = run(users=1, requests=1)[0].ran.measured()[0]
    late = msgspec.structs.replace(record, scheduled_at=record.sent_at - 2.0)
    assert late.ttft_from_schedule_s == pytest.approx((record.ttft_s or 0) + 2.0)
    slo = Slo(ttft_ms=1000, tpot_ms=1000)
    assert slo.met_by(record) and not slo.met_by(late), "the SLA is the schedule's"


def test_warm_up_is_not_measured() -> None:
    slow_start = Script(chunks=(Chunk(0.5, 1), Chunk(0.01, 1)))
    quick = Script(chunks=(Chunk(0.05, 1), Chunk(0.01, 1)))
    stage, _ = run(lambda n: slow_start if n < 2 else quick, users=2, warm_s=0.7, window_s=1.0)
    assert stage.summary.latency.ttft_ms is not None
    assert stage.summary.latency.ttft_ms.max < 400
    assert stage.summary.counts.unmeasured >= 2
    assert stage.summary.throughput.duration_s >= 1.0


def test_acceptance_from_the_streams_themselves() -> None:
    stage, _ = run(users=2, requests=6, speculation="requests")
    acceptance = stage.summary.acceptance
    assert (acceptance.source, acceptance.accepted_length) == ("requests", 2.75)


@pytest.mark.costly
def test_many_streams_against_a_server_on_another_core() -> None:
    """The check a user runs, small: its bounds are the command's, on a quiet machine."""
    found = self_check(40, 2.0)
    assert found["failed"] == 0 and found["requests"] > 5 and found["chunks"] > 500
    assert found["errors_pct"]["tokens"] == 0.0
    assert found["lag_p50_ms"] < LAG_MS


def test_the_self_check_notices_an_error() -> None:
    stage, server = run(users=2, requests=8)
    right = compare(stage.ran, server.served)
    assert right["requests"] == 8 and right["errors_pct"]["tokens"] == 0.0
    for served in server.served:
        served.chunk_times = [at - 0.05 * (i > 0) for i, at in enumerate(served.chunk_times)]
    wrong = compare(stage.ran, server.served)
    assert wrong["lag_ms"] >= right["lag_ms"] + 40
    assert wrong["errors_pct"]["tpot_ms mean"] > 20 and wrong["metric_error_pct"] > 20


# --- conversations -------------------------------------------------------------------------------------


def test_a_conversation_goes_on_with_the_servers_own_answers() -> None:
    talk = Prompt("talk", "chat", "Be kind.", "One?", ("Two?", "Three?"))
    _, server = run(prompts=[talk], users=1, requests=4)
    bodies = [served.body["messages"] for served in server.served[:4]]
    answer = "word " * 12
    assert [message["content"] for message in bodies[2]] == [
        "Be kind.", "One?", answer, "Two?", answer, "Three?"
    ]  # fmt: skip
    assert [message["role"] for message in bodies[1]] == ["system", "user", "assistant", "user"]
    assert bodies[3] == bodies[0], "then it begins again"


def test_packaged_prompts_have_the_published_mix_and_conversations() -> None:
    shares = Counter(prompt.kind for prompt in PROMPTS)
    published = {"math": 0.394, "code": 0.389, "chat": 0.176, "instructions": 0.041}
    for kind, share in published.items():
        assert shares[kind] / len(PROMPTS) == pytest.approx(share, abs=0.005)
    assert len(PROMPTS) >= 256
    turns = [1 + len(prompt.follow_ups) for prompt in PROMPTS]
    assert sum(count > 1 for count in turns) >= 40
    lengths = [len(prompt.user) for prompt in PROMPTS]
    assert min(lengths) < 60 and max(lengths) > 900
    words = [frozenset(prompt.user.lower().split()) for prompt in PROMPTS]
    for one, other in itertools.combinations(words, 2):
        assert len(one & other) / len(one | other) < 0.5, "no template with other numbers in it"


def test_other_files_are_read(tmp_path: Path) -> None:
    shared = tmp_path / "s.json"
    talk = {"conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "x"}, {"from": "human", "value": "B?"}]}  # fmt: skip
    shared.write_text(json.dumps([talk]))
    (prompt,) = read_prompts(shared).prompts
    assert (prompt.user, prompt.follow_ups, prompt.messages()) == (
        "A?", ("B?",), [{"role": "user", "content": "A?"}],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("p.json", "", "is empty"),
        ("p.txt", " \n", "is empty"),
        ("p.json", "[]", "No usable prompt"),
        ("p.json", "{", "cannot be read"),
        ("p.csv", "a,b", "no prompt file by its name"),
        ("p.jsonl", '{"timestamp": 1, "hash_ids": [1]}', "Replay it with aiperf"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, text: str, reason: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        read_prompts(path)
    with pytest.raises(ConfigError, match="Cannot read"):
        read_prompts(tmp_path / "none.json")


# --- what goes wrong -------------------------------------------------------------------------------------


def test_a_server_that_dies_leaves_a_marked_partial_result() -> None:
    stage, _ = run(dies_after=13, users=8, window_s=30.0)
    summary = stage.summary
    assert not summary.complete
    assert any("stopped answering" in line for line in summary.incidents)
    assert summary.counts.completed >= 8 and summary.counts.failed >= 4
    assert summary.throughput.duration_s < 20, "it does not wait for what cannot come"
    assert summary.tokens.completion == 12 * summary.counts.completed


def test_half_of_the_requests_fail() -> None:
    bad = msgspec.structs.replace(SCRIPT, ending="http_500")
    stage, _ = run(lambda n: bad if n % 2 else SCRIPT, users=4, requests=20)
    summary = stage.summary
    assert summary.complete, "failures are not a dead server"
    assert summary.counts.sent == 20
    # the order in which users arrive is not the order of records
    assert summary.counts.failed == pytest.approx(10, abs=2)
    assert summary.counts.failed + summary.counts.completed == 20
    assert summary.goodput.ratio == summary.counts.completed / 20, "over requests sent"
    assert summary.errors[0].message.startswith("HTTP 500")


def test_requests_that_hang_are_unfinished_and_count() -> None:
    hang = msgspec.structs.replace(SCRIPT, ending="hang")
    stage, _ = run(lambda n: hang if n == 1 else SCRIPT, users=2, requests=6, drain_s=1.0)  # fmt: skip
    counts = stage.summary.counts
    assert (counts.sent, counts.completed, counts.unfinished) == (6, 5, 1)
    assert stage.summary.goodput.ratio == 5 / 6
    assert any("unanswered" in line for line in stage.summary.incidents)


def test_an_sla_nobody_meets_is_said() -> None:
    stage, _ = run(users=1, requests=3, slo=Slo(ttft_ms=1.0, tpot_ms=50.0))
    goodput = stage.summary.goodput
    assert goodput.ratio == 0.0 and "the fastest took 1" in goodput.note


@pytest.mark.parametrize(
    ("load", "slo", "prompts", "reason"),
    [
        (Load(settings=SETTINGS, users=1), Slo(ttft_ms=0.0, tpot_ms=1.0), PROMPTS, "--sla-ttft-ms"),
        (Load(settings=SETTINGS, users=1, window_s=math.nan), SLO, PROMPTS, "--duration"),
        (Load(settings=SETTINGS, users=1), SLO, PROMPTS, "--duration is inf"),
        (Load(settings=SETTINGS, users=1, requests=1), SLO, [], "no prompt"),
        (Load(settings=SETTINGS, users=0), SLO, PROMPTS, "--concurrency is 0"),
        (Load(settings=SETTINGS, rate=0.0), SLO, PROMPTS, "--rate is 0"),
        (Load(settings=SETTINGS, rate=math.nan), SLO, PROMPTS, "--rate is nan"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_sent(
    load: Load, slo: Slo, prompts: Any, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        bench.check({"s": load}, Source(list(prompts), "test"), slo)


def test_a_generator_that_stood_still_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: int) -> Script:
        return SCRIPT

    taken = generator.chat_payload

    def slow(prompt: Prompt, settings: RequestSettings) -> dict[str, Any]:
        time.sleep(1.2)
        return taken(prompt, settings)

    monkeypatch.setattr(generator, "chat_payload", slow)
    stage, _ = run(stop, users=1, requests=1)
    assert any("stood still for 1." in line for line in stage.summary.incidents)
    assert stage.summary.generator is not None and stage.summary.generator.loop_lag_ms is not None
    assert stage.summary.generator.loop_lag_ms.max > 1000


# --- what a result holds ----------------------------------------------------------------------------------


def test_the_servers_arguments_are_kept_and_its_secrets_are_not() -> None:
    stage, _ = run(users=1, requests=2)
    arguments = stage.summary.server.arguments
    assert arguments["max_running_requests"] == 48 and "api_key" not in arguments


@pytest.mark.parametrize("count", [100, 6400])
def test_intervals_have_the_width_of_the_law(count: int) -> None:
    values = np.random.default_rng(3).normal(50.0, 8.0, count)
    mean = over_requests(values.tolist(), lambda sample: sample.mean(axis=-1))
    median = over_requests(values.tolist(), lambda sample: np.quantile(sample, 0.5, axis=-1))
    assert mean is not None and median is not None
    wanted = 2 * 1.96 * values.std() / math.sqrt(count)
    assert mean.high - mean.low == pytest.approx(wanted, rel=0.15)
    # the median of a normal law varies by sqrt(pi / 2) more
    assert median.high - median.low == pytest.approx(wanted * math.sqrt(math.pi / 2), rel=0.35)


@pytest.mark.costly
def test_estimates_bracket_the_value() -> None:
    stage, _ = run(
        lambda n: Script(chunks=(Chunk(0.02 + 0.02 * (n % 3), 1), Chunk(0.03, 3))),
        users=4, window_s=4.0,
    )  # fmt: skip
    ran = stage.ran
    found = stage.summary.estimates
    assert {"output_tok_s", "ttft_ms_p50", "tpot_ms_mean", "goodput_ratio"} <= found.keys()
    assert found["output_tok_s"].value == pytest.approx(stage.summary.throughput.output_tok_s)
    for value in found.values():
        assert value.low <= value.value <= value.high
    again = estimates(ran.measured(), Window(ran.begin, ran.end, ran.records), SLO)
    assert again == found, "seeded"


# --- the command -------------------------------------------------------------------------------------------


def bench_command(*options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["bench", *options])
    if isinstance(done.exception, DSparkError):
        return 2, str(done.exception)  # what main() turns it into
    return done.exit_code, done.output


def read(folder: Path) -> BenchResult:
    return read_artifact(folder / "result.json", BenchResult, "a result", "")


def test_the_command_writes_every_file(tmp_path: Path) -> None:
    with FakeServer(lambda _: SCRIPT) as server:
        code, text = bench_command(
            "--url", server.url, "--concurrency", "1,3", "--requests", "4", "--warmup", "0",
            "--name", "<fake>", "--out", str(tmp_path), "--gpus", "2",
        )  # fmt: skip
    assert code == 0, text
    result = read(tmp_path)
    assert [stage.name for stage in result.stages] == ["c1", "c3"] and result.complete
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text)["kind"] == "bench" and "must-not-be-reported" not in text
    lines = (tmp_path / "requests.jsonl").read_text().splitlines()
    requests = [json.loads(line) for line in lines]
    assert sum(request["measured"] for request in requests) == 8
    assert {request["stage"] for request in requests} == {"c1", "c3"}
    assert all(request["chunk_tokens"] == [1, 4, 2, 3, 2] for request in requests if request["measured"])  # fmt: skip
    drawn = frontier.read(tmp_path / "frontier.json")
    (series,) = drawn.series
    assert (series.name, series.gpus, [p.load for p in series.points]) == ("<fake>", 2, [1, 3])
    assert series.points[0].tok_s_per_user == pytest.approx(55, rel=0.15)
    assert series.points[0].budget is not None


def test_a_dead_server_is_exit_code_1_with_results(tmp_path: Path) -> None:
    with FakeServer(lambda _: SCRIPT, dies_after=9) as server:
        code, text = bench_command(
            "--url", server.url, "--concurrency", "3,6", "--duration", "30", "--warmup", "0",
            "--out", str(tmp_path),
        )  # fmt: skip
    assert code == 1 and "INCOMPLETE" in text and "1 of 2 stages were run" in text
    result = read(tmp_path)
    assert not result.complete and len(result.stages) == 1


@pytest.mark.costly
def test_an_interrupt_keeps_what_there_was(tmp_path: Path) -> None:
    with FakeServer(lambda _: SCRIPT) as server:
        child = subprocess.Popen(
            [sys.executable, "-m", "dspark_sglang.cli.main", "bench", "--url", server.url, "--concurrency", "4,8",
             "--duration", "60", "--warmup", "0", "--out", str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while len(server.served) < 20 and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        text, _ = child.communicate(timeout=60)
    assert child.returncode == 1 and "interrupted" in text and "INCOMPLETE" in text, text
    result = read(tmp_path)
    (stage,) = result.stages
    assert not result.complete and not stage.complete and stage.counts.completed >= 8
    assert stage.counts.sent == stage.counts.completed + stage.counts.unfinished


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "Usage"),
        (["--seed", "1"], "No server was named"),
        (["--url", "127.0.0.1:1"], "address is '127.0.0.1:1'"),
        (["--url", "http://127.0.0.1:9"], "Start the server"),
        (["--url", "http://127.0.0.1:9", "--pattern", "burst"], "closed or poisson"),
        (["--url", "http://127.0.0.1:9", "--pattern", "ramp"], "aiperf makes it"),
        (["--url", "http://127.0.0.1:9", "--rate", "x"], "--rate"),
        (["--url", "http://127.0.0.1:9", "--sla-tpot-ms", "0"], "nothing can be good"),
    ],
)
def test_bad_command_lines(options: list[str], reason: str) -> None:
    code, text = bench_command(*options)
    assert code in (0, 2) and reason in text
