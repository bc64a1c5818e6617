"""Requests that are refused before they run, in words that say what to send instead."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")
from dspark_sglang.core.schedule.scheduler import Scheduler, Synchronous
from dspark_sglang.serving import requests
from dspark_sglang.serving.faults import Faults


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scheduler]:
    monkeypatch.setattr(requests, "_process", None)
    made = Synchronous(gamma=3)
    requests.bind(made, Faults())
    yield made


def asking(**options: Any) -> Any:
    params = SimpleNamespace(custom_params={"dspark": options}, min_p=0.0)
    logprob = SimpleNamespace(token_ids_logprob=None, top_logprobs_num=0)
    return SimpleNamespace(
        sampling_params=params, origin_input_ids=[1], vocab_size=9, logprob=logprob,
        return_hidden_states=False,
    )  # fmt: skip


def test_only_an_unmeasured_server_takes_the_measurements_requests(scheduler: Scheduler) -> None:
    for taken in (True, False):
        scheduler.measurement.running = taken
        says = requests.refusal(asking(profile=True))
        assert (says is None) == taken
        if says is not None:
            assert "profile" in says and "max_draft_tokens" in says
        assert requests.refusal(asking(profile=False, max_draft_tokens=1)) is None


@pytest.mark.parametrize(
    "options",
    [{"max_draft_tokens": -1}, {"max_draft_tokens": "two"}, {"workload": "w" * 65}, {"depth": 3}, {"profile": True}],
    ids=str,
)  # fmt: skip
def test_wrong_options_of_a_request_are_refused(options: dict[str, Any]) -> None:
    says = requests.refusal(asking(**options)) or ""
    assert "custom_params.dspark cannot be used" in says and "max_draft_tokens" in says


@pytest.mark.parametrize("wanted", [True, "last"])
def test_hidden_states_are_refused(wanted: Any) -> None:
    """Verification captures the states the drafter reads; plain decoding's would be an empty list."""
    request = asking()
    request.return_hidden_states = wanted
    assert "return_hidden_states" in (requests.refusal(request) or "")


def test_an_empty_prompt_is_refused() -> None:
    """The target's forward over no rows would end the scheduler, and with it the server."""
    request = asking()
    request.origin_input_ids = []
    assert "no tokens" in (requests.refusal(request) or "")


@pytest.mark.parametrize("token", [-1, 9, 10**9])
def test_a_token_that_does_not_exist_is_refused(token: int) -> None:
    """Its embedding would end the scheduler."""
    request = asking()
    request.origin_input_ids = [1, token]
    assert f"token {token}." in (requests.refusal(request) or "")
    request.multimodal_inputs = object()
    assert requests.refusal(request) is None


def test_log_probabilities_of_tokens_that_do_not_exist_are_refused() -> None:
    request = asking()
    request.logprob.token_ids_logprob = [3, 9]
    assert "token_ids_logprob has token 9." in (requests.refusal(request) or "")
    request.logprob.token_ids_logprob = [3]
    request.logprob.top_logprobs_num = 9
    assert requests.refusal(request) is None
    request.logprob.top_logprobs_num = 10
    assert "at most 9" in (requests.refusal(request) or "")


def test_without_a_worker_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_process", None)
    assert requests.refusal(asking(profile=True)) is not None
    assert requests.refusal(asking(workload="code")) is None


@pytest.mark.parametrize("shape", [(2,), (2, 13)])
def test_a_grammars_parser_is_told_no_negative_token(shape: tuple[int, ...]) -> None:
    free, parsed = (SimpleNamespace(grammar=grammar) for grammar in (None, "[a-z]"))
    undecided = torch.full(shape, -1)
    found = requests.told(undecided, [free, parsed])  # type: ignore[list-item]
    assert (found[0] == -1).all() and (found[1] == 0).all()
    assert requests.told(undecided, [free, free]) is undecided  # type: ignore[list-item]
