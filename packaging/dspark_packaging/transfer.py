"""Bring files of any size from one folder to another without copying them where that can be avoided.

A reflink (copy on write) shares the blocks and stays apart; a hard link is the same file under two
names, so whatever edits it in place edits both; a copy is streamed in pieces, keeps holes, and goes
on where it was interrupted. The source is only read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from dspark_packaging.errors import PackageError
from dspark_packaging.progress import Meter

Method = Literal["auto", "reflink", "link", "copy"]
METHODS: tuple[Method, ...] = get_args(Method)
#: ``ioctl`` of Linux that shares blocks between two files (``FICLONE`` in linux/fs.h).
_FICLONE = 0x40049409
_PIECE = 8 << 20
#: A copy is made durable, and noted, this often: what an interruption can cost.
_CHECKPOINT = 256 << 20
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
    size = source.stat().st_size
    with source.open("rb", buffering=0) as reader, part.open("ab", buffering=0) as writer:
        # Only what was made durable counts: see `_durable`.
        done = min(_read_offset(part), size)
        writer.truncate(done)
        meter(done)
        mark = done
        while done < size:
            done = _next_piece(reader.fileno(), writer.fileno(), done, size, meter)
            if done - mark >= _CHECKPOINT:
                _durable(writer.fileno(), part, done)
                mark = done
        writer.truncate(size)
        os.fsync(writer.fileno())
    part.rename(out)
    _offset_file(part).unlink(missing_ok=True)


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


def _offset_file(part: Path) -> Path:
    return part.with_name(part.name + ".offset")


def _durable(descriptor: int, part: Path, done: int) -> None:
    os.fsync(descriptor)
    _offset_file(part).write_text(str(done))


def _read_offset(part: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return min(int(_offset_file(part).read_text()), part.stat().st_size)
    return 0


def place(job: Job, folder: Path, method: Method, meter: Meter) -> str:
    """Bring one file into ``folder``; returns how ("reflink", "link", "copy" or "there").

    Raises:
        PackageError: the method asked for is not possible here.
        OSError: no space, or unreadable; a copy goes on from there the next time.
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
