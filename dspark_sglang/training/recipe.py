"""Named recipes: which domains prompts come from, and how they begin.

``perfectblend`` follows the mix of Open-PerfectBlend that the paper trains on (39.4% math, 38.9%
code, 17.6% chat, 4.1% instruction following). The openings are ours; what an opening leaves open
is written by the target itself.
"""

from __future__ import annotations

import random
import re
from importlib import resources
from pathlib import Path

import msgspec

from dspark_sglang.errors import DataError

SCHEMA_VERSION = 1
_SLOT = re.compile(r"\{(\w+)\}")
_NESTING = 3


class Opening(msgspec.Struct, frozen=True):
    """How one user turn begins."""

    domain: str
    text: str

    @property
    def complete(self) -> bool:
        """Whether the text is a whole prompt; otherwise the target goes on writing it."""
        return self.text.endswith((".", "?", "!"))


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

    def draw(self, rng: random.Random) -> Opening:
        """Draw a domain by its share and fill one of its openings."""
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
        return Opening(domain=domain, text=text)


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
