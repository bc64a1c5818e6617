"""The learned step cost: what it predicts of machines that are known, and what must not move it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_sglang.core.schedule import admission_order, early_stop_budget, global_budget
from dspark_sglang.core.schedule.admission import survival
from dspark_sglang.core.schedule.cost_model import CostModel, Step
from dspark_sglang.errors import ConfigError

GAMMA = 5


def stairs(step: Step) -> float:
    """Seconds on a machine whose kernels run in tiles of 8 tokens."""
    tiles = -(-(step.requests + step.drafted) // 8)
    plain = 0.010 + 0.0032 * tiles + 2e-6 * step.context + 3e-4 * step.sampled
    return plain + (0.006 + 5e-4 * step.requests if step.round else 0.0)


def affine(step: Step) -> float:
    """Seconds on a machine that the affine law describes."""
    plain = 0.010 + 0.0004 * (step.requests + step.drafted) + 2e-6 * step.context
    return plain + (0.006 if step.round else 0.0)


def some_step(rng: np.random.Generator, *, drafts: bool | None = None) -> Step:
    """A step of a mixed load; ``drafts``: only of that kind."""
    requests = int(2 ** rng.uniform(0, 6))
    is_round = bool(rng.random() < 0.7) if drafts is None else drafts
    drafted = int(rng.integers(0, requests * GAMMA + 1)) if is_round else 0
    context = int(requests * rng.integers(30, 400))
    return Step(requests, drafted, context, is_round, int(rng.integers(0, requests + 1)))


def learn(
    model: CostModel,
    steps: int,
    *,
    seed: int,
    noise: float = 0.05,
    slower: float = 1.0,
    drafts: bool | None = None,
    machine: Callable[[Step], float] = stairs,
) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        step = some_step(rng, drafts=drafts)
        model.observe(step, slower * machine(step) * math.exp(noise * rng.standard_normal()))


def predict(model: CostModel, step: Step) -> float:
    if step.round:
        return model.round_seconds(step.requests, step.drafted, step.context, step.sampled)
    return model.plain_seconds(step.requests, step.context, step.sampled)


def ratios(
    model: CostModel, *, drafts: bool, machine: Callable[[Step], float] = stairs
) -> np.ndarray:
    """Predicted over true seconds of steps that were not learned from."""
    rng = np.random.default_rng(99)
    steps = [some_step(rng, drafts=drafts) for _ in range(200)]
    return np.array([predict(model, step) / machine(step) for step in steps])


@pytest.fixture(scope="module")
def learned() -> CostModel:
    """Knows the machine with stairs; tests change copies of it."""
    model = CostModel(gamma=GAMMA)
    learn(model, 600, seed=0)
    return model


# --- accuracy ------------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [True, False], ids=["rounds", "plain"])
@pytest.mark.parametrize("seed", range(4))
def test_a_noisy_machine_with_stairs_is_learned(seed: int, drafts: bool) -> None:
    model = CostModel(gamma=GAMMA)
    learn(model, 600, seed=seed)
    wrong = np.abs(ratios(model, drafts=drafts) - 1)
    assert np.median(wrong) < 0.06
    assert np.quantile(wrong, 0.9) < 0.15


@pytest.mark.parametrize("drafts", [True, False], ids=["rounds", "plain"])
def test_an_affine_machine_is_learned_closely(drafts: bool) -> None:
    model = CostModel(gamma=GAMMA)
    learn(model, 800, seed=1, noise=0.0, machine=affine)
    wrong = np.abs(ratios(model, drafts=drafts, machine=affine) - 1)
    assert np.median(wrong) < 0.03
    assert np.quantile(wrong, 0.95) < 0.1


def busy(rng: np.random.Generator) -> float:
    """Logarithm of how much longer a step takes on a machine that others use: now and then one stalls."""
    stall = rng.uniform(0.2, 0.9) if rng.random() < 0.04 else 0.0
    return float(rng.normal(0.0, 0.05) + stall)


@pytest.mark.parametrize("seed", range(2))
def test_stalls_do_not_make_the_law_drift(seed: int) -> None:
    """Rounds over plain steps after hours; the law and the machine's speed must not run apart."""
    rng, model = np.random.default_rng(seed), CostModel(gamma=GAMMA)
    for number in range(12_000):
        requests = 1 if rng.random() < 0.3 else 2
        plain = (number // 3) % 85 == 0
        drafted = 0 if plain else int(rng.integers(0, GAMMA * requests + 1))
        step = Step(requests, drafted, 100 * requests, not plain)
        model.observe(step, affine(step) * math.exp(busy(rng)))
    assert 0.85 < model.slowdown < 1.2
    for requests in (1, 2):
        full, context = GAMMA * requests, 100 * requests
        found = model.round_seconds(requests, full, context) / model.plain_seconds(
            requests, context
        )
        wanted = affine(Step(requests, full, context, True)) / affine(
            Step(requests, 0, context, False)
        )
        assert found == pytest.approx(wanted, rel=0.05)


def test_one_slow_depth_at_the_start_leaves_the_budgets_of_the_others() -> None:
    """What is measured before the server listens: four steps of each depth, two of one depth stalled."""
    model = CostModel(gamma=GAMMA)
    for number in range(24):
        depth = (5, 0, 4, 1, 3, 2)[number % 6]
        for step in (Step(1, depth, 40, True), Step(1, 0, 40, False)):
            stalled = step.round and number in (4, 10)  # of depth 3
            model.observe(step, affine(step) * (2.5 if stalled else 1.0))
    seconds = model.curve(1, 40).seconds(np.arange(1, GAMMA + 2))
    true = np.array([affine(Step(1, depth, 40, True)) for depth in range(GAMMA + 1)])
    assert np.diff(seconds).max() < 3.0 * np.diff(true).max()
    assert seconds == pytest.approx(true, rel=0.12)


def test_a_measurement_is_fitted_all_at_once_without_its_stalls() -> None:
    """One step in seven stalls, among them the first of every load, as when caches are cold."""
    rng, model = np.random.default_rng(0), CostModel(gamma=GAMMA)
    steps = []
    for requests in (32, 8, 2, 16, 4, 1) * 2:
        for number in range(20):
            is_round = number % 2 == 0
            drafted = requests * (5, 0, 4, 1, 3, 2)[number // 2 % 6] if is_round else 0
            step = Step(requests, drafted, 40 * requests, is_round)
            stall = 1.8 if number == 0 or rng.random() < 0.1 else 1.0
            steps.append((step, affine(step) * stall * math.exp(0.01 * rng.standard_normal())))
    for step, seconds in steps:
        model.observe(step, seconds)
    model.refit(steps)
    assert model.observations == len(steps) and model.slowdown == 1.0
    for step, _ in steps:
        assert predict(model, step) == pytest.approx(affine(step), rel=0.05)


def test_rounds_of_a_load_are_told_apart_from_plain_steps_within_a_few_probes() -> None:
    """In service plain steps of one load last a third longer than was measured, and rounds no more than before."""
    steps = [
        (step, affine(step))
        for requests in (1, 2, 4, 8, 16) * 6
        for drafted in (0, requests, 3 * requests, 5 * requests)
        for step in (Step(requests, drafted, 800, True), Step(requests, 0, 800, False))
    ]
    model = CostModel(gamma=GAMMA)
    model.refit(steps)
    plain, probe = Step(16, 0, 800, False), Step(16, 48, 800, True)

    def ratio() -> float:
        return predict(model, probe) / predict(model, plain)

    measured = affine(probe) / affine(plain)
    assert ratio() == pytest.approx(measured, rel=0.05)
    for _ in range(4):
        for _ in range(40):
            model.observe(plain, 1.33 * affine(plain))
        model.observe(probe, affine(probe))
    assert ratio() == pytest.approx(measured / 1.33, rel=0.08)


def test_the_reported_error_is_that_of_predictions_made_before(learned: CostModel) -> None:
    # The median of |exp(N(0, 0.05)) - 1| is 3.4%: less would be hindsight.
    assert learned.error is not None and 0.025 < learned.error < 0.07
    assert CostModel(gamma=GAMMA).error is None


@pytest.mark.parametrize("step", [Step(1, 3, 90, True), Step(32, 40, 9000, True, 32)], ids=str)
def test_a_load_that_never_varies_is_predicted_all_the_same(step: Step) -> None:
    model, rng = CostModel(gamma=GAMMA), np.random.default_rng(2)
    for _ in range(2000):
        model.observe(step, 0.03 * math.exp(0.02 * rng.standard_normal()))
    assert predict(model, step) == pytest.approx(0.03, rel=0.03)
    # No wind-up: a neighbour seen afterwards does not throw the known point off.
    model.observe(step._replace(drafted=step.drafted + 1), 0.045)
    assert predict(model, step) == pytest.approx(0.03, rel=0.12)


def test_more_context_and_more_sampling_cost_more(learned: CostModel) -> None:
    assert learned.plain_seconds(16, 6000) > learned.plain_seconds(16, 600)
    assert learned.plain_seconds(16, 2000, 16) > learned.plain_seconds(16, 2000, 0)
    assert learned.round_seconds(16, 20, 6000) > learned.round_seconds(16, 20, 600)


def test_what_was_never_seen_costs_infinitely_much() -> None:
    model = CostModel(gamma=GAMMA)
    assert model.round_seconds(4, 8, 100) == model.plain_seconds(4, 100) == math.inf
    model.observe(Step(4, 8, 100, round=True), 0.02)
    assert not model.comparable and model.plain_seconds(4, 100) == math.inf
    model.observe(Step(4, 0, 100, round=False), 0.01)
    assert model.comparable and model.observations == 2
    assert model.round_seconds(4, 8, 100) == pytest.approx(0.02, rel=1e-2)
    assert model.plain_seconds(4, 100) == pytest.approx(0.01, rel=1e-3)


# --- a machine that changes ------------------------------------------------------------------


@pytest.mark.parametrize("slower", [0.5, 2.0])
def test_a_slower_machine_is_noticed_for_both_kinds_by_either(
    learned: CostModel, slower: float
) -> None:
    model = copy.deepcopy(learned)
    learn(model, 400, seed=3, slower=slower, drafts=True)
    assert model.slowdown / learned.slowdown == pytest.approx(slower, rel=0.15)
    assert np.median(ratios(model, drafts=True)) == pytest.approx(slower, rel=0.06)
    # No plain step was seen meanwhile.
    assert np.median(ratios(model, drafts=False)) == pytest.approx(slower, rel=0.12)


def test_a_kind_that_alone_became_slower_is_told_apart_by_looks_at_the_other() -> None:
    model, step = CostModel(gamma=GAMMA), Step(8, 16, 1000, round=True)
    plain = Step(8, 0, 1000, round=False)
    for factor in (1.0, 2.0):
        for turn in range(2000):
            if turn % 100 < 97:
                model.observe(step, 0.02 * factor)
            else:
                model.observe(plain, 0.01)
    assert predict(model, step) / predict(model, plain) == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("drafts", [True, False], ids=["round", "plain"])
@pytest.mark.parametrize("seed", range(4))
def test_one_stall_moves_predictions_a_little_and_is_forgotten(
    learned: CostModel, seed: int, drafts: bool
) -> None:
    model = copy.deepcopy(learned)
    step = some_step(np.random.default_rng(seed), drafts=drafts)
    model.observe(step, 10 * stairs(step))
    for kind in (True, False):
        moved = ratios(model, drafts=kind) / ratios(learned, drafts=kind)
        assert moved.min() > 0.75 and moved.max() < 1.6  # a third of the stall, at most
    learn(model, 300, seed=seed + 50)
    assert np.median(np.abs(ratios(model, drafts=drafts) - 1)) < 0.06


@pytest.mark.parametrize("drafts", [True, False], ids=["round", "plain"])
def test_a_longer_stall_moves_no_more(learned: CostModel, drafts: bool) -> None:
    step = some_step(np.random.default_rng(5), drafts=drafts)
    states = []
    for stall in (10.0, 1e6):
        model = copy.deepcopy(learned)
        model.observe(step, stall * stairs(step))
        states.append(model.state())
    assert states[0] == states[1] != learned.state()


def test_a_slow_first_step_is_forgotten() -> None:
    """A server's first step warms caches up and may take a hundred times as long."""
    model = CostModel(gamma=GAMMA)
    model.observe(Step(4, 8, 300, round=True), 2.0)
    model.observe(Step(4, 0, 300, round=False), 1.0)
    learn(model, 800, seed=4)
    for drafts in (True, False):
        assert np.median(ratios(model, drafts=drafts)) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, -math.inf], ids=str)
def test_a_clock_that_jumps_teaches_nothing(learned: CostModel, seconds: float) -> None:
    model = copy.deepcopy(learned)
    for kind in (True, False):
        model.observe(some_step(np.random.default_rng(6), drafts=kind), seconds)
    assert (model.state(), model.error) == (learned.state(), learned.error)
    model.observe(Step(0, 0, 0, round=True), 0.01)  # nor does a step of nobody
    assert model.state() == learned.state()


# --- keeping it ----------------------------------------------------------------------------------


def test_what_was_learned_survives_being_written_down(learned: CostModel) -> None:
    found = CostModel(gamma=GAMMA)
    found.restore(json.loads(json.dumps(learned.state())))
    assert found.state() == learned.state()
    rng = np.random.default_rng(7)
    for _ in range(50):
        step = some_step(rng)
        assert predict(found, step) == predict(learned, step)


@pytest.mark.parametrize("faster", [1.0, 10.0, 100.0], ids=["cpu", "gpu", "fast-gpu"])
def test_a_load_that_never_varies_in_kind_is_kept_too(faster: float) -> None:
    """All requests sample and all contexts are alike: what is learned of them is of lower rank."""
    model, rng = CostModel(gamma=GAMMA), np.random.default_rng(9)
    for _ in range(300):
        for drafts in (True, False):
            step = some_step(rng, drafts=drafts)
            step = step._replace(sampled=step.requests, context=400 * step.requests)
            noise = math.exp(0.03 * rng.standard_normal())
            model.observe(step, affine(step) / faster * noise)
    found = CostModel(gamma=GAMMA)
    found.restore(model.state())
    assert found.state() == model.state()


def test_restoring_replaces_old_curves(learned: CostModel) -> None:
    model = CostModel(gamma=GAMMA)
    before = model.curve(4, 100).seconds(np.array([4]))[0]
    model.restore(learned.state())
    assert model.curve(4, 100).seconds(np.array([4]))[0] != before


def test_a_forgetful_model_is_a_new_one(learned: CostModel) -> None:
    model = copy.deepcopy(learned)
    model.forget()
    assert model.state() == CostModel(gamma=GAMMA).state()
    assert model.observations == 0 and model.error is None


def changed(state: dict[str, Any], *path: str, value: Any) -> dict[str, Any]:
    """A copy with one value replaced, or taken out where it is None."""
    result = copy.deepcopy(state)
    *folders, last = path
    place = result
    for name in folders:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return result


BAD: dict[str, tuple[tuple[str, ...], Any]] = {
    "another-gamma": (("gamma",), GAMMA + 2),
    "no-gamma": (("gamma",), None),
    "no-plain": (("plain",), None),
    "no-slower": (("slower",), None),
    "slower-is-text": (("slower",), "fast"),
    "no-theta": (("round", "theta"), None),
    "no-observations": (("round", "observations"), None),
    "theta-is-short": (("round", "theta"), [1.0, 1.0]),
    "theta-is-nan": (("plain", "theta"), [math.nan, 1.0, 1.0, 1.0, 1.0]),
    "theta-is-negative": (("plain", "theta"), [-1.0, 1.0, 1.0, 1.0, 1.0]),
    "theta-is-nothing": (("plain", "theta"), [0.0] * 5),
    "theta-is-text": (("plain", "theta"), ["a", "b", "c", "d", "e"]),
    "moments-are-ragged": (("plain", "moments"), [[1.0], [1.0, 2.0]]),
    "grid-of-another-gamma": (("round", "grid"), [[0.0] * GAMMA] * 12),
    "grid-is-infinite": (("round", "grid"), [[math.inf] * (GAMMA + 1)] * 12),
    "seen-is-negative": (("round", "seen"), [[-1.0] * (GAMMA + 1)] * 12),
    "a-kind-is-a-list": (("round",), [1, 2]),
}
#: What looks like a cost model and would stop the server later.
HARMFUL: dict[str, tuple[tuple[str, ...], Any]] = {
    "no-grid": (("round", "grid"), None),
    "no-moments": (("plain", "moments"), None),
    "a-field-more": (("round", "colour"), [1.0]),
    "slower-overflows": (("slower",), 1e6),
    "slower-is-nan": (("slower",), math.nan),
    "theta-overflows": (("round", "theta"), [1e308] * 5),
    "grid-overflows": (("round", "grid"), [[1e6] * (GAMMA + 1)] * 12),
    "moments-are-indefinite": (("round", "moments"), (-1e30 * np.eye(5)).tolist()),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_cost_model_is_refused_and_changes_nothing(
    learned: CostModel, name: str
) -> None:
    (path, value), model = BAD[name], copy.deepcopy(learned)
    with pytest.raises(ConfigError) as caught:
        model.restore(changed(learned.state(), *path, value=value))
    assert "dspark calibrate --cost" in caught.value.fix
    assert model.state() == learned.state()


@pytest.mark.parametrize("name", HARMFUL)
def test_what_would_stop_the_server_later_is_refused(learned: CostModel, name: str) -> None:
    (path, value), model = HARMFUL[name], copy.deepcopy(learned)
    with pytest.raises(ConfigError):
        model.restore(changed(learned.state(), *path, value=value))
    assert model.state() == learned.state()


# --- curves ----------------------------------------------------------------------------------------


@st.composite
def served(draw: st.DrawFn) -> list[tuple[Step, float]]:
    """Steps and durations with nothing regular about them."""
    found = []
    for _ in range(draw(st.integers(0, 25))):
        requests = draw(st.integers(1, 64))
        is_round = draw(st.booleans())
        drafted = draw(st.integers(0, requests * GAMMA)) if is_round else 0
        context, sampled = draw(st.integers(0, 1 << 20)), draw(st.integers(0, requests))
        step = Step(requests, drafted, context, is_round, sampled)
        found.append((step, draw(st.floats(1e-5, 1e3))))
    return found


@given(steps=served(), requests=st.integers(1, 48), context=st.integers(0, 1 << 18))
def test_curves_are_convex_finite_and_never_fall(
    steps: list[tuple[Step, float]], requests: int, context: int
) -> None:
    model = CostModel(gamma=GAMMA)
    for step, seconds in steps:
        model.observe(step, seconds)
    curve = model.curve(requests, context, requests // 2)
    seconds = curve.seconds(np.arange(requests, requests * (GAMMA + 1) + 1))
    assert np.isfinite(seconds).all() and (seconds > 0).all()
    slack = 1e-9 * seconds.max()
    assert (np.diff(seconds) >= -slack).all()
    assert (np.diff(seconds, n=2) >= -slack).all()


@given(seed=st.integers(0, 10_000), requests=st.sampled_from([1, 3, 8, 20]))
def test_early_stopping_finds_the_best_budget_of_a_curve(
    learned: CostModel, seed: int, requests: int
) -> None:
    rng = np.random.default_rng(seed)
    values = survival(rng.uniform(0.2, 1.0, (requests, GAMMA)))
    curve = learned.curve(requests, 100 * requests)
    assert early_stop_budget(values, admission_order(values), curve) == global_budget(values, curve)


def test_a_curve_is_nowhere_above_what_rounds_cost(learned: CostModel) -> None:
    curve = learned.curve(8, 1000)
    for depth in range(GAMMA + 1):
        seconds = learned.round_seconds(8, 8 * depth, 1000)
        assert curve.seconds(np.array([8 + 8 * depth]))[0] <= seconds * (1 + 1e-9)


def test_before_any_step_64_tokens_double_a_round() -> None:
    curve = CostModel(gamma=GAMMA).curve(16, 0)
    seconds = curve.seconds(np.array([16, 16 + 64]))
    assert seconds[1] - seconds[0] == pytest.approx(1.0)
    assert seconds[0] == pytest.approx(1.25)


@pytest.mark.parametrize("gamma", [1, 2, 7])
def test_any_gamma_has_a_curve(gamma: int) -> None:
    model = CostModel(gamma=gamma)
    for drafted in range(gamma + 1):
        model.observe(Step(2, 2 * drafted, 64, round=True), 0.01 + 0.001 * drafted)
    seconds = model.curve(2, 64).seconds(np.array([2, 2 * (gamma + 1)]))
    assert seconds[0] < seconds[1] < 0.03
    assert early_stop_budget(np.ones((2, gamma)), np.arange(2 * gamma), model.curve(2, 64)) > 0


def test_memory_does_not_grow_with_steps() -> None:
    model, rng = CostModel(gamma=GAMMA), np.random.default_rng(8)
    sizes = []
    for _ in range(3):
        for _ in range(700):
            step = some_step(rng)
            model.curve(step.requests, step.context, step.sampled)
            model.observe(step, stairs(step))
        sizes.append((len(model._errors), len(model._curves) <= 16))
    assert sizes == [(512, True)] * 3
