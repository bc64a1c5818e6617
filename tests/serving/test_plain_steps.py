"""Steps without a draft on the real server: the target's own decoding, and what it leaves to the draft."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dspark_loadtests.prompts import load_prompts
from dspark_sglang.server import Server
from tests.serving.conftest import Pair

pytestmark = pytest.mark.server
PROMPTS = load_prompts()


@pytest.fixture(autouse=True)
def usual(servers: Pair) -> Iterator[None]:
    """Nothing drafts unless a test wants it, and whatever a test changes is taken back."""
    servers.dspark.update(dspark_speculation=0)
    yield
    servers.dspark.update(dspark_speculation=-1)


def generate(server: Server, **body: Any) -> Any:
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=300.0)
    assert answer.status_code == 200, answer.text
    return answer.json()


def tokens(server: Server, prompt: list[int] | str, count: int, **options: Any) -> list[int]:
    given = {"input_ids": prompt} if isinstance(prompt, list) else {"text": prompt}
    sampling = {"temperature": 0.0, "max_new_tokens": count, "ignore_eos": True, **options}
    found: list[int] = generate(server, **given, sampling_params=sampling)["output_ids"]
    return found


def record(server: Server) -> dict[str, Any]:
    found = server.dspark()
    assert found is not None
    return found


def spent(server: Server, before: dict[str, Any], name: str) -> int:
    """How often a part has run since."""
    count: int = record(server)["ran"].get(name, 0) - before["ran"].get(name, 0)
    return count


def prompt_text(index: int) -> str:
    return str(PROMPTS[index].messages()[-1]["content"])


SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}


def test_a_step_without_a_draft_is_the_targets_own_decoding(servers: Pair) -> None:
    before = record(servers.dspark)
    jobs = [(prompt_text(index), {} if index % 2 else SAMPLED) for index in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: tokens(servers.dspark, job[0], 24, **job[1]), jobs))
    assert found[1::2] == [tokens(servers.plain, text, 24) for text, _ in jobs[1::2]]
    assert spent(servers.dspark, before, "step:decode") >= 23
    assert spent(servers.dspark, before, "schedule:plain") == 0
    after = record(servers.dspark)
    assert after["plain_rounds"] - before["plain_rounds"] == 8 * 23  # prefill brings the first
    assert after["rounds"] == before["rounds"]


@pytest.mark.parametrize(
    "options",
    [
        {"sampling_params": {"frequency_penalty": 0.8}},
        {"sampling_params": {"logit_bias": {"338": 6.0}}},
        {"sampling_params": {"min_new_tokens": 12, "ignore_eos": False}},
        {
            "sampling_params": {
                "json_schema": '{"type": "array", "maxItems": 2}',
                "ignore_eos": False,
            }
        },
        {"return_logprob": True, "top_logprobs_num": 2},
    ],
    ids=["penalty", "bias", "minimum", "grammar", "logprobs"],
)
def test_requests_whose_logits_are_touched_are_verified(
    servers: Pair, options: dict[str, Any]
) -> None:
    sampling = {"temperature": 0.0, "max_new_tokens": 16, "ignore_eos": True}
    body = {**options, "sampling_params": {**sampling, **options.get("sampling_params", {})}}
    before = record(servers.dspark)
    ours = generate(servers.dspark, text=prompt_text(9), **body)
    assert ours["output_ids"] == generate(servers.plain, text=prompt_text(9), **body)["output_ids"]
    assert spent(servers.dspark, before, "step:decode") == 0
    assert spent(servers.dspark, before, "schedule:plain") > 0


def test_one_touched_request_and_others_share_steps(servers: Pair) -> None:
    """The way of a step changes with who is in its batch, the texts do not."""
    jobs = [(prompt_text(20 + index), {}) for index in range(3)]
    jobs.append((prompt_text(23), {"presence_penalty": 1.0, "max_new_tokens": 8}))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        ours = list(pool.map(lambda job: tokens(servers.dspark, job[0], 32, **job[1]), jobs))
    assert ours == [tokens(servers.plain, text, 32, **options) for text, options in jobs]


def test_the_draft_reads_what_steps_without_it_left(servers: Pair) -> None:
    """Drafts after plain steps are as good as after a prefill of the same text."""
    server = servers.dspark

    def accepted(context: list[int]) -> tuple[list[int], float]:
        server.update(dspark_speculation=1, dspark_budget=1)
        before = record(server)
        found = tokens(server, context, 24)
        after = record(server)
        server.update(dspark_speculation=0, dspark_budget=-1)
        rounds = after["rounds"] - before["rounds"]
        return found, (after["committed_tokens"] - before["committed_tokens"]) / rounds

    kept, fresh = [], []
    for n in range(30, 33):
        httpx.post(f"{server.url}/flush_cache", timeout=60.0).raise_for_status()
        answer = httpx.post(f"{server.url}/tokenize", json={"prompt": prompt_text(n)}, timeout=60.0)
        prompt = list(answer.json()["tokens"])
        # Slots of one request go to the next while its states still wait to be written.
        tokens(server, prompt_text(n + 10), 20)
        # Sampled: a text that repeats itself would be copied, not drafted.
        context = [*prompt, *tokens(server, prompt, 80, temperature=1.0)]
        after_plain, one = accepted(context)
        httpx.post(f"{server.url}/flush_cache", timeout=60.0).raise_for_status()
        after_prefill, other = accepted(context)
        assert after_plain == after_prefill
        kept.append(one)
        fresh.append(other)
    pairs = list(zip(kept, fresh, strict=True))
    assert sum(one == other for one, other in pairs) >= 2, pairs


def test_a_server_on_a_cpu_can_be_profiled(servers: Pair, tmp_path: Path) -> None:
    body = {"output_dir": str(tmp_path), "num_steps": 2, "activities": ["CPU"]}
    answer = httpx.post(f"{servers.dspark.url}/start_profile", json=body, timeout=60.0)
    assert answer.status_code == 200, answer.text
    tokens(servers.dspark, prompt_text(3), 8)
    end = time.monotonic() + 60.0
    while not list(tmp_path.glob("*.trace.json.gz")):
        assert time.monotonic() < end, "no trace was written"
        time.sleep(0.2)
    assert tokens(servers.dspark, prompt_text(3), 8)  # and it serves on
