"""The prompts the load is made of: the packaged ones, or those of a file.

The packaged ones were written for this project and appear in no public benchmark, so no drafter has been
trained or tuned on them. Real text matters: on random tokens a drafter's acceptance says
nothing about service. Prompts of one kind share a system message, as one application's
requests do, so the server's prefix cache is exercised too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import msgspec

from dspark_sglang.errors import ConfigError, DataError

PromptKind = Literal["chat", "math", "code", "instructions"]
KINDS: tuple[PromptKind, ...] = get_args(PromptKind)
SCHEMA_VERSION = 1
#: The first prompts, nine of each kind, are what evaluation, exactness and `make bench-load` were measured on. The
#: rest bring the published mix of domains: 39.4% math, 38.9% code, 17.6% chat, 4.1% instructions.
BALANCED = 36


class Prompt(msgspec.Struct, frozen=True):
    """One user turn, with the system message its kind shares and the turns before it."""

    id: str
    kind: str
    system: str
    user: str
    #: What the user says after each answer.
    follow_ups: tuple[str, ...] = ()
    #: User turns and answers before this one, alternating.
    history: tuple[str, ...] = ()

    def messages(self) -> list[dict[str, str]]:
        """The chat messages to send."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for number, text in enumerate((*self.history, self.user)):
            found.append({"role": "assistant" if number % 2 else "user", "content": text})
        return found

    def after(self, answer: str) -> Prompt | None:
        """The conversation's next turn; None where it is over or the answer is empty."""
        if not self.follow_ups or not answer:
            return None
        return msgspec.structs.replace(
            self,
            id=f"{self.id.split('/')[0]}/{len(self.history) // 2 + 2}",
            user=self.follow_ups[0],
            follow_ups=self.follow_ups[1:],
            history=(*self.history, self.user, answer),
        )


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    kind: PromptKind
    user: str
    follow_ups: tuple[str, ...] = ()


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
        Prompt(
            id=entry.id,
            kind=entry.kind,
            system=content.systems[entry.kind],
            user=entry.user,
            follow_ups=entry.follow_ups,
        )
        for entry in content.prompts
    )


class Source(NamedTuple):
    """Prompts and where they are from, for the report."""

    prompts: list[Prompt]
    name: str


def read_prompts(path: Path | None) -> Source:
    """Prompts of a file in any format this kit reads; None: the packaged ones.

    The user turns of a conversation are asked one after the other, each after the server's own answer to the one
    before.

    Raises:
        ConfigError: nothing usable is in it.
    """
    if path is None:
        return Source(list(load_prompts()), "packaged")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"Cannot read {path}: {error}.", expected="a file of prompts", fix="Check --prompts."
        ) from error
    if not data.strip():
        raise ConfigError(
            f"{path} is empty.",
            expected="prompts: this kit's, ShareGPT, messages or text lines",
            fix="Name another file with --prompts, or leave it out for the packaged ones.",
        )
    if b'"hash_ids"' in data.lstrip().split(b"\n", 1)[0]:
        raise ConfigError(
            f"{path} is a Mooncake trace, which has lengths and no text.",
            expected="prompts",
            fix="Replay it with aiperf: docs/guides/load-test.md.",
        )
    if b'"systems"' in data:
        return Source(list(load_prompts(path)), path.name)
    # Not at the top: the reader belongs to training, and locust must start without it.
    from dspark_sglang.training.prompts import load_prompt_files

    try:
        scan = load_prompt_files([path])
    except DataError as error:
        raise ConfigError(error.found, expected=error.expected, fix=error.fix) from error
    prompts = [
        Prompt(
            id=f"{path.stem}-{number}",
            kind=draft.domain,
            system=draft.system or "",
            user=draft.turns[0],
            follow_ups=tuple(draft.turns[1:]),
        )
        for number, draft in enumerate(scan.drafts)
    ]
    return Source(prompts, path.name)


def cycle(prompts: Sequence[Prompt], rng: random.Random) -> Iterator[Prompt]:
    """Yield prompts for ever: each pass visits every one once, in a fresh seeded order.

    Every kind is spread evenly over a pass, so that a short run has the mix of a long one.
    """
    kinds: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        kinds.setdefault(prompt.kind, []).append(prompt)
    while True:
        placed = []
        for own in kinds.values():
            order = rng.sample(own, len(own))
            placed += [((i + rng.random()) / len(own), prompt) for i, prompt in enumerate(order)]
        placed.sort(key=lambda pair: pair[0])
        yield from (prompt for _, prompt in placed)
