"""The request options whose output distribution is proved, each as SGLang's sampling parameters.

The parameters are chosen for the tiny target of :mod:`tests.tiny_models`: each changes
its distribution well beyond what the samples resolve, and most of what it forbids would be drawn without it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark_sglang.errors import ConfigError
from tests.tiny_models import EOS, V4_VOCABULARY, VOCABULARY

#: Tokens of a continuation: one from the prefill, then a whole block and the bonus token, or several
#: rounds where drafted tokens are rejected.
MAX_TOKENS = 5


@dataclass(frozen=True, slots=True)
class Option:
    """One request option.

    Attributes:
        name: its name in results.
        params: SGLang's ``sampling_params`` of the request.
        mutant: the deliberately wrong acceptance that the same test must reject.
        environment: what the server is started with besides.
    """

    name: str
    params: Mapping[str, Any]
    mutant: str
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def request(self) -> dict[str, Any]:
        """The parameters as sent."""
        return {"temperature": 1.0, "max_new_tokens": MAX_TOKENS, "ignore_eos": True} | dict(
            self.params
        )


#: What may follow depends on the last character; the end may come after any complete unit.
REGEX = "([a-h][0-9]?|[A-Z][0-9])+"
#: Texts that can still become a text of :data:`REGEX`.
REGEX_PREFIX = re.compile("([a-h][0-9]?|[A-Z][0-9])*[A-Z]?")
_STOP_TOKENS = [token for token in range(4, len(VOCABULARY)) if token % 6 == 1]
_BIAS = {
    str(token): -5.0 if token % 3 == 0 else 2.5
    for token in range(4, len(VOCABULARY))
    if token % 3 == 0 or token % 7 == 1
}

OPTIONS: tuple[Option, ...] = (
    Option("temperature", {"temperature": 0.8}, "correction_from_target"),
    Option("top_k", {"top_k": 4}, "top_k_ignored"),
    Option("top_p", {"top_p": 0.8}, "top_p_drops_the_crossing_token"),
    Option("min_p", {"min_p": 0.12}, "min_p_ignored"),
    Option(
        "all_filters",
        {"temperature": 1.3, "top_k": 6, "top_p": 0.8, "min_p": 0.05},
        "filters_renormalise_in_turn",
    ),
    Option("frequency_penalty", {"frequency_penalty": 1.5}, "penalties_frozen_at_the_anchor"),
    Option("presence_penalty", {"presence_penalty": 1.8}, "penalties_ignored"),
    Option("repetition_penalty", {"repetition_penalty": 1.25}, "penalties_one_row_late"),
    Option(
        "min_new_tokens",
        {"min_new_tokens": 4, "stop_token_ids": _STOP_TOKENS, "ignore_eos": False},
        "min_new_tokens_ignored",
    ),
    Option("logit_bias", {"logit_bias": _BIAS}, "logit_bias_ignored"),
    Option("grammar", {"regex": REGEX, "ignore_eos": False}, "residual_against_masked_draft"),
    Option(
        "stop",
        {
            "stop": ["h", "2g", "8b"],
            "stop_token_ids": [t for t in _STOP_TOKENS if t % 5 == 0],
            "ignore_eos": False,
        },
        "runs_not_cut_at_a_stop",
    ),
    Option(
        "block_verification",
        {},
        "block_tested_by_survival",
        environment={"DSPARK_VERIFICATION": "block"},
    ),
)
NAMES = tuple(option.name for option in OPTIONS)


def choose(names: str) -> list[Option]:
    """Options by comma-separated names; all of them for ``all``.

    Raises:
        ConfigError: an unknown name.
    """
    if names.strip() == "all":
        return list(OPTIONS)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in NAMES]
    if unknown or not wanted:
        close = difflib.get_close_matches(unknown[0] if unknown else "", NAMES, n=1)
        raise ConfigError(
            f"--options names {unknown[0]!r}." if unknown else "--options names nothing.",
            expected="all, or some of " + ", ".join(NAMES),
            fix=f"Did you mean {close[0]}?" if close else "Correct --options.",
        )
    return [option for option in OPTIONS if option.name in wanted]


def text_of(tokens: Sequence[int]) -> str:
    """The text that stops are looked for in; special tokens have theirs."""
    return "".join(V4_VOCABULARY[token] for token in tokens)


def ends(params: Mapping[str, Any], output: Sequence[int]) -> bool:
    """Whether plain decoding of a request with ``params`` stops at ``output``, no shorter prefix of
    which stopped it."""
    if len(output) >= params["max_new_tokens"]:
        return True
    if not output:
        return False
    stops = (EOS, *params.get("stop_token_ids", ()))
    if not params.get("ignore_eos") and output[-1] in stops:
        return True
    text = text_of(output)
    return any(stop in text for stop in params.get("stop", ()))
