"""Keys that change a running server: checked in full before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dspark_sglang.artifacts import SCHEMA_VERSION, STSArtifact, read_sts, write_json
from dspark_sglang.core.steps import CostModel, Step
from dspark_sglang.errors import ArtifactError, ConfigError
from dspark_sglang.provenance import provenance
from dspark_sglang.serving import commands, cost_store, sts_refit
from dspark_sglang.serving.control import Control

GAMMA = 3
FINGERPRINT = {"target": "t", "drafter": "d"}


class Worker:
    """The part of our worker that commands change, over real files and real scheduling."""

    def __init__(self, folder: Path, *, adaptive: bool = True) -> None:
        self.control = Control(gamma=GAMMA, adaptive=adaptive)
        self.cost_path, self.sts_path = folder / "cost.json", folder / "sts.json"
        self.temperatures = [1.0] * GAMMA
        self.saved = self.caught_up = 0
        self.canary: bool | None = None
        self.commands = commands.Commands(self)

    def report_canary(self, passed: bool) -> None:
        self.canary = passed

    def catch_up(self) -> None:
        self.caught_up += 1

    def _set(self, temperatures: list[float]) -> Callable[[], None]:
        def apply() -> None:
            self.temperatures = temperatures
            self.control.reliability.forget()

        return apply

    def plan_no_sts(self) -> Callable[[], None]:
        return self._set([1.0] * GAMMA)

    def plan_sts_file(self) -> Callable[[], None]:
        return self._set(read_sts(self.sts_path, gamma=GAMMA).temperatures)

    def plan_sts_refit(self) -> Callable[[], None]:
        return self._set(sts_refit.fit(self.control.reliability.blocks).temperatures)

    def plan_cost_file(self) -> Callable[[], None]:
        found = CostModel(gamma=GAMMA)
        cost_store.load(self.cost_path, FINGERPRINT, found)
        return lambda: self.control.cost.restore(found.state())

    def plan_save_cost(self) -> Callable[[], None]:
        cost_store.require_both_kinds(self.control.cost)

        def apply() -> None:
            cost_store.save(self.cost_path, FINGERPRINT, self.control.cost)
            self.saved += 1

        return apply


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    made = Worker(tmp_path)
    for _ in range(20):
        made.control.cost.observe(Step(2, 4, 100, round=True), 0.02)
        made.control.cost.observe(Step(2, 0, 100, round=False), 0.01)
    return made


def state(worker: Worker) -> dict[str, Any]:
    """Everything that commands may change."""
    control = worker.control
    return {
        "choice": control.policy.choice,
        "forced": control.forced,
        "temperatures": worker.temperatures,
        "cost": control.cost.state(),
        "saved": worker.saved,
        "blocks": len(control.reliability.blocks.lens),
    }


def update(worker: Worker, requested: dict[str, float]) -> bool:
    """SGLang's own handling of ``/set_internal_state`` with our table of keys."""
    internal = pytest.importorskip("sglang.srt.managers.scheduler_components.internal_state")
    kind = internal.SchedulerInternalStateController
    controller = kind(SimpleNamespace(draft_worker=worker), record_step_time=False)
    controller._update_handlers = lambda: commands.handlers(kind._update_handlers, controller)
    found = controller.set_internal_state(SimpleNamespace(server_args=requested))
    return bool(found.updated)


@pytest.mark.parametrize(("value", "choice"), [(-1, "auto"), (0, "off"), (1, "on"), (1.0, "on")])
def test_speculation_is_switched(worker: Worker, value: float, choice: str) -> None:
    worker.control.choose("off" if choice == "on" else "on")
    assert update(worker, {"dspark_speculation": value})
    assert worker.control.policy.choice == choice
    assert worker.caught_up, "what steps that still run have shown is learned before"


@pytest.mark.parametrize(
    ("value", "forced"), [(0, 0.0), (0.5, 0.5), (1, 1.0), (-1, None), (-1.0, None)]
)
def test_a_budget_is_forced(worker: Worker, value: float, forced: float | None) -> None:
    worker.control.forced = 0.25
    assert update(worker, {"dspark_budget": value})
    assert worker.control.forced == forced


@pytest.mark.parametrize(("value", "forced"), [(0.5, 0.5), (1, 1.0), (None, None), (0, 0.0)])
def test_sglangs_own_key_sets_the_same_budget(
    worker: Worker, value: float | None, forced: float | None
) -> None:
    worker.control.forced = 0.25
    assert update(worker, {"dspark_force_budget_frac": value})
    assert worker.control.forced == forced


def test_a_cost_that_would_not_be_read_again_is_not_written(worker: Worker) -> None:
    worker.control.cost.forget()
    worker.control.cost.observe(Step(2, 0, 100, round=False), 0.01)
    assert not update(worker, {"dspark_cost": 2})
    assert worker.saved == 0 and not worker.cost_path.exists()
    with pytest.raises(ConfigError, match="1 steps are not of both kinds"):
        worker.commands.prepare("dspark_cost", 2)


def test_the_step_cost_is_written_forgotten_and_read(worker: Worker) -> None:
    known = worker.control.cost.state()
    assert update(worker, {"dspark_cost": 2}) and worker.saved == 1
    assert update(worker, {"dspark_cost": 0})
    assert worker.control.cost.observations == 0
    assert update(worker, {"dspark_cost": 1})
    assert worker.control.cost.state() == known


def test_calibration_is_read_again_and_dropped(worker: Worker) -> None:
    artifact = STSArtifact(
        schema_version=SCHEMA_VERSION, gamma=GAMMA, temperatures=[0.5, 1.5, 2.0],
        drafter_sha256="x", target="t", provenance=provenance(["test"]),
    )  # fmt: skip
    write_json(worker.sts_path, artifact)
    assert update(worker, {"dspark_sts": 1}) and worker.temperatures == [0.5, 1.5, 2.0]
    assert update(worker, {"dspark_sts": 0}) and worker.temperatures == [1.0] * GAMMA


def test_calibration_is_fitted_to_what_was_verified(worker: Worker) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0.5, 2.0, (2000, GAMMA))
    chance = torch.sigmoid(torch.from_numpy(logits) / 2.5).numpy()
    counts = (rng.random((2000, GAMMA)) < chance).cumprod(axis=1).sum(axis=1)
    worker.control.reliability.observe(
        torch.sigmoid(torch.from_numpy(logits)).numpy(), logits, np.full(2000, GAMMA), counts,
        np.ones(2000, dtype=bool),
    )  # fmt: skip
    assert update(worker, {"dspark_sts": 2})
    assert worker.temperatures[:2] == pytest.approx([2.5] * 2, rel=0.35)
    # What was seen before the fit says nothing of confidences after it.
    assert len(worker.control.reliability.blocks.lens) == 0


REFUSED = [
    {"dspark_speculation": 2},
    {"dspark_speculation": 0.5},
    {"dspark_speculation": float("nan")},
    {"dspark_budget": 1.01},
    {"dspark_budget": -0.5},
    {"dspark_budget": float("nan")},
    {"dspark_budget": float("inf")},
    {"dspark_force_budget_frac": 1.01},
    {"dspark_sts": 3},
    {"dspark_sts": 1},  # there is no file
    {"dspark_sts": 2},  # nothing was verified
    {"dspark_cost": -1},
    {"dspark_cost": 1},  # there is no file
    {"dspark_unknown": 1},
]


@pytest.mark.parametrize("requested", REFUSED, ids=str)
def test_a_value_of_no_use_is_refused(worker: Worker, requested: dict[str, float]) -> None:
    before = state(worker)
    assert not update(worker, requested)
    assert state(worker) == before


@pytest.mark.parametrize("requested", REFUSED, ids=str)
def test_nothing_is_changed_where_one_of_several_is_refused(
    worker: Worker, requested: dict[str, float]
) -> None:
    before = state(worker)
    good = {"dspark_budget": 0.5, "dspark_speculation": 0, "dspark_cost": 0, "dspark_sts": 0}
    for name in requested:
        good.pop(name, None)
    assert not update(worker, {**good, **requested})
    assert state(worker) == before
    assert update(worker, good)
    assert state(worker) != before


def test_several_keys_at_once(worker: Worker) -> None:
    assert update(worker, {"dspark_speculation": 1, "dspark_budget": 0.75, "dspark_cost": 0})
    assert (worker.control.policy.choice, worker.control.forced) == ("on", 0.75)
    assert worker.control.cost.observations == 0


def test_a_damaged_cost_file_is_refused_with_its_reason(worker: Worker) -> None:
    worker.cost_path.write_text('{"kind": "cost"')
    with pytest.raises(ArtifactError, match=r"cost\.json cannot be read"):
        worker.commands.prepare("dspark_cost", 1)


@pytest.mark.parametrize("key", [k for k in commands.Commands(None).keys if k != "dspark_canary"])
def test_a_server_that_does_not_schedule_refuses_every_key(tmp_path: Path, key: str) -> None:
    worker = Worker(tmp_path, adaptive=False)
    before = state(worker)
    assert not update(worker, {key: 0})
    assert state(worker) == before
    with pytest.raises(ConfigError, match="DSPARK_SCHEDULE=adaptive"):
        worker.commands.prepare(key, 0)


def test_sglangs_own_keys_stay(worker: Worker) -> None:
    internal = pytest.importorskip("sglang.srt.managers.scheduler_components.internal_state")
    kind = internal.SchedulerInternalStateController
    controller = kind(SimpleNamespace(draft_worker=worker), record_step_time=False)
    own = set(kind._update_handlers(controller))
    assert set(commands.handlers(kind._update_handlers, controller)) == own | set(
        worker.commands.keys
    )
    other = kind(SimpleNamespace(draft_worker=object()), record_step_time=False)
    assert set(commands.handlers(kind._update_handlers, other)) == own


def test_the_messages_say_what_to_do(worker: Worker) -> None:
    with pytest.raises(ConfigError, match=r"dspark_speculation is 7.* -1 or 0 or 1"):
        worker.commands.prepare("dspark_speculation", 7)
    with pytest.raises(ConfigError, match=r"0 to 1, or -1"):
        worker.commands.prepare("dspark_budget", 2)
    with pytest.raises(ConfigError, match=r"at least 256"):
        worker.commands.prepare("dspark_sts", 2)


@pytest.mark.parametrize("adaptive", [True, False])
def test_every_server_takes_the_canarys_verdict(tmp_path: Path, adaptive: bool) -> None:
    worker = Worker(tmp_path, adaptive=adaptive)
    assert update(worker, {"dspark_canary": 0}) and worker.canary is False
    assert update(worker, {"dspark_canary": 1}) and worker.canary is True
    assert not update(worker, {"dspark_canary": 2}) and worker.canary is True
