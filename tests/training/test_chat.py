"""Conversations as token sequences: what the target saw, and which tokens it wrote."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_sglang.errors import DataError
from dspark_sglang.training.chat import Encoder, TokenSequence
from dspark_sglang.training.conversations import Conversation, FinishReason, Message
from tests.layouts.drafter_samples import actionable
from tests.training.tokenizer_samples import CHATML, GEMMA, LLAMA3, QWEN3, tokenizer

TEMPLATES = pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA3, "<|eot_id|>"),
        (GEMMA, "<end_of_turn>"),
        (QWEN3, "<|im_end|>"),
    ],
    ids=["chatml", "llama3", "gemma", "qwen3"],
)


def conversation(
    *texts: str, system: str | None = None, finish: FinishReason = "stop"
) -> Conversation:
    """User and assistant by turns."""
    messages = [Message("system", system)] if system else []
    for index, text in enumerate(texts):
        messages.append(Message("assistant" if index % 2 else "user", text))
    return Conversation(id="0" * 16, messages=messages, finish_reason=finish)


def encode(template: str, made: Conversation, max_length: int = 10_000) -> list[TokenSequence]:
    return Encoder(tokenizer(template)).encode(made, 5, max_length)


def text(template: str, tokens: Any) -> str:
    return str(tokenizer(template).decode(tokens, clean_up_tokenization_spaces=False))


def answers(template: str, sequence: TokenSequence) -> list[str]:
    """Each run of tokens that the target wrote, as text."""
    padded = np.concatenate([[False], sequence.written, [False]])
    edges = np.flatnonzero(padded[1:] != padded[:-1]).reshape(-1, 2)
    return [text(template, sequence.tokens[start:stop]) for start, stop in edges]


# --- what is written ---------------------------------------------------------------------------


@TEMPLATES
def test_only_answers_and_their_ends_are_written(template: str, end: str) -> None:
    (sequence,) = encode(template, conversation("Why?", "Because.", "Thanks", "Ünd so ☕"))
    assert answers(template, sequence) == [f"Because.{end}", f"Ünd so ☕{end}"]
    assert sequence.tokens.dtype == np.int32 and sequence.written.dtype == np.bool_
    assert sequence.source == 5


@TEMPLATES
def test_the_tokens_are_those_of_the_template(template: str, end: str) -> None:
    made = conversation("Why?", "Because.", "Thanks", "Welcome")
    turns = [{"role": m.role, "content": m.content} for m in made.messages]
    whole = tokenizer(template).apply_chat_template(turns, tokenize=False)
    (sequence,) = encode(template, made)
    assert text(template, sequence.tokens) == whole.rstrip("\n")


@TEMPLATES
def test_a_cut_answer_does_not_end_its_turn(template: str, end: str) -> None:
    made = conversation("Why?", "Because.", "Go on", "Once upon", finish="length")
    (sequence,) = encode(template, made)
    assert answers(template, sequence) == [f"Because.{end}", "Once upon"]


def test_a_system_message_is_not_written() -> None:
    (sequence,) = encode(CHATML, conversation("Why?", "Because.", system="Be brief"))
    assert "Be brief" in text(CHATML, sequence.tokens)
    assert answers(CHATML, sequence) == ["Because.<|im_end|>"]


def test_the_template_writes_bos_once() -> None:
    (sequence,) = encode(LLAMA3, conversation("Why?", "Because."))
    assert text(LLAMA3, sequence.tokens).count("<|begin|>") == 1


# --- templates that rewrite history ------------------------------------------------------------


def test_dropped_thinking_gives_each_turn_its_own_sequence() -> None:
    thought, second = "<think>\nA\n</think>\n\nYes.", "<think>\nB\n</think>\n\nNo."
    first, last = encode(QWEN3, conversation("One?", thought, "Two?", second))
    assert answers(QWEN3, first) == [f"{thought}<|im_end|>"]
    assert answers(QWEN3, last) == [f"{second}<|im_end|>"]
    prompt = text(QWEN3, last.tokens[: last.anchors()[0]])
    assert "Yes.<|im_end|>" in prompt and "<think>" not in prompt


def test_history_that_stays_goes_on_in_one_sequence() -> None:
    thought = "<think>\nA\n</think>\n\nYes."
    made = encode(QWEN3, conversation("One?", "Plain.", "Two?", "Plain too.", "Three?", thought))
    assert [len(answers(QWEN3, sequence)) for sequence in made] == [3]


def test_trimmed_answers_are_learned_as_they_were_written() -> None:
    first, last = encode(LLAMA3, conversation("One?", "Yes. \n", "Two?", "No."))
    assert answers(LLAMA3, first) == ["Yes. \n<|eot_id|>"]
    assert answers(LLAMA3, last) == ["No.<|eot_id|>"]


# --- length ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_long_conversations_are_cut(cut: int) -> None:
    (whole,) = encode(CHATML, conversation("Why?", "abc"))
    prompt = int(np.flatnonzero(whole.written)[0])
    made = encode(CHATML, conversation("Why?", "abc"), prompt + cut)
    if cut == 1:  # one written token: no round may start before it, so nothing to learn
        assert not made
        return
    assert len(made[0].tokens) == len(made[0].written) == prompt + cut
    assert made[0].anchors().tolist() == list(range(prompt, prompt + cut - 1))


def test_turns_beyond_the_length_are_left_out() -> None:
    made = conversation("One?", "<think>\nA\n</think>Yes.", "x" * 500, "No.")
    (sequence,) = encode(QWEN3, made, 100)
    assert answers(QWEN3, sequence) == ["<think>\nA\n</think>Yes.<|im_end|>"]


# --- anchors -----------------------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=40))
def test_anchors_and_what_remains(written: list[bool]) -> None:
    sequence = TokenSequence(np.zeros(len(written), np.int32), np.array(written, np.bool_), 0)
    expected = []
    for place in range(len(written) - 1):
        if written[place] and written[place + 1]:
            follow = 1
            while place + follow + 1 < len(written) and written[place + follow + 1]:
                follow += 1
            expected.append((place, follow))
    got = zip(sequence.anchors().tolist(), sequence.remaining().tolist(), strict=True)
    assert list(got) == expected


# --- refusals ----------------------------------------------------------------------------------


def test_a_template_without_system_messages_says_so() -> None:
    with pytest.raises(DataError) as caught:
        encode(GEMMA, conversation("Why?", "Because.", system="Be brief"))
    actionable(caught.value, found="system, user: System role not supported", expected="form")
    assert "dspark data" in caught.value.fix


def test_no_template() -> None:
    bare = tokenizer(CHATML)
    bare.chat_template = None
    with pytest.raises(DataError) as caught:
        Encoder(bare)
    actionable(caught.value, found="chat template cannot render", expected="conversations")


def test_a_template_that_drops_answers() -> None:
    mute = tokenizer(CHATML)
    mute.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(DataError) as caught:
        Encoder(mute)
    actionable(caught.value, found="does not keep an answer's text", expected="verbatim")


@pytest.mark.parametrize("eos", ["<|im_end|>", None], ids=["eos", "no-eos"])
def test_a_template_that_writes_no_end(eos: str | None) -> None:
    endless = tokenizer(CHATML)
    endless.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    endless.eos_token = eos
    if eos is None:
        with pytest.raises(DataError) as caught:
            Encoder(endless)
        actionable(caught.value, found="No token ends an answer", expected="end token")
        return
    (sequence,) = Encoder(endless).encode(conversation("Why?", "Because."), 0, 100)
    assert answers(CHATML, sequence) == ["Because.<|im_end|>"]
