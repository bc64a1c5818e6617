"""Intervals of ``dspark bench`` against a known law."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dspark_loadtests.estimate import _over_requests


@pytest.mark.parametrize("count", [100, 6400])
def test_intervals_have_the_width_of_the_law(count: int) -> None:
    values = np.random.default_rng(3).normal(50.0, 8.0, count)
    mean = _over_requests(values.tolist(), None, 0)
    median = _over_requests(values.tolist(), 0.5, 0)
    assert mean is not None and median is not None
    wanted = 2 * 1.96 * values.std() / math.sqrt(count)
    assert mean.high - mean.low == pytest.approx(wanted, rel=0.15)
    # the median of a normal law varies by sqrt(pi / 2) more
    assert median.high - median.low == pytest.approx(wanted * math.sqrt(math.pi / 2), rel=0.35)
