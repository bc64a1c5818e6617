"""Prompts from files: ShareGPT, OpenAI messages or plain text. Their answers are not used.

- ``.json`` / ``.jsonl``: ``{"conversations": [{"from": "human", "value": ...}, ...]}`` (ShareGPT) or
  ``{"messages": [{"role": "user", "content": ...}, ...]}`` (OpenAI), ``{"prompt": ...}`` (a text or
  messages) or a plain string, one a line or in one array; ``domain`` or ``kind`` beside it is kept;
- ``.txt``: one prompt a line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dspark_sglang.errors import DataError
from dspark_sglang.training.conversations import iterate_lines
from dspark_sglang.training.generate import Draft

_ROLES = {"human": "user", "user": "user", "system": "system", "developer": "system"}
_TURNS = ("messages", "conversations", "prompt", "user", "text")
_SUFFIXES = (".json", ".jsonl", ".txt")
_MAX_TURNS = 8


class PromptScan(NamedTuple):
    """Usable prompts, and how many entries were not."""

    drafts: list[Draft]
    broken: int
    examples: tuple[str, ...]


def load_prompt_files(paths: list[Path], *, domain: str = "chat") -> PromptScan:
    """Read prompts; an entry that cannot be used is counted and skipped.

    Args:
        paths: files of the formats above.
        domain: of entries that name none.

    Raises:
        DataError: a file cannot be read, or no entry can be used.
    """
    drafts, broken = [], 0
    examples: list[str] = []
    for path in paths:
        for place, entry in _entries(path):
            try:
                drafts.append(_draft(entry, domain))
            except ValueError as error:
                broken += 1
                if len(examples) < 3:
                    examples.append(f"{path}:{place}: {error}")
    if not drafts:
        problems = "; ".join(examples) or "nothing in them"
        raise DataError(
            f"No usable prompt in {', '.join(map(str, paths))}: {problems}.",
            expected='ShareGPT {"conversations": ...}, OpenAI {"messages": ...} or text lines',
            fix="Bring the entries into one of these forms.",
        )
    return PromptScan(drafts, broken, tuple(examples))


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Place and decoded entry; an entry that is not JSON comes as its exception."""
    if path.suffix not in _SUFFIXES:
        raise DataError(
            f"{path} is no prompt file by its name.",
            expected=f"a name that ends in {', '.join(_SUFFIXES)}",
            fix="Unpack, convert or rename it.",
        )
    if path.suffix == ".json":
        try:
            content = msgspec.json.decode(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read: {error}.",
                expected="a JSON array of conversations",
                fix="Check the path, or name JSON Lines .jsonl.",
            ) from error
        yield from enumerate(content if isinstance(content, list) else [content], start=1)
        return
    for number, line in iterate_lines(path, expected="a prompt file", fix="Check the path."):
        if path.suffix == ".txt":
            yield number, line
            continue
        try:
            yield number, msgspec.json.decode(line)
        except ValueError as error:
            yield number, error


def _draft(entry: Any, domain: str) -> Draft:
    if isinstance(entry, Exception):
        raise ValueError(str(entry))
    if isinstance(entry, bytes):
        return Draft(domain, None, (entry.decode("utf-8-sig").strip(),))
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict):
        raise ValueError(f"a {type(entry).__name__}, not an object")
    system, users = _turns(entry)
    name = str(entry.get("domain") or entry.get("kind") or domain)
    return Draft(name, system, tuple(users[:_MAX_TURNS]))


def _turns(entry: dict[str, Any]) -> tuple[str | None, list[str]]:
    """The system message and the user turns of an entry in any of the formats."""
    turns = next((entry[key] for key in _TURNS if entry.get(key)), None)
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not isinstance(turns, list):
        raise ValueError(f"none of {', '.join(_TURNS)}")
    system: str | None = None
    users: list[str] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"a message that is a {type(turn).__name__}, not an object")
        role = _ROLES.get(str(turn.get("role") or turn.get("from")))
        if role is None:
            continue  # an answer: the target writes its own
        text = _text(turn.get("content", turn.get("value")))
        if role == "system" and not users:
            system = text
        elif role == "user" and text.strip():
            users.append(text)
    if not users:
        raise ValueError("no user turn")
    return system, users


def _text(content: Any) -> str:
    """The text of a message, which OpenAI's format may split into parts."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(content):
            return "".join(texts)
    if not isinstance(content, str):
        raise ValueError("a message that is not text")
    return content
