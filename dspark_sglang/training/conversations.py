"""Conversations a drafter learns from: one JSON object a line, answers written by the target.

Text is stored, not tokens, so that a file serves every target with the same chat template and
can be read by a person. A file only ever grows; a line cut short by a crash is dropped when the
file is opened for more.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal, NamedTuple, Self

import msgspec

from dspark_sglang.errors import DataError

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]


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


def iterate_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers and non-empty lines of a file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}.",
            expected="a JSON Lines file",
            fix="Check the path, or make one with `dspark generate-data`.",
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
            except (msgspec.DecodeError, ValueError) as error:
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
            fix="Make them with `dspark generate-data`.",
        )
    return Scan(list(found.values()), broken, duplicates, tuple(examples))


def _check(conversation: Conversation) -> None:
    roles = [message.role for message in conversation.messages]
    if "user" not in roles or not roles or roles[-1] != "assistant":
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
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_cut_line()
        if self.path.exists() and self.path.stat().st_size:
            for conversation in load_conversations([self.path]).conversations:
                self.ids.add(conversation.id)
                self.tokens += conversation.completion_tokens
        self._stream = self.path.open("ab")
        return self

    def _drop_cut_line(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("r+b") as stream:
            size = stream.seek(0, os.SEEK_END)
            while size:
                start = max(0, size - 65536)
                stream.seek(start)
                end = stream.read(size - start).rfind(b"\n")
                if end >= 0:
                    stream.truncate(start + end + 1)
                    return
                size = start
            stream.truncate(0)

    def write(self, conversation: Conversation) -> bool:
        """Append one conversation; False if its prompt is already there.

        Raises:
            DataError: the disk is full or the file cannot be written.
        """
        assert self._stream is not None, "use as a context manager"
        if conversation.id in self.ids:
            return False
        try:
            self._stream.write(msgspec.json.encode(conversation) + b"\n")
            self._stream.flush()
        except OSError as error:
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
