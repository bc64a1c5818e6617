"""The prompts the load is made of.

They were written for this project and appear in no public benchmark, so no drafter has been
trained or tuned on them. Real text matters: on random tokens a drafter's acceptance says
nothing about service. Prompts of one kind share a system message, as one application's
requests do, so the server's prefix cache is exercised too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

import msgspec

from dspark_sglang.errors import ConfigError

PromptKind = Literal["chat", "math", "code", "instructions"]
KINDS: tuple[PromptKind, ...] = get_args(PromptKind)
SCHEMA_VERSION = 1


class Prompt(msgspec.Struct, frozen=True):
    """One user turn, with the system message its kind shares."""

    id: str
    kind: PromptKind
    system: str
    user: str

    def messages(self) -> list[dict[str, str]]:
        """The chat messages to send."""
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": self.user},
        ]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    kind: PromptKind
    user: str


class _PromptFile(msgspec.Struct, forbid_unknown_fields=True):
    schema_version: int
    license: str
    systems: dict[PromptKind, str]
    prompts: list[_Entry]


def load_prompts(path: Path | None = None) -> tuple[Prompt, ...]:
    """Read the packaged prompts, or those of ``path`` in the same format.

    Raises:
        ConfigError: the file is not of this format or version, or has no prompts.
    """
    source = path or resources.files("dspark_loadtests").joinpath("data/prompts.json")
    expected = f"a prompt file of schema_version {SCHEMA_VERSION}"
    fix = "Compare it with loadtests/dspark_loadtests/data/prompts.json."
    try:
        content = msgspec.json.decode(source.read_bytes(), type=_PromptFile)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"Cannot use prompts {source}: {error}.", expected=expected, fix=fix
        ) from error
    missing = {entry.kind for entry in content.prompts} - content.systems.keys()
    if content.schema_version != SCHEMA_VERSION or not content.prompts or missing:
        raise ConfigError(
            f"{source} has schema_version {content.schema_version}, {len(content.prompts)} prompts "
            f"and no system message for {sorted(missing)}.",
            expected=expected,
            fix=fix,
        )
    return tuple(
        Prompt(id=entry.id, kind=entry.kind, system=content.systems[entry.kind], user=entry.user)
        for entry in content.prompts
    )


def cycle(prompts: Sequence[Prompt], rng: random.Random) -> Iterator[Prompt]:
    """Yield prompts for ever: each pass visits every one once, in a fresh seeded order.

    Passes keep the four kinds balanced, which independent draws do only in the long run.
    """
    while True:
        yield from rng.sample(prompts, len(prompts))
