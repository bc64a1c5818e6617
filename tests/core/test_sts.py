"""Sequential temperature scaling on confidences whose miscalibration is known."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_sglang.core.sts import (
    area_under_curve,
    calibration_error,
    fit_sts,
    sigmoid,
    survival_errors,
)

TRUE = np.array([2.0, 0.5, 4.0])


@pytest.fixture(scope="module")
def blocks() -> tuple[np.ndarray, np.ndarray]:
    """Logits that are too large or small by ``TRUE``, and decisions drawn from the truth."""
    generator = np.random.default_rng(3)
    logits = generator.normal(0.4, 1.5, (40_000, 3)) * TRUE
    return logits, (generator.random(logits.shape) < sigmoid(logits / TRUE)).astype(float)


def test_the_true_temperatures_are_found(blocks: tuple[np.ndarray, np.ndarray]) -> None:
    fit = fit_sts(*blocks)
    assert fit.temperatures == pytest.approx(TRUE, rel=0.25)
    assert fit.after.mean() < 0.01 < 0.05 < fit.before.mean()


def test_the_reported_errors_are_those_of_the_temperatures(
    blocks: tuple[np.ndarray, np.ndarray],
) -> None:
    fit = fit_sts(*blocks)
    assert survival_errors(*blocks, fit.temperatures) == pytest.approx(fit.after)
    assert survival_errors(*blocks, np.ones(3)) == pytest.approx(fit.before)


def test_a_position_never_changes_its_ranking(blocks: tuple[np.ndarray, np.ndarray]) -> None:
    logits = blocks[0]
    fit = fit_sts(*blocks)
    for k in range(3):
        order = np.argsort(logits[:, k])
        assert np.all(np.diff(sigmoid(logits[order, k] / fit.temperatures[k])) >= 0)


def test_soft_labels_fit_as_decisions_do(blocks: tuple[np.ndarray, np.ndarray]) -> None:
    logits = blocks[0]
    fit = fit_sts(logits, sigmoid(logits / TRUE))
    assert fit.temperatures == pytest.approx(TRUE, rel=0.05)


def test_calibration_error_of_known_cases() -> None:
    predicted = np.array([0.1, 0.1, 0.9, 0.9])
    assert calibration_error(predicted, np.array([0.0, 0.2, 1.0, 0.8])) == pytest.approx(0.0)
    assert calibration_error(predicted, np.array([0.0, 0.0, 0.0, 0.0])) == pytest.approx(0.5)
    assert calibration_error(np.ones(4), np.zeros(4)) == 1.0
    assert calibration_error(np.empty(0), np.empty(0)) == 0.0


def test_area_under_the_curve_counts_pairs() -> None:
    predicted = np.array([0.9, 0.8, 0.8, 0.3, 0.1])
    observed = np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    pairs = [
        (p > q) + 0.5 * (p == q)
        for p, o in zip(predicted, observed, strict=True)
        for q, u in zip(predicted, observed, strict=True)
        if o == 1 and u == 0
    ]
    assert area_under_curve(predicted, observed) == pytest.approx(np.mean(pairs))
    # Half an outcome is half of each.
    twice = area_under_curve(np.repeat(predicted, 2), np.tile([1.0, 0.0], 5))
    assert area_under_curve(predicted, np.full(5, 0.5)) == pytest.approx(twice) == 0.5
    assert area_under_curve(predicted, np.ones(5)) == 0.5


def test_temperatures_leave_the_ranking_of_a_position_alone(
    blocks: tuple[np.ndarray, np.ndarray],
) -> None:
    logits, outcomes = blocks
    plain = area_under_curve(logits[:, 0], outcomes[:, 0])
    scaled = area_under_curve(sigmoid(logits[:, 0] / 3.0), outcomes[:, 0])
    assert plain == pytest.approx(scaled, abs=1e-6)
    assert plain > 0.7


# --- blocks of which only a part was verified --------------------------------------------------


def test_all_verified_is_the_same_as_no_mask(blocks: tuple[np.ndarray, np.ndarray]) -> None:
    logits, outcomes = (part[:8000] for part in blocks)
    found = fit_sts(logits, outcomes, verified=np.ones(logits.shape, dtype=bool))
    wanted = fit_sts(logits, outcomes)
    for one, other in zip(found, wanted, strict=True):
        assert one.tolist() == other.tolist()


def censored(
    logits: np.ndarray, outcomes: np.ndarray, lens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes as service sees them, 0 after the last token verified, and which were verified."""
    verified = np.arange(logits.shape[1]) < lens[:, None]
    return outcomes * verified, verified


@pytest.mark.parametrize("lens", ["random", "by confidence"])
def test_censored_blocks_give_the_true_temperatures(
    blocks: tuple[np.ndarray, np.ndarray], lens: str
) -> None:
    logits, outcomes = blocks
    if lens == "random":
        chosen = np.random.default_rng(4).integers(0, 4, len(logits))
    else:  # a scheduler verifies what it is confident of
        chosen = (np.cumprod(sigmoid(logits / TRUE), axis=1) > 0.25).sum(axis=1)
    seen, verified = censored(logits, outcomes, chosen)
    fit = fit_sts(logits, seen, verified=verified)
    assert fit.temperatures == pytest.approx(TRUE, rel=0.3)
    assert fit.after.mean() < 0.01 < fit.before.mean()
    # Taken for rejections, the others would spoil it.
    assert fit_sts(logits, seen).after.mean() > 3 * fit.after.mean()


def test_what_was_not_verified_is_not_read(blocks: tuple[np.ndarray, np.ndarray]) -> None:
    logits, outcomes = (part[:8000] for part in blocks)
    lens = np.random.default_rng(5).integers(0, 4, len(logits))
    seen, verified = censored(logits, outcomes, lens)
    one = fit_sts(logits, seen, verified=verified)
    other = fit_sts(np.where(verified, logits, 99.0), np.where(verified, seen, 1.0),
                    verified=verified)  # fmt: skip
    assert one.temperatures.tolist() == other.temperatures.tolist()
    assert one.after.tolist() == other.after.tolist()


def test_a_position_that_was_never_verified_keeps_its_scale(
    blocks: tuple[np.ndarray, np.ndarray],
) -> None:
    logits, outcomes = (part[:4000] for part in blocks)
    seen, verified = censored(logits, outcomes, np.full(4000, 2))
    fit = fit_sts(logits, seen, verified=verified)
    assert fit.temperatures[2] == pytest.approx(1.0, rel=0.05)
    assert fit.after[2] == fit.before[2] == 0.0
