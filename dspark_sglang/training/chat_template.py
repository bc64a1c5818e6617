"""What a tokenizer's chat template does, found out by rendering it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
import msgspec

from dspark_sglang.errors import DataError
from dspark_sglang.training.conversations import Message

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
