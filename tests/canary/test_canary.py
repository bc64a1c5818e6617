"""The canary: what it asks, what it calls a fault, and how soon it is sure that acceptance fell."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dspark_sglang.canary import run as runs
from dspark_sglang.canary import statistics
from dspark_sglang.canary.checks import TOLERANCES, Answer, compare
from dspark_sglang.canary.prompts import Question, questions
from dspark_sglang.cli.main import app
from dspark_sglang.errors import ArtifactError, ConfigError, ServerError
from dspark_sglang.provenance import provenance

F32 = TOLERANCES["float32"]


class World:
    """A server whose text is a hash of the prompt; faults are switched on by name."""

    def __init__(self) -> None:
        self.fault, self.every = "", 7
        self.length, self.noise = 2.0, 0.25
        #: Of accepted lengths between questions.
        self.spread = 0.0
        self.vocabulary = 900
        self.plain_speculates = False
        self.algorithm: str | None = "DSPARK"
        self.revision = "r1"
        self.deterministic = False
        self.settings: list[dict[str, int]] = []
        self.seen = 0
        self.rng = np.random.default_rng(0)
        self.lock = threading.Lock()

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        given = body["sampling_params"]
        count = given["max_new_tokens"]
        base = np.random.default_rng(list(body["text"].encode()))
        ids = base.integers(0, self.vocabulary, count).tolist()
        lead = base.uniform(0.5, 3.0, count)
        logprobs = (-base.uniform(0.1, 2.0, count)).tolist()
        plain = given.get("custom_params") == {"dspark": {"max_draft_tokens": 0}}
        plain = plain or self.algorithm is None
        rounds = count
        if not plain or self.plain_speculates:
            with self.lock:
                self.seen += 1
                hit = self.fault and self.seen % self.every == 0
                own = float(base.uniform(-self.spread, self.spread))
                length = float(self.rng.normal(self.length + own, self.noise))
            rounds = max(1, round(count / max(length, 1.0)))
            if hit and self.fault == "accept":
                ids[count // 2] += 1
            if self.fault == "seeds" and given["temperature"]:
                ids[3] += 1
            if hit and self.fault == "position":
                logprobs = [value - 0.2 for value in logprobs]
        meta: dict[str, Any] = {"spec_verify_ct": rounds, "completion_tokens": count}
        if body.get("return_logprob"):
            meta["output_token_logprobs"] = [
                [p, i, None] for p, i in zip(logprobs, ids, strict=True)
            ]
            meta["output_top_logprobs"] = [
                [[p, i, None], [p - d, i + 1, None]]
                for p, i, d in zip(logprobs, ids, lead, strict=True)
            ]
        return {"text": " ".join(map(str, ids)), "output_ids": ids, "meta_info": meta}


@contextlib.contextmanager
def served(made: World) -> Iterator[str]:
    """A world over HTTP."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16

        def _send(self, answer: Any) -> None:
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self._send({
                "speculative_algorithm": made.algorithm, "dtype": "float32",
                "served_model_name": "m", "weight_version": made.revision,
                "enable_deterministic_inference": made.deterministic,
                "internal_states": [{"dspark_info_record": {"active": True, "gamma": 5}}],
            })  # fmt: skip

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/generate":
                return self._send(made.generate(body))
            made.settings.append(body["server_args"])
            return self._send([True])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def world() -> Iterator[tuple[World, str]]:
    made = World()
    with served(made) as url:
        yield made, url


def canary(url: str, **more: Any) -> runs.Canary:
    return runs.Canary(runs.Options(url=url, tokens=32, concurrency=4, **more))


def quiet(done: int, faults: int) -> None:
    pass


def test_a_right_server_passes(world: tuple[World, str]) -> None:
    report = runs.run(canary(world[1], requests=40), None, quiet)
    assert report.passed and report.requests == 40 and report.near_ties == 0
    assert set(report.accepted) == {"identifiers", "code", "numbers", "open"}
    assert report.accepted["open"].mean == pytest.approx(2.0, abs=0.3)


@pytest.mark.parametrize(("fault", "check"), [("accept", "text"), ("position", "logprob")])
def test_a_fault_is_found_and_named(world: tuple[World, str], fault: str, check: str) -> None:
    world[0].fault = fault
    report = runs.run(canary(world[1], requests=200), None, quiet)
    assert not report.passed and report.requests < 60
    assert report.faults[0].check == check and report.faults[0].prompt


def test_a_fall_of_acceptance_is_found_against_the_baseline(
    world: tuple[World, str], tmp_path: Path
) -> None:
    path = tmp_path / "baseline.json"
    runs.record(canary(world[1], requests=120), path, quiet, provenance(["test"]))
    watched = canary(world[1], requests=200, seed=1)
    known = runs.read_baseline(path, watched)
    assert runs.run(watched, known, quiet).passed
    world[0].length = 1.4
    report = runs.run(canary(world[1], requests=200, seed=2), known, quiet)
    assert report.drifted_at is not None and report.drifted_at < 80 and not report.faults
    assert 0 < report.familiar <= report.drifted_at / 2 + 4
    assert "known" in path.read_text() and known.deviation == pytest.approx(0.25, rel=0.35)


def test_a_small_fall_shows_since_questions_are_compared_with_themselves(
    world: tuple[World, str], tmp_path: Path
) -> None:
    """Questions differ by far more than the fall; one with itself hardly."""
    path = tmp_path / "baseline.json"
    world[0].spread, world[0].noise = 0.6, 0.02
    runs.record(canary(world[1], requests=120), path, quiet, provenance(["test"]))
    watched = canary(world[1], requests=200, seed=1)
    known = runs.read_baseline(path, watched)
    assert known.deviation < 0.12 < 0.3 < known.levels["open"].deviation
    assert runs.run(watched, known, quiet).passed
    world[0].length = 1.75
    report = runs.run(canary(world[1], requests=200, seed=2), known, quiet)
    assert report.drifted_at is not None and not report.faults


def test_a_baseline_of_other_texts_is_an_error_not_silence(
    world: tuple[World, str], tmp_path: Path
) -> None:
    path = tmp_path / "baseline.json"
    runs.record(canary(world[1], requests=120), path, quiet, provenance(["test"]))
    known = runs.read_baseline(path, canary(world[1]))
    world[0].vocabulary = 800
    with pytest.raises(ArtifactError, match="has the text it had"):
        runs.run(canary(world[1], requests=60), known, quiet)


def test_a_baseline_needs_repeats_and_answers_as_long(
    world: tuple[World, str], tmp_path: Path
) -> None:
    path = tmp_path / "baseline.json"
    with pytest.raises(ServerError, match="repeat an earlier one"):
        runs.record(canary(world[1], requests=40), path, quiet, provenance(["test"]))
    runs.record(canary(world[1], requests=120), path, quiet, provenance(["test"]))
    longer = runs.Canary(runs.Options(url=world[1], tokens=48))
    with pytest.raises(ArtifactError, match="answers of 32 tokens"):
        runs.read_baseline(path, longer)


def test_a_baseline_of_another_model_is_refused(world: tuple[World, str], tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    runs.record(canary(world[1], requests=120), path, quiet, provenance(["test"]))
    path.write_text(path.read_text().replace('"r1"', '"r2"'))
    with pytest.raises(ArtifactError, match="is of m r2"):
        runs.read_baseline(path, canary(world[1]))


def test_a_reference_that_was_speculated_on_compares_nothing(world: tuple[World, str]) -> None:
    world[0].plain_speculates = True
    with pytest.raises(ServerError, match="without speculation took"):
        runs.run(canary(world[1], requests=8), None, quiet)


def test_a_second_server_stands_in_where_speculation_cannot_be_switched_off(
    world: tuple[World, str],
) -> None:
    made, url = world
    made.plain_speculates = True
    plain = World()
    plain.algorithm = None
    with served(plain) as other:
        report = runs.run(canary(url, requests=40, baseline_url=other), None, quiet)
        assert report.passed and report.requests == 40 and report.compared_with == other
        made.fault = "accept"
        report = runs.run(canary(url, requests=200, baseline_url=other), None, quiet)
        assert report.faults and report.faults[0].check == "text"
        plain.revision = "r2"
        with pytest.raises(ConfigError, match="weight_version r2"):
            canary(url, baseline_url=other)
        plain.algorithm = "EAGLE"
        with pytest.raises(ConfigError, match="speculates too"):
            canary(url, baseline_url=other)
    with pytest.raises(ServerError, match="server_info"):
        canary(url, baseline_url=other)


def test_seeded_texts_are_compared_where_seeds_count(world: tuple[World, str]) -> None:
    made, url = world
    made.fault = "seeds"
    assert runs.run(canary(url, requests=40), None, quiet).passed  # nobody asks with seeds
    made.deterministic = True
    report = runs.run(canary(url, requests=40), None, quiet)
    assert [fault.check for fault in report.faults] == ["seeded"] and report.faults[0].token == 3
    made.fault = ""
    assert runs.run(canary(url, requests=40), None, quiet).passed


def test_the_command_acts_and_says_what_it_found(world: tuple[World, str], tmp_path: Path) -> None:
    made, url = world
    out = tmp_path / "report.json"
    arguments = ["canary", "--url", url, "--requests", "40", "--act", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and made.settings == [{"dspark_canary": 1}]
    made.fault, made.settings = "accept", []
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert made.settings == [{"dspark_speculation": 0}, {"dspark_canary": 0}]
    assert "FAULT text" in done.output and "speculation turned off" in done.output
    assert json.loads(out.read_text())["faults"]


def _answer(ids: list[int], lead: float = 2.0, text: str = "") -> Answer:
    best = [(-0.1, -0.1 - lead)] * len(ids)
    return Answer(ids, text, [-0.1] * len(ids), best, len(ids), 1.0)


def test_a_near_tie_is_no_fault_unless_a_verbatim_text_changes() -> None:
    question = Question(0, "identifiers", "Repeat", "kaRo_7", 8)
    ours, plain = _answer([1, 3]), _answer([1, 2], lead=1e-4)
    assert compare(question, ours, plain, F32) is None
    fault = compare(question, _answer([1, 3], text="karo"), _answer([1, 2], 1e-4, "a kaRo_7"), F32)
    assert fault is not None and fault.check == "echo"
    fault = compare(question, ours, _answer([1, 2], lead=0.1), F32)
    assert fault is not None and (fault.check, fault.token) == ("text", 1)
    fault = compare(question, _answer([1]), _answer([1, 2]), F32)
    assert fault is not None and fault.token == 1


def test_questions_are_the_same_for_the_same_seed_and_hold_what_is_echoed() -> None:
    one, other = questions(40, seed=3, tokens=8), questions(40, seed=4, tokens=8)
    assert one == questions(40, seed=3, tokens=8) != other
    assert all(q.verbatim in q.text for q in one if q.verbatim is not None)
    familiar = [[q for q in each if q.name] for each in (one, other)]
    assert familiar[0] == familiar[1] and len(familiar[0]) == 20
    assert len({q.text for q in familiar[0]}) == len({q.name for q in familiar[0]}) > 10
    fresh = questions(40, seed=3, tokens=8, familiar=False)
    assert not any(q.name for q in fresh)


@pytest.mark.parametrize("law", ["normal", "skewed"])
def test_false_alarms_are_rare_and_falls_are_found_soon(law: str) -> None:
    """At most one of 20 unchanged runs of 5,000 requests; a fall of one deviation within 150."""
    rng = np.random.default_rng(5)

    def draw(size: int) -> np.ndarray:
        values = rng.normal(size=size) if law == "normal" else 1.0 - rng.exponential(size=size)
        return np.asarray(values)

    def alarm(residuals: np.ndarray) -> int | None:
        drift = statistics.Drift(height)
        for residual in residuals.tolist():
            drift.add(residual)
        return drift.found

    height = statistics.threshold(draw(400).tolist(), rng)
    assert sum(alarm(draw(5000)) is not None for _ in range(20)) <= 1
    found = [alarm(draw(500) - 1.0) for _ in range(20)]
    assert all(at is not None and at < 150 for at in found), found


def test_cusum_is_the_recursion() -> None:
    values = np.random.default_rng(1).normal(size=50)
    level, expected = 0.0, []
    for value in values:
        level = max(0.0, level - value - statistics.SLACK)
        expected.append(level)
    np.testing.assert_allclose(statistics.cusum(values), expected, atol=1e-12)
