"""Conversations a drafter learns from: one JSON object a line, answers written by the target.

Text is stored, not tokens, so that a file serves every target with the same chat template and
can be read by a person. A file only ever grows, by one process at a time; a line cut short by a
crash is dropped when the file is opened for more.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Self

import msgspec

from dspark_sglang.errors import DataError

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]
#: How a line begins that this module wrote: nothing else is ever cut off a file.
_LINE_START = b'{"id":'
_OURS = "a new file, or conversations that this command wrote"


class Message(msgspec.Struct, frozen=True):
    """One chat message."""

    role: Role
    content: str


class Conversation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A conversation whose assistant turns the target wrote."""

    #: Digest of the prompt, see :func:`prompt_id`.
    id: str
    messages: list[Message]
    domain: str = "chat"
    #: ``length``: the last answer was cut and does not end its turn.
    finish_reason: FinishReason = "stop"
    temperature: float = 0.0
    #: Tokens the target wrote, as its server counted them.
    completion_tokens: int = 0


def prompt_id(messages: list[Message]) -> str:
    """16 hex digits that are equal for equal prompts, whatever their case and spacing.

    Everything before the first answer counts.
    """
    digest = hashlib.sha256()
    for message in messages:
        if message.role == "assistant":
            break
        digest.update(message.role.encode() + b"\0")
        digest.update(" ".join(message.content.lower().split()).encode() + b"\0")
    return digest.hexdigest()[:16]


def is_validation(identity: str, per_mille: int) -> bool:
    """Whether a prompt belongs to the validation split: decided by its digest alone.

    Every run on every machine splits alike, and a prompt never changes sides as a file grows.
    """
    return int(identity[:8], 16) % 1000 < per_mille


class Scan(NamedTuple):
    """Conversations of some files, and what could not be used."""

    conversations: list[Conversation]
    broken: int
    duplicates: int
    #: ``path:line: why`` of the first few broken lines.
    examples: tuple[str, ...]


def iterate_lines(
    path: Path,
    *,
    expected: str = "a JSON Lines file",
    fix: str = "Check the path, or make one with `dspark data`.",
) -> Iterator[tuple[int, bytes]]:
    """Line numbers and non-empty lines of a file.

    Raises:
        DataError: the file cannot be read; ``expected`` and ``fix`` are its words.
    """
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}.",
            expected=expected,
            fix=fix,
        ) from error


def load_conversations(paths: list[Path]) -> Scan:
    """Read conversation files; broken and repeated lines are counted and skipped.

    Raises:
        DataError: a file cannot be read, or nothing in them can be used.
    """
    found: dict[str, Conversation] = {}
    broken, duplicates = 0, 0
    examples: list[str] = []
    decoder = msgspec.json.Decoder(Conversation)
    for path in paths:
        for number, line in iterate_lines(path):
            try:
                conversation = decoder.decode(line)
                _check(conversation)
            except ValueError as error:
                broken += 1
                if len(examples) < 3:
                    examples.append(f"{path}:{number}: {error}")
                continue
            if conversation.id in found:
                duplicates += 1
                continue
            found[conversation.id] = conversation
    if not found:
        raise DataError(
            f"No usable conversation in {', '.join(map(str, paths))} ({broken} broken lines).",
            expected='lines like {"id": ..., "messages": [{"role": "user", ...}, ...]}',
            fix="Make them with `dspark data`.",
        )
    return Scan(list(found.values()), broken, duplicates, tuple(examples))


def _check(conversation: Conversation) -> None:
    roles = [message.role for message in conversation.messages]
    if "user" not in roles or roles[-1] != "assistant":
        raise ValueError("no user turn answered by the assistant")
    if not conversation.messages[-1].content.strip():
        raise ValueError("an empty answer")
    try:
        int(conversation.id[:8], 16)
    except ValueError:
        raise ValueError(f"id {conversation.id!r} is not a hexadecimal digest") from None


class ConversationWriter:
    """Appends conversations to a file, safe against being killed between or inside lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ids: set[str] = set()
        self.tokens = 0
        #: Lines already there that cannot be used.
        self.broken = 0
        self._stream: io.FileIO | None = None

    def __enter__(self) -> Self:
        """Open the file, or make it.

        Raises:
            DataError: it cannot be written, another process writes it, or it holds other things.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as stack:
                # Unbuffered: what a full disk did not take must not be written again at the end.
                stream = stack.enter_context(self.path.open("a+b", buffering=0))
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._end_last_line(stream)
                if stream.seek(0, os.SEEK_END):
                    self._count()
                self._stream = stream
                stack.pop_all()
        except BlockingIOError as error:
            raise DataError(
                f"Another process writes {self.path}.",
                expected="one at a time",
                fix="Wait for it, or give another --out; `dspark train` reads several files.",
            ) from error
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be written: {error.strerror}.",
                expected="a file, or a place for one",
                fix="Give another --out.",
            ) from error
        return self

    def _count(self) -> None:
        """Take note of the conversations that are there."""
        try:
            scan = load_conversations([self.path])
        except DataError as error:
            raise DataError(error.found, expected=_OURS, fix="Give another --out.") from error
        self.broken = scan.broken
        for conversation in scan.conversations:
            self.ids.add(conversation.id)
            self.tokens += conversation.completion_tokens

    def _end_last_line(self, stream: io.FileIO) -> None:
        """Drop a conversation cut short; end a whole one that lacks its line end.

        Raises:
            DataError: the file ends in something else, which is not ours to remove.
        """
        size = stream.seek(0, os.SEEK_END)
        start = _after_last_line_end(stream, size)
        if start == size:
            return
        stream.seek(start)
        line = stream.read(len(_LINE_START))
        if not _LINE_START.startswith(line):
            raise DataError(
                f"{self.path} ends in {line.decode(errors='replace')!r}...",
                expected=_OURS,
                fix="Give another --out, or end the file's last line.",
            )
        line += stream.readall()
        try:
            msgspec.json.decode(line)
        except ValueError:
            stream.truncate(start)
        else:
            stream.write(b"\n")

    def write(self, conversation: Conversation) -> bool:
        """Append one conversation; False if its prompt is already there.

        Raises:
            DataError: the disk is full or the file cannot be written; nothing was appended.
        """
        assert self._stream is not None, "use as a context manager"
        if conversation.id in self.ids:
            return False
        rest = memoryview(msgspec.json.encode(conversation) + b"\n")
        size = self._stream.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[self._stream.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # if this fails too, the next start does it
                self._stream.truncate(size)
            raise DataError(
                f"{self.path} cannot be written: {error.strerror}.",
                expected="space for more conversations",
                fix="Free some space and run the same command again; it goes on where it stopped.",
            ) from error
        self.ids.add(conversation.id)
        self.tokens += conversation.completion_tokens
        return True

    def __exit__(self, *exc: object) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _after_last_line_end(stream: io.FileIO, size: int) -> int:
    """Where the last line begins that has no end; ``size`` if there is none."""
    while size:
        start = max(0, size - 65536)
        stream.seek(start)
        end = stream.read(size - start).rfind(b"\n")
        if end >= 0:
            return start + end + 1
        size = start
    return 0
