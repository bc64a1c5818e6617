"""Measured step costs on disk: read back exactly, and refused where they are not this server's."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dspark_sglang.config import Settings
from dspark_sglang.core.schedule.cost_model import CostModel, Step
from dspark_sglang.errors import ArtifactError, ConfigError
from dspark_sglang.serving import calibration

GAMMA = 3
WANTED = {"plugin": "1", "target": "t", "drafter": "d", "dtype": "bfloat16"}
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def model() -> CostModel:
    made, rng = CostModel(gamma=GAMMA), np.random.default_rng(0)
    for _ in range(200):
        requests = int(rng.integers(1, 33))
        drafted = int(rng.integers(0, requests * GAMMA + 1))
        made.observe(Step(requests, drafted, 900, round=True), 0.02 + 0.001 * drafted)
        made.observe(Step(requests, 0, 900, round=False), 0.01)
    return made


@pytest.fixture
def saved(model: CostModel, tmp_path: Path) -> Path:
    path = tmp_path / "cost" / "kept.json"
    calibration.save_cost(path, WANTED, model, seconds=12.5)
    return path


def test_a_cost_comes_back_as_it_was(saved: Path, model: CostModel) -> None:
    found = CostModel(gamma=GAMMA)
    artifact = calibration.load_cost(saved, WANTED, found)
    assert found.state() == model.state()
    assert found.round_seconds(8, 12, 900) == model.round_seconds(8, 12, 900)
    assert (artifact.seconds, artifact.fingerprint) == (12.5, WANTED)
    assert artifact.provenance.command == "dspark calibrate --cost"
    assert artifact.provenance.data == "400 steps"


def edited(change: Change) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "does not exist"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "truncated": (truncated, "cannot be read"),
    "no JSON": (lambda path: path.write_text("steps: 3"), "cannot be read"),
    "binary": (lambda path: path.write_bytes(b"\x80\x04\x95\xff"), "cannot be read"),
    "a list": (lambda path: path.write_text("[]"), "cannot be read"),
    "another kind": (edited(lambda c: c.update(kind="sts")), "cannot be read"),
    "a field gone": (edited(lambda c: c.pop("fingerprint")), "cannot be read"),
    "a newer schema": (edited(lambda c: c.update(schema_version=2)), "schema_version 2"),
    "another dtype": (edited(lambda c: c["fingerprint"].update(dtype="float32")), "dtype"),
    "no drafter": (edited(lambda c: c["fingerprint"].pop("drafter")), "drafter: None"),
    "another machine": (edited(lambda c: c["fingerprint"].update(device="x")), "device: x"),
    "another gamma": (edited(lambda c: c["model"].update(gamma=7)), "gamma 7"),
    "no rounds": (edited(lambda c: c["model"].pop("round")), "'round'"),
    "negative": (
        edited(lambda c: c["model"]["plain"].update(theta=[-1.0] * 5)),
        "take no time",
    ),
    "no time": (edited(lambda c: c["model"]["plain"].update(theta=[0.0] * 5)), "take no time"),
    "ragged": (edited(lambda c: c["model"]["round"]["grid"].pop()), "grid has shape"),
    "text": (edited(lambda c: c["model"]["round"].update(seen="many")), "cost.*kept.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_of_no_use_is_refused_with_its_reason(
    saved: Path, model: CostModel, name: str
) -> None:
    damage, says = DAMAGE[name]
    damage(saved)
    target = CostModel(gamma=GAMMA)
    target.observe(Step(1, 1, 1, round=True), 0.5)
    before = target.state()
    with pytest.raises(ArtifactError, match=says) as caught:
        calibration.load_cost(saved, WANTED, target)
    assert str(saved) in caught.value.found
    assert "dspark calibrate --cost" in caught.value.fix and "DSPARK_COST" in caught.value.fix
    assert target.state() == before


def test_a_file_that_names_no_kind_is_refused(saved: Path) -> None:
    edited(lambda content: content.pop("kind"))(saved)
    with pytest.raises(ArtifactError):
        calibration.load_cost(saved, WANTED, CostModel(gamma=GAMMA))


@pytest.mark.parametrize("name", [name for name in DAMAGE if name != "missing"])
def test_a_bad_cached_file_is_as_good_as_none(
    saved: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGE[name][0](saved)
    model = CostModel(gamma=GAMMA)
    with caplog.at_level(logging.WARNING):
        assert calibration.load_cached_cost(saved, WANTED, model) is None
    assert "measured again" in caplog.text and str(saved) in caplog.text
    assert model.state() == CostModel(gamma=GAMMA).state()


def test_a_sound_cached_file_is_taken_and_a_missing_one_is_nothing(
    saved: Path, model: CostModel, caplog: pytest.LogCaptureFixture
) -> None:
    found = CostModel(gamma=GAMMA)
    assert calibration.load_cached_cost(saved.with_name("none.json"), WANTED, found) is None
    cached = calibration.load_cached_cost(saved, WANTED, found)
    assert cached is not None and cached.seconds == 12.5
    assert found.state() == model.state()
    assert not caplog.text


def test_writing_is_all_or_nothing(
    saved: Path, model: CostModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ArtifactError, match="No space"):
        calibration.save_cost(saved, WANTED, model, seconds=1.0)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("rounds", [True, False])
def test_a_cost_of_one_kind_of_step_is_not_written(tmp_path: Path, rounds: bool) -> None:
    one = CostModel(gamma=GAMMA)
    one.observe(Step(1, int(rounds), 10, round=rounds), 0.02)
    path = tmp_path / "one.json"
    with pytest.raises(ConfigError, match="1 steps are not of both kinds") as caught:
        calibration.save_cost(path, WANTED, one)
    assert "dspark_cost 2" in caught.value.fix
    assert not path.exists()
    one.observe(Step(1, int(not rounds), 10, round=not rounds), 0.01)
    calibration.save_cost(path, WANTED, one)
    calibration.load_cost(path, WANTED, CostModel(gamma=GAMMA))


# --- what it is valid for ----------------------------------------------------------------------------


def wanted(folder: Path, **others: object) -> dict[str, str]:
    known: dict[str, object] = {"dtype": torch.bfloat16, "gamma": 5, **others}
    return calibration.fingerprint(
        target=str(folder), drafter_sha256="abc", drafter="somewhere", **known
    )


def test_the_place_depends_on_everything_the_cost_depends_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"layers": 2}')
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"12345")
    settings = Settings(cache_dir=str(tmp_path / "cache"))
    one = wanted(tmp_path)
    found = {calibration.cost_path(settings, one)}
    assert calibration.cost_path(settings, dict(reversed(one.items()))) in found
    found.add(calibration.cost_path(settings, wanted(tmp_path, dtype=torch.float32)))
    found.add(calibration.cost_path(settings, wanted(tmp_path, gamma=7)))
    weights.write_bytes(b"123456")
    found.add(calibration.cost_path(settings, wanted(tmp_path)))
    (tmp_path / "config.json").write_text('{"layers": 3}')
    found.add(calibration.cost_path(settings, wanted(tmp_path)))
    assert len(found) == 5
    assert all(path.parent == tmp_path / "cache" / "cost" for path in found)


def test_a_target_on_the_hub_is_known_by_its_name() -> None:
    found = calibration.fingerprint(target="org/name", drafter_sha256="", drafter="org/draft")
    assert (found["target"], found["drafter"]) == ("org/name", "org/draft")


def test_a_cpu_is_known_by_its_threads() -> None:
    one = calibration.device_name(torch.device("cpu"), 1)
    assert one.endswith("1 threads") and one != calibration.device_name(torch.device("cpu"), 2)
