"""How deep to draft: learned from what schedulers would verify, apart for each workload."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_sglang.core.schedule.depth import DepthCaps

GAMMA = 5
ENOUGH = 32


def learned(steps: list[list[int]], *, name: str = "", caps: DepthCaps | None = None) -> DepthCaps:
    caps = caps or DepthCaps(gamma=GAMMA)
    for wanted in steps:
        caps.learn(name, np.array(wanted))
    return caps


@pytest.mark.parametrize("deepest", [0, 1, 3, 5])
def test_the_cap_is_the_deepest_position_in_use(deepest: int) -> None:
    caps = learned([[deepest, 0, min(1, deepest)]] * 100)
    assert caps.cap("") == max(1, deepest)  # something is drafted as long as anything is


def test_a_position_one_request_in_ten_uses_is_kept() -> None:
    rng = np.random.default_rng(0)
    caps = learned([[4 if rng.random() < 0.1 else 2 for _ in range(8)] for _ in range(500)])
    assert caps.cap("") == 4


def test_a_position_hardly_ever_used_is_cut() -> None:
    steps = [[4] if i % 1000 == 0 else [2] for i in range(900)]
    assert learned(steps).cap("") == 2


def test_nothing_is_cut_before_enough_was_seen() -> None:
    caps = learned([[1]] * (ENOUGH - 1))
    assert caps.cap("") == GAMMA
    assert learned([[1]], caps=caps).cap("") == 1
    assert DepthCaps(gamma=GAMMA).cap("never seen") == GAMMA


def test_a_workload_that_changes_is_followed_both_ways() -> None:
    caps = learned([[1]] * 200)
    assert caps.cap("") == 1
    learned([[5]], caps=caps)
    assert caps.cap("") == GAMMA  # one whole block that would be verified opens it up again
    learned([[1]] * 200, caps=caps)
    assert caps.cap("") == 1


def test_workloads_are_told_apart() -> None:
    caps = learned([[5]] * 64, name="code")
    learned([[2]] * 64, name="chat", caps=caps)
    assert caps.caps() == {"code": 5, "chat": 2}


def test_the_workload_unseen_for_longest_makes_room() -> None:
    caps = DepthCaps(gamma=GAMMA)
    for number in range(32):
        learned([[1]] * ENOUGH, name=f"w{number}", caps=caps)
    learned([[1]], name="w0", caps=caps)  # seen again
    learned([[1]] * ENOUGH, name="new", caps=caps)
    assert len(caps.caps()) == 32
    assert caps.cap("w1") == GAMMA and caps.cap("w0") == 1
    for number in range(500):
        learned([[3]], name=f"many{number}", caps=caps)
    assert len(caps.caps()) == 32


@given(steps=st.lists(st.lists(st.integers(0, GAMMA), min_size=1, max_size=6), max_size=80))
def test_a_cap_is_between_1_and_gamma(steps: list[list[int]]) -> None:
    assert 1 <= learned(steps).cap("") <= GAMMA
