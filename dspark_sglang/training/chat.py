"""The target's chat template: what it does, and conversations as the tokens that serving would have.

A conversation becomes token sequences with the tokens that the target wrote marked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
import msgspec
import numpy as np
import numpy.typing as npt

from dspark_sglang.errors import DataError
from dspark_sglang.training.conversations import Conversation, Message

#: Invisible separators around it: no template, and no text, contains this.
_SENTINEL = "\u2063user turn\u2063"


def user_turn_prefix(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, str]:
    """The chat template's text before the next user turn, and the text that ends the turn.

    Raises:
        DataError: the template changes or drops the user's text.
    """
    turns = [msgspec.to_builtins(message) for message in messages]
    turns.append({"role": "user", "content": _SENTINEL})
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    prefix, found, rest = str(text).rpartition(_SENTINEL)
    if not found:
        raise DataError(
            "The chat template does not keep the user's text.",
            expected="a template that contains each user message verbatim",
            fix="Give prompts with --prompts instead of letting the target write them.",
        )
    bos = tokenizer.bos_token or ""
    if bos and prefix.startswith(bos) and tokenizer("").input_ids:
        prefix = prefix.removeprefix(bos)  # the server adds it again
    return prefix, rest.strip()


def accepts_system(tokenizer: Any) -> bool:
    """Whether the chat template takes a system message (Gemma's first ones raise or drop it)."""
    turns = [{"role": "system", "content": _SENTINEL}, {"role": "user", "content": "?"}]
    try:
        return _SENTINEL in str(tokenizer.apply_chat_template(turns, tokenize=False))
    except jinja2.TemplateError:
        return False


def opens_thinking(tokenizer: Any) -> bool:
    """Whether the chat template itself writes the ``<think>`` that an answer begins with."""
    turns = [{"role": "user", "content": "?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return str(text).rstrip().endswith("<think>")


class TokenSequence(NamedTuple):
    """One sequence the target is run over once."""

    #: ``[n]`` int32 tokens.
    tokens: npt.NDArray[np.int32]
    #: ``[n]`` bool: the target wrote this token.
    written: npt.NDArray[np.bool_]
    #: Index of the conversation it came from.
    source: int

    def anchors(self) -> npt.NDArray[np.int64]:
        """Positions a round may start at: a written token followed by a written one.

        The first written token comes from prefill, so no block is ever drafted before it.
        """
        return np.flatnonzero(self.written[:-1] & self.written[1:])

    def remaining(self) -> npt.NDArray[np.int64]:
        """For each anchor, how many tokens of its answer follow."""
        anchors = self.anchors()
        ends = np.flatnonzero(np.append(np.diff(anchors) != 1, True))
        last = anchors[ends[np.searchsorted(ends, np.arange(len(anchors)))]]
        return last - anchors + 1


class Encoder:
    """Renders conversations with the target's chat template, as serving does.

    Raises:
        DataError: the tokenizer has no chat template, or one that changes answers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._end = self._turn_end()

    def _render(self, messages: Sequence[Message], *, open_turn: bool) -> str:
        turns = [msgspec.to_builtins(message) for message in messages]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=open_turn
                )
            )
        except (jinja2.TemplateError, ValueError) as error:
            roles = ", ".join(message.role for message in messages)
            raise DataError(
                f"The target's chat template cannot render {roles}: {error}.",
                expected="conversations in the form that this target takes",
                fix="Make them with this target: `dspark data --target ...`.",
            ) from error

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _turn_end(self) -> int:
        """The token that ends an assistant turn in the chat template."""
        mark = "\u2063answer\u2063"
        text = self._render([Message("user", "?"), Message("assistant", mark)], open_turn=False)
        _, found, rest = text.rpartition(mark)
        if not found:
            raise DataError(
                "The target's chat template does not keep an answer's text.",
                expected="a template that contains each answer verbatim",
                fix="Check the target's chat_template.",
            )
        end = self._encode(rest.strip())[:1]
        # Not all_special_ids: Gemma 3's <end_of_turn> is an added token without a role.
        if end and end[0] in self._tokenizer.added_tokens_decoder:
            return end[0]
        if self._tokenizer.eos_token_id is None:
            raise DataError(
                "No token ends an answer: the template writes none and there is no eos_token.",
                expected="a chat template or tokenizer with an end token",
                fix="Set eos_token in the target's tokenizer_config.json.",
            )
        return int(self._tokenizer.eos_token_id)

    def encode(
        self, conversation: Conversation, source: int, max_length: int
    ) -> list[TokenSequence]:
        """One sequence for a conversation, or several when the template rewrites history.

        Templates that drop earlier thinking render an old turn differently from how it was
        written; each such turn then gets a sequence of its own, so that the target always sees
        what it saw when it wrote.
        """
        sequences: list[tuple[list[int], list[bool]]] = []
        messages = conversation.messages
        last = len(messages) - 1
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self._encode(self._render(messages[:index], open_turn=True))
            answer = self._encode(message.content)
            if index != last or conversation.finish_reason == "stop":
                answer.append(self._end)
            if sequences and prompt[: len(sequences[-1][0])] == sequences[-1][0]:
                tokens, written = sequences[-1]
                prompt = prompt[len(tokens) :]
            else:
                tokens, written = [], []
                sequences.append((tokens, written))
            tokens += prompt + answer
            written += [False] * len(prompt) + [True] * len(answer)
        made = [
            TokenSequence(
                np.array(tokens[:max_length], dtype=np.int32),
                np.array(written[:max_length], dtype=np.bool_),
                source,
            )
            for tokens, written in sequences
        ]
        return [sequence for sequence in made if len(sequence.anchors())]
