"""Scheduling learns by itself: on simulated servers where the best way of serving is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dspark_sglang.core.schedule.policy import Choice
from dspark_sglang.core.schedule.scheduler import Synchronous
from tests.schedule.scheduled_world import (
    GAMMA,
    Asked,
    World,
    drafting_share,
    mean_budget,
    speed,
    world,
)


def best_speed(made: World, steps: int = 400) -> float:
    """The fastest of never drafting, verifying everything, and scheduling the truth."""
    fixed: list[tuple[Choice, float | None]] = [("off", None), ("on", 1.0), ("on", None)]
    found = []
    for choice, share in fixed:
        scheduler = Synchronous(gamma=GAMMA)
        other = World(scheduler, made.requests, acceptance=made.acceptance, seed=9)
        other.draft, other.token, other.each = made.draft, made.token, made.each
        other.measure()
        scheduler.choose(choice)
        scheduler.fix_budget(share)
        other.run(50)
        found.append(speed(other.run(steps)))
    return max(found)


@pytest.mark.parametrize(
    ("requests", "acceptance", "drafts"),
    [(1, 0.8, True), (1, 0.2, False), (8, 0.8, True), (8, 0.3, False), (32, 0.8, False)],
)
def test_the_right_choice_is_found_and_costs_little(
    requests: int, acceptance: float, drafts: bool
) -> None:
    made = world(requests, acceptance=acceptance)
    made.run(300)
    steps = made.run(1500)
    share = drafting_share(steps)
    assert share > 0.97 if drafts else share < 0.05
    assert speed(steps) > 0.97 * best_speed(made)


def test_what_is_predicted_comes_true() -> None:
    made = world(8, acceptance=0.75)
    made.run(600)
    assert made.scheduler.cost.error is not None and made.scheduler.cost.error < 0.03
    tau = made.scheduler.snapshot()["tau_error"]
    assert tau is not None and tau < 0.05
    gain = speed(made.run(600)) * 0.014 / 8  # over 8 tokens in a plain step's 14 ms
    assert made.scheduler.policy.gain(8) == pytest.approx(gain, rel=0.06)


def test_less_is_verified_the_more_requests_there_are() -> None:
    budgets = []
    for requests in (1, 4, 8, 16):
        made = world(requests, acceptance=0.8)
        made.scheduler.choose("on")
        made.run(100)
        budgets.append(mean_budget(made.run(200)))
    assert all(more > fewer for more, fewer in itertools.pairwise(budgets))
    assert budgets[0] > 4.0 and budgets[-1] < 2.5


@pytest.mark.parametrize("overlapped", [False, True], ids=["synchronous", "overlapped"])
def test_a_sudden_change_of_workload_is_followed_both_ways(overlapped: bool) -> None:
    made = world(1, acceptance=0.8, overlapped=overlapped)
    made.run(500)
    for acceptance, drafts in ((0.2, False), (0.8, True)):
        made.acceptance = acceptance
        began = made.now
        made.run(260)
        assert made.now - began < 30.0  # seconds of the simulated server
        steps = made.run(600)
        assert (drafting_share(steps) > 0.9) == drafts
        assert speed(steps) > 0.95 * best_speed(made)


@pytest.mark.parametrize(("acceptance", "drafts"), [(0.2, False), (0.8, True)])
def test_confidences_stuck_at_1_are_seen_through(acceptance: float, drafts: bool) -> None:
    made = world(1, acceptance=acceptance)
    made.confidence = 1.0
    while made.now < 30.0:
        made.step()
    steps = made.run(800)
    assert (drafting_share(steps) > 0.9) == drafts
    assert speed(steps) > 0.95 * best_speed(made)


@pytest.mark.parametrize(
    ("acceptance", "share"), [(0.05, 0.97), (0.8, 0.95)], ids=["right", "wrong"]
)
def test_confidences_stuck_at_0_cost_little(acceptance: float, share: float) -> None:
    made = world(1, acceptance=acceptance)
    made.confidence = 0.0
    while made.now < 30.0:
        made.step()
    assert speed(made.run(1000)) > share * best_speed(made)


@pytest.mark.parametrize("past", [5000, 0], ids=["one-position-in-use", "all-in-use"])
def test_a_better_workload_is_noticed_whatever_the_last_one_used(past: int) -> None:
    """Drafting costs so much that only deep blocks pay."""
    made = world(4, acceptance=0.02)
    made.draft, made.token = 0.02, 0.0003
    made.scheduler.cost.forget()
    made.measure()
    made.run(past)
    made.acceptance = 0.95
    began = made.now
    while made.now - began < 30.0:
        made.step()
    assert speed(made.run(800)) > 0.95 * best_speed(made)


def test_a_depth_that_nothing_uses_is_no_longer_drafted() -> None:
    made = world(8, acceptance=0.6)
    made.token = 0.0004
    made.scheduler.cost.forget()
    made.measure()
    made.run(300)
    steps = made.run(600)
    depths = [step.plan.depth for step in steps if step.plan.drafts and not step.plan.verify_all]
    assert max(depths) < GAMMA
    assert (
        sum(step.plan.verify_all for step in steps) >= 3
    )  # blocks drafted in full show what changed
    made.acceptance = 0.95
    made.run(400)
    assert max(step.plan.depth for step in made.run(100)) == GAMMA


def test_workloads_have_depths_of_their_own() -> None:
    made = world(2, acceptance=0.9)
    made.requests = [Asked(workload="code"), Asked(workload="chat")]
    rng = np.random.default_rng(4)

    def confidence() -> np.ndarray:
        return np.stack([np.full(GAMMA, 0.97), np.full(GAMMA, 0.05)]) * rng.uniform(0.98, 1.0)

    made.scheduler.choose("on")
    for _ in range(100):
        made.step(confidence())
    caps = made.scheduler.snapshot()["depth_caps"]
    assert caps["code"] == GAMMA and caps["chat"] < GAMMA


@pytest.mark.parametrize("stall", [10.0, 1000.0])
def test_a_step_that_stalls_changes_little(stall: float) -> None:
    made = world(8, acceptance=0.8)
    made.run(500)
    usual = made.cost
    before = made.scheduler.cost.round_seconds(8, 24, 800, 8)
    made.cost = lambda *a, **k: stall * usual(*a, **k)  # type: ignore[method-assign]
    made.step()
    made.cost = usual  # type: ignore[method-assign]
    assert made.scheduler.cost.round_seconds(8, 24, 800, 8) == pytest.approx(before, rel=0.25)
    steps = made.run(600)
    assert drafting_share(steps) > 0.95


@pytest.mark.parametrize("seconds", [0.0, -3.0, math.nan, math.inf], ids=str)
def test_a_clock_that_jumps_changes_nothing(seconds: float) -> None:
    made = world(8, acceptance=0.8)
    made.run(300)
    before = made.scheduler.cost.state()
    made.cost = lambda *a, **k: seconds  # type: ignore[method-assign]
    made.step()
    assert made.scheduler.cost.state() == before


def test_a_neighbour_that_takes_half_the_machine_changes_no_choice() -> None:
    made = world(1, acceptance=0.8)
    made.run(300)
    usual = made.cost
    made.cost = lambda *a, **k: 2.0 * usual(*a, **k)  # type: ignore[method-assign]
    steps = made.run(600)
    assert drafting_share(steps) > 0.97
    assert made.scheduler.cost.slowdown == pytest.approx(2.0, rel=0.15)


@pytest.mark.parametrize(("choice", "share"), [("on", 1.0), ("off", 0.0)])
def test_an_operators_choice_holds(choice: str, share: float) -> None:
    made = world(4, acceptance=0.7)
    made.scheduler.choose(choice)  # type: ignore[arg-type]
    assert drafting_share(made.run(400)) == share


def test_who_opted_out_gets_one_token_a_step_from_the_others_rounds() -> None:
    made = world(3, acceptance=0.8)
    made.requests[1] = Asked(max_draft_tokens=0)
    made.scheduler.choose("on")
    steps = made.run(300)
    assert sum(int(step.lens[1]) for step in steps) == 0
    assert sum(int(step.lens[0]) for step in steps) > 300
