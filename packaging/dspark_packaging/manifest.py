"""``checksums.json``: size and SHA-256 of every file that a server loads, weights looked at on the way.

The format is the one that ``python -m sglang.srt.utils.model_file_verifier verify`` reads, so
a download can be checked before serving without this package. That verifier looks at the top
level only, skips what documents the model, and must not find the manifest in its own list.

The pass that hashes weights also counts values that are no numbers (NaN) or infinite. A drafter with
one of them serves: the target's verification keeps the text right and refuses every draft.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from dspark_packaging.errors import PackageError
from dspark_packaging.layout import MANIFEST_FILE, SIGNATURE_FILE
from dspark_packaging.transfer import Entry, Meter, Progress, silent
from dspark_sglang.artifacts import write_json
from dspark_sglang.checkpoint import Header, read_header
from dspark_sglang.errors import CheckpointError

#: How to read one element, and the bits that are all set in those that are not finite, by dtype. E4M3 has no
#: infinity, E8M0 no sign and no fraction; FP4 and FP6 have finite values only (OCP Microscaling Formats 1.0).
_MASKS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "C64": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),
    "F8_E8M0": ("u1", 0xFF),
}
_NAMED = 3


class Scan:
    """Reads the bytes of one safetensors file in order, whatever the size of its tensors.

    Args:
        header: of the file.
    """

    def __init__(self, header: Header) -> None:
        #: Values that are not finite, by tensor.
        self.found: dict[str, int] = {}
        self._tensors = sorted(
            (header.start + tensor.data_offsets[0], header.start + tensor.data_offsets[1], name)
            for name, tensor in header.tensors.items()
            if tensor.dtype in _MASKS and tensor.nbytes
        )
        self._dtypes = {name: tensor.dtype for name, tensor in header.tensors.items()}
        self._next = 0
        self._at = 0
        #: The beginning of a value whose end is in the next piece.
        self._rest = b""

    def feed(self, piece: memoryview) -> None:
        """Take the next bytes of the file, the header's included."""
        begin, end = self._at, self._at + len(piece)
        for first, last, name in self._tensors[self._next :]:
            if first >= end:
                break
            self._count(name, piece[max(first, begin) - begin : min(last, end) - begin])
            if last > end:
                break
            self._next += 1
        self._at = end

    def _count(self, name: str, part: memoryview) -> None:
        kind, mask = _MASKS[self._dtypes[name]]
        size = np.dtype(kind).itemsize
        if self._rest:
            missing = size - len(self._rest)
            self._rest += bytes(part[:missing])
            part = part[missing:]
            if len(self._rest) < size:
                return
            self._add(name, np.frombuffer(self._rest, kind), mask)
        whole = len(part) - len(part) % size
        self._rest = bytes(part[whole:])
        if whole:
            self._add(name, np.frombuffer(part[:whole], kind), mask)

    def _add(self, name: str, values: np.ndarray, mask: int) -> None:
        bits = np.bitwise_and(values, values.dtype.type(mask))
        # A maximum is found several times faster than values are counted, and is nearly always enough.
        if int(bits.max()) == mask:
            self.found[name] = self.found.get(name, 0) + int(np.count_nonzero(bits == mask))


def scan_of(path: Path) -> Scan | None:
    """A scan of a weight file; None for other files, and for weights that cannot be read.

    Those are no oversight: opening the package reads every header again and refuses them.
    """
    if path.suffix != ".safetensors":
        return None
    try:
        return Scan(read_header(path))
    except CheckpointError:
        return None


def refuse_not_finite(path: Path, found: dict[str, int]) -> None:
    """Refuse a weight file with values that are not finite.

    Args:
        path: the file.
        found: how many each of its tensors has.

    Raises:
        PackageError: there are some.
    """
    if not found:
        return
    named = ", ".join(f"{count} in {name}" for name, count in sorted(found.items())[:_NAMED])
    more = len(found) - _NAMED
    raise PackageError(
        f"{path} holds NaN or infinite values: {named}"
        + (f", and some in {more} tensors more." if more > 0 else "."),
        expected="finite weights",
        fix="Convert or train it again, or download it again; it would serve, but draft nothing.",
    )


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
#: Small enough to stay in a core's cache while it is hashed and looked at.
_CHUNK = 1 << 20
_REPACK = "Download the folder again, or package it again with `dspark package DIR DIR`."


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``checksums.json``."""

    files: dict[str, Entry]


class Hashed(NamedTuple):
    """What one pass over a file found."""

    entry: Entry
    #: Values that are not finite, by tensor; empty for files that hold no weights.
    not_finite: dict[str, int]


def listed_names(directory: Path) -> list[str]:
    """The names that belong in the manifest of a folder, sorted."""
    return sorted(
        entry.name
        for entry in directory.iterdir()
        if entry.is_file()
        and not entry.name.startswith(".")
        and entry.name not in (MANIFEST_FILE, SIGNATURE_FILE)
        and not any(fnmatch.fnmatch(entry.name, pattern) for pattern in IGNORED)
    )


def file_entry(path: Path, meter: Meter | None = None, scan: Scan | None = None) -> Entry:
    """Digest and size of a file, read in pieces; ``scan`` looks at the same pieces."""
    digest = hashlib.sha256()
    size = 0
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            if scan is not None:
                scan.feed(buffer[:count])
            if meter is not None:
                meter(count)
    return Entry(sha256=digest.hexdigest(), size=size)


def file_entries(
    paths: Iterable[Path],
    *,
    progress: Progress = silent,
    done: Callable[[str, Hashed], None] | None = None,
) -> dict[str, Hashed]:
    """Digests of several files, as many at a time as there are cores; weights are looked at too.

    Args:
        paths: files of different names.
        progress: shows how far it is.
        done: told each file's result as soon as it is known.
    """
    files = list(paths)
    total = sum(path.stat().st_size for path in files)
    found: dict[str, Hashed] = {}
    workers = len(os.sched_getaffinity(0))
    stopped = threading.Event()
    with progress("checksums", total) as meter, ThreadPoolExecutor(workers) as pool:

        def count(nbytes: int) -> None:
            # An interrupt reaches the main thread only; a file of gigabytes must not delay it.
            if stopped.is_set():
                raise InterruptedError("stopped")
            meter(nbytes)

        def read(path: Path) -> tuple[str, Hashed]:
            scan = scan_of(path)
            entry = file_entry(path, count, scan)
            return path.name, Hashed(entry, scan.found if scan else {})

        try:
            for name, hashed in pool.map(read, files):
                found[name] = hashed
                if done is not None:
                    done(name, hashed)
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True, wait=False)
            raise
    return found


def write_manifest(
    directory: Path,
    *,
    digests: dict[str, Entry] | None = None,
    progress: Progress = silent,
    save: Callable[[], None] | None = None,
) -> Manifest:
    """Write the manifest of what the folder holds now.

    Args:
        directory: the folder.
        digests: known ones; filled with those computed here.
        progress: shows how far it is.
        save: called whenever ``digests`` has grown.

    Raises:
        PackageError: weights that are not finite.
    """
    known: dict[str, Entry] = {} if digests is None else digests
    names = listed_names(directory)

    def note(name: str, hashed: Hashed) -> None:
        # Before it is noted: a build that is continued does not read the file again.
        refuse_not_finite(directory / name, hashed.not_finite)
        known[name] = hashed.entry
        if save is not None:
            save()

    missing = [directory / name for name in names if name not in known]
    file_entries(missing, progress=progress, done=note)
    manifest = Manifest(files={name: known[name] for name in names})
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


def check_size(
    directory: Path,
    name: str,
    entry: Entry,
    *,
    listed_in: str = MANIFEST_FILE,
    fix: str = _REPACK,
) -> None:
    """Check that a file is there, whole.

    Raises:
        PackageError: missing, or of another size.
    """
    path = directory / name
    if not path.is_file():
        raise PackageError(
            f"{path} is missing.",
            expected=f"{entry.size} bytes, as {listed_in} lists",
            fix=fix,
        )
    if path.stat().st_size != entry.size:
        raise PackageError(
            f"{path} has {path.stat().st_size} bytes.", expected=f"{entry.size} bytes", fix=fix
        )


def check_entry(
    directory: Path,
    name: str,
    entry: Entry,
    found: Entry | None = None,
    *,
    listed_in: str = MANIFEST_FILE,
    fix: str = _REPACK,
) -> None:
    """Check one file against its entry.

    Args:
        found: what is known of it already; None: it is read.
        listed_in, fix: what errors name.

    Raises:
        PackageError: missing, another size, or another digest.
    """
    # The size first: it is free, and says "truncated" where a digest says only "different".
    check_size(directory, name, entry, listed_in=listed_in, fix=fix)
    found = file_entry(directory / name) if found is None else found
    if found != entry:
        raise PackageError(
            f"{directory / name} has SHA-256 {found.sha256[:16]}...",
            expected=f"{entry.sha256[:16]}..., as {listed_in} lists",
            fix=fix,
        )


def verify_manifest(directory: Path, *, progress: Progress = silent) -> Manifest:
    """Check every listed file, that no file is left out of the list, and that weights are finite.

    Raises:
        PackageError: a file is missing, changed, not listed, or holds NaN or infinite weights.
    """
    manifest = read_manifest(directory)
    for name, entry in manifest.files.items():
        check_size(directory, name, entry)
    found = file_entries((directory / name for name in manifest.files), progress=progress)
    for name, entry in manifest.files.items():
        check_entry(directory, name, entry, found[name].entry)
    unlisted = [name for name in listed_names(directory) if name not in manifest.files]
    if unlisted:
        raise PackageError(
            f"{directory} holds {', '.join(unlisted)}, which {MANIFEST_FILE} does not list.",
            expected="every file that a server loads in the list",
            fix=f"Run `dspark package {directory} {directory}` if the file belongs there.",
        )
    for name, hashed in found.items():
        refuse_not_finite(directory / name, hashed.not_finite)
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
