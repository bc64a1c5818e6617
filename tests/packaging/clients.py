"""The Hub's own command-line clients, each in a small environment of its own, against a local hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dspark_packaging.errors import PackageError
from tests.packaging.hub import FakeHub

#: Never sent anywhere but to the local hub; outputs are searched for it.
TOKEN = "hf_localCheckTokenThatMustNotBePrinted"


class Client(NamedTuple):
    """One command of one release of ``huggingface_hub``."""

    release: str
    command: str


#: The last release with ``huggingface-cli``, and the newest line, which has ``hf`` only.
CLIENTS = (Client("0.36.2", "huggingface-cli"), Client("2.4.0", "hf"))


def install(client: Client, cache: Path) -> Path:
    """The client's program, installed below ``cache`` where it is not there yet.

    Raises:
        PackageError: pip could not install it.
    """
    home = cache / f"huggingface_hub-{client.release}"
    program = home / "bin" / client.command
    if program.exists():
        return program
    pip = [str(home / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(home)],
        [*pip, f"huggingface_hub=={client.release}"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            tail = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise PackageError(
                f"huggingface_hub {client.release} could not be installed: {tail}",
                expected="the release from PyPI",
                fix="Check the network and pip's index, then run it again.",
            )
    return program


def environment(hub: FakeHub, home: Path) -> dict[str, str]:
    """An environment in which a client knows the local hub and nothing else."""
    copied = {**os.environ}
    kept = {k: v for k, v in copied.items() if not k.lower().endswith("_proxy")}
    kept = {k: v for k, v in kept.items() if not k.startswith(("HF_", "HUGGING"))}
    return kept | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def run(
    program: Sequence[str], hub: FakeHub, home: Path, *, timeout: float = 240.0
) -> subprocess.CompletedProcess[str]:
    """Run a client, or ``dspark push``, against the local hub."""
    return subprocess.run(
        list(program),
        env=environment(hub, home),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def dspark(*words: str) -> list[str]:
    """The ``dspark`` command of this interpreter."""
    return [sys.executable, "-m", "dspark_sglang.cli.main", *words]
