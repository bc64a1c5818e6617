"""What a step of the server does: limits, budgets, plans, and what must not look ahead."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dspark_sglang.core.round import Admission, Drafted, StepResult
from dspark_sglang.core.schedule import lengths
from dspark_sglang.core.schedule.cost_model import Step
from dspark_sglang.core.schedule.scheduler import Scheduler, Synchronous, VerifyAll
from tests.schedule.scheduled_world import GAMMA, Asked, World, admitted, load, over, world
from tests.schedule.test_schedule import DRAFT, SECOND, TARGET, TOKENS


def measured(
    kind: type[Scheduler] = Synchronous, *, gamma: int = GAMMA, token: float = 0.0006
) -> Scheduler:
    """Knows both kinds of step of a machine; nothing else was learned."""
    scheduler = kind(gamma=gamma)
    for requests in (1, 2, 4, 8, 16, 32, 64):
        for depth in range(gamma + 1):
            drafted, decode = requests * depth, 0.010 + 0.0005 * requests
            scheduler.cost.observe(Step(requests, drafted, 0, round=True, sampled=requests),
                                   decode + 0.004 + token * drafted)  # fmt: skip
            scheduler.cost.observe(Step(requests, 0, 0, round=False, sampled=requests), decode)
    return scheduler


def answered(scheduler: Scheduler, requests: list[Asked], confidence: np.ndarray) -> Admission:
    """What is verified of the next step, with these confidences."""
    return admitted(scheduler, scheduler.plan(load(requests)), confidence)


# --- limits ----------------------------------------------------------------------------------------

LIMITS = [0, 1, 3, GAMMA, GAMMA + 9, None, 2, 0]
ALLOWED = np.array([0, 1, 3, GAMMA, GAMMA, GAMMA, 2, 0])


def limited(*, profile: bool = False) -> list[Asked]:
    found = [Asked() if limit is None else Asked(max_draft_tokens=limit) for limit in LIMITS]
    if profile:
        found[5] = Asked(profile=True)
    return found


def prepared(branch: str, kind: type[Scheduler] = Synchronous) -> tuple[Scheduler, list[Asked]]:
    """A scheduler of which the next steps take a branch, and requests."""
    if branch == "verify all":
        return VerifyAll(gamma=GAMMA), limited()
    scheduler = kind(gamma=GAMMA) if branch == "unmeasured" else measured(kind, token=0.00001)
    if branch.startswith("budget"):
        scheduler.fix_budget(float(branch.split()[1]))
    if branch == "always":
        scheduler.choose("on")
    if branch == "profile":
        scheduler.measurement.begin()
    return scheduler, limited(profile=branch == "profile")


BRANCHES = [
    "auto", "always", "budget 1", "budget 0.5", "budget 0.01", "profile", "verify all",
    "unmeasured",
]  # fmt: skip


@pytest.mark.parametrize("branch", BRANCHES)
def test_no_request_ever_verifies_more_than_it_allows(branch: str) -> None:
    scheduler, requests = prepared(branch)
    rng, seen = np.random.default_rng(0), np.zeros(len(LIMITS), dtype=np.int64)
    whole = 0
    for _ in range(300):
        plan = scheduler.plan(load(requests))
        whole += plan.verify_all
        confidence = rng.uniform(0.5, 1.0, (len(LIMITS), GAMMA))
        found = admitted(scheduler, plan, confidence)
        lens = lengths(found.order, found.budget, requests=len(LIMITS))
        assert lens.sum() == found.budget
        assert (lens <= np.minimum(ALLOWED, plan.limits)).all()
        assert lens.max() <= plan.depth <= GAMMA
        assert (np.diff(found.survival, axis=1) <= 0).all()
        seen = np.maximum(seen, lens)
        over(scheduler, plan, found, confidence, lens, lens // 2)
    # The limits are what held them back.
    # (A hundredth of 40 tokens is none.)
    assert seen.tolist() == (ALLOWED.tolist() if branch != "budget 0.01" else [0] * len(LIMITS))
    if branch == "auto":
        assert 0 < whole < 10


@pytest.mark.parametrize("choice", ["auto", "on", "off"])
def test_who_wants_no_speculation_is_not_drafted_for(choice: str) -> None:
    scheduler = measured()
    scheduler.choose(choice)  # type: ignore[arg-type]
    for share in (None, 1.0, 0.5):
        scheduler.fix_budget(share)
        plan = scheduler.plan(load([Asked(max_draft_tokens=0)] * 3))
        assert not plan.drafts and plan.depth == 0
        found = admitted(scheduler, plan, np.ones((3, GAMMA)))
        assert found.budget == 0 and not found.survival.any()


def test_nothing_deeper_is_drafted_than_somebody_allows() -> None:
    plan = measured().plan(load([Asked(max_draft_tokens=2), Asked(max_draft_tokens=1)]))
    assert plan.depth == 2


@pytest.mark.parametrize("kind", [Synchronous, VerifyAll])
def test_a_drafter_at_fault_is_not_asked(kind: type[Scheduler]) -> None:
    scheduler = kind(gamma=GAMMA)
    scheduler.choose("on")
    assert not scheduler.plan(load([Asked()], stopped=True)).drafts
    assert scheduler.plan(load([Asked()])).drafts


def test_a_budget_of_0_skips_the_draft_and_one_of_1_verifies_everything() -> None:
    scheduler = measured(token=1.0)  # nothing pays
    scheduler.fix_budget(0.0)
    assert not scheduler.plan(load(limited())).drafts
    scheduler.fix_budget(1.0)
    plan = scheduler.plan(load(limited()))
    assert plan.depth == GAMMA
    assert admitted(scheduler, plan, np.full((8, GAMMA), 0.01)).budget == ALLOWED.sum()
    unlikely = np.full((4, GAMMA), 0.01)
    for share, budget in ((0.5, 10), (None, 0)):
        scheduler.fix_budget(share)
        assert answered(scheduler, [Asked()] * 4, unlikely).budget == budget


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_an_operators_budget_holds_in_steps_that_would_verify_everything(share: float) -> None:
    scheduler, free = measured(token=0.00001), measured(token=0.00001)
    scheduler.fix_budget(share)
    drafted, whole, confidence = set(), 0, np.full((4, GAMMA), 0.9)
    for _ in range(300):
        for own in (scheduler, free):
            plan = own.plan(load([Asked()] * 4))
            found = admitted(own, plan, confidence)
            if own is free:
                whole += plan.verify_all
            elif plan.drafts:
                drafted.add(found.budget)
            lens = lengths(found.order, found.budget, requests=4)
            over(own, plan, found, confidence, lens, lens)
    assert drafted == {int(share * 4 * GAMMA)}
    assert whole > 1  # the same server without that budget


def test_a_few_requests_in_turn_show_what_whole_blocks_bring() -> None:
    scheduler, shown = measured(token=0.01), np.zeros(12, dtype=np.int64)
    confidence = np.full((12, GAMMA), 0.3)
    confidence[7, 0] = 0.999  # this one pays
    for _ in range(2000):
        plan = scheduler.plan(load([Asked()] * 12))
        found = admitted(scheduler, plan, confidence)
        lens = lengths(found.order, found.budget, requests=12)
        if plan.verify_all:
            assert (lens == GAMMA).sum() == 4 and lens[7] >= 1
            assert np.delete(lens, 7)[np.delete(lens, 7) != GAMMA].sum() == 0
            assert found.expected == pytest.approx(12 + found.survival.sum())
            shown += lens == GAMMA
        over(scheduler, plan, found, confidence, lens, np.minimum(lens, np.arange(12) == 7))
    assert shown.min() >= 1 and shown.max() - shown.min() <= 1  # none is left out


def test_a_measurement_is_not_taken_from_a_client() -> None:
    scheduler = measured()
    scheduler.choose("off")
    plans = [scheduler.plan(load([Asked(profile=True)] * 2)) for _ in range(8)]
    assert not any(plan.profile or plan.drafts for plan in plans)


def test_a_server_that_does_not_schedule_verifies_everything() -> None:
    scheduler, none = VerifyAll(gamma=GAMMA), np.zeros((3, GAMMA))
    for _ in range(300):
        plan = scheduler.plan(load([Asked()] * 3, 100))
        assert plan.depth == GAMMA and plan.verify_all
        found = admitted(scheduler, plan, none)
        assert found.budget == 3 * GAMMA
        over(scheduler, plan, found, none, np.full(3, GAMMA), np.zeros(3, dtype=np.int64))
    assert scheduler.cost.observations == 0 and scheduler.reliability.error() is None


@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize("edge", [0.0, 1.0, 5e-324, np.nextafter(1.0, 0.0)])
def test_extreme_confidences_and_batches(count: int, edge: float) -> None:
    scheduler = measured()
    scheduler.choose("on")
    found = answered(scheduler, [Asked()] * count, np.full((count, GAMMA), edge))
    assert 0 <= found.budget <= count * GAMMA
    if edge < 0.5:
        assert found.budget == 0
    elif count == 1:
        assert found.budget == GAMMA
    assert np.isfinite(found.expected)
    assert 0.0 < scheduler.policy.gain(count) < np.inf


def test_a_request_whose_confidences_cannot_be_used_verifies_and_teaches_nothing() -> None:
    scheduler = measured()
    scheduler.choose("on")
    plan = scheduler.plan(load([Asked(), Asked()]))
    unsound = np.array([True, False])
    drafted = Drafted(
        confidence=np.array([[0.0] * GAMMA, [0.9] * GAMMA]),
        depth=GAMMA,
        copied=np.zeros(2, dtype=bool),
        unsound=unsound,
    )
    found = scheduler.admit(plan, drafted)
    assert not found.survival[0].any() and found.survival[1].all() and found.budget > 0
    lens = lengths(found.order, found.budget, requests=2)
    assert not lens[0]
    result = StepResult(
        plan=plan, drafted=drafted, admission=found, lens=lens, counts=lens,
        logits=np.where(unsound[:, None], np.nan, np.zeros((2, GAMMA))), seconds=0.02, now=1.0,
    )  # fmt: skip
    scheduler.observe(lambda: result)
    assert np.isfinite(scheduler.reliability.shift()).all()
    seen = np.array(scheduler.reliability.table()["seen"]).sum()
    assert 0 < seen <= lens[1]


# --- plans -------------------------------------------------------------------------------------------


def test_the_measurement_tries_both_kinds_at_every_depth() -> None:
    scheduler, confidence = Synchronous(gamma=GAMMA), np.full((2, GAMMA), 0.5)
    scheduler.measurement.begin()
    kinds, depths = [], set()
    for turn in range(2 * (GAMMA + 1)):
        plan = scheduler.plan(load([Asked(profile=True)] * 2))
        found = admitted(scheduler, plan, confidence)
        kinds.append(plan.drafts)
        assert plan.profile
        if plan.drafts:
            depths.add(found.budget // 2)
        lens = lengths(found.order, found.budget, requests=2)
        seconds, now = 0.01 + 0.002 * plan.drafts, 10.0 + turn
        over(scheduler, plan, found, confidence, lens, lens, seconds=seconds, now=now)
    assert kinds == [True, False] * (GAMMA + 1)
    assert depths == set(range(GAMMA + 1))
    assert scheduler.cost.comparable
    assert scheduler.measurement.seconds == pytest.approx(2 * (GAMMA + 1) - 1, abs=0.1)
    # It is a machine's time that is measured, with random tokens: nothing else is learned.
    assert scheduler.policy.gain(2) == 1.0 and scheduler.depths.caps() == {}
    assert len(scheduler.reliability.blocks.lens) == 0


def test_a_step_that_nobody_asked_for_is_survived() -> None:
    scheduler, none = Synchronous(gamma=GAMMA), np.zeros((0, GAMMA))
    plan = scheduler.plan(load([]))
    assert not plan.drafts
    nobody = np.zeros(0, dtype=np.int64)
    over(scheduler, plan, admitted(scheduler, plan, none), none, nobody, nobody)
    assert scheduler.cost.observations == 0


# --- nothing looks ahead --------------------------------------------------------------------------------


def appendix() -> Scheduler:
    """The machine of the paper's appendix A: 1, 2 and 3 tokens at 1, 0.5 and 0.45 steps a second."""
    scheduler = Synchronous(gamma=2)
    for _ in range(400):
        for drafted, seconds in enumerate((1.0, 2.0, 1 / 0.45)):
            scheduler.cost.observe(Step(1, drafted, 0, round=True, sampled=1), seconds)
    scheduler.choose("on")
    return scheduler


def chance_of_a(scheduler: Scheduler, *, retrospective: bool = False) -> Fraction:
    """P(the first committed token is A), over everything the drafter may draw."""
    total = Fraction(0)
    for first in TOKENS:
        found = answered(scheduler, [Asked()], np.array([[0.8, SECOND[first]]]))
        budget = found.budget
        if retrospective:
            tokens = 1 + np.concatenate([[0.0], found.survival[0].cumsum()])
            budget = int(np.argmax(tokens * np.array([1.0, 0.5, 0.45])))
        if not budget:
            total += DRAFT[first] * TARGET["A"]
            continue
        kept = min(Fraction(1), TARGET[first] / DRAFT[first])
        rest = {token: max(Fraction(0), TARGET[token] - DRAFT[token]) for token in TOKENS}
        total += DRAFT[first] * (
            kept * (first == "A") + (1 - kept) * rest["A"] / sum(rest.values())
        )
    return total


def test_the_papers_counterexample_keeps_its_distribution() -> None:
    assert chance_of_a(appendix()) == TARGET["A"]


def test_the_counterexample_catches_who_looks_back() -> None:
    assert chance_of_a(appendix(), retrospective=True) == Fraction(85, 100)


@settings(max_examples=150)
@given(
    confidence=hnp.arrays(np.float64, (3, 4), elements=st.floats(0.0, 1.0)),
    where=st.tuples(st.integers(0, 2), st.integers(0, 3)),
    later=hnp.arrays(np.float64, 4, elements=st.floats(0.0, 1.0)),
    limits=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    token=st.sampled_from([0.00005, 0.0006, 0.004]),
    seen=st.booleans(),
)
def test_a_tokens_admission_never_depends_on_what_comes_after_it(
    confidence: np.ndarray,
    where: tuple[int, int],
    later: np.ndarray,
    limits: list[int],
    token: float,
    seen: bool,
) -> None:
    """Whatever the confidences after a token, which depend on its value, it is sent or it is not."""
    row, position = where
    changed = confidence.copy()
    changed[row, position + 1 :] = later[position + 1 :]
    lens = []
    for values in (confidence, changed):
        scheduler = measured(gamma=4, token=token)
        scheduler.choose("on")
        if seen:  # the correction moves confidences
            rng = np.random.default_rng(1)
            for _ in range(60):
                scheduler.reliability.observe(
                    rng.random((3, 4)), np.zeros((3, 4)), np.full(3, 4),
                    rng.integers(0, 5, 3), np.ones(3, dtype=bool),
                )  # fmt: skip
        plan = scheduler.plan(load([Asked(max_draft_tokens=n) for n in limits], gamma=4))
        found = admitted(scheduler, plan, values)
        lens.append(int(lengths(found.order, found.budget, requests=3)[row]))
    assert min(lens[0], position + 1) == min(lens[1], position + 1)


# --- numbers --------------------------------------------------------------------------------------------


def test_expected_and_committed_tokens_are_counted_over_the_same_rounds() -> None:
    server = world(4, acceptance=0.7, seed=3)
    server.scheduler.clear()
    steps = [step for step in server.run(400) if step.plan.drafts]
    scheduler = server.scheduler
    committed = sum(int(step.counts.sum()) + 4 for step in steps)
    assert scheduler.committed_tokens == committed
    shown = scheduler.snapshot()
    assert shown["tau_error"] == pytest.approx(
        abs(committed / scheduler.expected_tokens - 1), abs=1e-3
    )
    assert shown["tau_error"] < 0.05
    assert shown["plain_steps"] == 400 - len(steps)
    json.dumps(shown)


def test_a_snapshot_before_any_request_is_json() -> None:
    for kind in (Synchronous, VerifyAll):
        shown = kind(gamma=GAMMA).snapshot()
        assert shown["drafting"] is True and shown["tau_error"] is None and shown["ece"] is None
        json.dumps(shown)


def test_clearing_counters_keeps_what_was_learned() -> None:
    server = world(2, acceptance=0.8)
    server.run(300)
    scheduler = server.scheduler
    before = scheduler.cost.state(), scheduler.policy.gain(2), scheduler.reliability.error()
    scheduler.clear()
    assert scheduler.snapshot()["expected_tokens"] == scheduler.snapshot()["plain_steps"] == 0
    assert (
        scheduler.cost.state(),
        scheduler.policy.gain(2),
        scheduler.reliability.error(),
    ) == before


def test_steps_of_a_shallower_draft_teach_confidences_at_its_depth() -> None:
    server = World(Synchronous(gamma=GAMMA), [Asked(max_draft_tokens=2)], acceptance=0.9)
    server.scheduler.choose("on")
    server.scheduler.fix_budget(1.0)
    server.run(50)
    seen = np.array(server.scheduler.reliability.table()["seen"]).sum(axis=2)
    assert (seen[1, :2] > 0).all() and (seen[1, 2:] == 0).all() and (seen[0] == 0).all()
