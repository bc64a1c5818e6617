"""Load in paired blocks: which tokens count, and what blocks are summed up to."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks import blocks as summary
from benchmarks.blocks import Block, rates
from benchmarks.load import _names
from dspark_loadtests import closed_loop
from dspark_loadtests.client import RequestSettings
from dspark_loadtests.closed_loop import MODES, Delivered, ModeName, make_server, mode
from dspark_loadtests.compare import ratio
from dspark_loadtests.generator import Load
from dspark_loadtests.prompts import load_prompts
from dspark_loadtests.report import tokens_in
from dspark_loadtests.stream import Outcome, RequestRecord
from dspark_sglang.errors import ConfigError, ServerError
from dspark_sglang.server import Server
from dspark_sglang.values import read_numbers

# --- tokens in a window ---------------------------------------------------------------------------


def record(first: float | None, gaps: list[float], tokens: list[int]) -> RequestRecord:
    return RequestRecord(
        prompt_id="p", prompt_kind="chat", outcome=Outcome.COMPLETED, error=None, sent_at=0.0,
        first_content_at=first, last_content_at=first, ended_at=99.0, gaps_s=tuple(gaps),
        chunk_tokens=tuple(tokens), content_chunks=len(tokens), prompt_tokens=5,
        completion_tokens=sum(tokens), cached_tokens=None, finish_reason="stop",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("begin", "end", "wanted"),
    [
        (0.0, 100.0, 15),  # 1 at 10, 2 at 11, 4 at 13, 8 at 16
        (11.0, 16.0, 6),  # the beginning counts, the end does not
        (11.5, 17.0, 12),
        (16.5, 100.0, 0),
        (0.0, 10.0, 0),
    ],
)
def test_tokens_count_where_they_arrive(begin: float, end: float, wanted: int) -> None:
    chat = record(10.0, [1.0, 2.0, 3.0], [1, 2, 4, 8])
    assert tokens_in(chat, begin, end) == wanted


def test_windows_share_every_token_once() -> None:
    rng = np.random.default_rng(0)
    gaps, tokens = rng.uniform(0, 0.3, 60).tolist(), rng.integers(1, 6, 61).tolist()
    chat = record(2.0, gaps, tokens)
    edges = [0.0, 3.0, 5.5, 7.25, 1000.0]
    parts = [tokens_in(chat, a, b) for a, b in itertools.pairwise(edges)]
    assert sum(parts) == sum(tokens) and min(parts[:3]) > 0


def test_a_request_without_an_answer_brings_nothing() -> None:
    assert tokens_in(record(None, [], []), 0.0, 100.0) == 0


# --- the loop itself, against a server that streams -------------------------------------------------


@contextmanager
def streaming(*, status: int = 200, chunk_s: float = 0.02) -> Iterator[tuple[str, list[Any]]]:
    """A server of chats whose chunks bring 2 tokens each; its URL, and the bodies it was sent."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            self.send_response(status)
            if status != 200:
                self.send_header("Content-Length", "4")
                self.end_headers()
                self.wfile.write(b"full")
                return
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            try:
                for sent in range(2, body["max_tokens"] + 1, 2):
                    time.sleep(chunk_s)
                    last = sent + 2 > body["max_tokens"]
                    event = {
                        "choices": [
                            {"delta": {"content": "a b"}, "finish_reason": "stop" if last else None}
                        ],
                        "usage": {"prompt_tokens": 3, "completion_tokens": sent},
                    }
                    self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
                self.wfile.write(b"data: [DONE]\n\n")
            except (BrokenPipeError, ConnectionResetError):
                pass  # the window is over

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()


SETTINGS = RequestSettings(model="default", temperature=0.5, max_tokens=20)
LOAD = Load(settings=SETTINGS, users=3, warm_s=0.3, window_s=1.2, seed=4)


def test_a_block_counts_what_was_streamed_in_its_window() -> None:
    with streaming() as (url, seen):
        found = closed_loop.run_block(url, load_prompts(), LOAD)
    # Three users, 2 tokens every 20 ms at most; a busy machine brings less, never more.
    assert 0 < found.tokens <= 3 * 2 * (1.2 / 0.02 + 1)
    assert found.tok_s == pytest.approx(found.tokens / 1.2)
    assert found.requests >= 1 and found.tpot_s is not None and found.tpot_s >= 0.009
    assert found.ttft_s is not None and found.ttft_s >= 0.02
    assert all(body["temperature"] == 0.5 and body["stream"] for body in seen)
    # Users start with answers of different lengths, and go on with whole ones.
    assert all(5 <= body["max_tokens"] <= 20 for body in seen[:3])
    assert {body["max_tokens"] for body in seen[3:]} == {20}


def test_the_same_seed_asks_the_same_in_the_same_order() -> None:
    asked = []
    for _ in range(2):
        with streaming() as (url, seen):
            closed_loop.run_block(url, load_prompts(), LOAD)
        asked.append(sorted(str(body) for body in seen[:3]))
    assert asked[0] == asked[1]


def test_a_server_that_fails_is_not_measured() -> None:
    with streaming(status=503) as (url, _), pytest.raises(ServerError, match="HTTP 503: full"):
        closed_loop.run_block(url, load_prompts(), LOAD)


# --- the end of a block --------------------------------------------------------------------------------


def loads(running: int, waiting: int = 0) -> dict[str, Any]:
    """``/v1/loads?include=core`` as SGLang 0.5.23 answers it."""
    return {
        "timestamp": "2026-11-27T09:14:59.455404+00:00", "version": "0.5.23", "accelerator": None,
        "num_accelerators": 1,
        "loads": [
            {"timestamp": 1795770899.05, "dp_rank": 0, "num_running_reqs": running,
             "num_waiting_reqs": waiting, "num_used_tokens": 14, "num_total_tokens": 14,
             "max_total_num_tokens": 32768, "max_running_requests": 16, "token_usage": 0.0}
        ],
    }  # fmt: skip


@contextmanager
def telling(answers: list[Any], tmp_path: Path) -> Iterator[tuple[Server, list[str]]]:
    """A server that answers in turn, the last answer for ever, and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            body = json.dumps(answers[min(len(asked), len(answers)) - 1]).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    log = tmp_path / "log"
    log.write_text("")
    try:
        yield Server([], port=http.server_address[1], log=log), asked
    finally:
        http.shutdown()
        http.server_close()


def test_a_block_ends_when_nothing_runs_or_waits_any_more(tmp_path: Path) -> None:
    answers = [loads(2), loads(0, waiting=1), loads(0), loads(1), loads(0), loads(0), loads(9)]
    with telling(answers, tmp_path) as (server, asked):
        closed_loop.wait_idle(server)
    assert len(asked) == 6 and {path.partition("?")[0] for path in asked} == {"/v1/loads"}


def test_a_server_that_does_not_come_to_rest_is_an_error(tmp_path: Path) -> None:
    with (
        telling([loads(3)], tmp_path) as (server, _),
        pytest.raises(ServerError, match="3 requests still run"),
    ):
        closed_loop.wait_idle(server, 0.3)


@pytest.mark.parametrize(
    "answer", [{}, {"loads": []}, {"loads": [{}]}, {"loads": None}, []], ids=str
)
def test_an_answer_that_does_not_tell_is_no_rest(answer: Any, tmp_path: Path) -> None:
    with telling([answer], tmp_path) as (server, _), pytest.raises(ServerError):
        closed_loop.wait_idle(server, 0.3)


# --- what a block counted ----------------------------------------------------------------------------


def counters(**known: Any) -> dict[str, Any]:
    names = ("steps", "rounds", "plain_rounds", "verified_tokens", "committed_tokens")
    return {"active": True, "seconds": {}} | dict.fromkeys(names, 0) | known


def test_counters_of_a_block_are_differences() -> None:
    before = counters(rounds=100, plain_rounds=50, committed_tokens=180, seconds={"plan": 1.0})
    after = counters(rounds=140, plain_rounds=60, committed_tokens=260, verified_tokens=90,
                     seconds={"plan": 1.5, "step": 4.0})  # fmt: skip
    found = closed_loop.difference({"dspark_info_record": before}, {"dspark_info_record": after})
    assert (found["rounds"], found["plain_rounds"]) == (40.0, 10.0)
    assert found["accept_length"] == 2.0
    assert found["mean_budget"] == 90 / 50
    assert found["drafting_share"] == 0.8
    assert (found["s_plan"], found["s_step"]) == (0.5, 4.0)


def test_servers_without_the_plugin_count_little() -> None:
    assert closed_loop.difference({}, {}) == {}
    assert closed_loop.difference({}, {"avg_spec_accept_length": 1.8}) == {"accept_length": 1.8}


# --- summing up ---------------------------------------------------------------------------------------


def block(name: ModeName, number: int, tok_s: float, **counted: float) -> Block:
    delivered = Delivered(
        tok_s=tok_s, tokens=int(tok_s * 10), window_s=10.0, requests=3, ttft_s=0.2, tpot_s=0.05
    )
    return Block(mode=name, number=number, delivered=delivered, counted=counted)


def counts(drafting: float, *, rounds: float = 100.0, length: float = 2.0) -> dict[str, float]:
    """What the plugin counted in a block with that share of rounds; it verified 3 tokens a request and step."""
    drafted = drafting * rounds
    return {
        "rounds": drafted,
        "plain_rounds": rounds - drafted,
        "committed_tokens": length * drafted,
        "verified_tokens": 3.0 * rounds,
    }


def cell(*, ours: float = 1.3, drafting: float = 0.9, seed: int = 0) -> list[Block]:
    """Four blocks of a machine that drifts by a factor of 3."""
    rng, found = np.random.default_rng(seed), []
    for number, drift in enumerate((1.0, 2.0, 3.0, 1.5)):
        speeds: dict[ModeName, float] = {"none": 100.0, "fixed": 90.0, "dspark": 100.0 * ours}
        for name, base in speeds.items():
            counted = {} if name == "none" else counts(drafting if name == "dspark" else 1.0)
            tok_s = base * drift * float(rng.uniform(0.98, 1.02))
            found.append(block(name, number, tok_s, **counted))
    return found[::-1]


def test_rates_are_in_the_order_of_blocks() -> None:
    assert rates([block("none", 1, 2.0), block("none", 0, 1.0)], "none").tolist() == [1.0, 2.0]


def test_drift_does_not_widen_a_paired_ratio() -> None:
    blocks = cell()
    found = ratio(rates(blocks, "dspark"), rates(blocks, "none"))
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(1.3, rel=0.03)
    assert found.high - found.low < 0.08


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng, inside = np.random.default_rng(1), 0
    for trial in range(200):
        drift = rng.uniform(0.5, 2.0, 12)
        ours = 1.1 * drift * rng.uniform(0.9, 1.1, 12)
        found = ratio(ours, drift * rng.uniform(0.9, 1.1, 12), draws=400, seed=trial)
        inside += found.low <= 1.1 <= found.high
    assert 0.86 < inside / 200 <= 1.0  # 95% for many blocks; somewhat less for twelve


def test_equal_servers_have_a_ratio_of_1() -> None:
    same = np.array([3.0, 5.0, 4.0])
    assert ratio(same, same).rounded() == [1.0, 1.0, 1.0]


def test_a_cell_holds_every_mode_and_our_ratios() -> None:
    found = summary.summarise_cell(cell(), {"builtin_static": "it needs a GPU"})
    assert list(found)[:3] == ["none", "fixed", "builtin_static"]
    assert found["builtin_static"] == {"missing": "it needs a GPU"}
    assert found["none"]["tok_s"] == pytest.approx(187.5, rel=0.02)
    assert found["none"]["accept_length"] is found["none"]["mean_budget"] is None
    assert (found["dspark"]["accept_length"], found["dspark"]["mean_budget"]) == (2.0, 3.0)
    assert found["dspark"]["ttft_s"] == 0.2
    assert found["best_fixed"] == "none"
    assert found["ratio_none"] == found["ratio_best_fixed"]
    assert found["ratio_none"][1] == pytest.approx(1.3, rel=0.03)
    json.dumps(found)


def test_a_block_with_hardly_a_round_weighs_little() -> None:
    blocks = [
        block("dspark", 0, 1.0, **counts(1.0, length=1.9)),
        block("dspark", 1, 1.0, **counts(0.5, rounds=2.0, length=6.0)),
        block("dspark", 2, 1.0, **counts(0.0)),
    ]
    found = summary.summarise_cell(blocks, {})["dspark"]
    assert found["accept_length"] == pytest.approx((1.9 * 100 + 6.0) / 101, abs=1e-4)
    assert found["drafting_share"] == pytest.approx(101 / 202, abs=1e-4)
    never = summary.summarise_cell([block("dspark", 0, 1.0, **counts(0.0))], {})["dspark"]
    assert never["accept_length"] is None and never["drafting_share"] == 0.0


def test_sglang_s_own_counts_have_a_length_alone() -> None:
    blocks = [block("builtin_static", n, 1.0, accept_length=1.5 + n) for n in range(2)]
    found = summary.summarise_cell(blocks, {})["builtin_static"]
    assert (found["accept_length"], found["mean_budget"], found["drafting_share"]) == (
        2.0,
        None,
        None,
    )


def test_the_best_of_the_rest_may_speculate() -> None:
    blocks = [b for b in cell() if b.mode != "fixed"]
    blocks += [block("fixed", number, 400.0) for number in range(4)]
    found = summary.summarise_cell(blocks, {})
    assert found["best_fixed"] == "fixed"
    assert found["ratio_best_fixed"][1] < 1.0 < found["ratio_none"][1]


@pytest.mark.parametrize(
    ("cell_", "wanted"),
    [
        ((1.0, 8, "bfloat16"), "T1-c8"),
        ((0.0, 32, "float32"), "T0-c32-float32"),
        ((0.7, 1, "bfloat16"), "T0.7-c1"),
    ],
)
def test_names_of_cells(cell_: tuple[float, int, str], wanted: str) -> None:
    assert summary.cell_name(*cell_) == wanted


def cells() -> dict[str, Any]:
    found = {
        summary.cell_name(heat, users, dtype): summary.summarise_cell(
            cell(ours=1.5 - users / 100, seed=users), {"builtin_static": "no"}
        )
        for heat in (0.0, 1.0)
        for users in (32, 1, 8)
        for dtype in ("bfloat16", "float32")
    }
    found["T1-c8"].pop("fixed")
    return found


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    from matplotlib import image

    path = tmp_path / "load.png"
    summary.draw(cells(), path)
    pixels = image.imread(path)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1500  # four columns
    assert pixels[..., :3].std() > 0.05
    one = tmp_path / "one.png"
    summary.draw({"T1-c8": cells()["T1-c8"]}, one)
    assert image.imread(one).shape[1] < pixels.shape[1] / 2


def test_the_table_shows_every_cell() -> None:
    console, known = Console(width=200, record=True), cells()
    console.print(summary.table(known))
    text = console.export_text()
    assert all(name in text for name in known)
    assert "does not run" in text and "1.4" in text


# --- ways of serving ---------------------------------------------------------------------------------


def test_every_mode_serves_the_same_target_its_own_way(tmp_path: Path) -> None:
    commands = {}
    for name in MODES:
        made = make_server(
            mode(name), target=tmp_path / "t", drafter=tmp_path / "d", dtype="bfloat16", port=1,
            requests=32, log=tmp_path / "log",
        )  # fmt: skip
        commands[name] = (made._command, made._environment)
    assert all(str(tmp_path / "t") in command for command, _ in commands.values())
    assert [name for name, (c, _) in commands.items() if "DSPARK" not in c] == ["none"]
    assert commands["fixed"][1]["DSPARK_SCHEDULE"] == "all"
    assert commands["builtin_static"][1]["DSPARK_PLUGIN"] == "off"
    assert commands["dspark"][0] == commands["fixed"][0] == commands["builtin_static"][0]
    for command, _ in commands.values():  # the last one counts
        text = " ".join(command)
        assert text.rpartition("--max-running-requests ")[2].split()[0] == "32"


@pytest.mark.parametrize("text", ["", "1,,2", "one", "0,4", "-1", "1.5"])
def test_numbers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--concurrency"):
        read_numbers(text, "--concurrency", int)


def test_names_are_checked() -> None:
    assert _names("dspark,none", "--modes", MODES) == ["dspark", "none"]
    assert read_numbers("0,0.7", "--temperatures", float, zero=True) == [0.0, 0.7]
    with pytest.raises(ConfigError, match="best"):
        _names("dspark,best", "--modes", MODES)
