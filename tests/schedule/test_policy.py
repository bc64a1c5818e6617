"""Whether to draft: against simulated servers on which the right answer is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_sglang.core.schedule.policy import HYSTERESIS, PROBE_ROUNDS, DraftPolicy

#: Plain steps between two probes, at most.
LONGEST_WAIT = 160


class Run(NamedTuple):
    """What a simulated server did."""

    drafted: list[bool]
    whole: int
    #: Throughput over what the better of always and never drafting would have had.
    efficiency: float


def serve(
    policy: DraftPolicy, gains: Iterable[float], *, requests: int = 8, round_seconds: float = 2.0
) -> Run:
    """Run steps; a plain one lasts a second, a round's throughput is its gain over plain's."""
    drafted, whole, tokens, seconds, best = [], 0, 0.0, 0.0, 0.0
    for gain in gains:
        decision = policy.decide(requests)
        drafted.append(decision.draft)
        whole += decision.verify_all
        spent = round_seconds if decision.draft else 1.0
        if decision.draft:
            policy.learn(requests, gain, round_seconds)
        tokens += spent * (gain if decision.draft else 1.0)
        seconds += spent
        best += spent * max(1.0, gain)
    return Run(drafted, whole, tokens / best)


def test_drafting_that_gains_is_kept() -> None:
    policy = DraftPolicy()
    run = serve(policy, [1.5] * 5000)
    assert sum(run.drafted) / 5000 > 0.98
    assert run.efficiency > 0.99
    assert policy.gain(8) == pytest.approx(1.5)
    assert policy.switches == 0


def test_the_gain_is_a_mean_of_throughputs_not_of_their_logarithms() -> None:
    policy = DraftPolicy()
    for number in range(400):
        policy.decide(1)
        policy.learn(1, 0.5 if number % 2 else 1.7)  # their logarithms' mean says a loss of 8%
    assert policy.drafting(1)
    assert policy.gain(1) == pytest.approx(1.1, rel=0.03)


def test_a_few_blocks_decide_nothing() -> None:
    policy = DraftPolicy()
    for _ in range(15):
        policy.learn(1, 0.7)
    assert policy.drafting(1)
    policy.learn(1, 0.7)
    assert not policy.drafting(1)


def test_drafting_that_loses_is_stopped_at_once() -> None:
    policy = DraftPolicy()
    run = serve(policy, [0.7] * 200)
    assert run.drafted[:PROBE_ROUNDS] == [True] * PROBE_ROUNDS
    assert not any(run.drafted[PROBE_ROUNDS : PROBE_ROUNDS + 10])
    assert not policy.drafting(8) and policy.switches == 1


def waits(policy: DraftPolicy, requests: int, gain: float, steps: int) -> list[int]:
    """Plain steps before each probe of a load where drafting brings ``gain``."""
    found, plain = [], 0
    for _ in range(steps):
        if policy.decide(requests).draft:
            policy.learn(requests, gain)
            found += [plain] if plain else []
            plain = 0
        else:
            plain += 1
    return found


def test_what_few_rounds_have_decided_is_looked_at_again_soon_and_then_rarely() -> None:
    policy = DraftPolicy()
    for _ in range(PROBE_ROUNDS):
        policy.learn(8, 0.9)
    assert not policy.drafting(8)
    found = waits(policy, 8, 0.9, 2000)
    assert found[:3] == sorted(found[:3]) and found[0] <= 12 and found[1] <= 24
    assert min(found[4:]) >= 50


def test_a_load_not_seen_before_does_not_stay_with_what_another_taught() -> None:
    policy = DraftPolicy()
    for _ in range(200):
        policy.learn(4, 0.9)
    assert not policy.drafting(8)
    assert waits(policy, 8, 1.3, 60)[0] <= 12
    assert policy.drafting(8) and not policy.drafting(4)


def test_much_evidence_is_not_looked_at_again_soon() -> None:
    policy = DraftPolicy()
    for _ in range(200):
        policy.learn(8, 1.1)
    for _ in range(200):
        policy.learn(8, 0.9)
    assert not policy.drafting(8) and waits(policy, 8, 0.9, 400)[0] >= 24


@pytest.mark.parametrize(("gain", "longer"), [(0.97, 1.5), (0.9, 1.5), (0.8, 2.0), (0.6, 2.0)])
def test_probes_cost_little(gain: float, longer: float) -> None:
    """Against never drafting, with rounds that last ``longer`` than plain steps."""
    run = serve(DraftPolicy(), [gain] * 20_000, round_seconds=longer)
    assert run.efficiency > 0.985
    assert sum(run.drafted) > 2 * PROBE_ROUNDS  # it does look


@pytest.mark.parametrize(("gain", "longer"), [(0.5, 3.0), (0.4, 6.0)])
def test_probes_of_long_rounds_cost_little_too(gain: float, longer: float) -> None:
    assert serve(DraftPolicy(), [gain] * 20_000, round_seconds=longer).efficiency > 0.98


def probes(policy: DraftPolicy, requests: int, lost: float) -> list[int]:
    """Rounds of each probe of a server that does not draft, and plain steps between them."""
    drafted = []
    for _ in range(4000):
        drafted.append(policy.decide(requests).draft)
        if drafted[-1]:
            policy.learn(requests, 0.8, 1.5, lost)
    runs = [sum(1 for _ in run) for _, run in itertools.groupby(drafted[200:])]
    return sorted(runs[1:-1])


@pytest.mark.parametrize(("requests", "rounds"), [(1, 3), (4, 3), (8, 2), (16, 1), (64, 1)])
def test_many_requests_are_looked_at_in_fewer_rounds(requests: int, rounds: int) -> None:
    found = probes(DraftPolicy(), requests, 0.5)
    assert found[: len(found) // 2] == [rounds] * (len(found) // 2)


def test_the_more_a_probe_loses_the_rarer_it_is() -> None:
    waits = [probes(DraftPolicy(), 16, lost)[-1] for lost in (-0.5, 0.3, 0.7, 3.0, 30.0)]
    assert waits == sorted(waits)
    assert waits[0] < 30 and waits[1] == 59 and waits[3] == 199 and waits[4] == 959


@pytest.mark.parametrize("gain", [1.05, 1.4])
def test_a_workload_that_begins_to_gain_is_noticed(gain: float) -> None:
    policy = DraftPolicy()
    serve(policy, [0.5] * 3000)
    assert not policy.drafting(8)
    run = serve(policy, [gain] * 600)
    first = next(i for i in range(600) if all(run.drafted[i : i + 20]))
    # One wait and the probe itself, more where the gain is small.
    assert first <= (LONGEST_WAIT + PROBE_ROUNDS) * (1 if gain > 1.3 else 3)


@pytest.mark.parametrize("gain", [0.9, 0.5])
def test_a_workload_that_begins_to_lose_is_noticed(gain: float) -> None:
    policy = DraftPolicy()
    serve(policy, [1.6] * 3000)
    run = serve(policy, [gain] * 200)
    assert not policy.drafting(8)
    assert sum(run.drafted[60:]) <= 2 * PROBE_ROUNDS


@pytest.mark.parametrize("started", [1.5, 0.6], ids=["drafting", "plain"])
def test_around_nothing_to_gain_nothing_changes(started: float) -> None:
    """Hysteresis: gains that wander about 1 must not flip the choice back and forth."""
    policy = DraftPolicy()
    serve(policy, [started] * 500)
    switches, drafting = policy.switches, policy.drafting(8)
    serve(policy, [1.0 + 0.6 * HYSTERESIS * (-1) ** i for i in range(5000)])
    assert policy.switches == switches and policy.drafting(8) == drafting


def test_who_drafts_looks_at_plain_steps_and_at_whole_blocks_now_and_then() -> None:
    run = serve(DraftPolicy(), [1.5] * 2560)
    plain = [i for i, drafted in enumerate(run.drafted) if not drafted]
    assert 10 * PROBE_ROUNDS <= len(plain) <= 15 * PROBE_ROUNDS
    assert plain[0] < 20  # soon after drafting starts, then ever more seldom
    looks = plain[::PROBE_ROUNDS]
    assert np.diff(looks).tolist() == sorted(np.diff(looks).tolist())
    assert looks[-1] - looks[-2] > 250
    # They come together: the cost model learns most right after a change of kind.
    assert plain[1:3] == [plain[0] + 1, plain[0] + 2]
    assert 2560 // 96 - 2 <= run.whole <= 2560 // 96 + 2


def test_near_break_even_plain_steps_are_looked_at_more_often() -> None:
    """A gain of 5% may be a wrong one; looking costs next to nothing then."""
    run = serve(DraftPolicy(), [1.05] * 2560)
    plain = [i for i, drafted in enumerate(run.drafted) if not drafted]
    assert 60 < plain[-1] - plain[-1 - PROBE_ROUNDS] < 75
    assert run.efficiency > 0.995


def test_probes_begin_with_a_block_verified_whole() -> None:
    """What the last workload taught about depth and confidences may be over."""
    run = serve(DraftPolicy(), [0.5] * 3000)
    probes = sum(a and not b for b, a in pairwise(run.drafted))
    assert run.whole == probes > 2


@pytest.mark.parametrize(("choice", "drafts"), [("on", True), ("off", False)])
def test_an_operator_is_obeyed_whatever_was_learned(choice: str, drafts: bool) -> None:
    policy = DraftPolicy()
    serve(policy, [0.5 if drafts else 2.0] * 500)
    policy.choice = choice  # type: ignore[assignment]
    assert policy.drafting(8) == drafts
    run = serve(policy, [0.5 if drafts else 2.0] * 1000)
    assert run.drafted == [drafts] * 1000 and run.whole == 0
    policy.choice = "auto"
    assert policy.drafting(8) != drafts  # what was learned is still known


def test_loads_are_told_apart() -> None:
    policy = DraftPolicy()
    for _ in range(40):
        serve(policy, [1.8] * 50, requests=1)
        serve(policy, [0.6] * 50, requests=32)
    assert policy.drafting(1) and not policy.drafting(32)
    assert not policy.drafting(33)  # from 32 to 63 requests
    assert policy.gain(1) == pytest.approx(1.8) and policy.gain(32) == pytest.approx(0.6, rel=0.05)


def test_a_new_load_starts_from_the_nearest_known_one() -> None:
    policy = DraftPolicy()
    serve(policy, [1.8] * 500, requests=1)
    serve(policy, [0.5] * 500, requests=64)
    assert policy.drafting(2) and policy.gain(2) == pytest.approx(1.8)
    assert not policy.drafting(32) and policy.gain(32) == pytest.approx(0.5, rel=0.05)
    # To be confirmed quickly: the first gains of its own count for all there is.
    serve(policy, [1.5] * (LONGEST_WAIT + 2 * PROBE_ROUNDS), requests=32)
    assert policy.drafting(32)


def test_sampled_requests_do_not_inherit_for_long_what_greedy_ones_gained() -> None:
    policy = DraftPolicy()
    for _ in range(300):
        policy.learn(8, 1.6)
    assert policy.drafting(8, sampled=True)  # from the nearest load, until there is one of its own
    for _ in range(PROBE_ROUNDS):
        policy.learn(8, 0.9, sampled=True)
    assert not policy.drafting(8, sampled=True) and policy.drafting(8)
    assert policy.gain(8) == pytest.approx(1.6)
    # Other sampled requests are nearer than as many greedy ones.
    assert not policy.drafting(2, sampled=True)


@pytest.mark.parametrize("gain", [math.nan, math.inf, -math.inf, 0.0, -2.0], ids=str)
def test_gains_that_cannot_be_are_ignored(gain: float) -> None:
    policy, same = DraftPolicy(), DraftPolicy()
    serve(policy, [1.3] * 100)
    serve(same, [1.3] * 100)
    for _ in range(50):
        policy.learn(8, gain)
    assert policy.gain(8) == same.gain(8)
    assert serve(policy, [1.3] * 300) == serve(same, [1.3] * 300)


@given(gains=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=400))
def test_any_gains_give_decisions_and_bounded_waits(gains: list[float]) -> None:
    policy = DraftPolicy()
    serve(policy, gains)
    assert 0.0 < policy.gain(8) < math.inf
    # However bad it was, drafting is tried again within the longest wait.
    assert any(policy.decide(8).draft for _ in range(LONGEST_WAIT + PROBE_ROUNDS))


def test_memory_is_two_states_for_each_power_of_two() -> None:
    policy = DraftPolicy()
    for requests in range(1, 1025):
        policy.decide(requests)
        policy.decide(requests, sampled=True)
    assert len(policy._states) == 22
