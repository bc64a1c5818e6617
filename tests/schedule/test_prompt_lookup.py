"""Prompt lookup: what is found, how sure of it, and how much of it to verify."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_sglang.core.schedule import prompt_lookup as lookup
from dspark_sglang.core.schedule.cost_model import FlatCost, TableCost
from dspark_sglang.core.schedule.prompt_lookup import (
    LEAST,
    LONGEST,
    Follower,
    LookupRates,
    lookup_budget,
)

WORDS = st.lists(st.integers(0, 2), max_size=60)


def agreeing(text: list[int], at: int) -> int:
    """How many tokens before ``at`` are those before the end."""
    count = 0
    while count < at and text[at - 1 - count] == text[-1 - count]:
        count += 1
    return count


@given(WORDS, WORDS, st.integers(1, 7))
def test_what_is_copied_followed_the_same_tokens_before(
    prompt: list[int], answer: list[int], count: int
) -> None:
    follower, text = Follower(prompt, LookupRates()), list(prompt)
    for token in answer:
        text.append(token)
        follower.read(text[len(prompt) :])
    found = follower.continuation(count)
    places = [at for at in range(LEAST, len(text)) if agreeing(text, at) >= LEAST]
    assert bool(found) == bool(places)
    if not found:
        assert follower.matched == 0
        return
    assert len(found) == count
    right = [
        at
        for at in places
        if min(agreeing(text, at), LONGEST) >= follower.matched
        # Read beyond the end, a repetition goes on with itself.
        and all((text + found)[at + k] == token for k, token in enumerate(found))
    ]
    assert right


@given(WORDS, WORDS)
def test_reading_in_pieces_or_at_once_is_the_same(prompt: list[int], answer: list[int]) -> None:
    slow, fast = Follower(prompt, LookupRates()), Follower(prompt, LookupRates())
    for size in range(len(answer) + 1):
        slow.read(answer[:size])
    fast.read(answer)
    assert slow.continuation(5) == fast.continuation(5) and slow.matched == fast.matched


def test_the_latest_place_is_followed() -> None:
    follower = Follower([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], LookupRates())
    assert follower.continuation(3) == [4, 9, 1]
    assert follower.matched == 3  # 9, 1, 2


def test_a_loop_goes_on() -> None:
    follower = Follower([5, 7, 8, 7, 8, 7], LookupRates())
    assert follower.continuation(6) == [8, 7, 8, 7, 8, 7]


@pytest.mark.parametrize("text", [[], [1], [1, 1], [1, 2], [1, 2, 3, 4]])
def test_text_that_repeats_nothing_is_not_copied(text: list[int]) -> None:
    assert Follower(text, LookupRates()).continuation(4) == []


def test_one_token_may_repeat_itself() -> None:
    assert Follower([1, 1, 1], LookupRates()).continuation(3) == [1, 1, 1]


def test_large_token_ids_do_not_collide() -> None:
    big = (1 << 31) - 1
    assert Follower([big, 1, 6, 1, big, 7, big, 1], LookupRates()).continuation(1) == [6]


def test_rates_are_learned_from_the_answer_alone() -> None:
    rates = LookupRates()
    before = [rates.rate(m) for m in range(1, LONGEST + 1)]
    Follower([1, 2] * 500, rates)
    assert [rates.rate(m) for m in range(1, LONGEST + 1)] == before
    Follower([1, 2] * 500, rates).read([1, 2] * 50)
    assert rates.rate(LONGEST) > before[-1]
    assert rates.rate(LEAST) == before[LEAST - 1]


@pytest.mark.parametrize("truth", [0.1, 0.5, 0.95])
def test_a_rate_becomes_the_truth_and_follows_it(truth: float) -> None:
    rates, rng = LookupRates(), np.random.default_rng(0)
    for chance in (1.0 - truth, truth):
        for _ in range(3000):
            rates.observe(4, bool(rng.random() < chance))
    assert rates.rate(4) == pytest.approx(truth, abs=0.06)
    assert rates.rate(5) == LookupRates().rate(5)


def test_later_copies_have_more_agreeing_tokens_before_them() -> None:
    rates = LookupRates()
    rates.observe(4, True)
    assert rates.chances(3, 4).tolist() == [rates.rate(m) for m in (3, 4, 5, 6)]
    assert rates.chances(LONGEST, 2).tolist() == [rates.rate(LONGEST)] * 2
    assert ((rates.chances(2, 40) > 0) & (rates.chances(2, 40) < 1)).all()


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "WINDOW", 64)
    rng = np.random.default_rng(0)
    follower = Follower(rng.integers(0, 9, 1000).tolist(), LookupRates())
    answer: list[int] = []
    for _ in range(40):
        answer += rng.integers(0, 50_000, 25).tolist()
        follower.read(answer)
        assert len(follower._tokens) <= 129 and len(follower._after) <= 129
    # What lies within the window is still found.
    follower.read([*answer, *answer[-20:-10]])
    assert follower.continuation(3) == answer[-10:-7]


def test_following_costs_little() -> None:
    rng = np.random.default_rng(0)
    prompt, answer = rng.integers(0, 9000, (2, 8192)).tolist()
    began = time.perf_counter()
    follower = Follower(prompt, LookupRates())
    for size in range(1, 2001):
        follower.read(answer[:size])
        follower.continuation(5)
    assert (time.perf_counter() - began) / 2000 < 200e-6  # 3 us on an idle core


# --- how much to verify ---------------------------------------------------------------------------------


@given(
    st.lists(st.floats(1e-3, 1.0), max_size=12).map(lambda v: sorted(v, reverse=True)),
    st.integers(1, 9),
    st.floats(0.0, 0.02),
    st.floats(0.8, 1.5),
)
def test_the_budget_is_the_best_one(
    gains: list[float], requests: int, each: float, factor: float
) -> None:
    cost = TableCost([1, 100], [0.05, 0.05 + 99 * each])
    found = lookup_budget(np.array(gains), requests, 0.03, cost, factor)
    sums = [0.0, *itertools.accumulate(gains)]
    # One that verifies nothing is a plain step, which is no verification.
    lasts = [(0.03 + n * each) * (factor if n else 1.0) for n in range(len(sums))]
    rates = [(requests + total) / last for total, last in zip(sums, lasts, strict=True)]
    assert found.rate == pytest.approx(max(rates))
    assert rates[found.tokens] == pytest.approx(max(rates))


def test_where_more_tokens_cost_nothing_all_are_verified() -> None:
    assert lookup_budget(np.full(7, 0.01), 3, 1.0, FlatCost()).tokens == 7


def test_without_copies_a_step_is_plain() -> None:
    found = lookup_budget(np.empty(0), 4, 0.02, TableCost([1, 2], [0.1, 0.2]))
    assert found == (0, pytest.approx(200.0))
