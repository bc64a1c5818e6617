"""Requests to a real target: shared prefixes, mixed lengths, long prompts, several concurrencies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from dspark_loadtests.prompts import BALANCED, Prompt, load_prompts

#: Ways to ask the same thing, so that many prompts share long prefixes.
_WAYS = (
    "{}",
    "{} Answer in one sentence.",
    "{} Answer as a list of three short points.",
    "{} Explain it to a child.",
    "{} Begin with the answer, then give the reason.",
    "{} Be brief.",
    "{} Say what you are unsure of.",
    "{} Give an example.",
)
#: Requests at once, and each one's share of the greedy prompts.
CONCURRENCY = {1: 0.2, 4: 0.3, 16: 0.5}
LONG_TOKENS = 1200
RETRACTED = 32


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request."""

    id: str
    tokens: list[int]
    params: dict[str, Any]
    #: Requests the server under test works on at once with it.
    at_once: int


class Encoder:
    """The target's chat template and tokenizer."""

    def __init__(self, target: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(target)

    def chat(self, prompt: Prompt, way: str) -> list[int]:
        """Tokens of a prompt asked one way."""
        *before, last = prompt.messages()
        messages = [*before, {**last, "content": way.format(last["content"])}]
        return self._plain(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        )

    def long(self, number: int) -> list[int]:
        """A prompt of :data:`LONG_TOKENS` tokens, to be prefilled in chunks."""
        text = " ".join(f"item {i} costs {(i + number) * 7 % 23} coins;" for i in range(400))
        return self._plain(text)[:LONG_TOKENS]

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _varied(encoder: Encoder, count: int) -> list[tuple[str, list[int]]]:
    prompts = load_prompts()[:BALANCED]
    found = []
    for number in range(count):
        way, prompt = _WAYS[number // len(prompts) % len(_WAYS)], prompts[number % len(prompts)]
        found.append((f"{prompt.id}/{number // len(prompts)}", encoder.chat(prompt, way)))
    return found


def greedy(encoder: Encoder, count: int) -> list[Ask]:
    """Greedy requests of 8 to 48 tokens, a part at each concurrency, two of them long."""
    asks, place = [], 0
    varied = _varied(encoder, max(0, count - 2))
    for at_once, share in CONCURRENCY.items():
        size = round(share * len(varied)) if at_once < max(CONCURRENCY) else len(varied) - place
        for number, (name, tokens) in enumerate(varied[place : place + size]):
            params = {"temperature": 0.0, "max_new_tokens": 8 + 8 * (number % 6)}
            asks.append(Ask(id=f"greedy/{name}", tokens=tokens, params=params, at_once=at_once))
        place += size
    for number in range(min(2, count)):
        asks.append(
            Ask(
                id=f"greedy/long-{number}",
                tokens=encoder.long(number),
                params={"temperature": 0.0, "max_new_tokens": 24},
                at_once=max(CONCURRENCY),
            )
        )
    return asks


def retracted(encoder: Encoder, count: int = RETRACTED) -> list[Ask]:
    """Greedy requests too long to run together where few KV slots are given.

    Not ``ignore_eos``: SGLang reserves the whole answer of such requests and never retracts them.
    """
    params = {"temperature": 0.0, "max_new_tokens": 112}
    return [
        Ask(id=f"retracted/{name}", tokens=tokens, params=params, at_once=16)
        for name, tokens in _varied(encoder, count)
    ]


def seeded(encoder: Encoder, count: int) -> list[Ask]:
    """Seeded sampled requests, each at concurrency 1 and 16, some with filters."""
    kinds: Sequence[dict[str, Any]] = ({}, {"top_p": 0.9}, {"top_k": 40}, {"temperature": 0.7})
    asks = []
    for at_once in (1, 16):
        for number, (name, tokens) in enumerate(_varied(encoder, count)):
            params = {"temperature": 1.0, "max_new_tokens": 24, "sampling_seed": 1000 + number}
            asks.append(
                Ask(
                    id=f"seeded/{at_once}/{name}",
                    tokens=tokens,
                    params=params | kinds[number % len(kinds)],
                    at_once=at_once,
                )
            )
    return asks
