"""Random requests to ``/generate``: grammars, biases at the edges of float, stop conditions, extreme parameters."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

PROMPTS = (
    "The capital of France is",
    "Answer yes or no. Is water wet?",
    "Write a JSON object about a cat:",
    "1, 2, 3, 4,",
    "def add(a, b):\n    return",
    "Once upon a time there was a",
    "Red, green, blue. Red, green, blue. Red,",
    "Q: Who wrote Hamlet?\nA:",
)
#: Among them tokens that the model likes, end-of-text and end-of-turn.
_TOKENS = (0, 1, 2, 28, 30, 198, 216, 260, 282, 284, 1000, 7042, 49151)
_EDGES = (1e39, -1e39, 3.4e38, -3.4e38, 1e30, -1e30, 1e-45, -100.0, -5.0, 5.0, 100.0)
_REGEXES = (
    "(yes|no)", "a", "a?", "[0-9]{1,3}", "(ab|abc|abcd)", r"\d+\.\d{2}", "(cat|dog)( runs)?", r"[a-z ]{5,20}\.",
)  # fmt: skip
_SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "object", "properties": {"a": {"enum": ["x", "y", "zebra"]}}, "required": ["a"]},
    {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]},
    {
        "type": "object",
        "properties": {"n": {"enum": [1, 22, 333]}, "s": {"type": "string", "maxLength": 4}},
        "required": ["n", "s"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3},
    {"enum": ["only"]},
)  # fmt: skip
_EBNFS = (
    'root ::= "yes" | "no"',
    'root ::= "(" digits ")"\ndigits ::= [0-9] | [0-9] digits',
    'root ::= ("la" | "lo"){1,4}',
)
_TAG = {
    "structures": [{"begin": "<n>", "schema": {"enum": [1, 2, 30]}, "end": "</n>"}],
    "triggers": ["<n>"],
}


def _grammar(rng: random.Random) -> dict[str, Any]:
    kinds: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: {"regex": rng.choice(_REGEXES)},
        lambda: {"json_schema": json.dumps(rng.choice(_SCHEMAS))},
        lambda: {"ebnf": rng.choice(_EBNFS)},
        lambda: {"structural_tag": json.dumps({"type": "structural_tag", **_TAG})},
    )
    return rng.choice(kinds)()


def _bias(rng: random.Random) -> dict[str, Any]:
    tokens = rng.sample(_TOKENS, rng.choice((1, 1, 2, 5)))
    return {"logit_bias": {str(token): rng.choice(_EDGES) for token in tokens}}


def _stops(rng: random.Random) -> dict[str, Any]:
    kinds: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: {
            "stop": rng.sample((" ", "\n", ".", "a", "the", "Paris", "1", ", "), rng.choice((1, 2)))
        },
        lambda: {"stop_token_ids": rng.sample(_TOKENS, 2)},
        lambda: {"stop_regex": rng.choice((r"\d", "[A-Z]", r"\."))},
        lambda: {"stop": ["."], "stop_token_ids": [198], "no_stop_trim": True},
    )
    return rng.choice(kinds)()


def _penalties(rng: random.Random) -> dict[str, Any]:
    kinds: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: {"repetition_penalty": rng.choice((1e-39, 1e-3, 0.7, 1.3, 2.0))},
        lambda: {"frequency_penalty": rng.choice((-2.0, 0.8, 2.0))},
        lambda: {"presence_penalty": rng.choice((-2.0, 0.8, 2.0)), "repetition_penalty": 1.2},
        lambda: {"min_new_tokens": rng.choice((1, 4, 12, 24))},
    )
    return rng.choice(kinds)()


def request(rng: random.Random) -> dict[str, Any]:
    """One request body."""
    given: dict[str, Any] = {
        "temperature": rng.choice((0.0, 0.0, 0.0, 1e-4, 1.0, 10.0)),
        "max_new_tokens": rng.choice((1, 2, 3, 5, 8, 13, 24)),
    }
    if rng.random() < 0.45:
        given |= _grammar(rng)
    if rng.random() < 0.3:
        given |= _bias(rng)
    if rng.random() < 0.3:
        given |= _stops(rng)
    if rng.random() < 0.3:
        given |= _penalties(rng)
    if given["temperature"] and rng.random() < 0.3:
        given |= rng.choice(({"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 1}))
    given["ignore_eos"] = rng.random() < 0.3
    if rng.random() < 0.1:
        given["skip_special_tokens"] = False
    body: dict[str, Any] = {"text": rng.choice(PROMPTS), "sampling_params": given}
    if rng.random() < 0.15:
        body |= {"return_logprob": True, "top_logprobs_num": rng.choice((0, 2))}
    return body


def greedy(body: dict[str, Any]) -> bool:
    """Whether plain decoding would take the likeliest token at every step, so that answers can be compared."""
    given = body["sampling_params"]
    return given["temperature"] == 0.0 or given.get("top_k") == 1


def batches(seed: int, requests: int) -> list[list[dict[str, Any]]]:
    """Requests in groups that are sent at once: of one to eight, now and then many equal ones."""
    rng = random.Random(seed)
    found: list[list[dict[str, Any]]] = []
    left = requests
    while left:
        size = min(left, rng.choice((1, 2, 4, 8, 8, 16)))
        if rng.random() < 0.15:
            found.append([request(rng)] * size)
        else:
            found.append([request(rng) for _ in range(size)])
        left -= size
    return found
