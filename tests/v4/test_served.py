"""DeepSeek-V4's tiny bundle on two real servers, without speculation and with our DSPARK."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from dspark_sglang.layouts.v4 import tiny
from dspark_sglang.layouts.v4.reference import Reference
from dspark_sglang.server import Server
from tests.v4.planted import BEYOND_TOP_K, MISTAKES, gaps
from tests.v4.servers import LENGTHS, clear_prompts, generate, greedy, prompt, scored, server

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]


class Pair(NamedTuple):
    plain: Server
    dspark: Server


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the published form: fp8 and fp4 weights, shards and index."""
    folder = tmp_path_factory.mktemp("bundle")
    tiny.write(folder, published=True)
    return folder


@pytest.fixture(scope="module")
def servers(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    logs = tmp_path_factory.mktemp("logs")
    pair = Pair(*(server(bundle, logs / f"{on}.log", dspark=on) for on in (False, True)))
    with pair.plain, pair.dspark:
        for each in pair:
            each.wait_ready()
        pair.dspark.update(dspark_speculation=1)  # whether it pays on this machine or not
        yield pair


def spent(of: Server, name: str) -> int:
    return int(of.record()["ran"].get(name, 0))


@pytest.mark.parametrize("at_once", [1, 7])
def test_greedy_text_is_plain_decodings(servers: Pair, at_once: int) -> None:
    """Prompts that end around every border; alone a request drafts, in a batch they share steps."""
    prompts = [prompt(length, seed=length + at_once) for length in LENGTHS]
    wanted = greedy(servers.plain, prompts, 32, at_once=7)
    assert greedy(servers.dspark, prompts, 32, at_once=at_once) == wanted
    assert spent(servers.dspark, "draft:torch-vanilla") > 0


def test_prefixes_are_read_again_at_every_border(servers: Pair) -> None:
    """A prompt's first part comes from the radix cache, wherever it ends."""
    whole = prompt(700, seed=3)
    cached = []
    for shared in (64, 255, 256, 257, 384, 512, 640):
        again = [*whole[:shared], *prompt(90, seed=shared)]
        ours, plain = (generate(each, again, 16) for each in (servers.dspark, servers.plain))
        assert ours["output_ids"] == plain["output_ids"], shared
        cached.append(ours["meta_info"]["cached_tokens"])
    assert max(cached) >= 512 and len(set(cached)) > 1, cached


@pytest.mark.parametrize(
    "options",
    [
        {"frequency_penalty": 0.7, "presence_penalty": 0.4},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 12, "ignore_eos": False},
        {"logit_bias": {"7": 4.0, "11": -50.0}},
        {"regex": "(ab|ba)+c?", "ignore_eos": False},
    ],
    ids=["penalties", "repetition", "minimum", "bias", "grammar"],
)
def test_options_as_plain_decoding_has_them(servers: Pair, options: dict[str, Any]) -> None:
    for length in (40, 300):
        given = {"sampling_params": options}
        ours, plain = (generate(each, prompt(length), 32, **given) for each in servers[::-1])
        assert ours["output_ids"] == plain["output_ids"]
        assert ours["meta_info"]["finish_reason"] == plain["meta_info"]["finish_reason"]


def test_the_server_agrees_with_the_reference(servers: Pair, bundle: Path) -> None:
    """And each planted mistake moves the reference much farther away.

    A number that storage rounds the other way shows in what follows it, so not every prompt is as close as most.
    """
    reference, found = Reference.load(bundle), []
    for tokens in clear_prompts(reference, 300, 5):
        logprobs, best = scored(servers.dspark, tokens)
        found.append((gaps(reference, tokens, logprobs, best), tokens, logprobs))
    found.sort(key=lambda one: one[0].mean)
    middle = found[2][0]
    assert middle.mean <= 1e-3 and middle.largest <= 5e-3, [one[0] for one in found]
    assert sum(g.argmax_equal or 0 for g, _, _ in found) >= 0.999 * sum(
        g.count for g, _, _ in found
    )
    exact, tokens, logprobs = found[0]
    for name, mistake in MISTAKES.items():
        if name in BEYOND_TOP_K:
            continue
        with mistake(reference):
            assert gaps(reference, tokens, logprobs).mean > 50 * exact.mean, name


def test_the_draft_reads_what_steps_without_it_left(servers: Pair) -> None:
    """Drafts after decode steps are as good as after a prefill of the same text."""
    of = servers.dspark

    def accepted(context: list[int]) -> tuple[list[int], float]:
        of.update(dspark_speculation=1, dspark_budget=1)
        before = of.record()
        found = generate(of, context, 24)["output_ids"]
        after = of.record()
        of.update(dspark_speculation=0, dspark_budget=-1)
        rounds = after["rounds"] - before["rounds"]
        return found, (after["committed_tokens"] - before["committed_tokens"]) / rounds

    def flush() -> None:
        httpx.post(f"{of.url}/flush_cache", timeout=60.0).raise_for_status()

    of.update(dspark_speculation=0)
    try:
        decoded, pairs = spent(of, "step:decode"), []
        for n in range(3):
            flush()
            generate(of, prompt(300, seed=50 + n), 20)  # its slots go to the next request
            start, sampled = prompt(150, seed=60 + n), {"temperature": 1.0}
            context = [*start, *generate(of, start, 150, sampling_params=sampled)["output_ids"]]
            text, after_decoding = accepted(context)
            flush()
            again, after_prefill = accepted(context)
            assert text == again
            pairs.append((after_decoding, after_prefill))
        assert spent(of, "step:decode") - decoded > 300
        assert sum(one == other for one, other in pairs) >= 2, pairs
    finally:
        of.update(dspark_speculation=1)


def test_text_through_the_tokenizer(servers: Pair) -> None:
    body = {"text": "once upon a time", "sampling_params": {"temperature": 0, "max_new_tokens": 12}}
    found = [httpx.post(f"{each.url}/generate", json=body, timeout=60.0).json() for each in servers]
    assert found[0]["text"] == found[1]["text"] and found[0]["text"]


def test_an_update_from_disk_brings_target_and_drafter(
    servers: Pair, bundle: Path, tmp_path: Path
) -> None:
    """Both servers load another checkpoint, and then their own again."""
    other = tmp_path / "other"
    tiny.write(other, seed=1, published=True)
    prompts = [prompt(length, seed=90 + length) for length in (40, 300)]

    def texts() -> list[list[int]]:
        plain, ours = (greedy(each, prompts, 24, at_once=2) for each in servers)
        assert ours == plain
        return ours

    before, drafts = texts(), spent(servers.dspark, "draft:torch-vanilla")
    for folder in (other, bundle):
        for each in servers:
            answer = each.http.post(
                "/update_weights_from_disk", json={"model_path": str(folder)}, timeout=300
            )
            assert answer.json()["success"], answer.text
        assert servers.dspark.record()["drafting_stopped"] is None
        assert (texts() == before) is (folder == bundle)
    assert spent(servers.dspark, "draft:torch-vanilla") > drafts
