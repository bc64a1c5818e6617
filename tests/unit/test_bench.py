"""``dspark bench``: what it measures is what the fake server did, and what goes wrong is said."""

from __future__ import annotations

import asyncio
import csv
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

from dspark_loadtests import arrivals, plan
from dspark_loadtests.arrivals import Segment
from dspark_loadtests.bench import Stage, connect
from dspark_loadtests.estimate import estimates
from dspark_loadtests.fake_server import FakeServer
from dspark_loadtests.prompts import Prompt, load_prompts
from dspark_loadtests.report import read_result, tokens_in
from dspark_loadtests.schema import BenchResult, Slo
from dspark_loadtests.scrape import over_run, read_metrics
from dspark_loadtests.script import Chunk, Script
from dspark_loadtests.selfcheck import _as_record, compare, self_check
from dspark_loadtests.watch import Watch
from dspark_sglang.cli.main import app
from dspark_sglang.errors import ConfigError, DSparkError
from dspark_sglang.load import frontier
from dspark_sglang.load.prompts import read_prompts
from dspark_sglang.load.sweep import measure_frontier

PROMPTS = load_prompts()
#: TTFT 100 ms, then 4 rounds of 50 ms with 11 tokens: TPOT 200 / 11, accepted length 2.75.
SCRIPT = Script(
    chunks=(Chunk(0.1, 1), Chunk(0.05, 4), Chunk(0.05, 2), Chunk(0.05, 3), Chunk(0.05, 2))
)
#: A busy machine may stamp that much later than the server wrote.
LAG_MS = 60.0


def run(
    script: Callable[[int], Script] = lambda _: SCRIPT, *, dies_after: int | None = None, **options: Any
) -> tuple[list[Stage], FakeServer]:  # fmt: skip
    speculation = options.pop("speculation", "counters")
    prompts = options.pop("prompts", PROMPTS)
    request = plan.Request(**{"warmup_s": 0.0, "drain_s": 5.0} | options)
    with FakeServer(script, speculation=speculation, dies_after=dies_after) as server:
        found = [stage for stage, _ in plan.run(connect(server.url), prompts, request)]
    return found, server


# --- arrivals -------------------------------------------------------------------------------------


def test_poisson_instants_have_the_law_of_the_rate() -> None:
    found = np.array(list(arrivals.instants(arrivals.steps([50.0], 400.0), random.Random(0))))
    gaps = np.diff(found)
    # 20,000 expected: five standard deviations
    assert abs(len(found) - 20_000) < 5 * math.sqrt(20_000)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05), "exponential, not regular"
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.04


def test_ramp_and_steps_send_in_proportion() -> None:
    rising = np.array(list(arrivals.instants(arrivals.ramp(0.0, 100.0, 200.0), random.Random(1))))
    assert abs(len(rising) - 10_000) < 500
    assert (rising < 100).mean() == pytest.approx(0.25, abs=0.02), "half the time, a quarter of it"
    stepped = np.array(list(arrivals.instants(arrivals.steps([10, 30], 200.0), random.Random(1))))
    assert (stepped < 100).mean() == pytest.approx(0.25, abs=0.03)
    assert stepped.max() < 200 and (np.diff(stepped) >= 0).all()


def test_instants_are_seeded_and_go_on_for_ever() -> None:
    endless = [Segment(1.0, 5.0, 5.0), Segment(math.inf, 7.0, 7.0)]
    first, again, other = (
        list(itertools.islice(arrivals.instants(endless, random.Random(seed)), 50))
        for seed in (1, 1, 2)
    )
    assert first == again != other and first[-1] > 4


@pytest.mark.parametrize(
    "segment", [Segment(1, -1, 2), Segment(1, 0, 0), Segment(0, 1, 1), Segment(1, math.nan, 1)]
)
def test_no_load_is_refused(segment: Segment) -> None:
    with pytest.raises(ConfigError, match="requests/s"):
        arrivals.check([segment])


# --- against known truth ------------------------------------------------------------------------------


def test_closed_loop_measures_what_the_server_did() -> None:
    (stage,), server = run(concurrency=(4,), requests=24)
    summary = stage.summary
    counts, latency = summary.counts, summary.latency
    assert (counts.sent, counts.completed, counts.failed, counts.unfinished) == (24, 24, 0, 0)
    assert counts.sent + counts.unmeasured == len(server.served), "the load went on until the end"
    assert latency.ttft_ms and latency.tpot_ms and latency.itl_ms and latency.inter_chunk_ms and latency.e2e_ms  # fmt: skip
    # Script's times are lower bounds, and the server's own notes the truth.
    true = [_as_record(record, server.served) for record in stage.measured]
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        ours = np.mean([getattr(record, name) for record in stage.measured])
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
    (stage,), _ = run(lambda _: slow, pattern="poisson", rates=(20.0,), requests=30)
    sent = np.array([record.sent_at for record in stage.measured])
    due = np.array([record.scheduled_at for record in stage.measured])
    assert (np.diff(due) > 0).all() and np.percentile(sent - due, 90) < LAG_MS / 1e3
    assert (sent >= due).all(), "never before its time"
    # A closed loop would send no more than it has users; here nobody waits for anybody.
    assert stage.summary.generator is not None and stage.summary.generator.peak_streams > 8
    wanted = [next(iter(arrivals.instants([Segment(math.inf, 20.0, 20.0)], random.Random(1))))]
    assert due[0] - stage.ran.began == pytest.approx(wanted[0])
    latency = stage.summary.latency
    assert latency.ttft_from_schedule_ms and latency.ttft_ms
    assert latency.ttft_from_schedule_ms.mean >= latency.ttft_ms.mean


def test_a_late_generator_does_not_hide_it() -> None:
    record = run(concurrency=(1,), requests=1)[0][0].measured[0]
    late = msgspec.structs.replace(record, scheduled_at=record.sent_at - 2.0)
    assert late.ttft_from_schedule_s == pytest.approx((record.ttft_s or 0) + 2.0)
    slo = Slo(ttft_ms=1000, tpot_ms=1000)
    assert slo.met_by(record) and not slo.met_by(late), "the SLA is the schedule's"


def test_warm_up_is_not_measured() -> None:
    slow_start = Script(chunks=(Chunk(0.5, 1), Chunk(0.01, 1)))
    quick = Script(chunks=(Chunk(0.05, 1), Chunk(0.01, 1)))
    (stage,), _ = run(
        lambda n: slow_start if n < 2 else quick, concurrency=(2,), warmup_s=0.7, duration_s=1.0
    )
    assert stage.summary.latency.ttft_ms is not None
    assert stage.summary.latency.ttft_ms.max < 400
    assert stage.summary.counts.unmeasured >= 2
    assert stage.summary.throughput.duration_s >= 1.0


def test_steps_come_in_parts() -> None:
    request = plan.Request(pattern="step", rates=(4.0, 40.0), duration_s=3.0, warmup_s=0.0)
    with FakeServer(lambda _: SCRIPT) as server:
        ((stage, parts),) = plan.run(connect(server.url), PROMPTS, request)
    assert [part.name for part in parts] == ["steps 4/s", "steps 40/s"]
    assert sum(part.counts.sent for part in parts) == stage.summary.counts.sent
    assert parts[1].counts.sent > 3 * parts[0].counts.sent


def test_acceptance_from_the_streams_themselves() -> None:
    (stage,), _ = run(concurrency=(2,), requests=6, speculation="requests")
    acceptance = stage.summary.acceptance
    assert (acceptance.source, acceptance.accepted_length) == ("requests", 2.75)


def test_many_streams_against_a_server_on_another_core() -> None:
    """The check a user runs, small: its bounds are the command's, on a quiet machine."""
    found = self_check(40, 2.0)
    assert found.failed == 0 and found.requests > 5 and found.chunks > 500
    assert found.errors_pct["tokens"] == 0.0
    assert found.lag_p50_ms < LAG_MS


def test_the_self_check_notices_an_error() -> None:
    (stage,), server = run(concurrency=(2,), requests=8)
    right = compare(stage.ran, server.served, streams=2, busy=0.0)
    assert right.requests == 8 and right.errors_pct["tokens"] == 0.0
    for served in server.served:
        served.chunk_times = [at - 0.05 * (i > 0) for i, at in enumerate(served.chunk_times)]
    wrong = compare(stage.ran, server.served, streams=2, busy=0.0)
    assert wrong.lag_ms >= right.lag_ms + 40
    assert wrong.errors_pct["tpot_ms mean"] > 20 and wrong.metric_error_pct > 20


# --- conversations -------------------------------------------------------------------------------------


def test_a_conversation_goes_on_with_the_servers_own_answers() -> None:
    talk = Prompt("talk", "chat", "Be kind.", "One?", ("Two?", "Three?"))
    _, server = run(prompts=[talk], concurrency=(1,), requests=4)
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
    trace = tmp_path / "t.jsonl"
    lines = [
        {"timestamp": 27_000, "input_length": 900, "output_length": 5, "hash_ids": [1, 2]},
        {"timestamp": 27_500, "input_length": 700, "output_length": 9, "hash_ids": [1, 3]},
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    first, second = read_prompts(trace).prompts
    assert (first.at_s, second.at_s, second.max_tokens) == (0.0, 0.5, 9)
    head = round(512 / 1.35)
    a, b = first.user.split(), second.user.split()
    assert a[:head] == b[:head] and a[head:] != b[head:], "an equal hash is an equal prefix"
    assert len(a) == pytest.approx(900 / 1.35, abs=2)


def test_a_trace_is_sent_at_its_times() -> None:
    prompts = [Prompt(f"t{i}", "trace", "", f"say {i}", max_tokens=i + 1, at_s=at) for i, at in enumerate((0.0, 0.3, 0.35))]  # fmt: skip
    (stage,), server = run(prompts=prompts, pattern="trace", duration_s=10.0)
    assert [served.body["max_tokens"] for served in server.served] == [1, 2, 3]
    sent = [record.sent_at - stage.ran.began for record in stage.measured]
    assert sent == pytest.approx([0.0, 0.3, 0.35], abs=LAG_MS / 1e3)
    assert stage.ran.end - stage.ran.began < 5, "a trace that is over ends the run"


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("p.json", "", "is empty"),
        ("p.txt", " \n", "is empty"),
        ("p.json", "[]", "No usable prompt"),
        ("p.json", "{", "cannot be read"),
        ("p.csv", "a,b", "no prompt file by its name"),
        ("p.jsonl", '{"hash_ids": 1}', "p.jsonl:1"),
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
    (stage,), _ = run(dies_after=13, concurrency=(4, 8), duration_s=30.0)
    summary = stage.summary
    assert not summary.complete
    assert any("stopped answering" in line for line in summary.incidents)
    assert summary.counts.completed >= 8 and summary.counts.failed >= 4
    assert summary.throughput.duration_s < 20, "it does not wait for what cannot come"
    assert summary.tokens.completion == 12 * summary.counts.completed


def test_half_of_the_requests_fail() -> None:
    bad = msgspec.structs.replace(SCRIPT, ending="http_500")
    (stage,), _ = run(lambda n: bad if n % 2 else SCRIPT, concurrency=(4,), requests=20)
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
    (stage,), _ = run(lambda n: hang if n == 1 else SCRIPT, concurrency=(2,), requests=6, drain_s=1.0)  # fmt: skip
    counts = stage.summary.counts
    assert (counts.sent, counts.completed, counts.unfinished) == (6, 5, 1)
    assert stage.summary.goodput.ratio == 5 / 6
    assert any("unanswered" in line for line in stage.summary.incidents)


def test_an_sla_nobody_meets_is_said() -> None:
    (stage,), _ = run(concurrency=(1,), requests=3, slo=Slo(ttft_ms=1.0, tpot_ms=50.0))
    goodput = stage.summary.goodput
    assert goodput.ratio == 0.0 and "the fastest took 1" in goodput.note


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"slo": Slo(ttft_ms=0.0, tpot_ms=1.0)}, "--sla-ttft-ms"),
        ({"duration_s": math.nan}, "--duration"),
        ({"pattern": "ramp", "rates": (1.0,)}, "A ramp with 1"),
        ({"pattern": "trace"}, "have no times"),
        ({"prompts": []}, "no prompt"),
        ({"concurrency": (0,)}, "concurrency of 0"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_sent(
    options: dict[str, Any], reason: str
) -> None:
    prompts = options.pop("prompts", PROMPTS)
    with pytest.raises(ConfigError, match=reason):
        plan.check(plan.Request(**options), prompts)


def test_clocks_that_jump_and_a_generator_that_stood_still() -> None:
    noted: list[str] = []
    mono, wall = [100.0], [5000.0]
    watch = Watch(noted.append, clock=lambda: mono[0], wall=lambda: wall[0])
    mono[0], wall[0] = 100.02, 5000.02
    watch.look(100.01)
    assert noted == [] and watch.lags == [(100.02, pytest.approx(0.01))]
    mono[0], wall[0] = 100.03, 1400.03
    watch.look(100.03)
    assert "jumped by -3600.0 s" in noted[0] and "not affected" in noted[0]
    mono[0], wall[0] = 104.03, 1404.03
    watch.look(100.04)
    assert "stood still for 4.0 s" in noted[1]
    watch.look(104.03)
    assert len(noted) == 2, "told once"


def test_a_blocked_event_loop_shows_in_the_lag() -> None:
    async def blocked() -> list[tuple[float, float]]:
        watch = Watch(lambda _: None)
        task = asyncio.create_task(watch.run())
        await asyncio.sleep(0.05)
        time.sleep(0.2)
        await asyncio.sleep(0.05)
        task.cancel()
        return watch.lags

    assert max(late for _, late in asyncio.run(blocked())) > 0.15


# --- the server's own numbers --------------------------------------------------------------------------


def test_metrics_over_the_run() -> None:
    before = read_metrics("# TYPE sglang:a counter\nsglang:a_total 5\n# TYPE sglang:g gauge\nsglang:g 1\n")  # fmt: skip
    text = '# TYPE sglang:a counter\nsglang:a_total{r="0"} 7\nsglang:a_total{r="1"} 4\n# TYPE sglang:g gauge\nsglang:g{r="0"} 3\nsglang:g{r="1"} 3\n# TYPE python_x gauge\npython_x 9\n'
    assert over_run(before, read_metrics(text)) == {"sglang:a_total": 6.0, "sglang:g": 3.0}
    assert over_run(read_metrics(text), before) == {"sglang:g": 1.0}, "a reset counter is left out"
    assert read_metrics("<html>") == ({}, {})
    (stage,), _ = run(concurrency=(1,), requests=2)
    assert stage.summary.server_metrics["sglang:generation_tokens_total"] > 0
    arguments = stage.summary.server.arguments
    assert arguments["max_running_requests"] == 48 and "api_key" not in arguments


def test_estimates_bracket_the_value() -> None:
    (stage,), _ = run(
        lambda n: Script(chunks=(Chunk(0.02 + 0.02 * (n % 3), 1), Chunk(0.03, 3))),
        concurrency=(4,), duration_s=4.0,
    )  # fmt: skip
    ran = stage.ran
    found = stage.summary.estimates
    assert {"output_tok_s", "ttft_ms_p50", "tpot_ms_mean", "goodput_ratio"} <= found.keys()
    assert found["output_tok_s"].value == pytest.approx(stage.summary.throughput.output_tok_s)
    for value in found.values():
        assert value.low <= value.value <= value.high
    again = estimates(stage.measured, ran.records, begin=ran.begin, end=ran.end, slo=stage.summary.settings.slo)  # fmt: skip
    assert again == found, "seeded"


# --- the command -------------------------------------------------------------------------------------------


def bench(*options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["bench", *options])
    if isinstance(done.exception, DSparkError):
        return 2, str(done.exception)  # what main() turns it into
    return done.exit_code, done.output


def test_the_command_writes_every_file(tmp_path: Path) -> None:
    with FakeServer(lambda _: SCRIPT) as server:
        code, text = bench(
            "--url", server.url, "--concurrency", "1,3", "--requests", "4", "--warmup", "0",
            "--name", "<fake>", "--out", str(tmp_path), "--gpus", "2",
        )  # fmt: skip
    assert code == 0, text
    result = read_result(tmp_path / "result.json")
    assert [stage.name for stage in result.stages] == ["c1", "c3"] and result.complete
    assert json.loads((tmp_path / "result.json").read_text())["kind"] == "bench"
    rows = list(csv.DictReader((tmp_path / "stages.csv").open()))
    assert [row["users"] for row in rows] == ["1", "3"] and float(rows[0]["ttft_p50_ms"]) >= 99
    requests = list(csv.DictReader((tmp_path / "requests.csv").open()))
    assert sum(row["measured"] == "True" for row in requests) == 8
    page = (tmp_path / "report.html").read_text()
    assert "&lt;fake&gt;" in page and "<fake>" not in page and "data:image/png" in page
    assert "must-not-be-reported" not in page
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    drawn = frontier.read(tmp_path / "frontier.json")
    (series,) = drawn.series
    assert (series.name, series.gpus, [p.load for p in series.points]) == ("<fake>", 2, [1, 3])
    assert series.points[0].tok_s_per_user == pytest.approx(55, rel=0.15)
    assert series.points[0].budget is not None


def test_a_dead_server_is_exit_code_1_with_results(tmp_path: Path) -> None:
    with FakeServer(lambda _: SCRIPT, dies_after=9) as server:
        code, text = bench(
            "--url", server.url, "--concurrency", "3,6", "--duration", "30", "--warmup", "0",
            "--out", str(tmp_path),
        )  # fmt: skip
    assert code == 1 and "INCOMPLETE" in text and "1 of 2 stages were run" in text
    result = read_result(tmp_path / "result.json")
    assert not result.complete and len(result.stages) == 1
    assert "Incomplete: the run ended before its time" in (tmp_path / "report.html").read_text()


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
    result = read_result(tmp_path / "result.json")
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
        (["--url", "http://127.0.0.1:9", "--pattern", "burst"], "closed, poisson, ramp, step"),
        (["--url", "http://127.0.0.1:9", "--rate", "x"], "--rate"),
        (["--url", "http://127.0.0.1:9", "--sla-tpot-ms", "0"], "nothing can be good"),
    ],
)
def test_bad_command_lines(options: list[str], reason: str) -> None:
    code, text = bench(*options)
    assert code in (0, 2) and reason in text


def test_one_function_gives_a_frontier() -> None:
    with FakeServer(lambda _: SCRIPT) as server:
        found = measure_frontier(server.url, (1, 2), name="x", duration_s=1.0, warmup_s=0.2)
    assert [point.load for point in found.series[0].points] == [1, 2]
    assert found.model == "fake-model" and found.source == "measured"
    assert isinstance(found, frontier.Frontier) and not isinstance(found, BenchResult)
