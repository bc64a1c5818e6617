"""The real server with our algorithm: exact text, every request option, counters, clean-up."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import time
from typing import Any

import httpx
import pytest

from dspark_loadtests.prompts import load_prompts
from dspark_sglang import diagnosis
from dspark_sglang.demo.measure import NEAR_TIE, tie_gap
from dspark_sglang.server import Server
from tests.serving.conftest import Pair

pytestmark = pytest.mark.server
PROMPTS = load_prompts()


def chat(server: Server, prompt: Any, **options: Any) -> dict[str, Any]:
    body = {
        "model": "default",
        "messages": prompt.messages(),
        "temperature": 0.0,
        "max_tokens": 40,
        **options,
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300.0)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def both(servers: Pair, prompt: Any, **options: Any) -> tuple[str, str]:
    return text(chat(servers.plain, prompt, **options)), text(
        chat(servers.dspark, prompt, **options)
    )


def ran(server: Server) -> dict[str, int]:
    record = server.dspark()
    assert record is not None
    counts: dict[str, int] = record["ran"]
    return counts


def test_our_parts_are_what_the_scheduler_runs(servers: Pair) -> None:
    chat(servers.dspark, PROMPTS[0], max_tokens=8)
    record = servers.dspark.dspark()
    assert record is not None
    assert all(module.startswith("dspark_sglang.") for module in record["parts"].values())
    parts = {name.split(":")[0] for name in record["ran"]}
    assert {"draft", "confidence", "schedule", "accept", "commit"} <= parts
    assert not any("builtin" in name or "sglang" in name for name in record["ran"])


def test_greedy_text_is_plain_decodings_one_at_a_time(servers: Pair) -> None:
    different = []
    for prompt in PROMPTS[:6]:
        plain, ours = both(servers, prompt)
        if plain != ours and tie_gap(servers.plain, prompt, ours, max_tokens=40) >= NEAR_TIE:
            different.append((prompt.id, plain, ours))
    assert not different


def test_greedy_text_is_plain_decodings_under_concurrency(servers: Pair) -> None:
    chosen = PROMPTS[6:14]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        plain = list(pool.map(lambda p: text(chat(servers.plain, p)), chosen))
        ours = list(pool.map(lambda p: text(chat(servers.dspark, p)), chosen))
    different = [
        (p.id, a, b)
        for p, a, b in zip(chosen, plain, ours, strict=True)
        if a != b and tie_gap(servers.plain, p, b, max_tokens=40) >= NEAR_TIE
    ]
    assert not different


def test_requests_are_let_in_as_places_get_free(servers: Pair) -> None:
    assert servers.plain.info()["min_free_slots_delay"] is None
    assert servers.dspark.info()["min_free_slots_delay"] == 1


def test_several_tokens_are_committed_a_round(servers: Pair) -> None:
    servers.dspark.update(dspark_speculation=1, dspark_budget=1)
    chat(servers.dspark, PROMPTS[0])
    servers.dspark.update(dspark_speculation=-1, dspark_budget=-1)
    record = servers.dspark.dspark()
    assert record is not None
    assert record["accept_length"] > 1.2
    assert record["position_kept"][0] > record["position_kept"][-1]


@functools.cache
def unadjusted_text(server: Server, prompt: Any, limit: int) -> str:
    return text(chat(server, prompt, max_tokens=limit))


@pytest.mark.parametrize(
    "options",
    [
        {"frequency_penalty": 1.2},
        {"presence_penalty": 1.5},
        {"repetition_penalty": 1.3},
        {"min_tokens": 30, "max_tokens": 34},
        {"logit_bias": {"260": -100, "28": -100}},
        {"frequency_penalty": 0.7, "repetition_penalty": 1.2, "logit_bias": {"30": -50}},
    ],
    ids=lambda options: "+".join(options),
)
def test_adjusted_logits_give_plain_decodings_text(servers: Pair, options: dict[str, Any]) -> None:
    before = ran(servers.dspark).get("adjust:exact", 0)
    changed = []
    for prompt in (PROMPTS[1], PROMPTS[20]):
        given = {"max_tokens": 28, **options}
        unadjusted = unadjusted_text(servers.plain, prompt, given["max_tokens"])
        plain, ours = both(servers, prompt, **given)
        assert plain == ours
        changed.append(plain != unadjusted)
    assert any(changed) or "min_tokens" in options, "the option changes nothing: no proof"
    assert ran(servers.dspark)["adjust:exact"] > before


def test_stop_string_inside_an_accepted_run(servers: Pair) -> None:
    full = text(chat(servers.plain, PROMPTS[2], max_tokens=40))
    stop = full[len(full) // 2 :][:6]
    plain, ours = both(servers, PROMPTS[2], stop=[stop])
    assert plain == ours
    assert stop not in ours and len(ours) < len(full)


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_max_tokens_is_kept_to_the_token(servers: Pair, limit: int) -> None:
    answer = chat(servers.dspark, PROMPTS[3], max_tokens=limit, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == limit
    assert text(answer) == text(chat(servers.plain, PROMPTS[3], max_tokens=limit, ignore_eos=True))


def test_json_schema_is_kept(servers: Pair) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "n": {"enum": [1, 2, 3]}},
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "item", "schema": schema}}
    for temperature in (0.0, 1.0):
        answer = chat(
            servers.dspark,
            PROMPTS[27],
            response_format=form,
            temperature=temperature,
            max_tokens=160,
        )
        assert answer["choices"][0]["finish_reason"] == "stop"
        value = json.loads(text(answer))
        assert set(value) == {"name", "n"}
        assert value["n"] in (1, 2, 3)


def test_logprobs_are_those_of_plain_decoding(servers: Pair) -> None:
    options = {"logprobs": True, "top_logprobs": 2, "max_tokens": 24}
    plain = chat(servers.plain, PROMPTS[4], **options)["choices"][0]["logprobs"]["content"]
    ours = chat(servers.dspark, PROMPTS[4], **options)["choices"][0]["logprobs"]["content"]
    assert [t["token"] for t in plain] == [t["token"] for t in ours]
    gaps = [abs(a["logprob"] - b["logprob"]) for a, b in zip(plain, ours, strict=True)]
    assert max(gaps) < 1e-3


def test_sampled_and_greedy_requests_share_a_batch(servers: Pair) -> None:
    greedy = [text(chat(servers.plain, p, max_tokens=32)) for p in PROMPTS[14:18]]
    before = ran(servers.dspark)

    def run(job: tuple[int, Any]) -> str:
        index, prompt = job
        options: dict[str, Any] = {"max_tokens": 32}
        if index % 2:
            options |= {"temperature": 1.0, "top_p": 0.9, "top_k": 40}
        return text(chat(servers.dspark, prompt, **options))

    jobs = [(i, PROMPTS[14 + i // 2]) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(run, jobs))
    assert answers[::2] == greedy
    after = ran(servers.dspark)
    assert after["accept:torch-rejection"] > before.get("accept:torch-rejection", 0)
    assert len(set(answers[1::2])) == 4


def test_temperature_near_zero_samples_the_greedy_text(servers: Pair) -> None:
    prompt = PROMPTS[8]
    plain = text(chat(servers.plain, prompt))
    assert text(chat(servers.dspark, prompt, temperature=0.001)) == plain


def test_shared_prefixes_come_from_the_radix_cache(servers: Pair) -> None:
    kind = [prompt for prompt in PROMPTS if prompt.kind == "instructions"][:3]
    for prompt in kind:
        answer = chat(servers.dspark, prompt, max_tokens=4)
    usage = answer["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0.5 * usage["prompt_tokens"]


def test_aborted_streams_free_their_slots(servers: Pair) -> None:
    body = {
        "model": "default",
        "messages": PROMPTS[9].messages(),
        "max_tokens": 400,
        "stream": True,
        "ignore_eos": True,
    }
    url = f"{servers.dspark.url}/v1/chat/completions"
    for _ in range(3):
        with httpx.Client(timeout=60.0) as client, client.stream("POST", url, json=body) as answer:
            next(answer.iter_lines())
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        metrics = httpx.get(f"{servers.dspark.url}/metrics", timeout=10.0).text
        running = [line for line in metrics.splitlines() if "num_running_reqs{" in line]
        if running and all(float(line.rsplit(" ", 1)[1]) == 0 for line in running):
            break
        time.sleep(0.5)
    else:
        pytest.fail(f"aborted requests still run: {running}")
    plain, ours = both(servers, PROMPTS[9])
    assert plain == ours


def test_long_prompt_is_prefilled_in_chunks_and_continued(servers: Pair) -> None:
    words = " ".join(f"item {i} costs {i * 3 % 17} coins;" for i in range(330))
    body = {"text": words, "sampling_params": {"temperature": 0, "max_new_tokens": 16}}
    answers = [
        httpx.post(f"{server.url}/generate", json=body, timeout=300.0).json()
        for server in (servers.plain, servers.dspark)
    ]
    assert answers[0]["meta_info"]["prompt_tokens"] > 2500
    assert answers[0]["text"] == answers[1]["text"]


def test_doctor_tells_the_two_servers_apart(servers: Pair) -> None:
    assert all(f.level == "ok" for f in diagnosis.server(servers.dspark.url))
    finding = diagnosis.server(servers.plain.url)[0]
    assert finding.level == "problem"
    assert "without DSPARK" in finding.what


def test_server_reports_speculation_in_sglangs_own_metrics(servers: Pair) -> None:
    metrics = httpx.get(f"{servers.dspark.url}/metrics", timeout=10.0).text
    lines = [line for line in metrics.splitlines() if line.startswith("sglang:spec_accept_length{")]
    assert lines and float(lines[0].rsplit(" ", 1)[1]) >= 1.0
