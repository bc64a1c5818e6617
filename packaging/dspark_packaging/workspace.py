"""The unfinished folder of a long build: kept when it is interrupted, continued by the same command."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from dspark_packaging.errors import PackageError
from dspark_packaging.manifest import Digests, Entry
from dspark_sglang.artifacts import write_json

_STATE = "state.json"


class Source(msgspec.Struct, frozen=True):
    """What a file of the source looked like: it must not change between two runs."""

    path: str
    size: int
    modified_ns: int


class _State(msgspec.Struct, frozen=True, kw_only=True):
    sources: list[Source]
    digests: dict[str, Entry] = {}


def describe(paths: Iterable[Path]) -> list[Source]:
    """What the files of a source look like now."""
    return [
        Source(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)
    ]


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
        self.digests = Digests({} if known is None else known.digests)
        self.save()

    def _known(self) -> _State | None:
        try:
            state = msgspec.json.decode((self.root / _STATE).read_bytes(), type=_State)
        except (OSError, msgspec.DecodeError):
            return None
        return state if state.sources == self._sources else None

    def save(self) -> None:
        """Note the digests that are known."""
        state = _State(sources=self._sources, digests=dict(self.digests.known))
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
            space = Workspace(out, describe(sources))
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
