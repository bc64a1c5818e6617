"""The measurement at start-up: which loads, and when it is asked for at all."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from dspark_sglang.serving import warmup


@pytest.mark.parametrize("most", [1, 2, 3, 8, 20, 48, 128, 1000])
def test_every_size_up_to_the_servers_is_tried_greedy_and_sampled(most: int) -> None:
    found = warmup.loads(most)
    sizes = {load.requests for load in found}
    assert sizes == {size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size <= most} | {
        min(4, most)
    }
    assert max(load.requests for load in found) <= most
    short = [load for load in found if load.prompt == min(load.prompt for load in found)]
    for size in {load.requests for load in short}:
        assert {load.temperature for load in short if load.requests == size} == {0.0, 1.0}
    assert len({load.prompt for load in found}) == 2  # what context costs is seen, too


@pytest.mark.parametrize("most", [8, 32, 48])
def test_what_tells_most_comes_first(most: int) -> None:
    """Where the time is spent early, the ends of the range are known."""
    first = [load.requests for load in warmup.loads(most)[:4]]
    assert first[0] == max(load.requests for load in warmup.loads(most))
    assert min(first) <= 2


def test_a_server_for_nobody_measures_nothing() -> None:
    assert warmup.loads(0) == []


class Manager:
    """The part of SGLang's tokenizer manager that measuring uses; it counts what it is asked."""

    def __init__(self, source: str | None) -> None:
        record = {} if source is None else {"cost_source": source}
        self._state = {
            "dspark_info_record": record or None,
            "effective_max_running_requests_per_dp": 4,
        }
        self.model_config = SimpleNamespace(vocab_size=50)
        self.requests: list[Any] = []
        self.calls: list[str] = []
        self.set: list[dict[str, float]] = []
        #: Answers after which requests only end by being aborted; None: all end by themselves.
        self.stuck_after: int | None = None
        self.aborted: list[str] = []
        self.running: dict[str, asyncio.Event] = {}

    async def get_internal_state(self) -> list[dict[str, Any]]:
        return [self._state]

    async def generate_request(self, request: Any, raw: Any) -> Any:
        self.requests.append(request)
        if self.stuck_after is not None and len(self.requests) > self.stuck_after:
            await asyncio.sleep(0.02)  # until then, SGLang does not know the request
            self.running[request.rid] = asyncio.Event()
            await self.running[request.rid].wait()
            del self.running[request.rid]
        yield {}

    def abort_request(self, rid: str) -> None:
        if rid in self.running:
            self.aborted.append(rid)
            self.running[rid].set()

    async def flush_cache(self) -> None:
        self.calls.append("flush")

    async def set_internal_state(self, request: Any) -> None:
        self.calls.append("set")
        self.set.append(request.server_args)


@pytest.mark.parametrize("source", [None, "off", "online", "/cache/cost/x.json"])
def test_what_is_known_or_not_wanted_is_not_measured(source: str | None) -> None:
    manager = Manager(source)
    asyncio.run(warmup.measure("null", manager))
    assert manager.requests == [] == manager.calls


def test_what_is_unknown_is_measured_kept_and_cleaned_up_after() -> None:
    pytest.importorskip("sglang")
    manager = Manager("unmeasured")
    asyncio.run(warmup.measure("null", manager))
    assert len(manager.requests) == sum(load.requests for load in warmup.loads(4))
    for request in manager.requests:
        assert request.sampling_params["custom_params"] == {"dspark": {"profile": True}}
        assert request.sampling_params["ignore_eos"]
        assert all(0 <= token < 50 for token in request.input_ids)
    # Its prompts leave the cache, its counts the metrics, and its cost is written.
    assert manager.calls == ["flush", "set"]
    assert manager.set == [{"dspark_cost": 2, "dspark_clear_info_records": 1}]


def test_a_slow_machine_is_measured_less(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sglang")
    monkeypatch.setattr(warmup, "BUDGET_S", -1.0)
    manager = Manager("unmeasured")
    asyncio.run(warmup.measure("null", manager))
    assert manager.requests == [] and manager.calls == ["flush", "set"]


@pytest.mark.parametrize("budget", [0.001, 0.3])
def test_a_load_that_overruns_is_cut_off_and_nothing_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, budget: float
) -> None:
    pytest.importorskip("sglang")
    monkeypatch.setattr(warmup, "BUDGET_S", budget)
    monkeypatch.setattr(warmup, "_ABORT_AGAIN_S", 0.01)
    manager = Manager("unmeasured")
    whole = warmup.loads(4)[0].requests
    manager.stuck_after = whole + 1 if budget > 0.1 else 0
    asyncio.run(asyncio.wait_for(warmup.measure("null", manager), 10.0))
    stuck = manager.requests[manager.stuck_after :]
    assert sorted(manager.aborted) == sorted(request.rid for request in stuck) != []
    assert not manager.running
    assert manager.calls == ["flush", "set"]  # what was learned until then is kept
    loads = warmup.loads(4)[: 3 if budget > 0.1 else 1]
    assert len(manager.requests) == sum(load.requests for load in loads)


def test_requests_are_told_apart() -> None:
    pytest.importorskip("sglang")
    manager = Manager("unmeasured")
    asyncio.run(warmup.measure("null", manager))
    assert len({request.rid for request in manager.requests}) == len(manager.requests)
