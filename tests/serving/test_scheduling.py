"""Scheduling in service on the real server: measured at start, switched and limited at run time."""

from __future__ import annotations

import concurrent.futures
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.blocks import hold, release
from dspark_loadtests.closed_loop import wait_idle
from dspark_loadtests.prompts import load_prompts
from dspark_sglang.demo.measure import NEAR_TIE, tie_gap
from dspark_sglang.server import Server, free_port, serve_command
from tests.serving.conftest import SMALL

pytestmark = pytest.mark.server
PROMPTS = load_prompts()
#: Answers that measure something are long enough for a few rounds.
TOKENS = 32
#: Steps that the measurement at start takes at least, on a crowded machine too.
MEASURED = 8


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty cache directory, so that the step cost has to be measured."""
    return tmp_path_factory.mktemp("cache")


def start(target: Path, drafter: Path, cache: Path, log: Path) -> Server:
    port = free_port()
    extra = [*SMALL, "--enable-metrics", "--max-running-requests", "8"]
    command = serve_command(target, port, dtype="float32", drafter=drafter, extra=extra)
    environment = {"DSPARK_CACHE_DIR": str(cache)}
    return Server(command, port=port, log=log, environment=environment).start()


@pytest.fixture(scope="module")
def server(
    target: Path, drafter: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    made = start(target, drafter, cache, tmp_path_factory.mktemp("scheduling") / "first.log")
    try:
        made.wait_ready(600.0)
        yield made
    finally:
        made.stop()


def update(server: Server, values: Mapping[str, float]) -> bool:
    answer = httpx.post(
        f"{server.url}/set_internal_state", json={"server_args": values}, timeout=60.0
    )
    assert answer.status_code == 200, answer.text
    return all(answer.json())  # one for each scheduler process


@pytest.fixture(autouse=True)
def usual(server: Server) -> Iterator[None]:
    """Whatever a test changes is taken back."""
    yield
    assert update(server, {"dspark_speculation": -1, "dspark_budget": -1})


def record(server: Server) -> dict[str, Any]:
    found = server.dspark()
    assert found is not None
    return found


def post(server: Server, prompt: Any, **options: Any) -> httpx.Response:
    body = {
        "model": "default",
        "messages": prompt.messages(),
        "temperature": 0.0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        **options,
    }
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300.0)


def chat(server: Server, prompt: Any, **options: Any) -> str:
    answer = post(server, prompt, **options)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


class Counted:
    """What the server counted during a ``with`` block."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def __enter__(self) -> Counted:
        self._before = record(self._server)
        return self

    def __exit__(self, *error: object) -> None:
        after = record(self._server)
        self.rounds, self.plain, self.verified, self.drafted = (
            after[name] - self._before[name]
            for name in ("rounds", "plain_rounds", "verified_tokens", "drafted_tokens")
        )


def same(server: Server, prompt: Any, one: str, other: str) -> bool:
    return one == other or tie_gap(server, prompt, other, max_tokens=TOKENS) < NEAR_TIE


# --- at start ---------------------------------------------------------------------------------------


def test_the_step_cost_was_measured_before_the_first_request(server: Server, cache: Path) -> None:
    found = record(server)
    path = Path(found["cost_source"])
    assert path.is_relative_to(cache) and path.is_file()
    assert found["profile_s"] is not None and found["profile_s"] > 0.0
    kept = json.loads(path.read_text())
    assert kept["kind"] == "cost" and kept["seconds"] == pytest.approx(found["profile_s"])
    assert kept["fingerprint"]["dtype"] == "torch.float32"
    assert kept["model"]["round"]["observations"] > 10 < kept["model"]["plain"]["observations"]
    assert "step cost measured under" in server.log.read_text(errors="replace")


def test_predictions_are_checked_against_real_steps(server: Server) -> None:
    assert update(server, {"dspark_speculation": 1})  # whether rounds pay depends on the machine
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda prompt: chat(server, prompt), PROMPTS[:8]))
    found = record(server)
    assert update(server, {"dspark_speculation": -1})
    # Tests share the machine with other work, so this is far from what a quiet one reaches.
    assert found["step_error"] is not None and found["step_error"] < 0.5
    assert found["expected_tokens"] > 0 and found["tau_error"] is not None
    assert 0.0 < found["planner_share"] < 0.1


# --- switched at run time -----------------------------------------------------------------------------


def test_speculation_is_switched_off_on_and_left_to_pay(server: Server) -> None:
    prompts, texts = PROMPTS[:3], {}
    for value, name in ((1, "on"), (0, "off")):
        assert update(server, {"dspark_speculation": value})
        assert record(server)["speculation"] == name
        with Counted(server) as counted:
            texts[name] = [chat(server, prompt) for prompt in prompts]
        if name == "on":
            assert counted.rounds > 0 == counted.plain
        else:
            assert counted.plain >= 3 * (TOKENS - 1) and counted.rounds == 0 == counted.drafted
    for prompt, plain, ours in zip(prompts, texts["off"], texts["on"], strict=True):
        assert same(server, prompt, plain, ours), prompt.id
    assert update(server, {"dspark_speculation": -1})
    with Counted(server) as counted:
        chat(server, prompts[0])
    assert record(server)["speculation"] == "auto"
    assert counted.rounds + counted.plain > 0


def test_sampled_and_greedy_requests_share_steps_that_do_not_draft(server: Server) -> None:
    prompts = PROMPTS[10:13]
    plain = [chat(server, prompt) for prompt in prompts]
    for value in (0, 1):
        assert update(server, {"dspark_speculation": value})
        jobs = [(prompt, heat) for prompt in prompts for heat in (0.0, 1.0)]
        with Counted(server) as counted, concurrent.futures.ThreadPoolExecutor(6) as pool:
            texts = list(pool.map(lambda job: chat(server, job[0], temperature=job[1]), jobs))
        assert (counted.rounds > 0) == bool(value) and (counted.plain > 0) != bool(value)
        for prompt, one, other in zip(prompts, plain, texts[::2], strict=True):
            assert same(server, prompt, one, other), prompt.id
        assert texts[1::2] != texts[::2]  # those were drawn


@pytest.mark.parametrize(
    ("key", "budget", "least", "most"),
    [
        ("dspark_budget", 0, 0.0, 0.0),
        ("dspark_budget", 0.5, 0.3, 0.5),
        ("dspark_budget", 1, 1.0, 1.0),
        ("dspark_force_budget_frac", 0.5, 0.3, 0.5),  # SGLang's own
    ],
)
def test_a_forced_budget_is_what_is_verified(
    server: Server, key: str, budget: float, least: float, most: float
) -> None:
    plain = chat(server, PROMPTS[7])
    assert update(server, {key: budget, "dspark_speculation": 1})
    assert record(server)["forced_budget"] == budget
    with Counted(server) as counted:
        ours = chat(server, PROMPTS[7])
    if budget:
        assert least <= counted.verified / counted.drafted <= most
    else:
        assert counted.verified == 0 == counted.rounds and counted.plain > 0
    assert same(server, PROMPTS[7], plain, ours)
    assert update(server, {"dspark_budget": -1})
    assert record(server)["forced_budget"] is None


def test_a_change_in_the_middle_of_an_answer_leaves_its_text(server: Server) -> None:
    plain = chat(server, PROMPTS[8], max_tokens=120)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(chat, server, PROMPTS[8], max_tokens=120)
        for value in (1, 0, 1, 0, -1):
            assert update(server, {"dspark_speculation": value})
        ours = running.result()
    assert plain == ours or tie_gap(server, PROMPTS[8], ours, max_tokens=120) < NEAR_TIE


@pytest.mark.parametrize(
    "values",
    [
        {"dspark_speculation": 2},
        {"dspark_budget": 1.5},
        {"dspark_cost": 7},
        {"dspark_sts": 9},
        {"dspark_nothing": 1},
        {"dspark_speculation": 0, "dspark_budget": -3},
        {"dspark_budget": 0.5, "dspark_unknown": 1},
    ],
    ids=str,
)
def test_refused_values_change_nothing(server: Server, values: dict[str, float]) -> None:
    names = ("speculation", "forced_budget", "cost_source", "sts", "temperatures")
    before = {name: record(server)[name] for name in names}
    assert not update(server, values)
    assert {name: record(server)[name] for name in names} == before
    chat(server, PROMPTS[0], max_tokens=4)


def test_calibration_is_dropped_and_read_again(server: Server) -> None:
    before = record(server)
    assert update(server, {"dspark_sts": 0})
    dropped = record(server)
    assert dropped["sts"] == "none" and set(dropped["temperatures"]) == {1.0}
    assert update(server, {"dspark_sts": 1})
    again = record(server)
    assert (again["sts"], again["temperatures"]) == (before["sts"], before["temperatures"])


def test_the_step_cost_is_forgotten_and_read_again(server: Server) -> None:
    assert update(server, {"dspark_cost": 0})
    assert record(server)["observations"] == 0
    chat(server, PROMPTS[0], max_tokens=8)  # nothing known is not nothing served
    assert update(server, {"dspark_cost": 1})
    assert record(server)["observations"] > MEASURED


# --- what a request may ask ------------------------------------------------------------------------------


def test_a_request_that_opts_out_is_not_speculated_on(server: Server) -> None:
    assert update(server, {"dspark_speculation": 1})
    usual = chat(server, PROMPTS[9])
    with Counted(server) as counted:
        ours = chat(server, PROMPTS[9], custom_params={"dspark": {"max_draft_tokens": 0}})
    assert counted.rounds == 0 == counted.drafted and counted.plain >= TOKENS - 1
    assert same(server, PROMPTS[9], ours, usual)


def test_a_request_that_caps_its_draft_is_drafted_no_deeper(server: Server) -> None:
    assert update(server, {"dspark_speculation": 1, "dspark_budget": 1})
    before = record(server)["position_sent"]
    with Counted(server) as counted:
        chat(server, PROMPTS[9], custom_params={"dspark": {"max_draft_tokens": 2}})
    sent = [b - a for a, b in zip(before, record(server)["position_sent"], strict=True)]
    assert sent[0] > 0 < sent[1] and not any(sent[2:])
    assert counted.drafted == 2 * counted.rounds == counted.verified


def test_workloads_are_told_apart(server: Server) -> None:
    assert update(server, {"dspark_speculation": 1})
    for name in ("code", "chat"):
        chat(server, PROMPTS[3], custom_params={"dspark": {"workload": name}})
    assert {"code", "chat"} <= set(record(server)["depth_caps"])


@pytest.mark.parametrize(
    "given",
    [
        {"max_draft_tokens": -1},
        {"max_draft_tokens": "all"},
        {"max_tokens": 3},
        {"profile": True},
        5,
    ],
    ids=str,
)
def test_options_that_are_wrong_are_refused(server: Server, given: Any) -> None:
    answer = post(server, PROMPTS[0], custom_params={"dspark": given}, max_tokens=4)
    assert answer.status_code == 400
    assert "custom_params.dspark cannot be used" in answer.text
    assert "max_draft_tokens" in answer.text
    chat(server, PROMPTS[0], max_tokens=4)


# --- metrics -----------------------------------------------------------------------------------------


def metric(server: Server, name: str) -> dict[str, float]:
    """Values of one metric by label set."""
    lines = httpx.get(f"{server.url}/metrics", timeout=30.0).text.splitlines()
    found = [line.rpartition(" ") for line in lines if line.split("{")[0].split(" ")[0] == name]
    return {labels: float(value) for labels, _, value in found}


def test_metrics_say_what_the_server_does(server: Server) -> None:
    assert update(server, {"dspark_speculation": 1})
    for prompt in PROMPTS[:2]:  # metrics are brought up to date once a second
        chat(server, prompt, max_tokens=80)
    (labels,) = metric(server, "dspark_info")
    assert 'schedule="adaptive"' in labels and 'kernels="torch"' in labels
    for name in ("rounds", "drafted_tokens", "verified_tokens", "committed_tokens",
                 "expected_tokens"):  # fmt: skip
        assert sum(metric(server, f"dspark_{name}_total").values()) > 0, name
    for name in ("drafting", "gain", "accept_length", "step_error", "slowdown", "drift_alarm",
                 "forced_budget", "calibration_error", "served_calibration_error"):  # fmt: skip
        assert len(metric(server, f"dspark_{name}")) == 1, name
    assert list(metric(server, "dspark_forced_budget").values()) == [-1.0]
    assert list(metric(server, "dspark_drafting").values()) == [1.0]
    assert metric(server, "dspark_depth_cap")


# --- the next start ------------------------------------------------------------------------------------


def test_the_next_start_takes_the_measured_cost_over(
    server: Server, target: Path, drafter: Path, cache: Path, tmp_path: Path
) -> None:
    known = record(server)
    second = start(target, drafter, cache, tmp_path / "second.log")
    try:
        second.wait_ready(600.0)
        found = record(second)
        assert found["cost_source"] == known["cost_source"]
        assert found["profile_s"] == pytest.approx(known["profile_s"])
        assert "step cost measured under" not in second.log.read_text(errors="replace")
        assert found["observations"] > MEASURED and found["steps"] == 0
    finally:
        second.stop()


def test_a_block_of_load_ends_when_the_server_has_come_to_rest(server: Server) -> None:
    body = {
        "text": "Tell me a long story.", "stream": True,
        "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True},
    }  # fmt: skip
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=300.0) as answer:
        chunks, busy = answer.iter_raw(), 0
        for _ in range(200):  # what runs is published every 15 steps
            next(chunks)
            busy = server.requests()
            if busy:
                break
    assert busy == 1
    wait_idle(server)
    before = record(server)
    assert server.requests() == 0
    time.sleep(0.5)
    after = record(server)
    assert before["rounds"] + before["plain_rounds"] == after["rounds"] + after["plain_rounds"]


REPEATING = "The seven dwarfs are Doc, Grumpy, Happy, Sleepy, Bashful, Sneezy and Dopey. " * 3


@pytest.mark.parametrize("choice", [1, -1, 0])
def test_text_that_repeats_is_copied_and_stays_what_it_is(server: Server, choice: int) -> None:
    def told() -> list[int]:
        body = {
            "text": REPEATING, "sampling_params": {"max_new_tokens": 64, "temperature": 0.0},
        }  # fmt: skip
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=300.0).json()
        tokens: list[int] = answer["output_ids"]
        return tokens

    assert update(server, {"dspark_speculation": 0})
    before = record(server)
    plain = told()
    between = record(server)
    assert between["copied_rounds"] == before["copied_rounds"] and between["lookup"] is True
    assert update(server, {"dspark_speculation": choice})
    assert told() == plain
    after = record(server)
    rounds = after["copied_rounds"] - between["copied_rounds"]
    tokens = after["copied_tokens"] - between["copied_tokens"]
    assert (rounds > 3 and tokens > 2 * rounds) if choice else rounds == 0


def test_an_operators_budget_holds_for_copies_too(server: Server) -> None:
    assert update(server, {"dspark_speculation": 1, "dspark_budget": 0.4})
    before = record(server)
    body = {"text": REPEATING, "sampling_params": {"max_new_tokens": 64, "temperature": 0.0}}
    assert httpx.post(f"{server.url}/generate", json=body, timeout=300.0).status_code == 200
    after = record(server)
    assert after["copied_rounds"] > before["copied_rounds"]
    rounds = after["rounds"] - before["rounds"]
    assert after["verified_tokens"] - before["verified_tokens"] <= rounds * int(
        0.4 * after["gamma"]
    )


def test_a_sampled_request_copies_nothing(server: Server) -> None:
    before = record(server)["copied_rounds"]
    body = {"text": REPEATING, "sampling_params": {"max_new_tokens": 32, "temperature": 1.0}}
    assert httpx.post(f"{server.url}/generate", json=body, timeout=300.0).status_code == 200
    assert record(server)["copied_rounds"] == before


def test_a_server_that_is_held_between_steps_goes_on_as_if_nothing_was(server: Server) -> None:
    body = {
        "text": "Tell me a long story.", "stream": True,
        "sampling_params": {"max_new_tokens": 96, "ignore_eos": True, "temperature": 0.0},
    }  # fmt: skip

    def told(pause_s: float) -> tuple[str, float]:
        """The text, and the seconds that its steps took."""
        last, before = "", record(server)["seconds"]["step"]
        with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=300.0) as answer:
            for number, line in enumerate(answer.iter_lines()):
                if line.startswith("data: {"):
                    last = line
                if number == 20 and pause_s:
                    hold(server)
                    time.sleep(pause_s)
                    release(server)
        return json.loads(last[len("data: ") :])["text"], record(server)["seconds"]["step"] - before

    (usual, usual_s), (held, held_s) = told(0.0), told(6.0)
    assert held == usual
    assert held_s < usual_s + 3.0  # the pause is in no step
