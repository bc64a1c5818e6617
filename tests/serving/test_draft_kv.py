"""States the draft has not read yet, and slots that are not allocated again: what SGLang is told of both."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_sglang.serving import draft_kv
from dspark_sglang.serving.draft_kv import DeferredStates, States, keep_prefills, latest

WIDTH = 3


def states(slots_: list[int], value: float, first: int = 0) -> States:
    rows = len(slots_)
    places = torch.arange(first, first + rows)
    return States(torch.full((rows, WIDTH), value), torch.tensor(slots_), places)


class Pool:
    """The draft's KV: of each slot the value and the position written last."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[float, int]] = {}
        self.writes: list[int] = []

    def write(self, given: States) -> None:
        rows = [row for row, slot in enumerate(given.slots.tolist()) if slot >= 0]
        taken = [int(given.slots[row]) for row in rows]
        assert len(set(taken)) == len(taken), "two rows of one slot in one write"
        self.writes.append(len(taken))
        for row in rows:
            value, place = float(given.hidden[row, 0]), int(given.places[row])
            self.found[int(given.slots[row])] = value, place


@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=6, unique=True), max_size=12))
def test_a_slot_keeps_what_was_left_last(written: list[list[int]]) -> None:
    pool, wanted = Pool(), {}
    deferred = DeferredStates(pool.write)
    for turn, taken in enumerate(written):
        deferred.keep(states(taken, float(turn), first=turn))
        wanted |= {slot: (float(turn), turn + row) for row, slot in enumerate(taken)}
    assert bool(deferred) == bool(written)
    deferred.flush()
    assert pool.found == wanted and not deferred
    deferred.flush()
    assert len(pool.writes) == bool(written)  # together, and once


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_the_last_row_of_each_slot_is_chosen(taken: list[int]) -> None:
    last = {slot: row for row, slot in enumerate(taken)}
    assert latest(torch.tensor(taken)).nonzero().view(-1).tolist() == sorted(last.values())


def test_what_is_kept_is_bounded() -> None:
    deferred = DeferredStates(Pool().write)
    deferred.keep(states(list(range(300)), 1.0))
    assert not deferred.full
    deferred.keep(states(list(range(300, 600)), 1.0))
    assert deferred.full
    deferred.flush()
    assert not deferred.full


class Placement(SimpleNamespace):
    def select(self, index: torch.Tensor) -> Placement:
        return Placement(cache_loc=self.cache_loc[index], positions=self.positions[index])


def prefill(injector: Any, rows: int, **options: Any) -> None:
    placement = Placement(
        cache_loc=torch.arange(rows, dtype=torch.int32), positions=torch.arange(5, 5 + rows)
    )
    given = {"target_hidden": torch.ones(rows + 2, WIDTH), "token_indices": None}
    injector.inject_prefill(placement, **{**given, "target_hidden_is_projected": False, **options})


def test_prefills_leave_their_states_too() -> None:
    pool, called = Pool(), []
    deferred = DeferredStates(pool.write)
    injector = SimpleNamespace(inject_prefill=lambda *_, **__: called.append(pool.writes[:]))
    keep_prefills(injector, deferred, SimpleNamespace(slots=lambda injector, slots: slots))
    prefill(injector, 3)  # rows beyond the real ones are padding
    prefill(injector, 4, token_indices=torch.tensor([3]), target_hidden=torch.full((1, WIDTH), 2.0))
    deferred.flush()
    assert pool.found == {0: (1.0, 5), 1: (1.0, 6), 2: (1.0, 7), 3: (2.0, 8)}
    assert not called
    prefill(injector, 3)
    prefill(injector, 3, target_hidden_is_projected=True)  # SGLang writes, after what is older
    assert called == [[4, 3]]


def batch(*requests: tuple[int, int]) -> Any:
    """Requests of so many committed tokens and allocated slots."""
    made = [
        SimpleNamespace(
            kv=SimpleNamespace(kv_committed_len=used, kv_allocated_len=have),
            sampling_params=SimpleNamespace(top_k=top),
            decode_batch_idx=7,
        )
        for top, (used, have) in enumerate(requests, start=1)
    ]
    return SimpleNamespace(reqs=made, evicted=0, maybe_evict_swa=lambda: None)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    known = SimpleNamespace(speculative_num_draft_tokens=6, disable_overlap_schedule=True)
    monkeypatch.setattr(draft_kv, "get_spec", lambda: known)
    monkeypatch.setattr(draft_kv, "get_schedule", lambda: known)
    return known


def allocated(given: Any) -> tuple[bool, Any]:
    """Whether SGLang was asked to allocate, and the draft input."""
    called, draft_input = [], SimpleNamespace()
    draft_kv.prepare(lambda own, of: called.append((own, of)), draft_input, given)
    assert called in ([], [(draft_input, given)])
    return bool(called), draft_input


def test_slots_that_last_for_a_block_are_not_topped_up(server: SimpleNamespace) -> None:
    given = batch((100, 106), (40, 52))
    asked, draft_input = allocated(given)
    assert not asked
    assert given.seq_lens_cpu.tolist() == [100, 40] and given.seq_lens_sum == 140
    assert given.seq_lens_cpu.dtype == torch.int64
    assert draft_input.nxt_kv_lens_cpu.tolist() == [106, 52] and draft_input.nxt_kv_lens_sum == 158
    assert [request.decode_batch_idx for request in given.reqs] == [8, 8]
    assert (draft_input.max_top_k, draft_input.uniform_top_k_value) == (2, None)


@pytest.mark.parametrize("requests", [[(100, 105), (40, 52)], [(7, 7)], []])
def test_a_request_short_of_a_block_has_sglang_allocate(
    server: SimpleNamespace, requests: list[tuple[int, int]]
) -> None:
    given = batch(*requests)
    assert allocated(given)[0]
    assert all(request.decode_batch_idx == 7 for request in given.reqs)  # SGLang counts them


def test_under_overlap_sglang_allocates(server: SimpleNamespace) -> None:
    server.disable_overlap_schedule = False
    assert allocated(batch((100, 112)))[0]
