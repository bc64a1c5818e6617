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
#: Questions of each kind that every run asks again, whatever its seed.
FAMILIAR = 4
_SUBJECTS = ("salt", "bridges", "winter", "maps", "bees", "glass", "tides", "letters", "iron")


class Question(NamedTuple):
    """One prompt; ``verbatim`` is what an echo has to hold."""

    number: int
    kind: str
    text: str
    verbatim: str | None
    tokens: int
    #: Of a familiar question, the same in every run; else empty.
    name: str = ""


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


def questions(count: int, *, seed: int, tokens: int, familiar: bool = True) -> list[Question]:
    """The prompts of one run, the same for the same seed.

    Args:
        tokens: most tokens of an answer.
        familiar: make every second one of a kind a question that all runs ask.
    """
    fresh, found = random.Random(seed), []
    kinds = ("identifiers", "code", "numbers", "open")
    for number in range(count):
        turn, place = divmod(number, len(kinds))
        kind, name, rng = kinds[place], "", fresh
        if familiar and turn % 2 == 0:
            name = f"{kind}-{turn // 2 % FAMILIAR}"
            rng = random.Random(name)
        if kind == "open":
            text, verbatim = rng.choice(_OPEN).format(x=rng.choice(_SUBJECTS)), None
        else:
            body = _echoed(kind, rng)
            text = f"Repeat the following exactly, three times, and nothing else:\n\n{body}\n"
            verbatim = body.strip()
        found.append(Question(number, kind, text, verbatim, tokens, name))
    return found
