"""Counters of the worker: what a round adds, and what a reader sees."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dspark_sglang.core.schedule.scheduler import Synchronous
from dspark_sglang.serving.telemetry import StepObservers, Telemetry


def test_a_step_is_counted_by_position() -> None:
    telemetry = Telemetry(gamma=3)
    telemetry.observe_round(np.array([3, 1, 0]), np.array([1, 1, 0]), depth=3)
    seen = telemetry.snapshot()
    assert (seen["steps"], seen["rounds"]) == (1, 3)
    assert (seen["drafted_tokens"], seen["verified_tokens"]) == (9, 4)
    assert seen["committed_tokens"] == 5  # two kept and one of the target's own a request
    assert seen["position_sent"] == [2, 1, 1]
    assert seen["position_kept"] == [2, 0, 0]
    # Position 2 was reached by the first request only (it kept one); position 3 by none.
    assert seen["position_acceptance"] == [1.0, 0.0, 0.0]
    assert seen["accept_length"] == pytest.approx(5 / 3)
    assert seen["mean_verified"] == pytest.approx(4 / 3)


def test_a_step_that_drafts_less_counts_what_it_drafted() -> None:
    telemetry = Telemetry(gamma=3)
    telemetry.observe_round(np.array([2, 1]), np.array([2, 0]), depth=2)
    seen = telemetry.snapshot()
    assert (seen["drafted_tokens"], seen["verified_tokens"], seen["rounds"]) == (4, 3, 2)


def test_a_plain_step_is_not_a_round() -> None:
    telemetry = Telemetry(gamma=3)
    telemetry.observe_round(np.array([3, 3]), np.array([1, 0]), depth=3)
    before = telemetry.snapshot()
    telemetry.observe_later(torch.zeros((2, 5), dtype=torch.int64), depth=0)
    after = telemetry.snapshot()
    assert (after["steps"], after["plain_rounds"]) == (2, 5)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"steps", "plain_rounds"}


def test_tensors_count_like_arrays() -> None:
    by_tensor, by_array = Telemetry(gamma=2), Telemetry(gamma=2)
    by_tensor.observe_later(torch.tensor([[2, 1], [1, 0]]), depth=2)
    by_array.observe_round(np.array([2, 1]), np.array([1, 0]), depth=2)
    assert by_tensor.snapshot() == by_array.snapshot()


def test_time_is_added_even_when_the_block_raises() -> None:
    telemetry = Telemetry(gamma=1)
    with pytest.raises(KeyError), telemetry.timed("plan"):
        raise KeyError
    first = telemetry.seconds["plan"]
    with telemetry.timed("plan"):
        pass
    assert telemetry.seconds["plan"] > first > 0


def test_nothing_yet_and_cleared_are_the_same_and_json() -> None:
    telemetry = Telemetry(gamma=2)
    fresh = telemetry.snapshot()
    assert fresh["accept_length"] is None
    scheduler = Synchronous(gamma=2)
    telemetry.observe_round(np.array([2]), np.array([2]), depth=2)
    telemetry.ran["accept:torch-greedy"] += 1
    scheduler.expected_tokens, scheduler.committed_tokens, scheduler.plain_steps = 2.5, 3, 4
    StepObservers(telemetry, scheduler).clear_info_records()
    assert telemetry.snapshot() == fresh
    assert scheduler.snapshot() == Synchronous(gamma=2).snapshot()
    json.dumps(fresh)
