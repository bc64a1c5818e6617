"""Where results come from: time, command, library versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from dspark_sglang.artifacts import Provenance

_LIBRARIES = ("dspark-sglang", "sglang", "torch", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of the libraries results depend on."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def provenance(
    command: Sequence[str], *, data: str = "", now: datetime | None = None
) -> Provenance:
    """Provenance of an artifact made by ``command`` now."""
    moment = now or datetime.now(UTC)
    return Provenance(
        created=moment.isoformat(timespec="seconds"),
        command=shlex.join(command),
        versions=versions(),
        data=data,
    )


def machine() -> str:
    """The processor and cores this process may use, in a few words."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{len(os.sched_getaffinity(0))} cores, {model}"


def commit(*folders: str) -> str:
    """The checkout's commit, ``+`` when ``folders`` of it differ; empty where git has none."""
    root = Path(__file__).resolve().parents[1]
    answers = []
    for words in (
        ["rev-parse", "--short", "HEAD"],
        ["status", "--porcelain", "--untracked-files=no", *folders],
    ):
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return ""
        answers.append(done.stdout.strip())
    return answers[0] + ("+" if answers[1] else "")
