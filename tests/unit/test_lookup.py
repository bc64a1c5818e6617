"""Copied drafts in service: whose text is followed, which copies replace a draft, what is learned of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scheduled_world import GAMMA, request
from test_control import budgeted, measured

from dspark_sglang.core.policy import PROBE_ROUNDS, DraftPolicy
from dspark_sglang.core.schedule import lengths
from dspark_sglang.serving.control import Control
from dspark_sglang.serving.lookup import Copies, Lookup


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


def losing(**known: Any) -> Control:
    """Has learned that drafting 4 requests does not pay."""
    control = measured(**known)
    for gain in [1.3] * 60 + [0.5] * 100:
        control.policy.learn(4, gain)
    assert not control.policy.drafting(4)
    return control


def copying(control: Control, rows: list[int], chance: float, *, count: int = 4) -> np.ndarray:
    """A step of greedy requests in which some copy; tokens verified of each."""
    plan = control.begin([request(sampled=False)] * count, 0)
    confidence = np.zeros((count, GAMMA))
    if plan.copies:
        control.copy_only(GAMMA)
        control.copy(np.array(rows), GAMMA)
        confidence[rows] = chance
    found = budgeted(control, confidence)
    lens = lengths(found.order, found.budget, requests=count)
    control.accepted(lens, lens)
    control.finished(0.012, 1.0)
    return lens


def test_copies_are_verified_where_drafting_does_not_pay() -> None:
    control = losing(token=0.0002)
    observed = control.cost.observations
    assert copying(control, [1, 3], 0.9).tolist() == [0, GAMMA, 0, GAMMA]
    assert control.running.plan.draft and control.running.undrafted
    assert (control.copied_rounds, control.copied_tokens) == (2, 2 * GAMMA)
    assert control.committed_tokens == 4 + 2 * GAMMA
    assert control.running.expected == pytest.approx(4 + 2 * (0.9 * (1 - 0.9**GAMMA) / 0.1))
    # Its time is neither a round's nor a plain step's, and it says nothing of the drafter.
    assert control.cost.observations == observed
    assert len(control.reliability.blocks.lens) == 0 and control.policy.gain(4) == pytest.approx(
        0.5, rel=0.2
    )


def test_copies_that_do_not_pay_leave_a_plain_step() -> None:
    control = losing(token=0.05)
    observed, plain = control.cost.observations, control.plain_steps
    assert not copying(control, [0], 0.5).any()
    assert (
        not control.running.plan.draft
        and not control.running.undrafted
        and not control.running.copied.any()
    )
    assert control.cost.observations == observed + 1 and control.plain_steps == plain + 1


def test_a_plain_step_is_timed_now_and_then() -> None:
    control = losing(token=0.0002)
    verified = [copying(control, [0], 0.95).any() for _ in range(100)]
    assert 2 <= verified.count(False) <= 100 // 20


@pytest.mark.parametrize("choice", ["off", "forced"])
def test_an_operator_who_wants_no_speculation_gets_no_copies(choice: str) -> None:
    control = losing(token=0.0002)
    if choice == "off":
        control.choose("off")
    else:
        control.forced = 0.0
    for _ in range(40):
        assert not control.begin([request(sampled=False)] * 4, 0).copies


def test_who_wants_no_speculation_copies_nothing() -> None:
    control = losing(token=0.0002)
    control.begin(
        [request(sampled=False, max_draft_tokens=limit) for limit in (0, 2, None, None)], 0
    )
    control.copy_only(GAMMA)
    control.copy(np.array([0, 1]), GAMMA)
    found = budgeted(control, np.full((4, GAMMA), 0.99))
    assert lengths(found.order, found.budget, requests=4).tolist() == [0, 2, 0, 0]


def test_what_is_copied_may_be_longer_than_what_is_drafted() -> None:
    control = measured(token=0.00001)
    control.choose("on")
    for _ in range(40):  # a workload whose drafts are short
        control.depths.learn("", np.full(3, 2))
    control.begin([request(sampled=False, max_draft_tokens=limit) for limit in (None, 3, None)], 0)
    assert control.running.plan.depth == control.running.width == 2
    control.copy(np.array([0, 1]), GAMMA)
    assert control.running.width == GAMMA
    confidence = np.full((3, GAMMA), 0.99)
    found = budgeted(control, confidence)
    assert lengths(found.order, found.budget, requests=3).tolist() == [GAMMA, 3, 2]
    control.begin([request(sampled=False)] * 3, 0)
    assert control.running.width == 2


def test_copies_do_not_make_drafts_deeper() -> None:
    control = measured(token=0.00001)
    control.choose("on")
    for _ in range(60):
        control.begin([request(sampled=False)] * 2, 0)
        control.copy(np.array([0]), GAMMA)
        budgeted(control, np.array([[0.99] * GAMMA, [0.9] + [0.0] * (GAMMA - 1)]))
    assert control.depths.caps() == {"": 1}


def test_copies_are_no_merit_of_drafting() -> None:
    gains = []
    for copied in ([], [0], [0, 1, 2, 3]):
        control = measured(token=0.0002)
        control.begin([request(sampled=False)] * 4, 0)
        confidence = np.full((4, GAMMA), 0.9)
        if copied:
            control.copy(np.array(copied), GAMMA)
            confidence[copied] = 0.5
        budgeted(control, confidence)
        gains.append(control.policy.gain(4))
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
    control = measured(token=0.0002)
    chances = np.full((len(rows), GAMMA), chance)
    control.begin([request(sampled=False)] * 4, 0)
    assert control.copying.skip_draft(control.running, np.array(rows), chances) is None, (
        "no round was seen"
    )
    for _ in range(50):
        control.policy.learn(4, 1.5, 1.5)
    control.begin([request(sampled=False)] * 4, 0)
    assert control.copying.skip_draft(control.running, np.array(rows), chances) is skips
    control.running.plan = control.running.plan._replace(whole=True)
    assert control.copying.skip_draft(control.running, np.array(rows), chances) is False
    control.begin([request(sampled=False, max_draft_tokens=0)] * 4, 0)
    assert control.copying.skip_draft(control.running, np.array(rows), chances) is False, (
        "they may not copy"
    )
    control.choose("on")
    control.begin([request(sampled=False)] * 4, 0)
    assert control.copying.skip_draft(control.running, np.array(rows), chances) is False, (
        "an operator wants drafts"
    )


@pytest.mark.parametrize(("longer", "copies"), [(1.0, True), (1.8, False)])
def test_steps_with_copies_alone_are_taken_for_what_they_cost(longer: float, copies: bool) -> None:
    control = measured(token=0.0002)
    control.choose("off")
    rows, sure = np.arange(4), np.full((4, GAMMA), 0.35)
    found = []
    for number in range(120):
        control.begin([request(sampled=False)] * 4, 0)
        control.copy(rows, GAMMA)
        control.copy_only(GAMMA)
        budget = budgeted(control, sure).budget
        found.append(budget > 0)
        seconds = 0.012 + 0.0002 * budget
        # Now and then one stalls.
        control.finished(
            seconds
            * (longer if control.running.undrafted else 1.0)
            * (9 if number % 40 == 7 else 1),
            1.0,
        )
    assert found[0]
    assert all(found) is copies and found[-1] is copies


def test_a_copied_block_is_not_held_against_the_confidences() -> None:
    control = measured(token=0.00001)
    control.choose("on")
    for _ in range(50):
        control.begin([request(sampled=False)] * 2, 0)
        control.copy(np.array([0]), GAMMA)
        found = budgeted(control, np.full((2, GAMMA), 0.9))
        lens = lengths(found.order, found.budget, requests=2)
        control.accepted(lens, np.array([0, int(lens[1])]))
        control.finished(0.012, 1.0)
    assert len(control.reliability.blocks.lens) == 50
    seen = np.array(control.reliability.table()["seen"]).sum()
    kept = np.array(control.reliability.table()["kept"]).sum()
    assert kept == pytest.approx(seen)  # the request that copied was never right


def test_plain_steps_that_are_looked_at_are_marked() -> None:
    policy = DraftPolicy()
    seen = [policy.decide(8) for _ in range(60)]
    assert any(decision.look for decision in seen)
    assert all(decision.look != decision.draft for decision in seen)
    for _ in range(PROBE_ROUNDS + 1):
        policy.learn(8, 0.5)
    assert not any(policy.decide(8).look for _ in range(200))
