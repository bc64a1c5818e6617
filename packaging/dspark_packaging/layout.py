"""Which files a packaged drafter may hold.

An allow list, because whoever downloads the folder will load it: a pickle runs code, and a
stray Python file can be imported as remote code.
"""

from __future__ import annotations

import re
from pathlib import Path

from dspark_packaging.errors import PackageError
from dspark_packaging.manifest import MANIFEST_FILE
from dspark_packaging.schemas import EVAL_FILE, PROVENANCE_FILE
from dspark_sglang.artifacts import DRAFT_VOCAB_FILE, STS_FILE

CARD_FILE = "README.md"
LICENSE_FILE = "LICENSE"
CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
#: Written by packaging; everything else is carried from the source.
GENERATED = (CARD_FILE, MANIFEST_FILE)
REQUIRED = (CONFIG_FILE, PROVENANCE_FILE, CARD_FILE, LICENSE_FILE, MANIFEST_FILE)
OPTIONAL = (INDEX_FILE, STS_FILE, DRAFT_VOCAB_FILE, EVAL_FILE)
WEIGHT_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}


def is_weight(name: str) -> bool:
    """Whether ``name`` is how a (shard of a) drafter's weights is called on the Hub."""
    return WEIGHT_NAME.fullmatch(name) is not None


def visible_entries(directory: Path) -> list[Path]:
    """What the folder holds, in name order, without the dot entries that git and ``hf`` leave."""
    return sorted(e for e in directory.iterdir() if not e.name.startswith("."))


def require_directory(directory: Path) -> None:
    """Refuse a path that is not an existing folder.

    Raises:
        PackageError: it is not.
    """
    if not directory.is_dir():
        raise PackageError(
            f"{directory} is not a directory.",
            expected="the folder of a DSpark drafter",
            fix="Check the path, or make one with `dspark package SOURCE OUT`.",
        )


def check_names(directory: Path) -> None:
    """Check that the folder holds every required file and nothing that is not allowed.

    Raises:
        PackageError: a pickle, a sub-folder, an unknown file, or a missing one.
    """
    for entry in visible_entries(directory):
        if entry.suffix.lower() in _PICKLES:
            raise PackageError(
                f"{entry} is a pickled (or array) file, which can run code when it is loaded.",
                expected="weights in safetensors only",
                fix=f"Convert it with safetensors, delete {entry.name} and package again.",
            )
        known = entry.name in REQUIRED or entry.name in OPTIONAL or is_weight(entry.name)
        if entry.is_dir() or not known:
            raise PackageError(
                f"{entry} does not belong in a packaged drafter.",
                expected="only " + ", ".join((*REQUIRED, *OPTIONAL, "model*.safetensors")),
                fix=f"Move {entry.name} out of the folder.",
            )
    for name in REQUIRED:
        if not (directory / name).is_file():
            raise PackageError(
                f"{directory} has no {name}.",
                expected="a packaged drafter with " + ", ".join(REQUIRED),
                fix="Build it with `dspark package SOURCE OUT`.",
            )
