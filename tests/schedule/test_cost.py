"""Step costs given as tables: what they refuse, and what early stopping sees of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_sglang.core.schedule import admission_order, early_stop_budget
from dspark_sglang.core.schedule.admission import survival
from dspark_sglang.core.schedule.cost_model import FlatCost, TableCost
from dspark_sglang.errors import ConfigError


def test_flat_cost_is_flat() -> None:
    assert FlatCost().seconds(np.array([1, 5, 900])).tolist() == [1.0, 1.0, 1.0]


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
