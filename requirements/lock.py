"""Resolve ``cpu.in`` and write ``cpu.lock``: every version pinned, every file by SHA-256.

SGLang goes in last and without its own requirements, which pin CUDA-only packages; the lock is
therefore installed with ``pip install --no-deps --require-hashes -r cpu.lock``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SGLANG = "sglang==0.5.23"
HEADER = f"""\
# Made by `make lock` from cpu.in for Linux x86-64, Python 3.11. Do not edit.
# Install with: pip install --no-deps --require-hashes -r requirements/cpu.lock
# {SGLANG} is installed without its CUDA-only requirements.
"""


def resolve(*arguments: str) -> dict[str, tuple[str, str]]:
    """Name to (version, SHA-256) of everything pip would install."""
    with tempfile.TemporaryDirectory() as work:
        report = Path(work) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--quiet", "--only-binary=:all:", "--report", str(report), *arguments]
        subprocess.run(command, check=True)
        entries = json.loads(report.read_text())["install"]
    return {
        entry["metadata"]["name"].lower().replace("_", "-"): (
            entry["metadata"]["version"],
            entry["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for entry in entries
    }


def main() -> None:
    """Write the lock file."""
    found = resolve("-r", str(HERE / "cpu.in"))
    found |= resolve("--no-deps", SGLANG)
    lines = [
        f"{name}=={version} \\\n    --hash=sha256:{digest}"
        for name, (version, digest) in sorted(found.items())
    ]
    (HERE / "cpu.lock").write_text(HEADER + "\n".join(lines) + "\n")
    print(f"{len(lines)} packages locked")


if __name__ == "__main__":
    main()
