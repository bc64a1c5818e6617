"""Prompts for a load test, from any of the files this kit reads: ours, ShareGPT, messages, text, a Mooncake trace."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import msgspec

from dspark_loadtests.prompts import Prompt, load_prompts
from dspark_sglang.errors import ConfigError, DataError
from dspark_sglang.training.prompts import load_prompt_files

#: Tokens of a block that one hash of a Mooncake trace stands for.
TRACE_BLOCK = 512
#: English text has about this many tokens a word with the vocabularies of today.
_TOKENS_A_WORD = 1.35


class Source(NamedTuple):
    """Prompts and where they are from, for the report."""

    prompts: list[Prompt]
    name: str


class _TraceLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_prompts(path: Path | None, *, limit: int | None = None) -> Source:
    """Prompts of a file; None: the packaged ones.

    A Mooncake trace (JSON lines with ``timestamp`` in milliseconds, ``input_length``, ``output_length`` and
    ``hash_ids``) has lengths and shared prefixes but no text; see :func:`trace_prompts`. In other files the user turns
    of a conversation are asked one after the other, each after the server's own answer to the one before.

    Args:
        limit: take no more than so many.

    Raises:
        ConfigError: nothing usable is in it.
    """
    if path is None:
        return Source(list(load_prompts())[:limit], "packaged")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"Cannot read {path}: {error}.", expected="a file of prompts", fix="Check --prompts."
        ) from error
    if not data.strip():
        raise ConfigError(
            f"{path} is empty.",
            expected="prompts: this kit's, ShareGPT, messages, text lines or a Mooncake trace",
            fix="Name another file with --prompts, or leave it out for the packaged ones.",
        )
    first = data.lstrip().split(b"\n", 1)[0]
    if b'"hash_ids"' in first:
        return Source(trace_prompts(_trace(path, data)[:limit]), f"trace {path.name}")
    if b'"systems"' in data:
        return Source(list(load_prompts(path))[:limit], path.name)
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
        for number, draft in enumerate(scan.drafts[:limit])
    ]
    return Source(prompts, path.name)


def _trace(path: Path, data: bytes) -> list[_TraceLine]:
    found = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(msgspec.json.decode(line, type=_TraceLine))
        except msgspec.DecodeError as error:
            raise ConfigError(
                f"{path}:{number}: {error}.",
                expected="timestamp, input_length, output_length and hash_ids",
                fix="Compare it with the traces of the Mooncake repository.",
            ) from error
    return sorted(found, key=lambda line: line.timestamp)


def trace_prompts(lines: list[_TraceLine], *, seed: int = 0) -> list[Prompt]:
    """Text of a trace's lengths and shared prefixes.

    Every hash stands for the same 512 tokens wherever it occurs. They are made of sentences of the packaged prompts:
    real English, so that drafting meets text and not noise, but no conversation; accepted lengths on it are not those
    of a service. Lengths are right to the words a token of the served vocabulary has.
    """
    sentences = [
        sentence.strip() + "."
        for prompt in load_prompts()
        for sentence in prompt.user.split(". ")
        if len(sentence) > 20
    ]
    begin = lines[0].timestamp if lines else 0.0
    return [
        Prompt(
            id=f"trace-{number}",
            kind="trace",
            system="",
            user=_text(line, sentences, seed),
            max_tokens=max(1, line.output_length),
            at_s=(line.timestamp - begin) / 1e3,
        )
        for number, line in enumerate(lines)
    ]


def _text(line: _TraceLine, sentences: list[str], seed: int) -> str:
    words: list[str] = []
    left = line.input_length
    for block in line.hash_ids:
        wanted = round(min(left, TRACE_BLOCK) / _TOKENS_A_WORD)
        rng = random.Random(f"{seed}/{block}")
        own: list[str] = []
        while len(own) < wanted:
            own += rng.choice(sentences).split()
        words += own[:wanted]
        left -= TRACE_BLOCK
    return " ".join(words)
