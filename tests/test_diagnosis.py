"""What doctor says of a machine: each finding with its fix."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from dspark_sglang import diagnosis
from dspark_sglang.config import Settings

NO_PORTS = Path("/no/such/file")


def test_shared_memory_that_is_small_is_a_warning_with_both_fixes(tmp_path: Path) -> None:
    assert diagnosis.shared_memory(tmp_path, least=1).level == "ok"
    small = diagnosis.shared_memory(tmp_path, least=1 << 60)
    assert small.level == "warning" and "--shm-size" in small.fix and "emptyDir" in small.fix
    assert diagnosis.shared_memory(tmp_path / "none").level == "problem"


def test_a_cache_directory_is_made_and_written(tmp_path: Path) -> None:
    found = diagnosis.directory(tmp_path / "a" / "b", "cache directory", least=1)
    assert found.level == "ok" and (tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir())
    assert diagnosis.directory(tmp_path, "cache directory", least=1 << 60).level == "warning"
    (tmp_path / "file").write_text("")
    blocked = diagnosis.directory(tmp_path / "file" / "cache", "cache directory")
    assert blocked.level == "problem" and "DSPARK_CACHE_DIR" in blocked.fix


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_artifact_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    path.chmod(0)
    (found,) = diagnosis.artifacts(Settings(), tmp_path)
    assert found.level == "problem" and "chmod" in found.fix


def test_artifacts_that_settings_name(tmp_path: Path) -> None:
    assert diagnosis.artifacts(Settings(), None) == []
    (tmp_path / "sts.json").write_text("{}")
    settings = Settings(sts=str(tmp_path / "sts.json"), cost=str(tmp_path / "none.json"))
    (found,) = diagnosis.artifacts(settings, None)
    assert found.level == "problem" and "DSPARK_COST" in found.what and "exist" in found.what
    (good,) = diagnosis.artifacts(Settings(sts=str(tmp_path / "sts.json")), None)
    assert good.level == "ok"


def test_a_port_that_is_taken_or_will_be(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (found,) = diagnosis.ports(port, NO_PORTS)
        assert found.level == "warning" and "taken" in found.what
    handed_out = tmp_path / "range"
    handed_out.write_text(f"{port}\t{port + 1}\n")
    free, among = diagnosis.ports(port, handed_out)
    assert free.level == "ok" and among.level == "warning" and f"below {port}" in among.fix


@pytest.mark.parametrize(
    ("supported", "built", "level"),
    [((12, 2), "13.0", "problem"), ((13, 0), "13.0", "ok"), ((13, 0), "12.8", "ok"),
     ((12, 1), "12.8", "ok")],
)  # fmt: skip
def test_a_driver_runs_every_cuda_of_its_major_number(
    supported: tuple[int, int], built: str, level: str
) -> None:
    assert diagnosis.judge_driver(supported, built).level == level


def test_everything_is_looked_at_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path))
    said = " ".join(finding.what for finding in diagnosis.look(29_999))
    assert all(word in said for word in ("driver", "shared memory", str(tmp_path), "29999"))
    assert "port " not in " ".join(f.what for f in diagnosis.look(None)).lower()


def test_attention_that_verifies_whole_blocks_is_said() -> None:
    assert [diagnosis.judge_attention(major).level for major in (9, 10, 8, 12)] == [
        "ok",
        "ok",
        "warning",
        "warning",
    ]
    assert "fa3" in diagnosis.judge_attention(8).fix and not diagnosis.judge_attention(12).fix
