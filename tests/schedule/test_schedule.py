"""Survival, admission and budgets, against slow independent versions and the paper's example."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dspark_sglang.core.schedule import (
    History,
    admission_order,
    early_stop_budget,
    global_budget,
    lengths,
)
from dspark_sglang.core.schedule.admission import survival
from dspark_sglang.core.schedule.cost_model import CostModel, FlatCost, StepCost
from dspark_sglang.errors import NumericsError


class TableCost:
    """Seconds of a round by tokens in the verify forward: ``table[B]``."""

    def __init__(self, table: Sequence[float]) -> None:
        self._table = np.asarray(table, dtype=np.float64)

    def seconds(self, tokens: np.ndarray) -> np.ndarray:
        return self._table[tokens]


def staircase(tokens: int, *, step: int, base: float, rise: float) -> TableCost:
    """Graph buckets of ``step`` tokens: every forward pays for its whole bucket."""
    return TableCost([base + rise * -(-count // step) for count in range(tokens + 1)])


SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=8)
EDGES = [0.0, 1.0, 5e-324, 2.0**-1074, 1e-300, 0.5, np.nextafter(1.0, 0.0)]


def confidences(width: int) -> st.SearchStrategy[np.ndarray]:
    dtype = np.float32 if width == 32 else np.float64
    values = st.floats(0.0, 1.0, width=width) | st.sampled_from(EDGES).map(
        lambda value: float(dtype(value))
    )
    return hnp.arrays(dtype, SHAPES, elements=values)


#: Few distinct values, so that ties within and across requests are common.
TIED = hnp.arrays(np.float64, SHAPES, elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])).map(survival)


# --- survival ------------------------------------------------------------------------------


@given(confidence=confidences(64) | confidences(32))
def test_survival_never_rises_and_is_the_left_to_right_product(confidence: np.ndarray) -> None:
    result = survival(confidence)
    assert result.dtype == np.float64
    assert np.all(result[:, 1:] <= result[:, :-1])
    for row, products in zip(confidence.tolist(), result.tolist(), strict=True):
        running = 1.0
        for value, product in zip(row, products, strict=True):
            running *= value
            assert product == running


def test_survival_leaves_its_argument_alone() -> None:
    confidence = np.full((2, 3), 0.5)
    survival(confidence)
    assert np.all(confidence == 0.5)


@pytest.mark.parametrize("bad", [np.nan, -1e-9, 1.0 + 1e-9, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("where", [(0, 0), (1, 2)], ids=["first", "last"])
def test_survival_refuses_what_is_not_a_probability(bad: float, where: tuple[int, int]) -> None:
    confidence = np.full((2, 3), 0.5)
    confidence[where] = bad
    with pytest.raises(NumericsError) as caught:
        survival(confidence)
    assert str(bad) in caught.value.found
    assert caught.value.expected == "values in [0, 1]"
    assert "dspark verify" in caught.value.fix


# --- admission -----------------------------------------------------------------------------


@given(values=TIED)
def test_order_is_descending_survival_then_position_then_request(values: np.ndarray) -> None:
    requests, gamma = values.shape
    wanted = sorted(
        ((r, j) for r in range(requests) for j in range(gamma)),
        key=lambda candidate: (-values[candidate], candidate[1], candidate[0]),
    )
    assert admission_order(values).tolist() == [j * requests + r for r, j in wanted]


@pytest.mark.parametrize("kinds", [3, 400, 10**6], ids=["many-ties", "ties", "no-ties"])
def test_large_batches_keep_the_order_of_small_ones(kinds: int) -> None:
    rng = np.random.default_rng(kinds)
    values = survival(rng.integers(0, kinds, (301, 5)) / kinds)
    found = admission_order(values)
    assert len(found) >= 1024
    key = [(-values.T.reshape(-1)[i], i) for i in found.tolist()]
    assert key == sorted(key)


@given(values=confidences(64).map(survival))
def test_every_prefix_of_the_order_admits_prefixes(values: np.ndarray) -> None:
    requests, gamma = values.shape
    order = admission_order(values)
    assert sorted(order.tolist()) == list(range(requests * gamma))
    for budget in range(len(order) + 1):
        lens = lengths(order, budget, requests=requests)
        assert lens.sum() == budget
        admitted = {j * requests + r for r in range(requests) for j in range(lens[r])}
        assert admitted == set(order[:budget].tolist())


@pytest.mark.parametrize(("budget", "total"), [(-3, 0), (0, 0), (5, 5), (6, 6), (99, 6)])
def test_lengths_clip_the_budget(budget: int, total: int) -> None:
    order = admission_order(np.full((3, 2), 0.5))
    lens = lengths(order, budget, requests=3)
    assert lens.sum() == total
    assert lens.dtype == np.int64
    assert lens.min() >= 0 and lens.max() <= 2


# --- budgets -------------------------------------------------------------------------------


def algorithm_1(values: np.ndarray, table: Sequence[int]) -> int:
    """The paper's Algorithm 1, one candidate at a time, in exact arithmetic."""
    requests = values.shape[0]
    candidates = sorted((Fraction(value) for value in values.reshape(-1).tolist()), reverse=True)
    expected, admitted = Fraction(requests), 0
    best = expected / table[requests]
    for gain in candidates:
        throughput = (expected + gain) / table[requests + admitted + 1]
        if throughput <= best:
            break
        expected, admitted, best = expected + gain, admitted + 1, throughput
    return admitted


def exhaustive(values: np.ndarray, table: Sequence[int]) -> int:
    """The smallest budget of largest throughput, in exact arithmetic."""
    requests = values.shape[0]
    candidates = sorted((Fraction(value) for value in values.reshape(-1).tolist()), reverse=True)
    scores = [
        (requests + sum(candidates[:budget], Fraction(0))) / table[requests + budget]
        for budget in range(len(candidates) + 1)
    ]
    return scores.index(max(scores))


@st.composite
def priced(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    """Survivals in 64ths (exact in float64) and non-decreasing whole seconds for every B."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    steps = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 64)))
    values = np.minimum.accumulate(steps, axis=1) / 64.0
    size = shape[0] + values.size + 1
    rises = draw(st.lists(st.sampled_from([0, 0, 1, 2, 9, 40]), min_size=size, max_size=size))
    return values, [int(t) for t in draw(st.integers(1, 60)) + np.cumsum(rises)]


@given(case=priced())
def test_early_stop_is_algorithm_1(case: tuple[np.ndarray, list[int]]) -> None:
    values, table = case
    budget = early_stop_budget(values, admission_order(values), TableCost(table))
    assert budget == algorithm_1(values, table)


@given(case=priced())
def test_global_budget_is_the_argmax(case: tuple[np.ndarray, list[int]]) -> None:
    values, table = case
    assert global_budget(values, TableCost(table)) == exhaustive(values, table)


@given(case=priced(), ends=st.sets(st.integers(1, 26), min_size=1, max_size=6))
def test_early_stop_fills_the_bucket_it_stops_in(
    case: tuple[np.ndarray, list[int]], ends: set[int]
) -> None:
    values, table = case
    order, buckets = admission_order(values), np.array(sorted(ends), dtype=np.int64)
    stops = len(values) + algorithm_1(values, table)
    filled = min((end for end in ends if end >= stops), default=stops)
    budget = early_stop_budget(values, order, TableCost(table), buckets)
    assert budget == min(filled - len(values), values.size)


@given(
    confidence=hnp.arrays(np.float64, (3, 4), elements=st.floats(0.0, 1.0)),
    request=st.integers(0, 2),
    position=st.integers(0, 3),
    later=hnp.arrays(np.float64, 4, elements=st.floats(0.0, 1.0)),
    buckets=st.sampled_from([None, np.array([4, 8, 12]), np.array([5, 15])]),
)
def test_early_stop_never_looks_ahead(
    confidence: np.ndarray,
    request: int,
    position: int,
    later: np.ndarray,
    buckets: np.ndarray | None,
) -> None:
    """Confidences after a token (they depend on its value) cannot change its own admission."""

    def sent(values: np.ndarray) -> int:
        order = admission_order(values)
        cost = TableCost([1.0 + 0.2 * tokens for tokens in range(16)])
        budget = early_stop_budget(values, order, cost, buckets)
        return int(lengths(order, budget, requests=3)[request])

    changed = confidence.copy()
    changed[request, position + 1 :] = later[position + 1 :]
    before, after = sent(survival(confidence)), sent(survival(changed))
    assert min(before, position + 1) == min(after, position + 1)


def test_early_stop_cannot_cross_a_cliff_that_the_global_argmax_crosses() -> None:
    # 4 requests fill a bucket of 4; the next bucket holds 4 more at a quarter of the price.
    values = survival(np.full((4, 2), 0.95))
    cost = staircase(12, step=4, base=3.0, rise=1.0)
    assert early_stop_budget(values, admission_order(values), cost) == 0
    assert global_budget(values, cost) == 8


@pytest.mark.parametrize("step", [1, 3, 4, 8])
def test_a_paid_bucket_is_filled(step: int) -> None:
    values = survival(np.linspace(0.5, 0.95, 5)[:, None].repeat(5, axis=1))
    budget = global_budget(values, staircase(30, step=step, base=8.0, rise=1.0))
    assert budget > 0
    assert (5 + budget) % step == 0 or budget == values.size


def test_flat_cost_admits_everything() -> None:
    values = survival(np.full((5, 7), 0.3))
    assert early_stop_budget(values, admission_order(values), FlatCost()) == 35
    assert global_budget(values, FlatCost()) == 35


def test_hopeless_tokens_are_never_admitted() -> None:
    values = np.zeros((3, 4))
    costs: list[StepCost] = [FlatCost(), CostModel(gamma=4).curve(3, 0)]
    for cost in costs:
        assert early_stop_budget(values, admission_order(values), cost) == 0
        assert global_budget(values, cost) == 0


@pytest.mark.parametrize("shape", [(0, 7), (0, 1)], ids=["idle-g7", "idle-g1"])
def test_no_requests(shape: tuple[int, int]) -> None:
    values = survival(np.zeros(shape))
    order = admission_order(values)
    assert order.shape == (0,)
    assert early_stop_budget(values, order, FlatCost()) == 0
    assert global_budget(values, FlatCost()) == 0
    assert lengths(order, 3, requests=0).shape == (0,)


def test_gamma_one_admits_the_likely_requests() -> None:
    values = survival(np.array([[0.1], [0.9], [0.4]]))
    order = admission_order(values)
    assert order.tolist() == [1, 2, 0]
    assert lengths(order, 2, requests=3).tolist() == [0, 1, 1]


# --- buckets -------------------------------------------------------------------------------


@given(
    values=TIED,
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    seed=st.integers(0, 9),
)
def test_a_budget_is_priced_at_the_bucket_that_runs_and_fills_it(
    values: np.ndarray, steps: list[int], seed: int
) -> None:
    buckets = np.cumsum(steps)
    requests = len(values)
    most = requests + values.size
    table = np.sort(np.random.default_rng(seed).uniform(1, 3, max(most, buckets[-1]) + 1))

    def runs(tokens: int) -> int:
        return next((int(b) for b in buckets if b >= tokens), tokens)

    found = global_budget(values, TableCost(table), buckets)
    gains = sorted(values.reshape(-1).tolist(), reverse=True)
    theta = [(requests + sum(gains[:k])) / table[runs(requests + k)] for k in range(len(gains) + 1)]
    assert theta[found] >= max(theta) * (1 - 1e-12)
    # Whatever is admitted beyond comes with the same bucket.
    assert found == len(gains) or runs(requests + found + 1) > runs(requests + found)


def test_pricing_at_the_bucket_below_loses() -> None:
    """The builtin prices at the probe below and runs the bucket above."""
    values = survival(np.full((4, 3), 0.6))
    cost = staircase(16, step=4, base=3.0, rise=1.0)
    buckets = np.array([4, 8, 12, 16])
    budget = global_budget(values, cost, buckets)
    assert (4 + budget) in buckets


# --- history -------------------------------------------------------------------------------


def note(history: History, slots: list[int], values: list[Any], generation: int = 1) -> None:
    survivals = np.array(values, dtype=np.float64).reshape(len(slots), -1)
    history.note(np.array(slots), np.full(len(slots), generation), survivals)


def recall(history: History, slots: list[int], generation: int = 1) -> list[list[float]]:
    found: list[list[float]] = history.recall(
        np.array(slots), np.full(len(slots), generation)
    ).tolist()
    return found


def test_survivals_come_back_to_their_slots() -> None:
    history = History(slots=4, gamma=1)
    assert recall(history, [2, 0]) == [[1.0], [1.0]]  # nothing known: assume the best
    note(history, [2, 0], [0.1, 0.2])
    assert recall(history, [0, 2]) == [[0.2], [0.1]]
    note(history, [0], [0.7])
    assert recall(history, [2, 0]) == [[0.1], [0.7]]


def test_a_slot_with_a_new_owner_has_no_past() -> None:
    history = History(slots=2, gamma=1)
    for _ in range(4):
        note(history, [0, 1], [0.1, 0.5])
        recall(history, [0, 1])
    (found,) = recall(history, [0], generation=2)
    assert 0.1 < found[0] < 1.0  # the mean of those that had a past


def test_positions_that_were_not_drafted_keep_what_was_known() -> None:
    history = History(slots=2, gamma=3)
    note(history, [0, 1], [[0.9, 0.8, 0.7], [0.5, 0.4, 0.3]])
    note(history, [0, 1], [[0.6, 0.0, 0.0], [0.9, 0.0, 0.0]])
    # Never above the position before.
    assert recall(history, [0, 1]) == [[0.6, 0.6, 0.6], [0.9, 0.4, 0.3]]
    note(history, [0, 1], [[0.0, 0.0, 0.0], [0.9, 0.8, 0.0]])
    assert recall(history, [0, 1]) == [[0.6, 0.6, 0.6], [0.9, 0.8, 0.3]]


# --- the paper's counterexample (appendix A) --------------------------------------------------

TOKENS = ("A", "B")
TARGET = {"A": Fraction(7, 10), "B": Fraction(3, 10)}
DRAFT = {"A": Fraction(1, 2), "B": Fraction(1, 2)}
#: Confidence of the second token, which depends on the value of the first.
SECOND = {"A": 0.9, "B": 0.0}
#: Steps a second of 1, 2 and 3 tokens.
APPENDIX_COST = TableCost([np.inf, 1 / 1.0, 1 / 0.5, 1 / 0.45])


def chance_of_a(scheduler: str) -> Fraction:
    """P(the first committed token is A), over everything the drafter may draw."""
    total = Fraction(0)
    for first in TOKENS:
        values = survival(np.array([[0.8, SECOND[first]]]))
        order = admission_order(values)
        if scheduler == "early-stop":
            budget = early_stop_budget(values, order, APPENDIX_COST)
        else:
            budget = global_budget(values, APPENDIX_COST)
        if lengths(order, budget, requests=1)[0] == 0:
            total += DRAFT[first] * TARGET["A"]
            continue
        kept = min(Fraction(1), TARGET[first] / DRAFT[first])
        residual = {token: max(Fraction(0), TARGET[token] - DRAFT[token]) for token in TOKENS}
        corrected = residual["A"] / sum(residual.values())
        total += DRAFT[first] * (kept * (first == "A") + (1 - kept) * corrected)
    return total


def test_early_stop_preserves_the_target_law() -> None:
    assert chance_of_a("early-stop") == TARGET["A"]


def test_a_global_argmax_over_the_same_step_does_not() -> None:
    assert chance_of_a("retrospective") == Fraction(85, 100)
