"""Where conversations begin: prompts from files, or recipes whose prompts the target itself goes on writing.

Files are ShareGPT, OpenAI messages or plain text; the answers in them are not used.

- ``.json`` / ``.jsonl``: ``{"conversations": [{"from": "human", "value": ...}, ...]}`` (ShareGPT) or
  ``{"messages": [{"role": "user", "content": ...}, ...]}`` (OpenAI), ``{"prompt": ...}`` (a text or
  messages) or a plain string, one a line or in one array; ``domain`` or ``kind`` beside it is kept;
- ``.txt``: one prompt a line.

A recipe says which domains prompts come from and how they begin. ``perfectblend`` follows the mix of
Open-PerfectBlend that the paper trains on (39.4% math, 38.9% code, 17.6% chat, 4.1% instruction
following). The openings are ours.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dspark_sglang.errors import DataError
from dspark_sglang.training.conversations import iterate_lines

_ROLES = {"human": "user", "user": "user", "system": "system", "developer": "system"}
_TURNS = ("messages", "conversations", "prompt", "user", "text")
_SUFFIXES = (".json", ".jsonl", ".txt")
_MAX_TURNS = 8


class Draft(NamedTuple):
    """A conversation to be answered: user turns to come, or an opening to be continued."""

    domain: str
    system: str | None
    #: User turns in order; the target answers each before the next.
    turns: tuple[str, ...]
    #: Whether the target still has to finish the (only) turn.
    continued: bool = False


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


SCHEMA_VERSION = 1
_SLOT = re.compile(r"\{(\w+)\}")
_NESTING = 3


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A prompt mix."""

    schema_version: int
    name: str
    license: str
    note: str
    #: Share of each domain; they add up to 1.
    shares: dict[str, float]
    systems: list[str]
    openings: dict[str, list[str]]
    slots: dict[str, list[str]]

    def draw(self, rng: random.Random, system_share: float = 0.3) -> Draft:
        """Draw a domain by its share and fill one of its openings.

        Args:
            system_share: of the conversations that get a system message.
        """
        domain = rng.choices(list(self.shares), weights=list(self.shares.values()))[0]
        text = rng.choice(self.openings[domain])
        used: set[str] = set()

        def fill(match: re.Match[str]) -> str:
            # A slot used twice gets two values where it has them.
            values = self.slots[match[1]]
            value = rng.choice([v for v in values if v not in used] or values)
            used.add(value)
            return value

        for _ in range(_NESTING):
            text = _SLOT.sub(fill, text)
        system = rng.choice(self.systems) if rng.random() < system_share else None
        return Draft(domain, system, (text,), continued=not text.endswith((".", "?", "!")))


def recipe_names() -> list[str]:
    """Names of the recipes this package carries."""
    folder = resources.files("dspark_sglang.training").joinpath("recipes")
    return sorted(
        entry.name.removesuffix(".json")
        for entry in folder.iterdir()
        if entry.name.endswith(".json")
    )


def load_recipe(name: str) -> Recipe:
    """Read a packaged recipe by name, or a recipe file by path.

    Raises:
        DataError: there is none, or it contradicts itself.
    """
    packaged = resources.files("dspark_sglang.training").joinpath(f"recipes/{name}.json")
    source = packaged if name in recipe_names() else Path(name)
    fix = f"Use {' or '.join(recipe_names())}, or compare yours with it."
    try:
        recipe = msgspec.json.decode(source.read_bytes(), type=Recipe)
    except (OSError, ValueError) as error:
        raise DataError(
            f"Cannot use recipe {name}: {error}.", expected="a recipe file", fix=fix
        ) from error
    problem = _problem(recipe)
    if problem:
        raise DataError(f"Recipe {name}: {problem}.", expected="a consistent recipe", fix=fix)
    return recipe


def _problem(recipe: Recipe) -> str:
    if recipe.schema_version != SCHEMA_VERSION:
        return f"schema_version is {recipe.schema_version}, not {SCHEMA_VERSION}"
    if abs(sum(recipe.shares.values()) - 1.0) > 1e-6 or min(recipe.shares.values()) <= 0:
        return f"shares {recipe.shares} are not positive or do not add up to 1"
    if not recipe.systems:
        return "no system messages"
    empty = [domain for domain in recipe.shares if not recipe.openings.get(domain)]
    if empty:
        return f"no openings for {', '.join(empty)}"
    texts = [text for domain in recipe.openings.values() for text in domain]
    texts += [text for values in recipe.slots.values() for text in values]
    used = {slot for text in texts for slot in _SLOT.findall(text)}
    unknown = sorted(slot for slot in used if not recipe.slots.get(slot))
    if unknown:
        return f"no values for slots {', '.join(unknown)}"
    inner = {slot for texts in recipe.openings.values() for slot in _SLOT.findall(" ".join(texts))}
    for _ in range(_NESTING):
        inner = {slot for outer in inner for slot in _SLOT.findall(" ".join(recipe.slots[outer]))}
    return f"slots inside slots, more than {_NESTING} deep" if inner else ""
