"""Prompts from files: ShareGPT, OpenAI messages or plain text. Their answers are not used.

- ``.json`` / ``.jsonl``: ``{"conversations": [{"from": "human", "value": ...}, ...]}`` (ShareGPT) or
  ``{"messages": [{"role": "user", "content": ...}, ...]}`` (OpenAI), one a line or in one array;
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

_ROLES = {"human": "user", "user": "user", "system": "system", "gpt": "assistant"}
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
            except (ValueError, KeyError, TypeError) as error:
                broken += 1
                if len(examples) < 3:
                    examples.append(f"{path}:{place}: {error}")
    if not drafts:
        raise DataError(
            f"No usable prompt in {', '.join(map(str, paths))} ({broken} broken entries).",
            expected='ShareGPT {"conversations": ...}, OpenAI {"messages": ...} or text lines',
            fix=f"First problems: {'; '.join(examples) or 'the files are empty'}.",
        )
    return PromptScan(drafts, broken, tuple(examples))


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Place and decoded entry; an entry that is not JSON comes as its exception."""
    if path.suffix == ".json":
        try:
            content = msgspec.json.decode(path.read_bytes())
        except (OSError, msgspec.DecodeError) as error:
            raise DataError(
                f"{path} cannot be read: {error}.",
                expected="a JSON array of conversations",
                fix="Check the path, or give JSON Lines as .jsonl.",
            ) from error
        yield from enumerate(content if isinstance(content, list) else [content], start=1)
        return
    for number, line in iterate_lines(path):
        if path.suffix == ".jsonl":
            try:
                yield number, msgspec.json.decode(line)
            except msgspec.DecodeError as error:
                yield number, error
        else:
            yield number, line


def _draft(entry: Any, domain: str) -> Draft:
    if isinstance(entry, Exception):
        raise ValueError(str(entry))
    if isinstance(entry, bytes):
        return Draft(domain, None, (entry.decode("utf-8").strip(),))
    if not isinstance(entry, dict):
        raise ValueError(f"a {type(entry).__name__}, not an object")
    turns = entry.get("messages") or entry.get("conversations")
    if not isinstance(turns, list):
        raise ValueError("neither messages nor conversations")
    system: str | None = None
    users: list[str] = []
    for turn in turns:
        role = _ROLES.get(turn.get("role") or turn.get("from"), "")
        text = turn.get("content", turn.get("value"))
        if not isinstance(text, str):
            raise ValueError("a message that is not text")
        if role == "system" and not users:
            system = text
        elif role == "user" and text.strip():
            users.append(text)
    if not users:
        raise ValueError("no user turn")
    return Draft(str(entry.get("domain") or domain), system, tuple(users[:_MAX_TURNS]))
