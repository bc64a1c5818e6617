"""Keys that change a running server: checked in full before anything is changed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dspark_sglang.artifacts import SCHEMA_VERSION, STSArtifact, write_json
from dspark_sglang.config import Settings
from dspark_sglang.core.schedule.cost_model import Step
from dspark_sglang.core.schedule.scheduler import Scheduler, Synchronous, VerifyAll
from dspark_sglang.errors import ArtifactError, ConfigError
from dspark_sglang.provenance import provenance
from dspark_sglang.serving import admin
from dspark_sglang.serving import calibration as serving_calibration
from dspark_sglang.serving.calibration import Calibration, KnownCost
from dspark_sglang.serving.faults import Faults

GAMMA = 3
FINGERPRINT = {"target": "t", "drafter": "d"}


class Worker:
    """The part of our worker that commands change, over real files and real scheduling."""

    def __init__(self, folder: Path, *, kind: type[Scheduler] = Synchronous) -> None:
        self.scheduler, self.faults = kind(gamma=GAMMA), Faults()
        self.sts_path = folder / "sts.json"
        settings = Settings(cache_dir=str(folder), sts=str(self.sts_path))
        self.known_cost = KnownCost(settings, self.scheduler, FINGERPRINT, writes=True)
        self.scheduler.measurement.running = False
        self.calibration = Calibration(settings, gamma=GAMMA, drafter_sha256=None)
        self.temperatures = [1.0] * GAMMA
        self.caught_up = 0
        self.canary: bool | None = None
        self.commands = admin.Commands(self)

    @property
    def kept(self) -> bytes | None:
        """The cost file."""
        path = self.known_cost.path
        return path.read_bytes() if path is not None and path.exists() else None

    @property
    def cost_path(self) -> Path:
        path = self.known_cost.path
        assert path is not None
        return path

    def report_canary(self, passed: bool) -> None:
        self.canary = passed

    def catch_up(self) -> None:
        self.caught_up += 1

    def set_temperatures(self, temperatures: torch.Tensor, source: str) -> None:
        self.temperatures = temperatures.tolist()
        self.scheduler.recalibrated()


@pytest.fixture(autouse=True)
def no_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's arguments, without its own flag for the STS file."""
    given = SimpleNamespace(
        speculative_dspark_confidence_sts_path=None, speculative_draft_model_path="none"
    )
    monkeypatch.setattr(serving_calibration, "get_spec", lambda: given)


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    made = Worker(tmp_path)
    for _ in range(20):
        made.scheduler.cost.observe(Step(2, 4, 100, round=True), 0.02)
        made.scheduler.cost.observe(Step(2, 0, 100, round=False), 0.01)
    return made


def state(worker: Worker) -> dict[str, Any]:
    """Everything that commands may change."""
    scheduler = worker.scheduler
    return {
        "choice": scheduler.policy.choice,
        "budget": scheduler.fixed_budget,
        "temperatures": worker.temperatures,
        "cost": scheduler.cost.state(),
        "saved": worker.kept,
        "blocks": len(scheduler.reliability.blocks.lens),
    }


def update(worker: Worker, requested: dict[str, float]) -> bool:
    """SGLang's own handling of ``/set_internal_state`` with our table of keys."""
    internal = pytest.importorskip("sglang.srt.managers.scheduler_components.internal_state")
    kind = internal.SchedulerInternalStateController
    controller = kind(SimpleNamespace(draft_worker=worker), record_step_time=False)
    controller._update_handlers = lambda: admin.handlers(kind._update_handlers, controller)
    found = controller.set_internal_state(SimpleNamespace(server_args=requested))
    return bool(found.updated)


@pytest.mark.parametrize(("value", "choice"), [(-1, "auto"), (0, "off"), (1, "on"), (1.0, "on")])
def test_speculation_is_switched(worker: Worker, value: float, choice: str) -> None:
    worker.scheduler.choose("off" if choice == "on" else "on")
    assert update(worker, {"dspark_speculation": value})
    assert worker.scheduler.policy.choice == choice
    assert worker.caught_up, "what steps that still run have shown is learned before"


@pytest.mark.parametrize(
    ("value", "forced"), [(0, 0.0), (0.5, 0.5), (1, 1.0), (-1, None), (-1.0, None)]
)
def test_a_budget_is_forced(worker: Worker, value: float, forced: float | None) -> None:
    worker.scheduler.fix_budget(0.25)
    assert update(worker, {"dspark_budget": value})
    assert worker.scheduler.fixed_budget == forced


@pytest.mark.parametrize(("value", "forced"), [(0.5, 0.5), (1, 1.0), (None, None), (0, 0.0)])
def test_sglangs_own_key_sets_the_same_budget(
    worker: Worker, value: float | None, forced: float | None
) -> None:
    worker.scheduler.fix_budget(0.25)
    assert update(worker, {"dspark_force_budget_frac": value})
    assert worker.scheduler.fixed_budget == forced


def test_a_cost_that_would_not_be_read_again_is_not_written(worker: Worker) -> None:
    worker.scheduler.cost.forget()
    worker.scheduler.cost.observe(Step(2, 0, 100, round=False), 0.01)
    assert not update(worker, {"dspark_cost": 2})
    assert not worker.cost_path.exists()
    with pytest.raises(ConfigError, match="1 steps are not of both kinds"):
        worker.commands.prepare("dspark_cost", 2)


def test_the_step_cost_is_written_forgotten_and_read(worker: Worker) -> None:
    known = worker.scheduler.cost.state()
    assert update(worker, {"dspark_cost": 2}) and worker.cost_path.exists()
    assert update(worker, {"dspark_cost": 0})
    assert worker.scheduler.cost.observations == 0
    assert update(worker, {"dspark_cost": 1})
    assert worker.scheduler.cost.state() == known


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
    worker.scheduler.reliability.observe(
        torch.sigmoid(torch.from_numpy(logits)).numpy(), logits, np.full(2000, GAMMA), counts,
        np.ones(2000, dtype=bool),
    )  # fmt: skip
    assert update(worker, {"dspark_sts": 2})
    assert worker.temperatures[:2] == pytest.approx([2.5] * 2, rel=0.35)
    # What was seen before the fit says nothing of confidences after it.
    assert len(worker.scheduler.reliability.blocks.lens) == 0


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
    assert (worker.scheduler.policy.choice, worker.scheduler.fixed_budget) == ("on", 0.75)
    assert worker.scheduler.cost.observations == 0


def test_a_damaged_cost_file_is_refused_with_its_reason(worker: Worker) -> None:
    worker.cost_path.parent.mkdir(exist_ok=True)
    worker.cost_path.write_text('{"kind": "cost"')
    with pytest.raises(ArtifactError, match=r"\.json cannot be read"):
        worker.commands.prepare("dspark_cost", 1)


@pytest.mark.parametrize("key", [k for k in admin.Commands(None).keys if k != "dspark_canary"])
def test_a_server_that_does_not_schedule_refuses_every_key(tmp_path: Path, key: str) -> None:
    worker = Worker(tmp_path, kind=VerifyAll)
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
    assert set(admin.handlers(kind._update_handlers, controller)) == own | set(worker.commands.keys)
    other = kind(SimpleNamespace(draft_worker=object()), record_step_time=False)
    assert set(admin.handlers(kind._update_handlers, other)) == own


def test_the_messages_say_what_to_do(worker: Worker) -> None:
    with pytest.raises(ConfigError, match=r"dspark_speculation is 7.* -1 or 0 or 1"):
        worker.commands.prepare("dspark_speculation", 7)
    with pytest.raises(ConfigError, match=r"0 to 1, or -1"):
        worker.commands.prepare("dspark_budget", 2)
    with pytest.raises(ConfigError, match=r"at least 256"):
        worker.commands.prepare("dspark_sts", 2)


@pytest.mark.parametrize("kind", [Synchronous, VerifyAll])
def test_every_server_takes_the_canarys_verdict(tmp_path: Path, kind: type[Scheduler]) -> None:
    worker = Worker(tmp_path, kind=kind)
    assert update(worker, {"dspark_canary": 0}) and worker.canary is False
    assert update(worker, {"dspark_canary": 1}) and worker.canary is True
    assert not update(worker, {"dspark_canary": 2}) and worker.canary is True
