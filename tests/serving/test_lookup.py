"""Copied drafts in service: whose text is followed, which copies replace a draft, what is learned of them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dspark_sglang.core.round import Admission, Drafted, StepPlan, StepResult
from dspark_sglang.core.schedule import lengths
from dspark_sglang.core.schedule.policy import PROBE_ROUNDS, DraftPolicy
from dspark_sglang.core.schedule.scheduler import Scheduler
from dspark_sglang.serving.prompt_lookup import Copies, Lookup
from tests.schedule.scheduled_world import GAMMA, Asked, load
from tests.schedule.test_scheduler import measured


def follows(prompt: list[int], answer: list[int]) -> Any:
    return SimpleNamespace(origin_input_ids=prompt, output_ids=answer)


def copies(rows: list[int], chance: list[float], depth: int = 3) -> Copies:
    tokens = np.arange(len(rows) * depth).reshape(-1, depth) + 100
    return Copies(np.array(rows), tokens, np.repeat(np.array(chance)[:, None], depth, axis=1))


def test_greedy_requests_that_repeat_are_found() -> None:
    batch = [follows([1, 2, 3, 1], [2]), follows([4, 5, 6], [7]), follows([8, 9, 8], [9])]
    found = Lookup().find(batch, np.array([False, False, True]), 2)
    assert found.rows.tolist() == [0]
    assert found.tokens.tolist() == [[3, 1]]
    assert found.chances.shape == (1, 2)
    nobody = Lookup().find(batch, np.array([True, True, True]), 2)
    assert nobody.tokens.shape == nobody.chances.shape == (0, 2)
    assert not nobody.suffice(3)


def test_a_request_is_followed_over_its_steps() -> None:
    lookup, one = Lookup(), follows([1, 2, 3, 4], [9])
    greedy = np.zeros(1, dtype=bool)
    assert len(lookup.find([one], greedy, 4).rows) == 0
    one.output_ids += [2, 3]
    assert lookup.find([one], greedy, 2).tokens.tolist() == [[4, 9]]
    before = lookup.rates.rate(2)
    one.output_ids += [4]  # as it was copied
    assert lookup.find([one], greedy, 2).tokens.tolist() == [[9, 2]]
    assert lookup.rates.rate(2) > before


def test_a_copy_replaces_a_draft_that_is_expected_to_be_shorter() -> None:
    found = copies([0, 2], [0.6, 0.6])
    confidence = np.array([[0.9, 0.9, 0.9], [0.1, 0.1, 0.1], [0.5, 0.5, 0.5]])
    better = found.better(confidence)
    assert better.rows.tolist() == [2]
    tokens, chances = better.replace(
        torch.zeros((3, 3), dtype=torch.int64), torch.from_numpy(confidence).float()
    )
    assert tokens.tolist() == [[0, 0, 0], [0, 0, 0], [103, 104, 105]]
    assert chances[:2].numpy() == pytest.approx(confidence[:2])
    assert chances[2].numpy() == pytest.approx([0.6] * 3)


@pytest.mark.parametrize(
    ("rows", "chance", "enough"),
    [([0, 1], [0.95, 0.95], True), ([0, 1], [0.95, 0.5], False), ([1], [0.99], False)],
)
def test_the_draft_is_skipped_where_all_copy_surely(
    rows: list[int], chance: list[float], enough: bool
) -> None:
    assert copies(rows, chance).suffice(2) is enough


# --- scheduling ---------------------------------------------------------------------------------------


GREEDY = [Asked(sampled=False)]


def losing(**known: Any) -> Scheduler:
    """Has learned that drafting 4 requests does not pay."""
    scheduler = measured(**known)
    for gain in [1.3] * 60 + [0.5] * 100:
        scheduler.policy.learn(4, gain)
    assert not scheduler.policy.drafting(4)
    return scheduler


def beside(
    plan: StepPlan, rows: list[int], confidence: np.ndarray, *, alone: bool = False
) -> Drafted:
    """A draft in which some requests copy; alone: only they have something to verify."""
    copied = np.zeros(len(confidence), dtype=bool)
    copied[rows] = True
    return Drafted(
        confidence=confidence, depth=plan.depth or GAMMA, copied=copied, copied_depth=GAMMA,
        alone=alone, unsound=np.zeros(len(confidence), dtype=bool),
    )  # fmt: skip


def ended(
    scheduler: Scheduler, plan: StepPlan, drafted: Drafted | None, found: Admission,
    *, counts: np.ndarray | None = None, seconds: float = 0.012,
) -> np.ndarray:  # fmt: skip
    """The step is over; tokens verified of each of its requests."""
    count = plan.load.requests
    lens = lengths(found.order, found.budget, requests=count)
    decodes = drafted is None or (drafted.alone and not found.budget)
    result = StepResult(
        plan=plan, drafted=None if decodes else drafted, admission=None if decodes else found,
        lens=lens, counts=lens if counts is None else counts,
        logits=np.zeros((count, GAMMA)), seconds=seconds, now=1.0,
    )  # fmt: skip
    scheduler.observe(lambda: result)
    return lens


def copying(
    scheduler: Scheduler, rows: list[int], chance: float, *, count: int = 4
) -> tuple[np.ndarray, Admission]:
    """A step of greedy requests in which some copy; tokens verified of each."""
    plan, drafted = scheduler.plan(load(GREEDY * count)), None
    if plan.prompt_lookup:
        confidence = np.zeros((count, GAMMA))
        confidence[rows] = chance
        drafted = beside(plan, rows, confidence, alone=True)
    found = scheduler.admit(plan, drafted)
    return ended(scheduler, plan, drafted, found), found


def test_copies_are_verified_where_drafting_does_not_pay() -> None:
    scheduler = losing(token=0.0002)
    observed = scheduler.cost.observations
    lens, found = copying(scheduler, [1, 3], 0.9)
    assert lens.tolist() == [0, GAMMA, 0, GAMMA]
    assert (scheduler.copied_rounds, scheduler.copied_tokens) == (2, 2 * GAMMA)
    assert scheduler.committed_tokens == 4 + 2 * GAMMA
    assert found.expected == pytest.approx(4 + 2 * (0.9 * (1 - 0.9**GAMMA) / 0.1))
    # Its time is neither a round's nor a decode step's, and it says nothing of the drafter.
    assert scheduler.cost.observations == observed
    assert len(scheduler.reliability.blocks.lens) == 0
    assert scheduler.policy.gain(4) == pytest.approx(0.5, rel=0.2)


def test_copies_that_do_not_pay_leave_a_decode_step() -> None:
    scheduler = losing(token=0.05)
    observed, decoded = scheduler.cost.observations, scheduler.plain_steps
    assert not copying(scheduler, [0], 0.5)[0].any()
    assert scheduler.cost.observations == observed + 1
    assert scheduler.plain_steps == decoded + 1


def test_a_decode_step_is_timed_now_and_then() -> None:
    scheduler = losing(token=0.0002)
    verified = [copying(scheduler, [0], 0.95)[0].any() for _ in range(100)]
    assert 2 <= verified.count(False) <= 100 // 20


@pytest.mark.parametrize("choice", ["off", "budget"])
def test_an_operator_who_wants_no_speculation_gets_no_copies(choice: str) -> None:
    scheduler = losing(token=0.0002)
    if choice == "off":
        scheduler.choose("off")
    else:
        scheduler.fix_budget(0.0)
    for _ in range(40):
        assert not scheduler.plan(load(GREEDY * 4)).prompt_lookup


def test_who_wants_no_speculation_copies_nothing() -> None:
    scheduler = losing(token=0.0002)
    limits = (0, 2, GAMMA, GAMMA)
    plan = scheduler.plan(load([Asked(sampled=False, max_draft_tokens=n) for n in limits]))
    found = scheduler.admit(plan, beside(plan, [0, 1], np.full((4, GAMMA), 0.99), alone=True))
    assert lengths(found.order, found.budget, requests=4).tolist() == [0, 2, 0, 0]


def test_what_is_copied_may_be_longer_than_what_is_drafted() -> None:
    scheduler = measured(token=0.00001)
    scheduler.choose("on")
    for _ in range(40):  # a workload whose drafts are short
        scheduler.depths.learn("", np.full(3, 2))
    limits = (GAMMA, 3, GAMMA)
    plan = scheduler.plan(load([Asked(sampled=False, max_draft_tokens=n) for n in limits]))
    assert plan.depth == 2
    confidence = np.full((3, GAMMA), 0.99)
    drafted = beside(plan, [0, 1], confidence)
    assert drafted.width == GAMMA and Drafted.of(confidence, plan.depth).width == 2
    found = scheduler.admit(plan, drafted)
    assert lengths(found.order, found.budget, requests=3).tolist() == [GAMMA, 3, 2]


def test_copies_do_not_make_drafts_deeper() -> None:
    scheduler = measured(token=0.00001)
    scheduler.choose("on")
    confidence = np.array([[0.99] * GAMMA, [0.9] + [0.0] * (GAMMA - 1)])
    for _ in range(60):
        plan = scheduler.plan(load(GREEDY * 2))
        drafted = beside(plan, [0], confidence)
        ended(scheduler, plan, drafted, scheduler.admit(plan, drafted))
    assert scheduler.depths.caps() == {"": 1}


def test_copies_are_no_merit_of_drafting() -> None:
    gains = []
    for copied in ([], [0], [0, 1, 2, 3]):
        scheduler = measured(token=0.0002)
        plan = scheduler.plan(load(GREEDY * 4))
        confidence = np.full((4, GAMMA), 0.9)
        confidence[copied] = 0.5
        drafted = beside(plan, copied, confidence)
        ended(scheduler, plan, drafted, scheduler.admit(plan, drafted))
        gains.append(scheduler.policy.gain(4))
    assert gains[0] > 1.2
    assert gains[1] == pytest.approx(gains[0], rel=0.02)
    assert gains[2] == 1.0, "nobody drafted, so nothing was learned"


@pytest.mark.parametrize(
    ("rows", "chance", "skips"),
    [
        ([0, 1, 2, 3], 0.95, True),
        ([0, 1, 2, 3], 0.3, False),
        ([0], 0.95, False),  # three would lose their drafts
        ([0, 1, 2], 0.99, True),
    ],
)
def test_the_draft_is_skipped_where_copies_alone_bring_more(
    rows: list[int], chance: float, skips: bool
) -> None:
    scheduler = measured(token=0.0002)
    chances = np.full((len(rows), GAMMA), chance)

    def skip(plan: StepPlan) -> bool | None:
        return scheduler.lookup.skip_draft(plan, np.array(rows), chances)

    plan = scheduler.plan(load(GREEDY * 4))
    assert skip(plan) is None, "no round was seen"
    for _ in range(50):
        scheduler.policy.learn(4, 1.5, 1.5)
    assert skip(plan) is skips
    assert skip(dataclasses.replace(plan, verify_all=True)) is False
    nobody = scheduler.plan(load([Asked(sampled=False, max_draft_tokens=0)] * 4))
    assert skip(nobody) is False, "they may not copy"
    scheduler.choose("on")
    assert skip(plan) is False, "an operator wants drafts"


@pytest.mark.parametrize(("longer", "copies"), [(1.0, True), (1.8, False)])
def test_steps_with_copies_alone_are_taken_for_what_they_cost(longer: float, copies: bool) -> None:
    scheduler = measured(token=0.0002)
    scheduler.choose("off")
    rows, sure = [0, 1, 2, 3], np.full((4, GAMMA), 0.35)
    chosen = []
    for number in range(120):
        plan = scheduler.plan(load(GREEDY * 4))
        drafted = beside(plan, rows, sure, alone=True)
        found = scheduler.admit(plan, drafted)
        chosen.append(found.budget > 0)
        seconds = (0.012 + 0.0002 * found.budget) * (longer if found.budget else 1.0)
        # Now and then one stalls.
        ended(scheduler, plan, drafted, found, seconds=seconds * (9 if number % 40 == 7 else 1))
    assert chosen[0]
    assert all(chosen) is copies and chosen[-1] is copies


def test_a_copied_block_is_not_held_against_the_confidences() -> None:
    scheduler = measured(token=0.00001)
    scheduler.choose("on")
    for _ in range(50):
        plan = scheduler.plan(load(GREEDY * 2))
        drafted = beside(plan, [0], np.full((2, GAMMA), 0.9))
        found = scheduler.admit(plan, drafted)
        lens = lengths(found.order, found.budget, requests=2)
        ended(scheduler, plan, drafted, found, counts=np.array([0, int(lens[1])]))
    assert len(scheduler.reliability.blocks.lens) == 50
    seen = np.array(scheduler.reliability.table()["seen"]).sum()
    kept = np.array(scheduler.reliability.table()["kept"]).sum()
    assert kept == pytest.approx(seen)  # the request that copied was never right


def test_decode_steps_that_are_looked_at_are_marked() -> None:
    policy = DraftPolicy()
    seen = [policy.decide(8) for _ in range(60)]
    assert any(decision.look for decision in seen)
    assert all(decision.look != decision.draft for decision in seen)
    for _ in range(PROBE_ROUNDS + 1):
        policy.learn(8, 0.5)
    assert not any(policy.decide(8).look for _ in range(200))
