"""The built wheel: what it holds, and that it works without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dspark_sglang", "dspark_kernels", "dspark_packaging", "dspark_loadtests")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_it_holds_the_packages_and_their_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == set(PACKAGES)
    assert "dspark_loadtests/data/prompts.json" in names
    assert "dspark_packaging/templates/card.md.jinja" in names
    assert "dspark_sglang/simulate/prices.toml" in names
    for word in ("/check/", "samples", "mutants", "drill", "benchmarks", "profiling"):
        assert not [name for name in names if word in name], word
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.endswith((".safetensors", ".pyc", ".lock")) for name in names)
    assert wheel.stat().st_size < 7 * 2**17


def test_it_names_what_sglang_looks_for(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        text = archive.read(name).decode()
    assert "[sglang.srt.plugins]\ndspark = dspark_sglang.serving.entry:activate_plugin" in text
    assert "[sglang.srt.platforms]\ndspark = dspark_sglang.serving.entry:activate_platform" in text
    assert "dspark = dspark_sglang.cli.main:main" in text


def test_it_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*pip, str(installed), str(wheel)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    code = f"import {', '.join(PACKAGES)}; print(*[m.__file__ for m in ({', '.join(PACKAGES)},)])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert all(path.startswith(str(installed)) for path in found.stdout.split())
    shown = subprocess.run(
        [sys.executable, "-m", "dspark_sglang.cli.main", "--help"],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    for command in ("doctor", "demo", "calibrate", "package", "verify"):
        assert command in shown.stdout
