"""Files of any size, brought from folder to folder: linked where that is possible, continued when interrupted.

A reflink (copy on write) shares the blocks and stays apart; a hard link is the same file under two
names, so whatever edits it in place edits both; a copy is streamed in pieces and keeps holes. The
source is only read. A long build works in ``.NAME.partial`` beside its output, which the same command
continues with the next file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
from tqdm import tqdm

from dspark_packaging.errors import PackageError
from dspark_sglang.artifacts import write_bytes, write_json
from dspark_sglang.checkpoint import Tensor, encode_header, read_header

#: Seconds between lines where standard error is no terminal (a log).
_LOG_SECONDS = 20.0
#: Told how many bytes more are done; may be called from several threads.
Meter = Callable[[int], object]
#: Opens a meter for an operation (its name, its bytes).
Progress = Callable[[str, int], AbstractContextManager[Meter]]


@contextmanager
def silent(what: str, total: int) -> Iterator[Meter]:
    """Say nothing: for tests and for work too short to watch."""
    yield lambda nbytes: None


@contextmanager
def shown(what: str, total: int) -> Iterator[Meter]:
    """A bar with rate and time left on a terminal; a line every 20 seconds in a log."""
    terminal = sys.stderr.isatty()
    bar = tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        leave=not terminal,
        # Work that is over sooner is not worth a line.
        delay=0.5 if terminal else _LOG_SECONDS,
        mininterval=0.2 if terminal else _LOG_SECONDS,
        # A log keeps every line.
        bar_format=None
        if terminal
        else "{l_bar}{n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left\n",
        dynamic_ncols=terminal,
    )
    with bar:
        yield bar.update


Method = Literal["auto", "reflink", "link", "copy"]
#: ``ioctl`` of Linux that shares blocks between two files (``FICLONE`` in linux/fs.h).
_FICLONE = 0x40049409
_PIECE = 8 << 20
_STATE = "state.json"
#: What these calls answer where the file system cannot do it.
_UNABLE = {
    errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.EPERM, errno.ENOSYS,
    errno.EMLINK, errno.EACCES,
}  # fmt: skip


class Job(NamedTuple):
    """One file to bring: where it lies, and its new name."""

    source: Path
    name: str


def _reflink(source: Path, out: Path) -> bool:
    try:
        with source.open("rb") as reader, out.open("xb") as writer:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
    except OSError as error:
        out.unlink(missing_ok=True)
        if error.errno in _UNABLE:
            return False
        raise
    return True


def _link(source: Path, out: Path) -> bool:
    try:
        os.link(source.resolve(), out)
    except OSError as error:
        if error.errno in _UNABLE:
            return False
        raise
    return True


def _copy(source: Path, out: Path, meter: Meter) -> None:
    """Stream ``source``; ``out`` appears when it is complete."""
    part = out.with_name(f".{out.name}.part")
    size, done = source.stat().st_size, 0
    with source.open("rb", buffering=0) as reader, part.open("wb", buffering=0) as writer:
        while done < size:
            done = _next_piece(reader.fileno(), writer.fileno(), done, size, meter)
        writer.truncate(size)
        os.fsync(writer.fileno())
    part.rename(out)


def _next_piece(reader: int, writer: int, done: int, size: int, meter: Meter) -> int:
    """Copy one piece, or skip the hole that begins here; returns the new offset."""
    try:
        data = os.lseek(reader, done, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        data = size  # nothing but a hole up to the end
    if data > done:
        os.ftruncate(writer, data)
        meter(data - done)
        return data
    hole = os.lseek(reader, done, os.SEEK_HOLE)
    piece = os.pread(reader, min(_PIECE, hole - done, size - done), done)
    if not piece:
        raise OSError(errno.EIO, "the source became shorter while it was read")
    view = memoryview(piece)
    while view:
        view = view[os.write(writer, view) :]
    meter(len(piece))
    return done + len(piece)


def place(job: Job, folder: Path, method: Method, meter: Meter) -> str:
    """Bring one file into ``folder``; returns how ("reflink", "link", "copy" or "there").

    Raises:
        PackageError: the method asked for is not possible here.
        OSError: no space, or unreadable.
    """
    out = folder / job.name
    size = job.source.stat().st_size
    if out.exists():
        meter(size)
        return "there"
    tries: dict[str, Callable[[Path, Path], bool]] = {"reflink": _reflink, "link": _link}
    for name, attempt in tries.items():
        if method in ("auto", name) and attempt(job.source, out):
            meter(size)
            return name
    if method in ("auto", "copy"):
        _copy(job.source, out, meter)
        return "copy"
    raise PackageError(
        f"{folder} cannot hold a {method} of {job.source}.",
        expected="source and output on one file system that has it",
        fix="Use --method auto, which copies where nothing else is possible.",
    )


def subset_bytes(source: Path, names: Collection[str]) -> int:
    """Size of the data section that :func:`write_subset` writes."""
    tensors = read_header(source).tensors
    return sum(tensors[name].nbytes for name in names)


def write_subset(source: Path, out: Path, names: Collection[str], meter: Meter) -> None:
    """Write the named tensors of ``source`` to ``out``, in their order there, bytes unchanged.

    Complete or absent: the file is written beside its place and renamed.

    Args:
        source: a safetensors file.
        out: the new one.
        names: at least one tensor of ``source``.
        meter: told the bytes copied.

    Raises:
        CheckpointError: ``source`` is damaged.
        OSError: no space.
    """
    header = read_header(source)
    kept = sorted(
        ((name, header.tensors[name]) for name in names), key=lambda item: item[1].data_offsets
    )
    moved: dict[str, Tensor] = {}
    end = 0
    for name, tensor in kept:
        moved[name] = Tensor(tensor.dtype, tensor.shape, (end, end + tensor.nbytes))
        end += tensor.nbytes
    part = out.with_name(f".{out.name}.part")
    with source.open("rb", buffering=0) as reader, part.open("wb") as writer:
        writer.write(encode_header(moved, header.metadata))
        for _, tensor in kept:
            first, last = (header.start + offset for offset in tensor.data_offsets)
            while first < last:
                piece = os.pread(reader.fileno(), min(_PIECE, last - first), first)
                if not piece:
                    raise OSError(f"{source} became shorter while it was read")
                writer.write(piece)
                first += len(piece)
                meter(len(piece))
        writer.flush()
        os.fsync(writer.fileno())
    part.rename(out)


class Rewrite(NamedTuple):
    """A shard that cannot be linked, because some of its tensors go elsewhere: what stays, and where."""

    source: Path
    name: str
    keep: list[str]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Every file of a folder to make, before any byte moves."""

    jobs: list[Job]
    rewrites: list[Rewrite]
    #: Small files, whole.
    written: dict[str, bytes]

    @property
    def sources(self) -> list[Path]:
        """The files that are read."""
        return [*(job.source for job in self.jobs), *(part.source for part in self.rewrites)]

    def rewritten_bytes(self) -> int:
        """Bytes of the shards that are written anew."""
        return sum(subset_bytes(rewrite.source, rewrite.keep) for rewrite in self.rewrites)


def carry_out(plan: Plan, folder: Path, method: Method, progress: Progress) -> dict[str, int]:
    """Bring and write every file of a plan that is not there yet; returns how many came in which way."""
    methods: dict[str, int] = {}
    total = sum(job.source.stat().st_size for job in plan.jobs) + plan.rewritten_bytes()
    with progress("files", total) as meter:
        for job in plan.jobs:
            (folder / job.name).parent.mkdir(parents=True, exist_ok=True)
            how = place(job, folder, method, meter)
            methods[how] = methods.get(how, 0) + 1
        for source, name, keep in plan.rewrites:
            out = folder / name
            out.parent.mkdir(parents=True, exist_ok=True)
            if out.exists():
                meter(subset_bytes(source, keep))
            else:
                write_subset(source, out, keep, meter)
    for name, content in plan.written.items():
        write_bytes(folder / name, content)
    return methods


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One file: lower-case hexadecimal digest, and size in bytes."""

    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    size: Annotated[int, msgspec.Meta(ge=0)]


class Source(msgspec.Struct, frozen=True):
    """What a file of the source looked like: it must not change between two runs."""

    path: str
    size: int
    modified_ns: int


class _State(msgspec.Struct, frozen=True, kw_only=True):
    sources: list[Source]
    digests: dict[str, Entry] = {}


class Workspace:
    """``.NAME.partial`` beside the output: the files so far, and what is known about them."""

    def __init__(self, out: Path, sources: list[Source]) -> None:
        self.root = out.with_name(f".{out.name}.partial")
        self.folder = self.root / "new"
        self.out = out
        self._sources = sources
        known = self._known()
        #: Whether an interrupted build of the same sources is being continued.
        self.resumed = known is not None
        if known is None and self.root.exists():
            shutil.rmtree(self.root)
        self.folder.mkdir(parents=True, exist_ok=True)
        #: Digests that are known, by name: a build that is continued does not compute them again.
        self.digests: dict[str, Entry] = {} if known is None else known.digests
        self.save()

    def _known(self) -> _State | None:
        try:
            state = msgspec.json.decode((self.root / _STATE).read_bytes(), type=_State)
        except (OSError, msgspec.DecodeError):
            return None
        return state if state.sources == self._sources else None

    def save(self) -> None:
        """Note the digests that are known."""
        state = _State(sources=self._sources, digests=self.digests)
        write_json(self.root / _STATE, state)

    def finish(self) -> None:
        """Put the folder in its place; the workspace goes."""
        for path in (self.folder, *self.folder.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)
        if self.out.exists():
            self.out.rmdir()  # empty: checked before
        self.folder.rename(self.out)
        shutil.rmtree(self.root)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Let one process at a time build ``out``."""
    path = out.with_name(f".{out.name}.lock")
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PackageError(
                f"Another process is building {out}.",
                expected="one at a time",
                fix="Wait for it to end, or choose another output folder.",
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def workspace(out: Path, sources: Iterable[Path]) -> Iterator[Workspace]:
    """A workspace for ``out``; it survives an interruption or a full disk.

    Raises:
        PackageError: the output exists and is not empty; or no space is left (run again).
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PackageError(
            f"{out} exists and is not empty.",
            expected="an empty or absent folder",
            fix="Choose another output folder.",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _alone(out):
            seen = ((path, path.stat()) for path in sorted(sources))
            known = [Source(str(path), of.st_size, of.st_mtime_ns) for path, of in seen]
            space = Workspace(out, known)
            yield space
            space.finish()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise PackageError(
            f"{out} cannot grow: {os.strerror(error.errno)}.",
            expected="space for the files that cannot be linked",
            fix="Free some space and run the same command again: it goes on from there.",
        ) from error
