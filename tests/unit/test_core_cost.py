"""The online step cost: what it learns, and what it must not be moved by."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_sglang.core.cost import FlatCost, OnlineCost, TableCost
from dspark_sglang.core.schedule import admission_order, early_stop_budget
from dspark_sglang.core.survival import survival
from dspark_sglang.errors import ConfigError

FIXED, SLOPE = 0.020, 0.0004
TOKENS = np.arange(1, 129)


def truth(tokens: np.ndarray | int) -> np.ndarray:
    return np.asarray(FIXED + SLOPE * np.asarray(tokens, dtype=np.float64))


def learn(cost: OnlineCost, rounds: int, *, seed: int, noise: float = 0.0) -> None:
    random = np.random.default_rng(seed)
    for _ in range(rounds):
        tokens = int(random.integers(1, 129))
        cost.observe(tokens, float(truth(tokens)) * (1 + noise * random.standard_normal()))


def error(cost: OnlineCost) -> float:
    return float(np.abs(cost.seconds(TOKENS) / truth(TOKENS) - 1).max())


@pytest.mark.parametrize("seed", range(10))
def test_an_affine_law_is_recovered_from_noisy_rounds(seed: int) -> None:
    cost = OnlineCost()
    learn(cost, 300, seed=seed, noise=0.03)
    assert error(cost) < 0.05
    assert cost.coefficients == pytest.approx((FIXED, SLOPE), rel=0.05)
    assert cost.observations == 300


def test_before_any_round_a_usable_prior_answers() -> None:
    cost = OnlineCost(prior_tokens=64.0)
    assert cost.coefficients is None
    assert cost.seconds(np.array([64, 128])).tolist() == [2.0, 3.0]


def test_the_first_round_sets_the_scale() -> None:
    cost = OnlineCost(prior_tokens=64.0)
    cost.observe(64, 0.5)
    assert cost.seconds(np.array([64]))[0] == pytest.approx(0.5)
    assert cost.coefficients == pytest.approx((0.25, 0.25 / 64))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("stall", [10.0, 1e6], ids=["10x", "1e6x"])
def test_one_stall_moves_predictions_a_little_and_is_forgotten(stall: float, seed: int) -> None:
    cost = OnlineCost()
    learn(cost, 300, seed=seed)
    cost.observe(40, float(truth(40)) * stall)
    assert error(cost) < 0.20
    learn(cost, 150, seed=seed + 100)
    assert error(cost) < 0.05


def test_without_clipping_the_same_stall_would_be_ruinous() -> None:
    cost = OnlineCost(outlier=float("inf"))
    learn(cost, 300, seed=0)
    cost.observe(40, float(truth(40)) * 1e6)
    assert error(cost) > 100


@pytest.mark.parametrize("tokens", [1, 6, 48, 384])
def test_a_constant_batch_keeps_its_own_prediction_right(tokens: int) -> None:
    cost, random = OnlineCost(), np.random.default_rng(1)
    for _ in range(3000):
        cost.observe(tokens, 0.03 * (1 + 0.02 * random.standard_normal()))
    assert cost.seconds(np.array([tokens]))[0] == pytest.approx(0.03, rel=0.02)
    # No wind-up: a neighbour seen afterwards does not throw the known point off.
    cost.observe(tokens + 1, 0.045)
    assert cost.seconds(np.array([tokens]))[0] == pytest.approx(0.03, rel=0.05)


def test_a_lasting_change_is_followed() -> None:
    cost, random = OnlineCost(), np.random.default_rng(2)
    learn(cost, 300, seed=2)
    for _ in range(400):
        tokens = int(random.integers(1, 129))
        cost.observe(tokens, 2 * float(truth(tokens)))
    assert error(cost) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("tokens", "seconds"),
    [(8, float("nan")), (8, float("inf")), (8, 0.0), (8, -1.0), (0, 0.03), (-4, 0.03)],
    ids=["nan", "inf", "zero", "negative", "no-tokens", "negative-tokens"],
)
def test_unusable_rounds_are_ignored(tokens: int, seconds: float) -> None:
    cost = OnlineCost()
    cost.observe(tokens, seconds)
    assert cost.coefficients is None and cost.observations == 0
    learn(cost, 20, seed=3)
    before = cost.coefficients
    cost.observe(tokens, seconds)
    assert cost.coefficients == before and cost.observations == 20


@given(
    rounds=st.lists(st.tuples(st.integers(1, 4096), st.floats(1e-5, 1e3)), min_size=0, max_size=40)
)
def test_seconds_are_positive_finite_and_never_fall(rounds: list[tuple[int, float]]) -> None:
    cost = OnlineCost()
    for tokens, seconds in rounds:
        cost.observe(tokens, seconds)
    predicted = cost.seconds(np.arange(1, 5000, 7))
    assert np.all(np.isfinite(predicted)) and np.all(predicted > 0)
    assert np.all(np.diff(predicted) >= 0)


def test_flat_cost_is_flat() -> None:
    assert FlatCost().seconds(np.array([1, 5, 900])).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_lasting_change_is_followed_at_a_constant_batch(factor: float) -> None:
    cost = OnlineCost()
    for _ in range(1000):
        cost.observe(6, 0.03)
    for _ in range(400):
        cost.observe(6, 0.03 * factor)
    assert cost.seconds(np.array([6]))[0] == pytest.approx(0.03 * factor, rel=0.1)


def test_a_slow_first_round_is_forgotten() -> None:
    """A server's first round warms caches up and may take a hundred times as long."""
    cost = OnlineCost()
    cost.observe(6, 3.0)
    for _ in range(600):
        cost.observe(6, 0.03)
    assert cost.seconds(np.array([6]))[0] == pytest.approx(0.03, rel=0.2)


# --- measured tables -----------------------------------------------------------------------


def test_a_table_is_met_at_its_points_and_straight_between_and_beyond() -> None:
    table = TableCost([1, 5, 9], [1.0, 2.0, 4.0])
    assert table.seconds(np.array([1, 3, 5, 7, 9, 13])).tolist() == [1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("tokens", "seconds", "says"),
    [
        ([1, 2], [1.0], "does not pair"),
        ([4], [1.0], "does not pair"),
        ([0, 2], [1.0, 1.0], "do not ascend"),
        ([2, 2], [1.0, 1.0], "do not ascend"),
        ([1, 2], [1.0, float("nan")], "positive and finite"),
        ([1, 2], [0.0, 1.0], "positive and finite"),
        ([1, 2, 3], [1.0, 2.0, 1.5], "faster at 3 tokens"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused(
    tokens: list[int], seconds: list[float], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        TableCost(tokens, seconds)


@given(rises=st.lists(st.floats(0, 5), min_size=1, max_size=30))
def test_a_smoothed_table_is_convex_and_nowhere_above(rises: list[float]) -> None:
    tokens = np.arange(1, len(rises) + 2)
    seconds = 1.0 + np.concatenate([[0.0], np.cumsum(rises)])
    table = TableCost(tokens, seconds)
    smooth = table.smoothed().seconds(tokens)
    assert np.all(smooth <= seconds + 1e-9)
    assert np.all(np.diff(smooth, n=2) >= -1e-9)
    assert smooth[0] == seconds[0]
    assert smooth[-1] == pytest.approx(seconds[-1])


def test_early_stop_crosses_a_cliff_once_it_is_smoothed() -> None:
    staircase = TableCost(range(1, 13), [4.0] * 4 + [5.0] * 4 + [6.0] * 4)
    values = survival(np.full((4, 2), 0.95))
    order = admission_order(values)
    assert early_stop_budget(values, order, staircase) == 0
    assert early_stop_budget(values, order, staircase.smoothed()) == 8
