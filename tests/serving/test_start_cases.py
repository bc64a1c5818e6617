"""Starts beside the common one: KV in pages, and what a server of that kind answers to requests it cannot serve."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from dspark_sglang.server import Server, free_port, serve_command
from tests.serving.tiny import ONE_THREAD

pytestmark = pytest.mark.server
PAGE, CHUNK = 16, 64
#: Prompts of more pages than are left over, so that some are evicted; and a chunked one.
EXTRA = ["--page-size", str(PAGE), "--chunked-prefill-size", str(CHUNK), "--max-total-tokens", "1024",
         "--enable-metrics", "--tokenizer-metrics-allowed-custom-labels", "tenant"]  # fmt: skip
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small village by the sea where",
    "def fibonacci(n):",
    "Water boils at",
    "The three most important things to know about gardening are the following. First,",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17,",
)
LONG = "A list of animals and where they live. " + " ".join(
    f"Animal {n} lives in country {n * 7 % 31}, in a house with {n % 5} doors." for n in range(9)
)


class Answer(NamedTuple):
    tokens: tuple[int, ...]
    cached: int


def ask(server: Server, prompt: str, most: int = 32) -> Answer:
    body = {"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": most, "ignore_eos": True}}  # fmt: skip
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=300.0)
    answer.raise_for_status()
    found = answer.json()
    return Answer(tuple(found["output_ids"]), int(found["meta_info"]["cached_tokens"]))


def answers(server: Server) -> list[Answer]:
    """Four at once; again, from the cache; a prompt in chunks; and one that goes on from what another wrote."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: ask(server, prompt), PROMPTS))
        found += pool.map(lambda prompt: ask(server, prompt), PROMPTS)
        found += pool.map(lambda prompt: ask(server, prompt), (LONG, PROMPTS[1], LONG + " So"))
    told = httpx.post(f"{server.url}/generate", json={"text": PROMPTS[1], "sampling_params": {"temperature": 0, "max_new_tokens": 40}}, timeout=300.0).json()  # fmt: skip
    return [*found, ask(server, PROMPTS[1] + told["text"]), ask(server, LONG)]


@pytest.fixture(scope="module")
def paged(
    target: Path, drafter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, list[Answer]]]:
    """A DSPARK server with pages, and what one without speculation, which has ended, answered with them."""
    folder = tmp_path_factory.mktemp("paged")

    def server(name: str, draft: Path | None) -> Server:
        port = free_port()
        command = serve_command(target, port, dtype="float32", drafter=draft, extra=EXTRA)
        return Server(command, port=port, log=folder / name, environment=ONE_THREAD)

    with server("plain", None) as plain:
        plain.wait_ready()
        expected = answers(plain)
    with server("dspark", drafter) as ours:
        ours.wait_ready()
        yield ours, expected


def test_pages_do_not_change_the_text(paged: tuple[Server, list[Answer]]) -> None:
    server, expected = paged
    found = answers(server)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    hits = [answer.cached for answer in found]
    assert max(hits) > 2 * CHUNK and not any(hit % PAGE for hit in hits)
    record = server.dspark()
    assert record is not None and record["accept_length"] > 1.1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"return_logprob": True, "logprob_start_len": -5}, "logprob_start_len is -5"),
        ({"return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num is -1"),
        ({"positional_embed_overrides": "a"}, "positional_embed_overrides holds no tensors"),
        ({"sampling_params": {"n": 2**31}}, "n is 2147483648"),
        ({"custom_labels": {"other": "a"}}, "custom_labels has 'other'"),
        ({"return_logprob": True, "top_logprobs_num": [1]}, "top_logprobs_num cannot be used"),
        ({"bootstrap_host": ["a"]}, "bootstrap_host cannot be used"),
        ({"session_params": {"id": 1}}, "session_params.id cannot be used"),
        ({"sampling_params": {"custom_params": 5}}, "sampling_params.custom_params cannot be used"),
    ],
    ids=["logprob-start", "top-logprobs", "embeds", "answers", "label", "list", "host", "session", "custom"],
)  # fmt: skip
def test_what_would_end_a_process_is_refused(
    paged: tuple[Server, list[Answer]], wrong: dict[str, Any], says: str
) -> None:
    server, _ = paged
    body = {"text": "The sea is", "sampling_params": {"max_new_tokens": 4}} | wrong
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=60.0)
    assert answer.status_code == 400, answer.text
    assert says in answer.text
    assert len(ask(server, "The sea is", 4).tokens) == 4


def test_tokens_that_the_target_does_not_have(
    paged: tuple[Server, list[Answer]],
) -> None:
    server, _ = paged
    sampling = {"max_new_tokens": 40, "min_new_tokens": 40, "stop_token_ids": [10**9, -1, 2**63], "top_k": 10**12}  # fmt: skip
    body = {"text": PROMPTS[0], "sampling_params": sampling}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=60.0)
    assert answer.status_code == 200 and len(answer.json()["output_ids"]) == 40


def test_a_label_named_at_start_is_counted(paged: tuple[Server, list[Answer]]) -> None:
    server, _ = paged
    body = {"text": "The sea is", "sampling_params": {"max_new_tokens": 4}, "custom_labels": {"tenant": "a"}}  # fmt: skip
    assert httpx.post(f"{server.url}/generate", json=body, timeout=60.0).status_code == 200
    assert 'tenant="a"' in httpx.get(f"{server.url}/metrics", timeout=60.0).text


def test_memory_that_cannot_be_released_is_kept(paged: tuple[Server, list[Answer]]) -> None:
    server, expected = paged
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, server, PROMPTS[2], 120)
        time.sleep(0.5)
        for path in ("release", "resume", "release", "resume"):
            answer = httpx.post(f"{server.url}/{path}_memory_occupation", json={}, timeout=60.0)
            assert answer.status_code == 400 and "--enable-memory-saver" in answer.text
        assert running.result().tokens[:32] == expected[2].tokens
    assert ask(server, PROMPTS[0]).tokens == expected[0].tokens
