"""Results on disk, one file a piece, so that an interrupted run goes on where it stopped.

Every piece carries a key of what it depends on: the settings that made it and the source of the
algorithm. A piece with another key is made again, never mixed.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from dspark_sglang.artifacts import write_bytes
from dspark_sglang.errors import DataError
from dspark_sglang.provenance import versions
from tests.exactness.distribution import Output

ROOT = Path(__file__).resolve().parents[2]
#: Folders and modules whose source decides a result.
_SOURCES = ("dspark_sglang/core", "dspark_sglang/serving", "tests/tiny_models.py", "tests/exactness/mutants.py",
            "tests/exactness/options.py")  # fmt: skip


class Sampled(msgspec.Struct, kw_only=True):
    """Continuations drawn so far with one option."""

    key: str
    counts: dict[str, int] = {}

    @property
    def samples(self) -> int:
        """Continuations drawn."""
        return sum(self.counts.values())

    def add(self, outputs: list[Output]) -> None:
        """Count more continuations."""
        for output, count in Counter(outputs).items():
            name = " ".join(map(str, output))
            self.counts[name] = self.counts.get(name, 0) + count

    def outputs(self) -> dict[Output, int]:
        """How often each output was drawn."""
        return {tuple(map(int, name.split())): n for name, n in self.counts.items()}


class Answers(msgspec.Struct, kw_only=True):
    """Answers of one server so far, by request."""

    key: str
    answers: dict[str, list[int]] = {}
    #: Continuations of the one prompt that is sampled.
    drawn: dict[str, int] = {}
    #: What happened on the way, such as retractions seen.
    events: dict[str, int] = {}


class Judged(msgspec.Struct, kw_only=True):
    """A mutant's or an option's verdict."""

    key: str
    p_value: float
    samples: int
    statistic: float
    freedom: int
    impossible: int


Piece = TypeVar("Piece", Sampled, Answers, Judged)


def source_digest() -> str:
    """Digest of the algorithm's source and of the libraries it runs on."""
    digest = hashlib.sha256(msgspec.json.encode(versions()))
    for name in _SOURCES:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(ROOT).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def key(*parts: Any) -> str:
    """The key of a piece that depends on ``parts`` and on the source."""
    encoded = msgspec.json.encode([source_digest(), *parts], order="sorted")
    return hashlib.sha256(encoded).hexdigest()[:16]


def load(path: Path, kind: type[Piece], wanted: str) -> Piece | None:
    """A piece made under the same key, or None.

    Raises:
        DataError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        piece = msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, OSError) as error:
        raise DataError(
            f"{path} is damaged: {error}.",
            expected="results of an earlier run",
            fix="Remove it and run the same command again.",
        ) from error
    return piece if piece.key == wanted else None


def save(path: Path, piece: Sampled | Answers | Judged) -> None:
    """Write a piece, all or nothing.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    try:
        write_bytes(path, msgspec.json.encode(piece))
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror}.",
            expected="a writable folder with space",
            fix="Free some space or pass --out, and run the same command again.",
        ) from error


class Clock:
    """The time a command may still use.

    Args:
        minutes: from now; 0 for no limit.
    """

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60.0 * minutes if minutes else float("inf")

    @property
    def over(self) -> bool:
        """Whether no further piece should be started."""
        return time.monotonic() >= self._end


def digest(directory: Path) -> str:
    """Digest of a model directory's weights and configuration."""
    found = hashlib.sha256()
    for file in sorted(directory.glob("*.json")) + sorted(directory.glob("*.safetensors")):
        found.update(file.name.encode())
        with file.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()[:16]
