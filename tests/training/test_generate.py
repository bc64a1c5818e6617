"""``dspark data`` against a real HTTP server that answers well, badly, or not at all."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dspark_sglang.errors import DataError
from dspark_sglang.training.chat import (
    accepts_system,
    opens_thinking,
    user_turn_prefix,
)
from dspark_sglang.training.conversations import (
    ConversationWriter,
)
from dspark_sglang.training.generate import Generator, Options, Tally
from dspark_sglang.training.prompts import Draft, load_recipe
from tests.layouts.drafter_samples import actionable
from tests.training.fake_endpoint import (
    FakeEndpoint,
    Request,
    Response,
    chat,
    completion,
    running_endpoint,
)
from tests.training.generate_data_samples import made, texts
from tests.training.tokenizer_samples import CHATML, GEMMA, LLAMA3, QWEN3, tokenizer

ENOUGH = 10**9


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    with running_endpoint() as running:
        yield running


def listed(*drafts: Draft) -> Callable[[random.Random], Draft | None]:
    queue = iter(drafts)
    return lambda rng: next(queue, None)


def questions(count: int) -> list[Draft]:
    return [Draft("chat", None, (f"question {number}",)) for number in range(count)]


def generate(
    endpoint: FakeEndpoint,
    out: Path,
    drafts: Callable[[random.Random], Draft | None],
    *,
    tokens: int = ENOUGH,
    template: str = CHATML,
    **options: Any,
) -> Tally:
    """Run the real generator against the endpoint."""
    chosen = Options(**{"url": endpoint.url, "follow_up_share": 0.0, "backoff": 0.01} | options)

    async def run() -> Tally:
        async with httpx.AsyncClient() as client:
            with ConversationWriter(out) as writer:
                generator = Generator(client, chosen, tokenizer(template))
                return await generator.run(drafts, writer, tokens)

    return asyncio.run(run())


# --- what is asked and kept ----------------------------------------------------------------------


def test_prompts_are_answered(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    drafts = listed(Draft("math", "Be brief", ("2+2?",)), Draft("chat", None, ("Why?",)))
    tally = generate(endpoint, out, drafts, model="mine", api_key="secret", max_tokens=33)
    assert tally == Tally(written=2, tokens=20)
    by_domain = {conversation.domain: conversation for conversation in made(out)}
    assert texts(by_domain["math"]) == ["Be brief", "2+2?", "About 2+2?: yes."]
    assert texts(by_domain["chat"]) == ["Why?", "About Why?: yes."]
    for request in endpoint.requests:
        assert request.chat and request.headers["Authorization"] == "Bearer secret"
        assert request.body["model"] == "mine" and request.body["max_tokens"] == 33
        assert request.body["top_p"] == 1.0
        assert "separate_reasoning" not in request.body


def test_turns_are_answered_one_after_the_other(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert generate(endpoint, out, listed(Draft("chat", None, ("One?", "Two?")))).written == 1
    first, second = (request.body["messages"] for request in endpoint.requests)
    answers = ("About One?: yes.", "About Two?: yes.")
    assert second == [*first, {"role": "assistant", "content": answers[0]}, second[-1]]
    (conversation,) = made(out)
    assert texts(conversation) == ["One?", answers[0], "Two?", answers[1]]
    assert conversation.completion_tokens == 20


def test_the_target_writes_its_own_prompts(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    draft = Draft("code", "Be brief", ("Explain how",), continued=True)
    endpoint.reply = lambda request: (
        completion(" a queue works.\n\nAnd more") if not request.chat else chat("So.")
    )
    generate(endpoint, out, listed(draft))
    written = endpoint.requests[0].body
    prefix = "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\n"
    assert written["prompt"] == f"{prefix}Explain how" and written["stop"] == ["<|im_end|>"]
    assert texts(made(out)[0]) == ["Be brief", "Explain how a queue works.", "So."]


def test_the_target_asks_back(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    def reply(request: Request) -> Response:
        if request.chat:
            cut = "Two" in request.asked
            return chat("Answer", finish="length" if cut else "stop")
        return completion("Question Two?")

    endpoint.reply = reply
    generate(endpoint, out, listed(Draft("chat", None, ("Why?",))), follow_up_share=1.0)
    assert [request.chat for request in endpoint.requests] == [True, False, True]
    assert endpoint.requests[1].asked.endswith("Answer<|im_end|>\n<|im_start|>user\n")
    assert texts(made(out)[0]) == ["Why?", "Answer", "Question Two?", "Answer"]


@pytest.mark.parametrize(
    "written",
    [completion("  "), completion("x" * 200, finish="length"), (400, {"error": "too long"})],
    ids=["empty", "cut", "refused"],
)
def test_a_follow_up_that_fails_ends_the_conversation(
    endpoint: FakeEndpoint, tmp_path: Path, written: Response
) -> None:
    out = tmp_path / "out.jsonl"
    endpoint.reply = lambda request: chat("Because.") if request.chat else written
    tally = generate(endpoint, out, listed(Draft("chat", None, ("Why?",))), follow_up_share=1.0)
    assert tally.written == 1 and texts(made(out)[0]) == ["Why?", "Because."]


def test_a_cut_answer_ends_the_conversation(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    endpoint.reply = lambda request: chat("Once upon \ufffd", finish="length")
    drafts = listed(Draft("chat", None, ("One?", "Two?")))
    generate(endpoint, out, drafts, follow_up_share=1.0)
    assert endpoint.asked == ["One?"]
    (conversation,) = made(out)
    # Half a character is no text, and would be other tokens than the target wrote.
    assert texts(conversation) == ["One?", "Once upon "]
    assert conversation.finish_reason == "length"


@pytest.mark.parametrize(
    "second",
    [chat("", finish="length"), chat(None), chat("cut off", finish="abort"), (400, b"too long")],
    ids=["empty", "none", "aborted", "refused"],
)
def test_a_turn_without_an_answer_leaves_those_before_it(
    endpoint: FakeEndpoint, tmp_path: Path, second: Response
) -> None:
    out = tmp_path / "out.jsonl"
    endpoint.reply = lambda request: second if request.asked == "Two?" else chat("Yes.")
    generate(endpoint, out, listed(Draft("chat", None, ("One?", "Two?"))))
    (conversation,) = made(out)
    assert texts(conversation) == ["One?", "Yes."]
    assert conversation.finish_reason == "stop" and conversation.completion_tokens == 10


def test_tokens_are_counted_where_the_server_does_not(
    endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    answer = {"choices": [{"finish_reason": "stop", "message": {"content": "seven b"}}]}
    endpoint.reply = lambda request: (200, answer)
    generate(endpoint, out, listed(Draft("chat", None, ("Why?",))))
    assert made(out)[0].completion_tokens == 7


# --- thinking ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (chat("\n\nYes.", reasoning_content="\nHm.\n"), "<think>\nHm.\n</think>\n\nYes."),
        (chat("\n\nYes.", reasoning="\nHm.\n"), "<think>\nHm.\n</think>\n\nYes."),
        (chat("<think>\nHm.\n</think>\n\nYes."), "<think>\nHm.\n</think>\n\nYes."),
        (chat(None, reasoning_content="\nHm", finish="length"), "<think>\nHm"),
        (chat("\n\nYe", reasoning_content="H", finish="length"), "<think>H</think>\n\nYe"),
        (chat("Yes.", reasoning_content=None), "Yes."),
    ],
    ids=["split", "newer-name", "whole", "cut-thinking", "cut-answer", "none"],
)
def test_thinking_is_part_of_the_answer(
    endpoint: FakeEndpoint, tmp_path: Path, answer: Response, kept: str
) -> None:
    out = tmp_path / "out.jsonl"
    endpoint.reply = lambda request: answer
    generate(endpoint, out, listed(Draft("chat", None, ("Why?",))), template=QWEN3)
    assert texts(made(out)[0]) == ["Why?", kept]
    # SGLang splits thinking off, and strips it, unless told otherwise.
    assert endpoint.requests[0].body["separate_reasoning"] is False


def test_thinking_that_the_template_begins(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    out, opening = tmp_path / "out.jsonl", tokenizer(CHATML)
    opening.chat_template = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    assert opens_thinking(opening) and not opens_thinking(tokenizer(CHATML))
    endpoint.reply = lambda request: chat("\n\nYes.", reasoning_content="Hm.\n")

    async def run() -> None:
        async with httpx.AsyncClient() as client:
            with ConversationWriter(out) as writer:
                options = Options(url=endpoint.url, follow_up_share=0.0)
                generator = Generator(client, options, opening)
                await generator.run(listed(Draft("chat", None, ("Why?",))), writer, ENOUGH)

    asyncio.run(run())
    assert texts(made(out)[0])[1] == "Hm.\n</think>\n\nYes."


# --- chat templates ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "prefix", "end"),
    [
        (CHATML, "<|im_start|>system\nYou are SmolLM<|im_end|>\n<|im_start|>user\n", "<|im_end|>"),
        (LLAMA3, "<|begin|><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        (GEMMA, "<bos><start_of_turn>user\n", "<end_of_turn>"),
    ],
    ids=["chatml", "llama3", "gemma"],
)
def test_the_text_around_a_user_turn(template: str, prefix: str, end: str) -> None:
    assert user_turn_prefix(tokenizer(template), []) == (prefix, end)


def test_bos_is_left_to_a_server_that_adds_it() -> None:
    from tokenizers.processors import TemplateProcessing

    adding = tokenizer(LLAMA3)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", adding.bos_token_id)]
    )
    prefix, _ = user_turn_prefix(adding, [])
    assert prefix == "<|start_header_id|>user<|end_header_id|>\n\n"


def test_a_template_that_changes_the_users_text() -> None:
    shouting = tokenizer(CHATML)
    shouting.chat_template = CHATML.replace("message['content']", "message['content'] | upper")
    with pytest.raises(DataError) as caught:
        user_turn_prefix(shouting, [])
    actionable(caught.value, found="does not keep the user's text", expected="verbatim")


def test_system_messages_are_left_out_where_the_template_takes_none(
    endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    assert accepts_system(tokenizer(CHATML)) and accepts_system(tokenizer(LLAMA3))
    assert not accepts_system(tokenizer(GEMMA))
    out, recipe = tmp_path / "out.jsonl", load_recipe("perfectblend")
    drafts = listed(*(recipe.draw(random.Random(seed), 1.0) for seed in range(20)))
    generate(endpoint, out, drafts, template=GEMMA)
    assert made(out)
    for request in endpoint.requests:
        assert not request.chat or request.body["messages"][0]["role"] == "user"


# --- rounds --------------------------------------------------------------------------------------


def test_rounds_take_the_temperatures_in_turn(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    generate(endpoint, out, listed(*questions(20)), concurrency=2, temperatures=(0.0, 0.7))
    temperatures = [request.body["temperature"] for request in endpoint.requests]
    assert temperatures == [0.0] * 8 + [0.7] * 8 + [0.0] * 4
    assert sorted(c.temperature for c in made(out)) == [0.0] * 12 + [0.7] * 8


def test_prompts_of_a_round_come_before_its_answers(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    opening = Draft("chat", None, ("Tell me about",), continued=True)
    generate(endpoint, tmp_path / "out.jsonl", listed(*[opening] * 16), concurrency=2)
    kinds = [request.chat for request in endpoint.requests]
    assert kinds == [False] * 8 + [True] * 8 + [False] * 8 + [True] * 8


@pytest.mark.parametrize("concurrency", [1, 5])
def test_concurrency_is_reached_and_never_exceeded(
    endpoint: FakeEndpoint, tmp_path: Path, concurrency: int
) -> None:
    endpoint.delay = 0.02
    generate(endpoint, tmp_path / "out.jsonl", listed(*questions(20)), concurrency=concurrency)
    assert endpoint.peak == concurrency


def test_it_stops_at_enough_tokens(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out.jsonl", load_recipe("perfectblend")
    tally = generate(endpoint, out, recipe.draw, tokens=95, concurrency=2, seed=3)
    assert 95 <= tally.tokens == sum(c.completion_tokens for c in made(out)) <= 110
    assert tally.written == len(made(out)) == tally.tokens // 10


def test_equal_prompts_are_kept_once(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    drafts = listed(*questions(3), *questions(3))
    tally = generate(endpoint, out, drafts, concurrency=6)
    assert tally.written == 3 and tally.duplicates == 3 and len(made(out)) == 3
    before = len(endpoint.requests)
    assert generate(endpoint, out, listed(*questions(4))).duplicates == 3
    assert endpoint.asked[before:] == ["question 3"], "what is answered is not asked again"


def test_a_new_start_draws_other_prompts(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out.jsonl", load_recipe("perfectblend")
    for tokens in (200, 400):
        generate(endpoint, out, recipe.draw, tokens=tokens, concurrency=1)
    assert len(endpoint.asked) == len(set(endpoint.asked)) == len(made(out)) == 40


# --- a server in trouble -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [(500, b"oops"), (503, b""), (429, b"slow down"), (200, b"<html>"), (200, {"choices": []})],
    ids=["500", "503", "429", "html", "no-choices"],
)
def test_a_server_in_trouble_is_asked_again(
    endpoint: FakeEndpoint, tmp_path: Path, trouble: Response
) -> None:
    endpoint.reply = lambda request: (
        trouble if len(endpoint.requests) <= 2 else endpoint.usual(request)
    )
    tally = generate(endpoint, tmp_path / "out.jsonl", listed(*questions(1)))
    assert tally == Tally(written=1, tokens=10, failed=2)
    assert len({json.dumps(request.body) for request in endpoint.requests}) == 1


def failed(
    endpoint: FakeEndpoint, out: Path, *, drafts: list[Draft] | None = None, **options: Any
) -> DataError:
    with pytest.raises(DataError) as caught:
        generate(endpoint, out, listed(*(drafts or questions(1))), **options)
    return caught.value


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((500, b"out of memory"), "500 out of memory"),
        ((200, b"<html>"), "JSON is malformed"),
        ((200, {"error": "no"}), "missing required field `choices`"),
    ],
    ids=["500", "html", "no-choices"],
)
def test_a_server_that_stays_in_trouble(
    endpoint: FakeEndpoint, tmp_path: Path, answer: Response, says: str
) -> None:
    endpoint.reply = lambda request: answer
    error = failed(endpoint, tmp_path / "out.jsonl", drafts=questions(4), concurrency=1)
    actionable(error, found=f"{endpoint.url}/chat/completions failed: ", expected="OpenAI")
    assert says in error.found and "goes on where it stopped" in error.fix
    assert len(endpoint.requests) == 4, "four attempts, then no other prompt is tried"


def test_no_server(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    error = failed(endpoint, tmp_path / "out.jsonl", url=f"http://127.0.0.1:{port}/v1")
    actionable(error, found="ConnectError", expected="an OpenAI-compatible endpoint")


def test_a_server_that_is_too_slow(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    endpoint.delay = 0.3
    error = failed(endpoint, tmp_path / "out.jsonl", timeout=0.02)
    actionable(error, found="ReadTimeout", expected="an OpenAI-compatible endpoint")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_address_or_key_is_said_at_once(
    endpoint: FakeEndpoint, tmp_path: Path, status: int
) -> None:
    endpoint.reply = lambda request: (status, b"no")
    error = failed(endpoint, tmp_path / "out.jsonl")
    actionable(error, found=f"failed: {status} no", expected="OpenAI")
    assert "/v1" in error.fix and "OPENAI_API_KEY" in error.fix
    assert len(endpoint.requests) == 1


def test_answers_follow_the_plain_law(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    tally = generate(endpoint, tmp_path / "out.jsonl", listed(*questions(3)))
    assert not tally.own_defaults
    for request in endpoint.requests:
        fields = ("top_p", "top_k", "min_p", "repetition_penalty")
        assert [request.body[name] for name in fields] == [1.0, -1, 0.0, 1.0]


def test_an_endpoint_that_knows_openais_fields_only(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda request: (
        (400, b"unknown field top_k") if "top_k" in request.body else chat("Yes.")
    )
    tally = generate(endpoint, tmp_path / "out.jsonl", listed(*questions(3)), concurrency=1)
    assert (tally.written, tally.own_defaults) == (3, True)
    assert len(endpoint.requests) == 4  # asked twice only once


def test_a_refused_prompt_is_skipped(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda request: (
        (400, b"longer than the context") if request.asked == "question 1" else chat("Yes.")
    )
    tally = generate(endpoint, tmp_path / "out.jsonl", listed(*questions(3)))
    assert tally == Tally(written=2, tokens=20, unusable=1)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((400, b"no such model"), "refused a request: 400 no such model"),
        (chat(""), "an empty or aborted answer (finish_reason stop)"),
        (chat("x", finish="abort"), "an empty or aborted answer (finish_reason abort)"),
    ],
    ids=["refused", "empty", "aborted"],
)
@pytest.mark.parametrize("endless", [False, True], ids=["file", "recipe"])
def test_a_target_that_never_answers(
    endpoint: FakeEndpoint, tmp_path: Path, answer: Response, says: str, endless: bool
) -> None:
    endpoint.reply = lambda request: answer if request.chat else completion(" of that?")
    drafts = questions(10_000 if endless else 3)
    error = failed(endpoint, tmp_path / "out.jsonl", drafts=drafts, concurrency=20)
    count = 80 if endless else 3
    actionable(error, found=f"The last {count} prompts got no answer", expected="most prompts")
    # A refused request is sent once more, without the fields that not all endpoints know.
    assert says in error.found
    assert len(endpoint.requests) == count * (2 if "refused" in says else 1)


def test_a_full_disk_stops_at_once(endpoint: FakeEndpoint) -> None:
    error = failed(endpoint, Path("/dev/full"), drafts=questions(40), concurrency=2)
    actionable(error, found="No space left on device", expected="space")
    assert len(endpoint.requests) < 10
