"""Which files a package may hold.

An allow list, because whoever downloads the folder will load it: a pickle runs code, and a
stray Python file can be imported as remote code.
"""

from __future__ import annotations

import re
from pathlib import Path

from dspark_packaging.errors import PackageError
from dspark_packaging.manifest import MANIFEST_FILE, SIGNATURE_FILE
from dspark_packaging.schemas import (
    BUNDLE_FILE,
    EVAL_FILE,
    PROVENANCE_FILE,
    TARGET_FILE,
    THROUGHPUT_FILE,
)
from dspark_sglang.artifacts import DRAFT_VOCAB_FILE, STS_FILE

CARD_FILE = "README.md"
LICENSE_FILE = "LICENSE"
CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
COST_FILE = "cost.json"
PLOT_FILE = "calibration.png"
TOKENIZER_FILE = "tokenizer.json"
#: A drafter inside its target's folder, where SGLang looks for one (speculative_hook.py:622).
DRAFT_FOLDER = "dspark"
EVAL_RESULTS, RESULTS_FILE = ".eval_results", "accepted-length.yaml"
#: What git and ``hf`` leave in a folder: no part of a package. By hand, ``hf upload`` sends of these only
#: ``.gitattributes``, which every repository on the Hub has.
LEFT = (".git", ".cache", ".gitattributes")
#: Written by packaging; everything else is carried from the source.
GENERATED = (CARD_FILE, MANIFEST_FILE, PLOT_FILE, SIGNATURE_FILE)
REQUIRED = (CONFIG_FILE, PROVENANCE_FILE, CARD_FILE, LICENSE_FILE, MANIFEST_FILE)
#: Records that a source may hold and a package carries.
RECORDS = (STS_FILE, COST_FILE, DRAFT_VOCAB_FILE, EVAL_FILE, THROUGHPUT_FILE, TARGET_FILE)
OPTIONAL = (INDEX_FILE, *RECORDS, PLOT_FILE, SIGNATURE_FILE)
WEIGHT_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
#: The drafter's shards in a bundle; the target's keep their names.
BUNDLED_NAME = re.compile(r"dspark-\d{5}-of-\d{5}\.safetensors")
#: What a target folder holds beside weights that servers read; carried as it is.
_TARGET_DATA = re.compile(
    r"(?!\.)[\w.-]+\.(json|jinja|txt|model|tiktoken|vocab|md|yaml)|(LICENSE|NOTICE)[\w.-]*"
)
TOKENIZER = re.compile(
    r"tokenizer[\w.-]*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)"
    r"|merges\.txt|chat_template\.(jinja|json)|[\w.-]+\.tiktoken"
)
#: Originals that a bundle had to change, kept under these prefixes so that it can be split.
FROM_TARGET, FROM_DRAFTER = "target-", "drafter-"
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}


def is_weight(name: str) -> bool:
    """Whether ``name`` is how a (shard of a) drafter's weights is called on the Hub."""
    return WEIGHT_NAME.fullmatch(name) is not None


def is_pickle(name: str) -> bool:
    """Whether ``name`` is that of a file which can run code when it is loaded."""
    return Path(name).suffix.lower() in _PICKLES


def is_target_data(name: str) -> bool:
    """Whether a bundle carries a target's file of this name (weights aside)."""
    return _TARGET_DATA.fullmatch(name) is not None


def is_tokenizer(name: str) -> bool:
    """Whether ``name`` is one of the files a tokenizer is loaded from."""
    return TOKENIZER.fullmatch(name) is not None


def visible_entries(directory: Path) -> list[Path]:
    """What the folder holds, in name order, without the dot entries that git and ``hf`` leave."""
    return sorted(e for e in directory.iterdir() if not e.name.startswith("."))


def package_files(directory: Path) -> list[Path]:
    """Every file of a package: what is verified, and all that is sent.

    Raises:
        PackageError: another entry whose name begins with a dot, or a link out of the folder.
    """
    found: list[Path] = []
    strange: list[str] = []
    for entry in sorted(directory.iterdir()):
        folder = entry.is_dir() and not entry.is_symlink()
        if entry.name == EVAL_RESULTS and folder:
            inside = sorted(entry.iterdir())
            found += [path for path in inside if path.name == RESULTS_FILE]
            strange += [f"{entry.name}/{p.name}" for p in inside if p.name != RESULTS_FILE]
        elif entry.name == DRAFT_FOLDER and folder:
            found += package_files(entry)
        elif not entry.name.startswith("."):
            found.append(entry)
        elif entry.name not in LEFT:
            strange.append(entry.name)
        elif entry.is_file():
            require_inside(entry, directory)
    if strange:
        raise PackageError(
            f"{directory} holds {', '.join(strange)}, which no package has.",
            expected=f"names without a dot in front, {EVAL_RESULTS}/{RESULTS_FILE}, and what git "
            f"and `hf` leave ({', '.join(LEFT)})",
            fix=f"Move {', '.join(strange)} out of the folder: `hf upload` would publish it.",
        )
    for path in found:
        require_inside(path, path.parent)
    return found


def require_directory(directory: Path, what: str = "the folder of a DSpark drafter") -> None:
    """Refuse a path that is not an existing folder.

    Raises:
        PackageError: it is not.
    """
    if not directory.is_dir():
        raise PackageError(
            f"{directory} is not a directory.",
            expected=what,
            fix="Check the path, or make one with `dspark package SOURCE OUT`.",
        )


def require_apart(out: Path, *sources: Path) -> None:
    """Refuse an output folder inside a source, or a source inside it.

    Raises:
        PackageError: they lie inside each other, or are the same.
    """
    for source in sources:
        if source == out or source in out.parents or out in source.parents:
            raise PackageError(
                f"{out} and {source} lie inside each other.",
                expected="two separate folders",
                fix="Choose another output folder.",
            )


def require_inside(path: Path, directory: Path) -> None:
    """Refuse a link that leads out of its folder, except into the Hub cache it belongs to.

    In the cache ``models--X/snapshots/COMMIT/name`` is a link to ``models--X/blobs/digest``.

    Raises:
        PackageError: the file lies elsewhere.
    """
    real, home = path.resolve(), directory.resolve()
    if real.parent == home:
        return
    cached = any(
        place.name == "snapshots" and real.parent == place.parent / "blobs"
        for place in home.parents
    )
    if not cached:
        raise PackageError(
            f"{path} is a link to {real}.",
            expected="a file of its own folder",
            fix="Replace the link by the file it leads to, if you trust it.",
        )


def check_names(directory: Path) -> None:
    """Check that a drafter's folder holds every required file and nothing that is not allowed.

    Raises:
        PackageError: a pickle, a sub-folder, an unknown file, a link out of it, or a missing file.
    """
    package_files(directory)
    for entry in visible_entries(directory):
        _refuse_pickle(entry)
        known = entry.name in (*REQUIRED, *OPTIONAL) or is_weight(entry.name)
        if not entry.is_file() or not (known or is_tokenizer(entry.name)):
            raise PackageError(
                f"{entry} does not belong in a packaged drafter.",
                expected="only " + ", ".join((*REQUIRED, *OPTIONAL, "model*.safetensors")),
                fix=f"Move {entry.name} out of the folder.",
            )
    _check_required(directory, REQUIRED)


def check_bundle_names(directory: Path) -> None:
    """The same for a bundle: a target's files, and a drafter's under ``dspark/`` or beside them.

    Raises:
        PackageError: as :func:`check_names`.
    """
    package_files(directory)
    for entry in visible_entries(directory):
        _refuse_pickle(entry)
        if entry.is_dir() and entry.name == DRAFT_FOLDER and not entry.is_symlink():
            continue
        name = entry.name.removeprefix(FROM_TARGET).removeprefix(FROM_DRAFTER)
        known = name.endswith(".safetensors") or name in (*OPTIONAL, *REQUIRED)
        if not entry.is_file() or not (known or is_target_data(name)):
            raise PackageError(
                f"{entry} does not belong in a bundle.",
                expected="weights, configuration, tokenizer and records only (no code, no folders)",
                fix=f"Move {entry.name} out of the folder.",
            )
    _check_required(directory, (CONFIG_FILE, CARD_FILE, MANIFEST_FILE, BUNDLE_FILE))


def _refuse_pickle(entry: Path) -> None:
    if is_pickle(entry.name):
        raise PackageError(
            f"{entry} is a pickled (or array) file, which can run code when it is loaded.",
            expected="weights in safetensors only",
            fix=f"Convert it with safetensors, delete {entry.name} and package again.",
        )


def _check_required(directory: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if not (directory / name).is_file():
            raise PackageError(
                f"{directory} has no {name}.",
                expected="a package with " + ", ".join(names),
                fix="Build it with `dspark package SOURCE OUT`.",
            )
