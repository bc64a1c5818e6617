"""What commands do with a bundle, where target and drafter are one directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from dspark_sglang import diagnosis, targets
from dspark_sglang.cli.main import app
from dspark_sglang.errors import CheckpointError, DSparkError
from dspark_sglang.layouts.base import bundle_at, weights_digest
from tests.planning.plan_samples import small_v4, v4_tensors, write_config, write_index


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    config = small_v4()
    folder = write_config(tmp_path / "v4", config)
    write_index(folder, v4_tensors(config))
    return folder


def failed(*words: str) -> DSparkError:
    """The error that a command line ends with."""
    error = CliRunner().invoke(app, [*words]).exception
    assert isinstance(error, DSparkError), error
    return error


def test_a_bundle_is_known_by_its_configuration(bundle: Path, tmp_path: Path) -> None:
    assert bundle_at(bundle) == bundle
    assert bundle_at(tmp_path) is None
    assert bundle_at(write_config(tmp_path / "plain", {"architectures": ["X"]})) is None
    (bundle / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        bundle_at(bundle)


def test_a_bundle_is_served_with_itself(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "ensure_target", lambda **_: tmp_path / "fetched")
    assert targets.of_drafter(bundle, None) == bundle
    assert targets.of_drafter(bundle, tmp_path / "named") == tmp_path / "named"
    assert targets.of_drafter(tmp_path / "dense", None) == tmp_path / "fetched"


def test_what_needs_a_dense_drafter_is_refused_with_the_way_that_works(bundle: Path) -> None:
    calibrate = failed("calibrate", "--target", str(bundle), "--drafter", str(bundle))
    assert "is a bundle" in calibrate.found
    assert (
        f"dspark calibrate --url http://127.0.0.1:30000 --out {bundle / 'sts.json'}"
        in calibrate.fix
    )
    for engine in ("standalone", "both"):
        evaluate = failed("eval", "--artifact", str(bundle), "--engine", engine)
        assert "is a bundle" in evaluate.found and "--engine server" in evaluate.fix


def test_a_bundle_is_evaluated_by_a_server(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"mtp.0.norm.weight": np.ones(2, np.float32)}, bundle / "model.safetensors")
    seen: list[dict[str, Any]] = []

    def serve(url: str, questions: Any, **_: Any) -> Any:
        seen.append({"url": url})
        raise KeyboardInterrupt

    monkeypatch.setattr("dspark_sglang.evaluation.served.serve", serve)
    CliRunner().invoke(
        app, ["eval", "--artifact", str(bundle), "--engine", "server", "--url", "http://x:1/v1"]
    )
    assert seen == [{"url": "http://x:1"}]


@pytest.mark.parametrize("named", [True, False], ids=["named", "left-out"])
def test_serve_checks_the_drafter_inside(
    bundle: Path, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path | None, Path]] = []
    found = diagnosis.Finding("problem", "half a bundle", "Download it.")

    def models(target: Path | None, drafter: Path) -> list[diagnosis.Finding]:
        asked.append((target, drafter))
        return [found]

    monkeypatch.setattr(diagnosis, "activation", list)
    monkeypatch.setattr(diagnosis, "models", models)
    words = ["serve", "--dry-run", "--model-path", str(bundle), "--speculative-algorithm", "DSPARK"]
    words += ["--speculative-draft-model-path", str(bundle)] if named else []
    assert "half a bundle" in failed(*words).found
    assert asked == [(bundle, bundle)]


def test_doctor_checks_the_drafter_inside(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "local", list)
    monkeypatch.setattr(diagnosis, "look", lambda *_: [])
    found = diagnosis.Finding("ok", "checked")
    monkeypatch.setattr(
        diagnosis, "models", lambda *given: [found] if given == (bundle, bundle) else []
    )
    done = CliRunner().invoke(app, ["doctor", "--target", str(bundle), "--json"])
    checked, memory = json.loads(done.stdout)
    assert checked["what"] == "checked"
    assert "memory of" in memory["what"] and "computed, not run" in memory["what"]


def test_one_identity_whatever_the_files_are_called(bundle: Path) -> None:
    """Over what drafts: the target's weights are not read, nor are routed experts'."""
    part = {"mtp.0.norm.weight": np.ones(2, np.float32)}
    expert = {"mtp.0.ffn.experts.0.w1.weight": np.ones((2, 2), np.float32)}
    save_file(
        {**part, **expert, "embed.weight": np.ones(3, np.float32)}, bundle / "one.safetensors"
    )
    whole = weights_digest(bundle)
    (bundle / "one.safetensors").unlink()
    save_file(part, bundle / "a.safetensors")
    save_file({key: 2 * value for key, value in expert.items()}, bundle / "b.safetensors")
    assert weights_digest(bundle) == whole
    save_file({key: 2 * value for key, value in part.items()}, bundle / "a.safetensors")
    assert weights_digest(bundle) != whole
