"""What a request may ask of scheduling, and how wrong wishes are answered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dspark_sglang.serving.options import RequestOptions, read_options


def request(custom: Any) -> Any:
    """What is read of an SGLang request."""
    return SimpleNamespace(sampling_params=SimpleNamespace(custom_params=custom))


@pytest.mark.parametrize("custom", [None, {}, {"other": 1}, "text", ["dspark"], {"dspark": {}}])
def test_who_asks_for_nothing_gets_the_defaults(custom: Any) -> None:
    assert read_options(request(custom)) == RequestOptions()


def test_every_option_is_read() -> None:
    wanted = {"max_draft_tokens": 3, "workload": "code", "profile": True}
    found = read_options(request({"dspark": wanted, "other": 1}))
    assert found == RequestOptions(max_draft_tokens=3, workload="code", profile=True)
    assert read_options(request({"dspark": {"max_draft_tokens": None}})) == RequestOptions()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_draft_tokens": -1}, "-1"),
        ({"max_draft_tokens": "3"}, "max_draft_tokens"),
        ({"max_draft_tokens": 1.5}, "max_draft_tokens"),
        ({"max_draft_tokens": True}, "max_draft_tokens"),
        ({"max_drafts": 3}, "max_drafts"),
        ({"workload": "x" * 65}, "64 characters"),
        ({"workload": 7}, "workload"),
        ({"profile": 1}, "profile"),
        (3, "int"),
        ([], "array"),
        (None, "null"),
    ],
    ids=str,
)
def test_wrong_options_are_named(given: Any, says: str) -> None:
    wrong = request({"dspark": given})
    for _ in range(2):  # a bad request stays bad
        with pytest.raises(ValueError, match=says):
            read_options(wrong)


def test_options_are_read_once() -> None:
    own = request({"dspark": {"max_draft_tokens": 2}})
    first = read_options(own)
    own.sampling_params.custom_params["dspark"]["max_draft_tokens"] = 5
    assert read_options(own) is first
