"""``checksums.json``: size and SHA-256 of every file that a server loads.

The format is the one that ``python -m sglang.srt.utils.model_file_verifier verify`` reads, so
a download can be checked before serving without this package. That verifier looks at the top
level only, skips what documents the model, and must not find the manifest in its own list.
"""

from __future__ import annotations

import fnmatch
import hashlib
from pathlib import Path
from typing import Annotated

import msgspec

from dspark_packaging.errors import PackageError
from dspark_sglang.artifacts import write_json

MANIFEST_FILE = "checksums.json"
#: Files that SGLang's verifier leaves out when it lists a folder.
IGNORED = (
    ".DS_Store",
    "*.lock",
    ".gitattributes",
    "LICENSE",
    "LICENSE.*",
    "README.md",
    "README.*",
    "NOTICE",
)
#: Weights by whatever name: a server loads every one it finds.
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_CHUNK = 1 << 20
_REPACK = "Download the folder again, or package it again with `dspark package DIR DIR`."


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One file: lower-case hexadecimal digest, and size in bytes."""

    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    size: Annotated[int, msgspec.Meta(ge=0)]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``checksums.json``."""

    files: dict[str, Entry]


def listed_names(directory: Path) -> list[str]:
    """The names that belong in the manifest of a folder, sorted."""
    return sorted(
        entry.name
        for entry in directory.iterdir()
        if entry.is_file()
        and not entry.name.startswith(".")
        and entry.name != MANIFEST_FILE
        and not any(fnmatch.fnmatch(entry.name, pattern) for pattern in IGNORED)
    )


def file_entry(path: Path) -> Entry:
    """Digest and size of a file, read in pieces."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return Entry(sha256=digest.hexdigest(), size=size)


def write_manifest(directory: Path) -> Manifest:
    """Write the manifest of what the folder holds now."""
    manifest = Manifest(files={n: file_entry(directory / n) for n in listed_names(directory)})
    write_json(directory / MANIFEST_FILE, manifest)
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a folder.

    Raises:
        PackageError: missing, unreadable, or naming something outside the folder.
    """
    return _read(directory / MANIFEST_FILE, fix=_REPACK)


def _read(path: Path, *, fix: str) -> Manifest:
    expected = 'a checksum file {"files": {name: {"sha256": ..., "size": ...}}}'
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise PackageError(f"{path} does not exist.", expected=expected, fix=fix) from None
    except msgspec.DecodeError as error:
        raise PackageError(
            f"{path} cannot be read: {error}.", expected=expected, fix=fix
        ) from error
    for name in manifest.files:
        # A name with a slash would make a verifier read (and trust) files elsewhere.
        if name != Path(name).name or name in {"", ".", "..", MANIFEST_FILE}:
            raise PackageError(
                f"{path} lists {name!r}.", expected="plain file names beside it", fix=fix
            )
    return manifest


def check_entry(
    directory: Path,
    name: str,
    entry: Entry,
    *,
    listed_in: str = MANIFEST_FILE,
    fix: str = _REPACK,
) -> None:
    """Check one file against its entry.

    Raises:
        PackageError: missing, another size, or another digest.
    """
    path = directory / name
    if not path.is_file():
        raise PackageError(
            f"{path} is missing.",
            expected=f"{entry.size} bytes, as {listed_in} lists",
            fix=fix,
        )
    # The size first: it is free, and says "truncated" where a digest says only "different".
    if path.stat().st_size != entry.size:
        raise PackageError(
            f"{path} has {path.stat().st_size} bytes.", expected=f"{entry.size} bytes", fix=fix
        )
    found = file_entry(path)
    if found != entry:
        raise PackageError(
            f"{path} has SHA-256 {found.sha256[:16]}...",
            expected=f"{entry.sha256[:16]}..., as {listed_in} lists",
            fix=fix,
        )


def verify_manifest(directory: Path) -> Manifest:
    """Check every listed file, and that no file is left out of the list.

    Raises:
        PackageError: a file is missing, changed or not listed.
    """
    manifest = read_manifest(directory)
    for name, entry in manifest.files.items():
        check_entry(directory, name, entry)
    unlisted = [name for name in listed_names(directory) if name not in manifest.files]
    if unlisted:
        raise PackageError(
            f"{directory} holds {', '.join(unlisted)}, which {MANIFEST_FILE} does not list.",
            expected="every file that a server loads in the list",
            fix=f"Run `dspark package {directory} {directory}` if the file belongs there.",
        )
    return manifest


def verify_files(directory: Path, manifest: Path) -> int:
    """Check a folder against a checksum file that may lie elsewhere.

    Returns:
        How many files were checked.

    Raises:
        PackageError: a listed file is missing or changed, or weights lie there that are not listed.
    """
    fix = "Fetch the files and their checksum file again, of one revision."
    if not directory.is_dir():
        raise PackageError(f"{directory} does not exist.", expected="a model's folder", fix=fix)
    listed = _read(manifest, fix=fix).files
    for name, entry in listed.items():
        check_entry(directory, name, entry, listed_in=manifest.name, fix=fix)
    stray = [
        path.name
        for pattern in WEIGHT_FILES
        for path in sorted(directory.glob(pattern))
        if path.name not in listed
    ]
    if not listed or stray:
        raise PackageError(
            f"{directory} holds {', '.join(stray) or 'files'} that {manifest} does not list.",
            expected="every weight file in the list",
            fix=fix,
        )
    return len(listed)
