"""Confidences in service: their error as counted directly, and what the correction makes of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dspark_sglang.core.schedule.correction import ALARM, BLOCKS_KEPT, ENOUGH, Reliability
from dspark_sglang.core.sts import calibration_error, sigmoid

GAMMA = 3
Floats = np.ndarray
#: The chance that a token is really kept, from its confidence logit.
Truth = Callable[[Floats], Floats]


def overconfident(logits: Floats) -> Floats:
    """Confidence is sigmoid(logit); the truth is three times flatter and lower."""
    return np.asarray(sigmoid(logits / 3.0 - 0.5))


def honest(logits: Floats) -> Floats:
    return np.asarray(sigmoid(logits))


def serve(
    kept: Reliability,
    steps: int,
    *,
    truth: Truth = honest,
    confidence: Truth = honest,
    requests: int = 8,
    sampled: bool = True,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """Serve steps that verify random lengths.

    Returns:
        Confidences served, corrected as they were at the time, and outcomes of the tokens reached.
    """
    rng = np.random.default_rng(seed)
    kinds = np.full(requests, sampled)
    served, outcomes = [], []
    for _ in range(steps):
        logits = rng.normal(0.5, 1.5, (requests, GAMMA))
        lens = rng.integers(0, GAMMA + 1, requests)
        accepted = rng.random((requests, GAMMA)) < truth(logits)
        counts = np.minimum(accepted.cumprod(axis=1).sum(axis=1), lens)
        given = confidence(logits)
        position = np.arange(GAMMA)
        reached = (position < lens[:, None]) & (position <= counts[:, None])
        served.append(kept.corrected(given, kinds)[reached])
        outcomes.append(accepted[reached])
        kept.observe(given, logits, lens, counts, kinds)
    return np.concatenate(served), np.concatenate(outcomes).astype(float)


def test_the_error_is_what_one_would_count() -> None:
    kept, rng = Reliability(gamma=GAMMA), np.random.default_rng(1)
    confidence = rng.random((12, GAMMA))
    lens, counts = np.full(12, GAMMA), rng.integers(0, GAMMA + 1, 12)
    kept.observe(confidence, np.zeros((12, GAMMA)), lens, counts, np.ones(12, dtype=bool))
    for position in range(GAMMA):
        reached = counts >= position
        outcome = (counts[reached] > position).astype(float)
        wanted = calibration_error(confidence[reached, position], outcome)
        assert kept.errors()[1, position] == pytest.approx(wanted)
    assert (kept.errors()[0] == 0.0).all()


def test_tokens_after_the_first_rejected_one_tell_nothing() -> None:
    one, other = Reliability(gamma=GAMMA), Reliability(gamma=GAMMA)
    confidence = np.array([[0.5, 0.6, 0.7]])
    lens, kinds = np.array([3]), np.array([True])
    for kept, last in ((one, 0.7), (other, 0.1)):
        confidence[0, 2] = last
        kept.observe(confidence, np.zeros((1, 3)), lens, np.array([1]), kinds)
    assert (one.errors() == other.errors()).all()
    assert one.errors()[1].tolist() == pytest.approx([0.5, 0.6, 0.0])


def test_honest_confidences_have_next_to_no_error() -> None:
    kept = Reliability(gamma=GAMMA)
    serve(kept, 2000)
    error, served = kept.error(), kept.served_error()
    assert error is not None and error < 0.025
    assert served is not None and served < 0.025
    assert not kept.alarms.any()


def test_right_confidences_show_little_error_by_chance() -> None:
    """Counts of about the last 2,000 tokens of a position alone show 2.0% and 1.7%."""
    kept, found = Reliability(gamma=GAMMA), []
    for seed in range(24):
        serve(kept, 60, requests=64, seed=seed)
        found.append((kept.error(), kept.served_error()))
    before, served = np.array(found[14:], dtype=float).mean(axis=0)
    assert before < 0.014 and served < 0.012


def test_a_drafter_that_goes_wrong_after_a_long_calm_is_noticed_and_corrected_soon() -> None:
    kept, kind, steps = Reliability(gamma=GAMMA), np.array([True]), 0
    serve(kept, 600, requests=64)
    assert not kept.alarms.any()
    while kept.corrected(np.full((1, GAMMA), 0.7), kind)[0, 0] > 0.5:
        serve(kept, 10, truth=lambda logits: sigmoid(logits) - 0.4, seed=steps)
        steps += 10
        assert steps < 400  # 2,700 tokens of the first position
    assert kept.alarms[1, 0]


def test_a_miscalibrated_head_is_served_corrected() -> None:
    kept = Reliability(gamma=GAMMA)
    serve(kept, 400, truth=overconfident)
    served, outcomes = serve(kept, 4000, truth=overconfident, seed=1)
    error, own, counted = kept.error(), kept.served_error(), calibration_error(served, outcomes)
    assert error is not None and error > 0.15
    assert counted < 0.05 and counted < 0.25 * error
    # What it says of itself is of the last tokens only, so a little more than the truth.
    assert own is not None and own == pytest.approx(counted, abs=0.02)


@pytest.mark.parametrize("stuck", [0.0, 1.0])
@pytest.mark.parametrize("chance", [0.2, 0.8])
def test_a_head_that_is_stuck_is_corrected_once_it_is_seen(stuck: float, chance: float) -> None:
    kept = Reliability(gamma=GAMMA)
    serve(
        kept,
        1500,
        truth=lambda logits: np.full_like(logits, chance),
        confidence=lambda logits: np.full_like(logits, stuck),
    )
    found = kept.corrected(np.full((1, GAMMA), stuck), np.array([True]))
    # A last position that few tokens reach is corrected less.
    assert found[0, :2] == pytest.approx(chance, abs=0.08)
    assert abs(found[0, 2] - chance) < 0.5 * abs(stuck - chance)
    other = kept.corrected(np.full((1, GAMMA), 0.5), np.array([True]))
    assert other == pytest.approx(0.5)  # nothing is known of other confidences


def test_what_was_never_seen_is_left_alone() -> None:
    confidence = np.random.default_rng(2).random((5, GAMMA))
    kept = Reliability(gamma=GAMMA)
    assert (kept.corrected(confidence, np.zeros(5, dtype=bool)) == confidence).all()
    assert kept.error() is None and kept.served_error() is None


@pytest.mark.parametrize("edge", [0.0, 1.0, np.nextafter(1.0, 0.0), np.nextafter(0.0, 1.0)])
def test_corrections_stay_chances(edge: float) -> None:
    kept = Reliability(gamma=GAMMA)
    serve(kept, 200, truth=overconfident)
    found = kept.corrected(np.full((2, GAMMA), edge), np.array([True, False]))
    assert (found >= 0.0).all() and (found <= 1.0).all()


def test_greedy_and_sampled_requests_are_told_apart() -> None:
    kept = Reliability(gamma=GAMMA)
    serve(kept, 1500, sampled=True)
    serve(kept, 2500, sampled=False, truth=overconfident)
    greedy, sampled = kept.errors()
    assert greedy.min() > 0.1 > 0.04 > sampled.max()
    assert kept.alarms[0].all() and not kept.alarms[1].any()
    confidence = np.full((2, GAMMA), 0.9)
    found = kept.corrected(confidence, np.array([False, True]))
    assert found[0].max() < 0.75 and found[1] == pytest.approx(0.9, abs=0.05)


def test_an_alarm_is_raised_and_taken_back() -> None:
    kept = Reliability(gamma=GAMMA)
    serve(kept, 1000)
    assert not kept.alarms.any()
    serve(kept, 3000, truth=overconfident, seed=1)
    assert kept.alarms[1].all()
    serve(kept, 4000, seed=2)
    assert not kept.alarms.any()
    assert (kept.errors()[1] < 0.6 * ALARM).all()


def test_an_alarm_needs_enough_tokens() -> None:
    kept = Reliability(gamma=1)
    one, kinds = np.ones((1, 1)), np.array([True])
    seen = 0
    while not kept.alarms.any():
        kept.observe(one, one, np.array([1]), np.array([0]), kinds)
        seen += 1
    # Older observations weigh less, so it takes a few more.
    assert ENOUGH <= seen < 1.2 * ENOUGH
    assert kept.error() == pytest.approx(1.0)


def test_an_alarm_does_not_flicker_between_its_thresholds() -> None:
    kept, rng = Reliability(gamma=1), np.random.default_rng(3)
    changes, before = 0, False
    for step in range(8000):
        chance = 0.5 if step < 3000 else 0.61  # then an error of 0.09, between relief and alarm
        accepted = rng.random((8, 1)) < chance
        kept.observe(
            np.full((8, 1), 0.7),
            np.zeros((8, 1)),
            np.ones(8, dtype=int),
            accepted.sum(axis=1),
            np.ones(8, dtype=bool),
        )
        changes += bool(kept.alarms.any()) != before
        before = bool(kept.alarms.any())
    assert changes == 1 and before


def test_plain_and_empty_steps_teach_nothing() -> None:
    kept = Reliability(gamma=GAMMA)
    zeros = np.zeros(4, dtype=np.int64)
    kept.observe(np.full((4, GAMMA), 0.9), np.ones((4, GAMMA)), zeros, zeros, zeros.astype(bool))
    empty = np.zeros((0, GAMMA))
    kept.observe(empty, empty, zeros[:0], zeros[:0], zeros[:0].astype(bool))
    assert (kept.errors() == 0.0).all() and len(kept.blocks.lens) == 0


# --- blocks for a new fit -----------------------------------------------------------------------


def test_the_last_blocks_are_kept_in_a_ring() -> None:
    kept = Reliability(gamma=GAMMA)
    numbers = np.arange(BLOCKS_KEPT + 904)
    for part in np.split(numbers, 125):
        size = len(part)
        kept.observe(
            np.full((size, GAMMA), 0.5),
            part[:, None] + np.array([0.0, 0.25, 0.5]),
            part % (GAMMA + 1),
            part % (GAMMA + 1) // 2,
            part % 2 == 0,
        )
    verified = numbers[numbers % (GAMMA + 1) > 0]
    found = kept.blocks
    assert len(found.lens) == min(len(verified), BLOCKS_KEPT) == len(verified)
    assert found.logits[:, 0].tolist() == verified.tolist()
    assert found.logits[:, 2].tolist() == (verified + 0.5).tolist()
    assert found.lens.tolist() == (verified % (GAMMA + 1)).tolist()
    assert found.counts.tolist() == (verified % (GAMMA + 1) // 2).tolist()
    assert found.sampled.tolist() == (verified % 2 == 0).tolist()
    more = np.arange(10_000, 10_000 + BLOCKS_KEPT - 5)
    ones = np.ones(len(more), dtype=np.int64)
    kept.observe(np.full((len(more), GAMMA), 0.5), more[:, None] + np.zeros(GAMMA), ones, ones,
                 ones.astype(bool))  # fmt: skip
    wanted = {*verified[-5:].tolist(), *more.tolist()}
    assert set(kept.blocks.logits[:, 0].tolist()) == wanted


def test_blocks_given_out_are_copies() -> None:
    kept = Reliability(gamma=GAMMA)
    serve(kept, 5)
    before = kept.blocks
    kept.blocks.lens[:] = 99
    assert (kept.blocks.lens == before.lens).all()


def test_memory_does_not_grow() -> None:
    kept = Reliability(gamma=GAMMA)

    def size() -> int:
        return sum(v.nbytes for v in vars(kept).values() if isinstance(v, np.ndarray))

    before, names = size(), set(vars(kept))
    serve(kept, 1500)
    assert size() == before and set(vars(kept)) == names


def test_a_refit_starts_anew() -> None:
    kept = Reliability(gamma=GAMMA)
    serve(kept, 500, truth=overconfident)
    kept.forget()
    assert kept.error() is None and len(kept.blocks.lens) == 0 and not kept.alarms.any()
    confidence = np.full((1, GAMMA), 0.4)
    assert (kept.corrected(confidence, np.array([True])) == confidence).all()


def test_the_table_is_what_errors_come_from() -> None:
    kept = Reliability(gamma=GAMMA)
    serve(kept, 300, truth=overconfident)
    table = {name: np.array(values) for name, values in kept.table().items()}
    gap = np.abs(table["predicted"] - table["kept"]).sum(axis=2)
    found = gap / np.maximum(table["seen"].sum(axis=2), 1e-9)
    assert found == pytest.approx(kept.errors(), abs=1e-3)
