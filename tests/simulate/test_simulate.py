"""The simulator against what can be computed by hand, and its scheduler against the server's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_sglang.core.schedule import lengths
from dspark_sglang.core.schedule.cost_model import CostModel, Step
from dspark_sglang.core.schedule.scheduler import Scheduler
from dspark_sglang.errors import ConfigError
from dspark_sglang.simulate.acceptance import Law, Mixture, fitted
from dspark_sglang.simulate.arrivals import Lengths, Requests, poisson, waiting
from dspark_sglang.simulate.costs import Measured, Overheads, StepTimes, learned
from dspark_sglang.simulate.engine import Mode, Replica, Result, Setting
from dspark_sglang.simulate.replicas import Job, run, spread
from dspark_sglang.simulate.summary import Sla, summarise
from tests.simulate.simulated_times import Fixed

GAMMA = 3
ONE = np.ones(1)


def block_law(chance: float = 0.6, *, gamma: int = GAMMA) -> Mixture:
    values = np.full((64, gamma), chance)
    return Mixture([Law("all", values, values)])


def asked(at: Any, *, output: Any, prompt: int = 10) -> Requests:
    at = np.asarray(at, dtype=np.float64)
    size = len(at)
    zeros = np.zeros(size, dtype=np.int64)
    return Requests(at, zeros + prompt, zeros + prompt, zeros + np.asarray(output), zeros)


def served(
    requests: Requests, times: StepTimes, blocks: Mixture | None = None, **given: Any
) -> Result:
    return Replica(Setting(**given), requests, times=times, blocks=blocks).run()


def machine(*, gamma: int = GAMMA) -> CostModel:
    """A machine on which a round costs more the more it verifies."""

    class Times(Fixed):
        def plain(self, requests: int, context: int, sampled: int) -> float:
            return 0.010 + 0.0005 * requests

        def round(self, requests: int, drafted: int, context: int, sampled: int) -> float:
            return self.plain(requests, context, sampled) + 0.003 + 0.0006 * drafted

    return learned(Times(gamma=gamma, step=1.0), requests=64, context=64)


# --- closed forms ------------------------------------------------------------------------------


def test_a_lone_request_without_drafting_takes_a_step_a_token() -> None:
    result = served(asked([2.0], output=101), Fixed(gamma=1, step=0.05, prefill=0.3), mode="none")
    one = summarise([result], load=1)
    assert one.ttft_ms is not None and one.tpot_ms is not None
    assert one.ttft_ms[0] == pytest.approx(300)
    assert one.tpot_ms[0] == pytest.approx(50)


@pytest.mark.parametrize("chance", [0.0, 0.35, 0.8, 1.0])
def test_a_lone_request_takes_a_round_over_the_accepted_length_a_token(chance: float) -> None:
    blocks, tokens = block_law(chance), 20_001
    result = served(asked([0.0], output=tokens), Fixed(gamma=GAMMA, step=0.1), blocks, mode="fixed")
    one = summarise([result], load=1)
    length = sum(chance**k for k in range(GAMMA + 1))
    assert one.tpot_ms is not None
    assert one.tpot_ms[0] == pytest.approx(100 / length, rel=0.02)
    assert one.accept_length == pytest.approx(length, rel=0.02)
    assert one.budget == GAMMA


@pytest.mark.parametrize(
    ("load", "count"), [(0.3, 15_000), (0.6, 15_000), pytest.param(0.85, 60_000, marks=pytest.mark.slow)]
)  # fmt: skip
def test_the_queue_of_one_server_is_pollaczek_and_khinchines(load: float, count: int) -> None:
    """M/D/1: one slot, service of one length D; mean wait D * load / (2 * (1 - load))."""
    tokens, step = 4, 0.25
    requests = poisson(
        load / (tokens * step), count, Lengths(prompt=8, output=tokens + 1), weights=ONE,
        rng=np.random.default_rng(1),
    )  # fmt: skip
    result = served(requests, Fixed(gamma=1, step=step), mode="none", slots=1)
    wait = float((result.first - result.came).mean())
    assert wait == pytest.approx(tokens * step * load / (2 * (1 - load)), rel=0.05)


def test_a_full_server_makes_a_token_a_request_and_step() -> None:
    requests = asked(np.zeros(400), output=50)
    result = served(
        requests, Fixed(gamma=1, step=0.2), mode="none", slots=16, users=16, warm=5.0, until=100.0
    )
    assert summarise([result], load=16, warm=5.0).tok_s == pytest.approx(16 / 0.2, rel=0.03)


def test_prompts_are_computed_before_anything_decodes() -> None:
    """A second request's prefill is a gap in the first one's answer."""
    times = Fixed(gamma=1, step=0.1, prefill=1.0)
    result = served(asked([0.0, 1.05], output=11), times, mode="none")
    assert result.ended.tolist() == pytest.approx([3.0, 3.1])
    assert result.first.tolist() == pytest.approx([1.0, 2.1])


def test_long_prompts_take_several_steps() -> None:
    times = Fixed(gamma=1, step=0.1, prefill=1.0)
    result = served(asked([0.0], output=1, prompt=1000), times, mode="none", chunk=300)
    assert result.first.tolist() == [4.0]


def test_a_pool_that_is_full_makes_requests_wait() -> None:
    times, requests = Fixed(gamma=1, step=1.0), asked([0.0, 0.0], output=6)
    apart = served(requests, times, mode="none", pool=20)
    together = served(requests, times, mode="none", pool=32)
    assert apart.ended.tolist() == [5.0, 10.0]
    assert together.ended.tolist() == [5.0, 5.0]


# --- what never changes ------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    mode=st.sampled_from(["none", "fixed", "adaptive", "lagged"]),
    outputs=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    gaps=st.lists(st.floats(0.0, 0.4), min_size=30, max_size=30),
    slots=st.integers(1, 8),
    prefill=st.booleans(),
    closed=st.booleans(),
    seed=st.integers(0, 5),
)
def test_nothing_is_lost(
    mode: Mode,
    outputs: list[int],
    gaps: list[float],
    slots: int,
    prefill: bool,
    closed: bool,
    seed: int,
) -> None:
    requests = asked(np.cumsum(gaps[: len(outputs)]), output=outputs)
    times = Fixed(gamma=GAMMA, step=0.02, round_=0.03, prefill=0.05)
    result = served(
        requests, times, block_law(), mode=mode, slots=slots, prefill=prefill, seed=seed,
        users=slots if closed else None,
    )  # fmt: skip
    assert sorted(result.number.tolist()) == list(range(len(outputs)))
    assert result.counts.tokens == sum(outputs)
    assert result.left == 0 and result.arrived == len(outputs)
    assert (result.first >= result.came).all() and (result.ended >= result.first).all()
    assert all(a <= b for a, b in pairwise(result.ended.tolist()))


def test_the_same_seed_gives_the_same_run_and_another_one_does_not() -> None:
    def once(seed: int) -> list[float]:
        model = machine()
        times = Measured(model, Overheads())
        setting = Setting(mode="adaptive", slots=8, seed=seed, noise=0.05)
        requests = asked(np.linspace(0, 1, 20), output=30)
        return (
            Replica(setting, requests, times=times, blocks=block_law(), cost=model)
            .run()
            .ended.tolist()
        )

    assert once(3) == once(3)
    assert once(3) != once(4)


def test_an_interrupt_keeps_what_happened() -> None:
    def stop(answered: int, now: float) -> None:
        raise KeyboardInterrupt

    replica = Replica(
        Setting(mode="none", slots=4),
        asked(np.zeros(4000), output=20),
        times=Fixed(gamma=1, step=0.1),
    )
    result = replica.run(stop)
    assert result.interrupted and 0 < len(result.number) < 4000
    assert len(result.number) + result.left == result.arrived
    assert summarise([result], load=1).interrupted


# --- the scheduler is the server's ---------------------------------------------------------------


class Recorded:
    """Notes what a scheduler is asked and what it answers."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.calls: list[tuple[str, Any, Any]] = []
        for verb in ("plan", "admit", "observe"):
            setattr(scheduler, verb, self._noted(verb, getattr(scheduler, verb)))

    def _noted(self, verb: str, original: Any) -> Any:
        def noted(*given: Any) -> Any:
            found = original(*given)
            self.calls.append((verb, given, found))
            return found

        return noted


@pytest.mark.parametrize("mode", ["adaptive", "lagged", "fixed"])
def test_a_run_asks_as_a_server_does(mode: Mode) -> None:
    """Plan, admit and observe, once a step each; a fresh scheduler that is asked the same answers the same."""
    model = machine()
    laws = [fitted("a", [0.8, 0.7, 0.5]), fitted("b", [0.4, 0.3, 0.2])]
    mix, rng = Mixture(laws), np.random.default_rng(0)
    requests = poisson(20.0, 200, Lengths(prompt=30, output=40), weights=mix.weights, rng=rng)
    replica = Replica(
        Setting(mode=mode, slots=24),
        requests,
        times=Measured(model, Overheads()),
        blocks=mix,
        cost=model,
    )
    assert replica.scheduler is not None
    kind = type(replica.scheduler)
    recorded = Recorded(replica.scheduler)
    replica.run()
    verbs = [verb for verb, _, _ in recorded.calls]
    assert verbs == ["plan", "admit", "observe"] * (len(verbs) // 3) and len(verbs) > 600
    fresh = kind(gamma=GAMMA)
    fresh.cost.restore(machine().state())
    for verb, put, found in recorded.calls:
        again = getattr(fresh, verb)(*put)
        if verb == "plan":
            assert (again.depth, again.budget) == (found.depth, found.budget)
            assert again.limits.tolist() == found.limits.tolist()
        elif verb == "admit":
            assert again.budget == found.budget
            assert (again.order == found.order).all() and (again.survival == found.survival).all()
    assert fresh.snapshot() == replica.scheduler.snapshot()


def test_verified_tokens_are_those_that_were_admitted() -> None:
    """The engine verifies the scheduler's budget, best first, and nothing else."""
    model, seen = machine(), []
    replica = Replica(
        Setting(mode="adaptive", speculation="on", slots=8), asked(np.zeros(8), output=60),
        times=Measured(model, Overheads()), blocks=Mixture([fitted("a", [0.7, 0.6, 0.5])]), cost=model,
    )  # fmt: skip
    assert replica.scheduler is not None
    recorded = Recorded(replica.scheduler)
    replica.run()
    given = None
    for verb, asked_for, found in recorded.calls:
        if verb == "admit":
            given = found
        elif verb == "observe":
            assert given is not None
            result = asked_for[0]()
            wanted = lengths(given.order, given.budget, requests=len(result.lens))
            assert result.lens.tolist() == wanted.tolist()
            assert (result.counts <= result.lens).all()
            seen.append(int(result.lens.sum()))
    assert len(set(seen)) > 2


def test_the_scheduler_turns_drafting_off_where_it_loses() -> None:
    model = learned(Fixed(gamma=GAMMA, step=0.01, round_=0.05), requests=8, context=32)
    times = Fixed(gamma=GAMMA, step=0.01, round_=0.05)
    result = Replica(
        Setting(mode="adaptive", slots=8), asked(np.zeros(8), output=4000), times=times,
        blocks=block_law(0.5), cost=model,
    ).run()  # fmt: skip
    one = summarise([result], load=8)
    assert one.drafting < 0.1
    assert one.tok_s > 0.9 * 8 / 0.01


# --- replicas ------------------------------------------------------------------------------------


def test_a_random_router_splits_poisson_into_poisson() -> None:
    """Gaps of each part are exponential with the part's share of the rate: mean and spread alike."""
    rng = np.random.default_rng(5)
    requests = poisson(80.0, 40_000, Lengths(prompt=8, output=8), weights=ONE, rng=rng)
    parts = spread(requests, 4, "random", speed=1.0, rng=rng)
    assert sum(len(part.at) for part in parts) == 40_000
    for part in parts:
        gaps = np.diff(part.at)
        assert gaps.mean() == pytest.approx(4 / 80.0, rel=0.04)
        assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)


def test_replicas_behind_a_random_router_wait_as_one_server_at_its_share() -> None:
    rng, step, tokens, load = np.random.default_rng(2), 0.1, 5, 0.7
    rate = 3 * load / (tokens * step)
    requests = poisson(rate, 30_000, Lengths(prompt=8, output=tokens + 1), weights=ONE, rng=rng)
    jobs = [
        Job(Setting(mode="none", slots=1), part, Fixed(gamma=1, step=step), None, None)
        for part in spread(requests, 3, "random", speed=1.0, rng=rng)
    ]
    results = run(jobs)
    wait = np.concatenate([r.first - r.came for r in results]).mean()
    assert wait == pytest.approx(tokens * step * load / (2 * (1 - load)), rel=0.07)


def test_weighing_work_makes_requests_wait_less_than_dealing_blindly() -> None:
    rng = np.random.default_rng(3)
    lengths_ = Lengths(prompt=8, output=20, variation=1.5)
    requests = poisson(2.2, 4000, lengths_, weights=ONE, rng=rng)
    waits = {}
    for router in ("random", "round-robin", "least-work"):
        parts = spread(requests, 5, router, speed=10.0, rng=rng)
        jobs = [
            Job(Setting(mode="none", slots=1), p, Fixed(gamma=1, step=0.1), None, None)
            for p in parts
        ]
        waits[router] = float(np.concatenate([r.first - r.came for r in run(jobs)]).mean())
    assert waits["least-work"] < waits["round-robin"] < waits["random"]


@pytest.mark.timeout(300)
def test_processes_find_what_one_process_finds() -> None:
    model, mix = machine(), Mixture([fitted("a", [0.7, 0.6, 0.5])])
    rng = np.random.default_rng(4)
    requests = poisson(50.0, 400, Lengths(prompt=8, output=20), weights=mix.weights, rng=rng)
    jobs = [
        Job(
            Setting(mode="adaptive", slots=8, seed=n),
            part,
            Measured(model, Overheads()),
            mix,
            model,
        )
        for n, part in enumerate(spread(requests, 2, "round-robin", speed=1.0, rng=rng))
    ]
    told: list[int] = []
    for here, there in zip(run(jobs), run(jobs, workers=2, progress=told.append), strict=True):
        assert here.ended.tolist() == there.ended.tolist()
        assert here.counts == there.counts
    assert told


# --- settings that no server has -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"slots": 0}, "slots is 0"),
        ({"noise": -1.0}, "noise is -1"),
        ({"users": 0}, "users is 0"),
        ({"users": 1, "until": 1.0, "warm": 2.0}, "before counting begins"),
        ({"pool": 11}, "needs 12 tokens"),
        ({"mode": "adaptive"}, "no tokens"),
    ],
)
def test_impossible_settings(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        served(asked([0.0], output=2), Fixed(gamma=1, step=1.0), **{"mode": "none", **given})


def test_an_sla_that_no_load_meets_is_refused_with_the_fastest() -> None:
    times = Fixed(gamma=3, step=0.010, round_=0.020)
    drafting = {"context": 1, "drafts": True, "sampled": True}
    Sla(tpot_ms=5.1).check(times, **drafting)
    with pytest.raises(ConfigError, match="a lone request takes 5 ms"):
        Sla(tpot_ms=4.9).check(times, **drafting)
    with pytest.raises(ConfigError, match="a lone request takes 10 ms"):
        Sla(tpot_ms=9.0).check(times, context=1, drafts=False, sampled=True)
    with pytest.raises(ConfigError, match="above 0"):
        Sla(ttft_ms=-3.0).check(times, **drafting)


def test_the_share_within_an_sla_is_counted_over_requests() -> None:
    result = served(
        asked([0.0, 0.0, 5.0], output=3), Fixed(gamma=1, step=1.0), mode="none", slots=1
    )
    one = summarise([result], load=1, sla=Sla(ttft_ms=1000.0))
    assert one.sla_share == pytest.approx(2 / 3)


def test_what_a_scheduler_learns_of_a_machine_is_what_it_costs() -> None:
    model = machine()
    for count in (1, 4, 24, 64):
        for depth in range(GAMMA + 1):
            true = 0.013 + 0.0005 * count + 0.0006 * count * depth
            assert model.round_seconds(count, count * depth, 64 * count, count) == pytest.approx(
                true, rel=0.05
            )
    step = Step(8, 0, 512, round=False, sampled=8)
    assert model.plain_seconds(step.requests, step.context, 8) == pytest.approx(0.014, rel=0.05)


def test_requests_that_wait_are_all_there_at_once() -> None:
    made = waiting(
        5, Lengths(prompt=100, output=7, cached=0.75), weights=ONE, rng=np.random.default_rng(0)
    )
    assert made.at.tolist() == [0.0] * 5
    assert made.fresh.tolist() == [25] * 5 and made.output.tolist() == [7] * 5
