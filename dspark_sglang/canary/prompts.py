"""What the canary asks: text that has to come back letter by letter, and text that does not."""

from __future__ import annotations

import random
from typing import NamedTuple

_SYLLABLES = ("ka", "ro", "mi", "ten", "sul", "va", "qui", "nor", "pex", "lu", "dra", "zen")
_CODE = """def {name}({a}, {b}):
    {c} = {a}[{i}] * 0x{n:04x} + {b}.{d}
    return {c} if {c} >= {m} else "{e}"
"""
_OPEN = (
    "Explain in three sentences why {x} matters.",
    "Write a short story about {x} and a river.",
    "List five facts about {x}.",
    "Write a Python function that counts {x} in a list.",
)
_SUBJECTS = ("salt", "bridges", "winter", "maps", "bees", "glass", "tides", "letters", "iron")


class Question(NamedTuple):
    """One prompt; ``verbatim`` is what an echo has to hold."""

    number: int
    kind: str
    text: str
    verbatim: str | None
    tokens: int


def _identifier(rng: random.Random) -> str:
    words = ["".join(rng.choices(_SYLLABLES, k=2)) for _ in range(2)]
    return f"{words[0]}_{words[1].capitalize()}{rng.randrange(1000)}"


def _echoed(kind: str, rng: random.Random) -> str:
    if kind == "identifiers":
        return ", ".join(_identifier(rng) for _ in range(4))
    if kind == "numbers":
        return " ".join(f"{rng.uniform(-1e4, 1e4):.3f}" for _ in range(5))
    names = {name: _identifier(rng) for name in ("name", "a", "b", "c", "d", "e")}
    numbers = {"i": rng.randrange(9), "n": rng.randrange(1 << 16), "m": rng.randrange(999)}
    return _CODE.format(**names, **numbers)


def questions(count: int, *, seed: int, tokens: int) -> list[Question]:
    """The prompts of one run, the same for the same seed.

    Args:
        tokens: most tokens of an answer.
    """
    rng, found = random.Random(seed), []
    kinds = ("identifiers", "code", "numbers", "open")
    for number in range(count):
        kind = kinds[number % len(kinds)]
        if kind == "open":
            text = rng.choice(_OPEN).format(x=rng.choice(_SUBJECTS))
            found.append(Question(number, kind, text, None, tokens))
            continue
        body = _echoed(kind, rng)
        text = f"Repeat the following exactly, three times, and nothing else:\n\n{body}\n"
        found.append(Question(number, kind, text, body.strip(), tokens))
    return found
