"""Values of command-line options that hold several."""

from __future__ import annotations

from typing import Any

from dspark_sglang.errors import ConfigError


def read_numbers(text: str, name: str, kind: type[Any], *, zero: bool = False) -> list[Any]:
    """The numbers of an option such as ``1,8,32``.

    Args:
        kind: int or float.
        zero: whether 0 is one of them.

    Raises:
        ConfigError: no numbers, or one that is negative, infinite or 0 where that is none.
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= value < float("inf") and (zero or value) for value in found):
        least = "from 0" if zero else "above 0"
        raise ConfigError(
            f"{name} is {text!r}.",
            expected=f"numbers {least} with commas between them",
            fix="As in 1,8,32.",
        )
    return found
