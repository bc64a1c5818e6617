"""``dspark`` itself: whatever goes wrong that a user can mend, or interrupts, is one line."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DRAFTER = ROOT / "model_cards" / "smollm2-135m-instruct-dspark"
COMMAND = [sys.executable, "-m", "dspark_sglang.cli.main"]


def failed(*words: str | Path) -> str:
    """The one line that a command ends with."""
    done = subprocess.run(
        [*COMMAND, *map(str, words)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("dspark: error: "), done.stderr
    return lines[0]


@pytest.mark.costly
@pytest.mark.parametrize(
    "words",
    [
        ["package", DRAFTER],
        ["demo", "--fetch-only", "--target"],
        ["calibrate", "--target", DRAFTER, "--drafter", DRAFTER, "--out"],
    ],
    ids=lambda words: words[0],
)
def test_an_output_that_cannot_be(tmp_path: Path, words: list[str | Path]) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "below" / "out"
    line = failed(*words, out)
    assert f"{out} cannot be written" in line and "Not a directory" in line


def test_broken_yaml(tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text("target: t\ndata: {files: [a\nout: runs\n")
    line = failed("train", "--config", config)
    assert f"{config} cannot be read: line 3" in line


def begun(process: subprocess.Popen[str]) -> bool:
    """Whether our first line has run: it catches SIGTERM, which Python does not by itself."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0])
def test_an_interrupt_while_libraries_are_imported(seconds: float) -> None:
    process = subprocess.Popen(
        [*COMMAND, "doctor"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    deadline = time.monotonic() + 60.0
    while not begun(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors + output
