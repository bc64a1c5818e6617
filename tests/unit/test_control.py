"""What a step of the server does: limits, budgets, plans, and what must not look ahead."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scheduled_world import GAMMA, World, request, world
from test_core_schedule import DRAFT, SECOND, TARGET, TOKENS

from dspark_sglang.core.schedule import lengths
from dspark_sglang.core.steps import Step
from dspark_sglang.serving.control import COST_UNMEASURED, Budgeted, Control
from dspark_sglang.serving.running import StepPlan


def budgeted(control: Control, confidence: np.ndarray) -> Budgeted:
    """The budget of the step that was begun."""
    count = len(confidence)
    control.running.logits = torch.zeros((count, max(1, control.running.plan.depth)))
    return control.budget(confidence, None)


def measured(*, gamma: int = GAMMA, token: float = 0.0006) -> Control:
    """Knows both kinds of step of a machine; nothing else was learned."""
    control = Control(gamma=gamma, adaptive=True)
    for requests in (1, 2, 4, 8, 16, 32, 64):
        for depth in range(gamma + 1):
            drafted, plain = requests * depth, 0.010 + 0.0005 * requests
            control.cost.observe(Step(requests, drafted, 0, round=True, sampled=requests),
                                 plain + 0.004 + token * drafted)  # fmt: skip
            control.cost.observe(Step(requests, 0, 0, round=False, sampled=requests), plain)
    return control


# --- limits ----------------------------------------------------------------------------------------

LIMITS = [0, 1, 3, GAMMA, GAMMA + 9, None, 2, 0]
ALLOWED = np.array([0, 1, 3, GAMMA, GAMMA, GAMMA, 2, 0])


def limited(*, profile: bool = False) -> list[Any]:
    options = [{} if limit is None else {"max_draft_tokens": limit} for limit in LIMITS]
    if profile:
        options[5] = {"profile": True}
    return [request(**given) for given in options]


def prepared(branch: str) -> tuple[Control, list[Any]]:
    """A control of which the next steps take a branch, and requests."""
    if branch == "not adaptive":
        return Control(gamma=GAMMA, adaptive=False), limited()
    control = measured(token=0.00001)
    if branch == "unmeasured":
        control = Control(gamma=GAMMA, adaptive=True)
    if branch.startswith("forced"):
        control.forced = float(branch.split()[1])
    if branch == "always":
        control.choose("on")
    if branch == "profile":
        control.cost_source = COST_UNMEASURED
    return control, limited(profile=branch == "profile")


BRANCHES = [
    "auto", "always", "forced 1", "forced 0.5", "forced 0.01", "profile", "not adaptive",
    "unmeasured",
]  # fmt: skip


@pytest.mark.parametrize("branch", BRANCHES)
def test_no_request_ever_verifies_more_than_it_allows(branch: str) -> None:
    control, requests = prepared(branch)
    rng, seen = np.random.default_rng(0), np.zeros(len(LIMITS), dtype=np.int64)
    whole = 0
    for _ in range(300):
        plan = control.begin(requests, 0)
        whole += plan.whole
        found = budgeted(control, rng.uniform(0.5, 1.0, (len(LIMITS), GAMMA)))
        lens = lengths(found.order, found.budget, requests=len(LIMITS))
        assert lens.sum() == found.budget
        assert (lens <= np.minimum(ALLOWED, plan.limits)).all()
        assert lens.max() <= plan.depth <= GAMMA
        assert (np.diff(found.survival, axis=1) <= 0).all()
        seen = np.maximum(seen, lens)
        control.accepted(lens, lens // 2)
        control.finished(0.02, 1.0)
    # The limits are what held them back.
    # (A hundredth of 40 tokens is none.)
    assert seen.tolist() == (ALLOWED.tolist() if branch != "forced 0.01" else [0] * len(LIMITS))
    if branch == "auto":
        assert 0 < whole < 10


@pytest.mark.parametrize("choice", ["auto", "on", "off"])
def test_who_wants_no_speculation_is_not_drafted_for(choice: str) -> None:
    control = measured()
    control.choose(choice)  # type: ignore[arg-type]
    for forced in (None, 1.0, 0.5):
        control.forced = forced
        plan = control.begin([request(max_draft_tokens=0)] * 3, 0)
        assert not plan.draft and plan.depth == 0
        found = budgeted(control, np.ones((3, GAMMA)))
        assert found.budget == 0 and not found.survival.any()


def test_nothing_deeper_is_drafted_than_somebody_allows() -> None:
    control = measured()
    plan = control.begin([request(max_draft_tokens=2), request(max_draft_tokens=1)], 0)
    assert plan.depth == 2


def test_a_budget_of_0_skips_the_draft_and_one_of_1_verifies_everything() -> None:
    control = measured(token=1.0)  # nothing pays
    control.forced = 0.0
    assert not control.begin(limited(), 0).draft
    control.forced = 1.0
    assert control.begin(limited(), 0).depth == GAMMA
    assert budgeted(control, np.full((8, GAMMA), 0.01)).budget == ALLOWED.sum()
    control.forced = 0.5
    control.begin([request()] * 4, 0)
    assert budgeted(control, np.full((4, GAMMA), 0.01)).budget == 10
    control.forced = None
    control.begin([request()] * 4, 0)
    assert budgeted(control, np.full((4, GAMMA), 0.01)).budget == 0


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_an_operators_budget_holds_in_steps_that_would_verify_everything(share: float) -> None:
    control, free = measured(token=0.00001), measured(token=0.00001)
    control.forced = share
    drafted, whole = set(), 0
    for _ in range(300):
        for own in (control, free):
            plan = own.begin([request()] * 4, 0)
            found = budgeted(own, np.full((4, GAMMA), 0.9))
            if own is free:
                whole += plan.whole
            elif plan.draft:
                drafted.add(found.budget)
            lens = lengths(found.order, found.budget, requests=4)
            own.accepted(lens, lens)
            own.finished(0.02, 1.0)
    assert drafted == {int(share * 4 * GAMMA)}
    assert whole > 1  # the same server without that budget


def test_a_few_requests_in_turn_show_what_whole_blocks_bring() -> None:
    control, shown = measured(token=0.01), np.zeros(12, dtype=np.int64)
    for _ in range(2000):
        plan = control.begin([request()] * 12, 0)
        confidence = np.full((12, GAMMA), 0.3)
        confidence[7, 0] = 0.999  # this one pays
        found = budgeted(control, confidence)
        lens = lengths(found.order, found.budget, requests=12)
        if plan.whole:
            assert (lens == GAMMA).sum() == 4 and lens[7] >= 1
            assert np.delete(lens, 7)[np.delete(lens, 7) != GAMMA].sum() == 0
            assert control.running.expected == pytest.approx(12 + found.survival.sum())
            shown += lens == GAMMA
        control.accepted(lens, np.minimum(lens, np.arange(12) == 7))
        control.finished(0.02, 1.0)
    assert shown.min() >= 1 and shown.max() - shown.min() <= 1  # none is left out


@pytest.mark.parametrize("source", ["off", "online", "/cache/cost/x.json"])
def test_a_measurement_is_not_taken_from_a_client(source: str) -> None:
    control = measured()
    control.cost_source = source
    control.choose("off")
    plans = [control.begin([request(profile=True)] * 2, 0) for _ in range(8)]
    assert not any(plan.profile or plan.draft for plan in plans)


def test_a_server_that_does_not_schedule_verifies_everything() -> None:
    control = Control(gamma=GAMMA, adaptive=False)
    for _ in range(300):
        plan = control.begin([request()] * 3, 100)
        assert plan.depth == GAMMA and plan.whole
        assert budgeted(control, np.zeros((3, GAMMA))).budget == 3 * GAMMA
        control.accepted(np.full(3, GAMMA), np.zeros(3, dtype=np.int64))
        control.finished(0.01, 1.0)
    assert control.cost.observations == 0 and control.reliability.error() is None


@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize("edge", [0.0, 1.0, 5e-324, np.nextafter(1.0, 0.0)])
def test_extreme_confidences_and_batches(count: int, edge: float) -> None:
    control = measured()
    control.choose("on")
    control.begin([request()] * count, 100 * count)
    found = budgeted(control, np.full((count, GAMMA), edge))
    assert 0 <= found.budget <= count * GAMMA
    if edge < 0.5:
        assert found.budget == 0
    elif count == 1:
        assert found.budget == GAMMA
    assert np.isfinite(control.running.expected)
    assert 0.0 < control.policy.gain(count) < np.inf


@pytest.mark.parametrize("bad", [np.nan, 1.5, -0.1])
def test_confidences_that_are_none_are_explained(bad: float) -> None:
    """A request whose drafts have none verifies nothing and drafts no more; the others are served as before."""
    control = measured()
    control.choose("on")
    requests = [request(), request()]
    control.begin(requests, 0)
    found = budgeted(control, np.array([[0.9, bad, 0.5, 0.5, 0.5], [0.9] * 5]))
    assert not found.survival[0].any() and found.survival[1].all()
    assert found.budget > 0
    assert not lengths(found.order, found.budget, requests=2)[0]
    assert control.begin(requests, 0).limits.tolist() == [0, GAMMA]
    assert control.faults.counts == {"confidence": 1}
    assert control.faults.stopped is None


def test_a_drafter_without_confidence_for_anybody_is_turned_off_and_on_again() -> None:
    control = measured()
    control.choose("on")
    nothing = np.full((2, GAMMA), np.nan)
    for requests in ([request(), request()], [request(), request()]):
        assert control.begin(requests, 0).draft
        assert not budgeted(control, nothing).budget
        # Until its requests have gone a request alone is no proof against the drafter.
    assert control.faults.counts == {"confidence": 5}  # four requests, and the drafter
    assert "NaN for 4 requests" in str(control.faults.stopped)
    assert not control.begin([request()], 0).draft
    assert control.snapshot()["drafting"] is False
    control.choose("on")
    assert control.faults.stopped is None and control.begin([request()], 0).draft


def test_requests_without_confidence_between_sound_ones_are_no_fault_of_the_drafter() -> None:
    control = measured()
    control.choose("on")
    for _ in range(20):
        for value in (np.nan, 0.5):
            control.begin([request()], 0)
            budgeted(control, np.full((1, GAMMA), value))
    assert control.faults.counts == {"confidence": 20}
    assert control.faults.stopped is None


def test_what_cannot_be_used_teaches_nothing() -> None:
    control = measured()
    control.choose("on")
    control.begin([request()], 0)
    budgeted(control, np.full((1, GAMMA), np.nan))
    control.running.logits = torch.full((1, GAMMA), np.nan)
    control.accepted(np.array([0]), np.array([0]))
    assert control.reliability.error() is None or np.isfinite(control.reliability.error())
    assert np.isfinite(control.reliability.shift()).all()


# --- plans -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        StepPlan(np.array([5, 0, 3]), 5),
        StepPlan(np.array([2]), 0),
        StepPlan(np.array([], dtype=np.int64), 3, whole=True),
        StepPlan(np.array([1, 1]), 4, whole=True, profile=True),
        StepPlan(np.array([4]), 0, copies=True),
    ],
    ids=["auto", "plain", "nobody", "profile", "copies"],
)
def test_ranks_unpack_the_plan_that_was_packed(plan: StepPlan) -> None:
    found = StepPlan.unpacked(plan.packed("cpu"))
    assert plan.packed("cpu").dtype == torch.int64
    assert found.limits.tolist() == plan.limits.tolist() and found.limits.dtype == np.int64
    assert found[1:] == plan[1:]
    assert type(found.whole) is bool and found.draft == (plan.depth > 0)


def test_the_measurement_tries_both_kinds_at_every_depth() -> None:
    control = Control(gamma=GAMMA, adaptive=True)
    control.cost_source = COST_UNMEASURED
    kinds, depths = [], set()
    for turn in range(2 * (GAMMA + 1)):
        plan = control.begin([request(profile=True)] * 2, 0)
        found = budgeted(control, np.full((2, GAMMA), 0.5))
        kinds.append(plan.draft)
        assert plan.profile
        if plan.draft:
            depths.add(found.budget // 2)
        lens = lengths(found.order, found.budget, requests=2)
        control.accepted(lens, lens)
        control.finished(0.01 + 0.002 * plan.draft, 10.0 + turn)
    assert kinds == [True, False] * (GAMMA + 1)
    assert depths == set(range(GAMMA + 1))
    assert control.cost.comparable
    assert control.profile_seconds == pytest.approx(2 * (GAMMA + 1) - 1, abs=0.1)
    # It is a machine's time that is measured, with random tokens: nothing else is learned.
    assert control.policy.gain(2) == 1.0 and control.depths.caps() == {}
    assert len(control.reliability.blocks.lens) == 0


def test_a_step_that_nobody_asked_for_is_survived() -> None:
    control = Control(gamma=GAMMA, adaptive=True)
    plan = control.begin([], 0)
    assert not plan.draft
    control.finished(0.01, 1.0)
    assert control.cost.observations == 0


# --- nothing looks ahead --------------------------------------------------------------------------------


def appendix() -> Control:
    """The machine of the paper's appendix A: 1, 2 and 3 tokens at 1, 0.5 and 0.45 steps a second."""
    control = Control(gamma=2, adaptive=True)
    for _ in range(400):
        for drafted, seconds in enumerate((1.0, 2.0, 1 / 0.45)):
            control.cost.observe(Step(1, drafted, 0, round=True, sampled=1), seconds)
    control.choose("on")
    return control


def chance_of_a(control: Control, *, retrospective: bool = False) -> Fraction:
    """P(the first committed token is A), over everything the drafter may draw."""
    total = Fraction(0)
    for first in TOKENS:
        control.begin([request()], 0)
        found = budgeted(control, np.array([[0.8, SECOND[first]]]))
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


def test_the_papers_counterexample_keeps_its_law() -> None:
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
        control = measured(gamma=4, token=token)
        control.choose("on")
        if seen:  # the correction moves confidences
            rng = np.random.default_rng(1)
            for _ in range(60):
                control.reliability.observe(
                    rng.random((3, 4)), np.zeros((3, 4)), np.full(3, 4),
                    rng.integers(0, 5, 3), np.ones(3, dtype=bool),
                )  # fmt: skip
        control.begin([request(max_draft_tokens=limit) for limit in limits], 0)
        found = budgeted(control, values)
        lens.append(int(lengths(found.order, found.budget, requests=3)[row]))
    assert min(lens[0], position + 1) == min(lens[1], position + 1)


# --- numbers --------------------------------------------------------------------------------------------


def test_expected_and_committed_tokens_are_counted_over_the_same_rounds() -> None:
    server = world(4, acceptance=0.7, seed=3)
    server.control.clear()
    steps = [step for step in server.run(400) if step.plan.draft]
    control = server.control
    committed = sum(int(step.counts.sum()) + 4 for step in steps)
    assert control.committed_tokens == committed
    shown = control.snapshot()
    assert shown["tau_error"] == pytest.approx(
        abs(committed / control.expected_tokens - 1), abs=1e-3
    )
    assert shown["tau_error"] < 0.05
    assert shown["plain_steps"] == 400 - len(steps)
    json.dumps(shown)


def test_a_snapshot_before_any_request_is_json() -> None:
    for adaptive in (True, False):
        shown = Control(gamma=GAMMA, adaptive=adaptive).snapshot()
        assert shown["drafting"] is True and shown["tau_error"] is None and shown["ece"] is None
        json.dumps(shown)


def test_clearing_counters_keeps_what_was_learned() -> None:
    server = world(2, acceptance=0.8)
    server.run(300)
    control = server.control
    before = control.cost.state(), control.policy.gain(2), control.reliability.error()
    control.clear()
    assert control.snapshot()["expected_tokens"] == control.snapshot()["plain_steps"] == 0
    assert (control.cost.state(), control.policy.gain(2), control.reliability.error()) == before


def test_steps_of_a_shallower_draft_teach_confidences_at_its_depth() -> None:
    server = World(Control(gamma=GAMMA, adaptive=True), [request(max_draft_tokens=2)],
                   acceptance=0.9)  # fmt: skip
    server.control.choose("on")
    server.control.forced = 1.0
    server.run(50)
    seen = np.array(server.control.reliability.table()["seen"]).sum(axis=2)
    assert (seen[1, :2] > 0).all() and (seen[1, 2:] == 0).all() and (seen[0] == 0).all()
