"""No request, no update and no fault of the drafter ends the server: beside a plain server, in SGLang's two loops."""

from __future__ import annotations

import concurrent.futures
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from dspark_sglang.server import Server
from tests.net.generate import PROMPTS, batches
from tests.net.run import Answer, catch
from tests.serving.asking import (
    BYSTANDER,
    accept_length,
    body,
    drafting,
    faults,
    together,
    wait_for,
)
from tests.serving.conftest import Pair

pytestmark = pytest.mark.server

JSON_ENUM = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y", "zebra"]}},
    "required": ["a"],
}
#: Seconds of the net in continuous integration, and its seed; `make net` runs all of it.
NET_COMPARED, NET_SEED = 30, 24
#: Tokens of SmolLM2.
VOCABULARY = 49152


CASES = {
    "a regex that must not end yet": body(regex="(yes|no)", min_new_tokens=10),
    "a schema that must not end yet": body(json_schema=json.dumps({"type": "boolean"}), min_new_tokens=30),
    "an infinite bias": body(logit_bias={"260": 1e39}),
    "an infinite bias against": body(logit_bias={"260": -1e39, "28": -1e39, "7042": -1e39}),
    "infinite biases for several": body(logit_bias={"260": 1e39, "28": 3.4e38, "1000": 1e39}),
    "an infinite bias for what a grammar excludes": body(regex="(yes|no)", logit_bias={"260": 1e39}),
    "an infinite bias for what a grammar allows": body(regex="[a-z]{3,9}", logit_bias={"94": 1e39}),
    "a repetition penalty beyond float": body(repetition_penalty=1e-39),
    "two penalties": body(presence_penalty=0.8, repetition_penalty=1.3, max_new_tokens=40),
    "a regex, end of text ignored": body(regex="(yes|no)", ignore_eos=True),
    "an optional regex, end of text ignored": body(regex="a?", ignore_eos=True),
    "a schema, end of text ignored": body(json_schema=json.dumps(JSON_ENUM), ignore_eos=True, max_new_tokens=24),
}  # fmt: skip


@pytest.fixture(scope="module")
def answered(servers: Pair) -> list[list[Answer]]:
    """What both servers answer to all cases, each in company of the others and of bystanders."""
    sent = [BYSTANDER, *CASES.values(), BYSTANDER]
    drafting(servers.dspark, 1)
    found = [together(server, sent) for server in servers]
    drafting(servers.dspark, -1)
    return found


@pytest.mark.parametrize("case", ["bystander", *CASES])
def test_a_greedy_request_is_answered_as_plain_decoding_answers_it(
    servers: Pair, answered: list[list[Answer]], case: str
) -> None:
    place = ["bystander", *CASES].index(case)
    plain, ours = (answers[place].compared for answers in answered)
    assert ours == plain
    assert answered[1][-1].compared == answered[1][0].compared
    assert servers.dspark.alive()


def test_chat_with_a_schema_that_must_not_end_yet(servers: Pair) -> None:
    form = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    given = {
        "model": "default",
        "messages": [{"role": "user", "content": "Is water wet?"}],
        "temperature": 0.0,
        "min_tokens": 30,
        "max_tokens": 40,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": form},
        },
    }
    answers = [
        httpx.post(f"{server.url}/v1/chat/completions", json=given, timeout=300.0)
        for server in (servers.plain, servers.dspark)
    ]
    assert answers[0].status_code == answers[1].status_code == 500
    assert "Grammar" in answers[1].text
    assert servers.dspark.alive()


def test_a_request_that_nothing_can_be_drawn_for_ends_alone(servers: Pair) -> None:
    """Plain decoding's sampler draws token 0 from NaN; here the request is told what is wrong with it."""
    drafting(servers.dspark, 1)
    before = faults(servers.dspark).get("request", 0)
    broken = body(temperature=1.0, logit_bias=dict.fromkeys(map(str, range(VOCABULARY)), -1e39))
    alone = together(servers.dspark, [BYSTANDER])[0]
    answers = together(servers.dspark, [broken, BYSTANDER, broken, BYSTANDER])
    drafting(servers.dspark, -1)
    assert [answer.status for answer in answers] == [400, 200, 400, 200]
    assert "logit_bias" in answers[0].error and "cannot be drawn" in answers[0].error
    assert answers[1] == answers[3] == alone
    assert faults(servers.dspark)["request"] == before + 2
    assert together(servers.plain, [broken])[0].status == 200


def test_the_same_in_a_stream(servers: Pair) -> None:
    broken = body(temperature=1.0, logit_bias=dict.fromkeys(map(str, range(VOCABULARY)), -1e39))
    broken |= {"stream": True}
    with httpx.stream(
        "POST", f"{servers.dspark.url}/generate", json=broken, timeout=120.0
    ) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    assert "cannot be drawn" in "".join(lines)


def test_an_infinite_bias_is_certain_for_requests_that_sample(servers: Pair) -> None:
    given = body(temperature=1.0, logit_bias={"260": 1e39}, ignore_eos=True)
    for server in servers:
        for answer in together(server, [given, BYSTANDER, given | {"return_logprob": True}]):
            assert answer.status == 200
            assert answer.ids == together(servers.plain, [BYSTANDER])[0].ids or set(answer.ids) == {
                260
            }


def test_sixteen_equal_requests_for_json(servers: Pair) -> None:
    given = {
        "text": [PROMPTS[2]] * 16,
        "sampling_params": {
            "temperature": 1.0, "max_new_tokens": 3, "ignore_eos": True, "json_schema": json.dumps(JSON_ENUM),
        },
    }  # fmt: skip
    for _ in range(3):
        answer = httpx.post(f"{servers.dspark.url}/generate", json=given, timeout=300.0)
        assert answer.status_code == 200
        assert all(len(one["output_ids"]) == 3 for one in answer.json())


def test_the_net(servers: Pair) -> None:
    """Random requests in random company; `make net` sends two thousand."""
    print(f"seed {NET_SEED}")
    drafting(servers.dspark, 1)
    groups = batches(NET_SEED, 2000)
    found = catch(servers.plain, servers.dspark, groups, enough=NET_COMPARED)
    drafting(servers.dspark, -1)
    assert not found.ended
    assert not found.different, found.different[:3]
    assert found.compared >= NET_COMPARED, found.summary()
    assert found.ties <= 1, found.summary()


# --- weights -----------------------------------------------------------------------------------------


def update(server: Server, **given: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/update_weights_from_disk", json=given, timeout=300.0)
    found: dict[str, Any] = answer.json()
    return found


def test_an_update_with_equal_weights_changes_nothing(servers: Pair, target: Path) -> None:
    before, length = together(servers.dspark, [BYSTANDER]), accept_length(servers.dspark)
    for server in servers:
        found = update(server, model_path=str(target))
        assert found["success"], found
    assert together(servers.dspark, [BYSTANDER]) == before
    # Requests also copy from their own text, where that was right often enough lately.
    assert accept_length(servers.dspark) == pytest.approx(length, rel=0.1)
    record = servers.dspark.dspark()
    assert record is not None and record["drafting_stopped"] is None


def test_an_update_waits_for_requests_as_on_a_plain_server(servers: Pair, target: Path) -> None:
    """SGLang lets what runs come to its end, or says that it could not flush the cache; the text is whole."""
    long = body(PROMPTS[5], max_new_tokens=60, ignore_eos=True)
    alone = together(servers.plain, [long])[0]
    for server in servers:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(together, server, [long])
            wait_for(server, 1)
            found = update(server, model_path=str(target))
            assert found["success"] or "not flushed" in found["message"]
            assert running.result()[0] == alone


def test_files_that_do_not_fit_leave_the_old_weights(servers: Pair, tmp_path: Path) -> None:
    before = together(servers.dspark, [BYSTANDER])
    found = update(servers.dspark, model_path=str(tmp_path / "nothing"))
    assert not found["success"]
    assert together(servers.dspark, [BYSTANDER]) == before


# --- the life of a server ----------------------------------------------------------------------------


def test_pauses_aborts_and_flushes_at_any_moment(servers: Pair) -> None:
    """Whatever an operator does between two steps: requests that are not aborted have plain decoding's text."""
    drafting(servers.dspark, 1)
    bodies = [body(text, max_new_tokens=32, ignore_eos=True) for text in PROMPTS]
    expected = together(servers.plain, bodies)
    with httpx.Client(base_url=servers.dspark.url, timeout=120.0) as http, concurrent.futures.ThreadPoolExecutor(1) as pool:  # fmt: skip
        for mode in ("in_place", "retract"):
            running = pool.submit(together, servers.dspark, bodies)
            for delay in (0.15, 0.4, 0.7):
                time.sleep(delay)
                assert http.post("/pause_generation", json={"mode": mode}).status_code == 200
                http.post("/flush_cache")
                assert http.post("/continue_generation", json={}).status_code == 200
            assert running.result() == expected
        for delay in (0.1, 0.6):
            running = pool.submit(together, servers.dspark, bodies)
            time.sleep(delay)
            http.post("/abort_request", json={"rid": "", "abort_all": True})
            for answer, whole in zip(running.result(), expected, strict=True):
                assert whole.ids[: len(answer.ids)] == answer.ids
        running = pool.submit(together, servers.dspark, bodies)
        time.sleep(0.5)
        http.post("/pause_generation", json={"mode": "abort"})
        http.post("/continue_generation", json={})
        running.result()
    drafting(servers.dspark, -1)
    assert together(servers.dspark, bodies) == expected
