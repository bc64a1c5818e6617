"""What the HTTP process refuses: values that would end it, or the scheduler that reads them."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")
from sglang.srt.managers.io_struct import (
    ReleaseMemoryOccupationReqOutput,
    TokenizedGenerateReqInput,
)
from sglang.srt.sampling.sampling_params import TOP_K_ALL, SamplingParams

from dspark_sglang.serving import admin, options


def made(obj: Any = None, *, metrics: bool = True, **given: Any) -> TokenizedGenerateReqInput:
    """What would be sent for ``obj`` with these parameters, through the hook."""

    def create(manager: Any, obj: Any, text: str) -> TokenizedGenerateReqInput:
        top = {name: given.pop(name) for name in list(given) if name in FIELDS}
        request = {
            "input_text": text, "input_ids": array("q", [1, 2]), "input_embeds": None, "mm_inputs": None,
            "token_type_ids": None, "sampling_params": SamplingParams(**given), "return_logprob": True,
            "logprob_start_len": -1, "top_logprobs_num": 0, "token_ids_logprob": None, "stream": False,
        }  # fmt: skip
        return TokenizedGenerateReqInput(**request | top)

    manager = SimpleNamespace(
        enable_metrics=metrics, model_config=SimpleNamespace(vocab_size=VOCABULARY)
    )
    found: TokenizedGenerateReqInput = options.made(
        create, manager, obj or SimpleNamespace(), "text"
    )
    return found


VOCABULARY = 100
FIELDS = {*TokenizedGenerateReqInput.__struct_fields__} - {"sampling_params"}


@pytest.fixture(autouse=True)
def labels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that was started with one label."""
    allowed = SimpleNamespace(tokenizer_metrics_allowed_custom_labels=["tenant"])
    monkeypatch.setattr("sglang.srt.runtime_context.get_observability", lambda: allowed)
    return


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 1, "top_p": 0.5, "stop": ["a"], "stop_token_ids": [5, None], "max_new_tokens": None},
        {"logit_bias": {"5": -math.inf, "6": 3}, "custom_params": {"dspark": {"max_draft_tokens": 0}}},
        {"logprob_start_len": 0, "top_logprobs_num": 5, "token_ids_logprob": [1], "rid": "a", "priority": -3},
        {"return_logprob": False, "logprob_start_len": -5},
        {"input_text": ["a", ["b", "c"]], "time_stats": object()},
    ],
    ids=["plain", "sampling", "bias", "logprobs", "unread", "own"],
)  # fmt: skip
def test_what_the_scheduler_can_read_is_left_alone(given: dict[str, Any]) -> None:
    assert list(made(**given).input_ids) == [1, 2]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"temperature": True}, "sampling_params.temperature cannot be used: Expected `float`, got `bool`"),
        ({"max_new_tokens": 1.5}, "sampling_params.max_new_tokens"),
        ({"stream_interval": [1]}, "sampling_params.stream_interval"),
        ({"regex": 5}, "sampling_params.regex"),
        ({"ignore_eos": "yes"}, "sampling_params.ignore_eos"),
        ({"min_new_tokens": 2**70}, "A value of the request cannot be used"),
        ({"input_text": "\ud800"}, "A value of the request cannot be used"),
        ({"no_such": 1}, "cannot be read"),
        ({"temperature": "hot"}, "cannot be read"),
        ({"token_ids_logprob": [[1]]}, "token_ids_logprob cannot be used"),
        ({"priority": "high"}, "priority cannot be used"),
        ({"logprob_start_len": -2}, "logprob_start_len is -2. Expected at least -1."),
        ({"top_logprobs_num": -1}, "top_logprobs_num is -1. Expected at least 0."),
        ({"positional_embed_overrides": [1, [1]]}, "positional_embed_overrides holds no tensors"),
        ({"logit_bias": {"5": math.nan}}, "logit_bias of token 5 is nan"),
        ({"logit_bias": {"5": math.inf}}, "logit_bias of token 5 is inf"),
    ],
)  # fmt: skip
def test_what_it_cannot_read_or_use_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=r"Expected|cannot be") as caught:
        made(**given)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("given", "metrics", "says"),
    [
        ({"tenant": "a"}, True, None),
        ({"other": "a"}, False, None),
        (None, True, None),
        ({"tenant": "a", "other": "a"}, True, "custom_labels has 'other': 'a'. Expected text for tenant."),
        ({"tenant": 1}, True, "custom_labels has 'tenant': 1. Expected text for tenant."),
    ],
    ids=["known", "no-metrics", "none", "unknown", "number"],
)  # fmt: skip
def test_labels(given: dict[str, Any] | None, metrics: bool, says: str | None) -> None:
    asked = SimpleNamespace(custom_labels=given)
    if says is None:
        assert made(asked, metrics=metrics)
        return
    with pytest.raises(ValueError, match="custom_labels") as caught:
        made(asked, metrics=metrics)
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("given", "kept"),
    [([5, VOCABULARY - 1], {5, 99}), ([5, VOCABULARY, -1, 2**63, 2**70], {5}), ([10**9], None), (None, None)],
    ids=["known", "some", "unknown", "none"],
)  # fmt: skip
def test_stop_tokens_that_there_are(given: list[int] | None, kept: set[int] | None) -> None:
    assert made(stop_token_ids=given, min_new_tokens=2).sampling_params.stop_token_ids == kept


@pytest.mark.parametrize(
    ("given", "kept"), [(1, 1), (VOCABULARY - 1, 99), (VOCABULARY, TOP_K_ALL), (10**12, TOP_K_ALL)]
)
def test_more_tokens_than_there_are_are_all(given: int, kept: int) -> None:
    assert made(top_k=given).sampling_params.top_k == kept


def test_answers_to_one_prompt() -> None:
    options.check_samples(None, SimpleNamespace(parallel_sample_num=128))
    with pytest.raises(ValueError, match=r"n is 2147483648\. Expected at most"):
        options.check_samples(None, SimpleNamespace(parallel_sample_num=2**31))


class Updater:
    """The part of SGLang's updater that is looked at."""

    def __init__(self, *, enabled: bool = True, gone: tuple[str, ...] = (), idle: bool = True) -> None:  # fmt: skip
        self.memory_saver_adapter = SimpleNamespace(enabled=enabled)
        self.offload_tags = set(gone)
        self.scheduler = SimpleNamespace(_engine_paused=False)
        self.is_fully_idle = lambda ignore_waiting: idle
        self.done = 0

    def original(self, updater: Any, recv_req: Any) -> ReleaseMemoryOccupationReqOutput:
        self.done += 1
        return ReleaseMemoryOccupationReqOutput()


@pytest.fixture
def _no_weight_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(weight_cache_mode="off")
    monkeypatch.setattr("sglang.srt.runtime_context.get_model", lambda: model)


@pytest.mark.usefixtures("_no_weight_cache")
@pytest.mark.parametrize(
    ("updater", "tags", "release", "says"),
    [
        (Updater(), None, True, None),
        (Updater(gone=("weights",)), ["kv_cache"], True, None),
        (Updater(gone=("weights",)), ["weights"], False, None),
        (Updater(gone=("kv_cache", "weights", "cuda_graph"), idle=False), None, False, None),
        (Updater(enabled=False), None, True, "--enable-memory-saver"),
        (Updater(enabled=False), None, False, "--enable-memory-saver"),
        (Updater(idle=False), None, True, "Requests are running"),
        (Updater(gone=("weights",)), None, True, "weights of this server: released"),
        (Updater(), ["kv_cache"], False, "kv_cache of this server: in use"),
        (Updater(), ["all"], True, "tags has 'all'"),
    ],
)
def test_memory(updater: Updater, tags: list[str] | None, release: bool, says: str | None) -> None:
    before = set(updater.offload_tags)
    asked = SimpleNamespace(tags=tags)
    output = admin.guard(updater.original, updater, asked, release=release)

    async def schedulers(obj: Any) -> list[Any]:
        return [output]

    manager = SimpleNamespace(
        auto_create_handle_loop=lambda: None,
        release_memory_occupation_communicator=schedulers,
        resume_memory_occupation_communicator=schedulers,
    )
    if says is None:
        assert updater.done == 1
        asyncio.run(admin.ask(manager, asked, release=release))
        return
    assert updater.done == 0 and updater.offload_tags == before
    with pytest.raises(ValueError, match="Expected") as caught:
        asyncio.run(admin.ask(manager, asked, release=release))
    assert says in str(caught.value)
