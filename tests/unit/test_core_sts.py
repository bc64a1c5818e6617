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
