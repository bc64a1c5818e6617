"""Reading model configurations strictly: what is missing or nonsense is named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dspark_sglang.errors import CheckpointError

Config = Mapping[str, Any]
_FIX = "Download config.json of this model again with `hf download`."
#: Names in configurations and safetensors headers of the types weights come in.
TYPES = {"bfloat16": "BF16", "float16": "F16", "half": "F16", "float32": "F32", "float": "F32"}


def integer(config: Config, key: str, low: int = 1, *, default: int | None = None) -> int:
    """An integer of at least ``low``; ``default`` where it is missing or null.

    Raises:
        CheckpointError: missing without a default, of another type or too small.
    """
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise wrong(key, value, f"an integer of at least {low}")
    return value


def number(config: Config, key: str, default: float | None = None) -> float:
    """A positive number. Raises as :func:`integer`."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 < value < math.inf:
        raise wrong(key, value, "a positive number")
    return float(value)


def flag(config: Config, key: str, *, default: bool = True) -> bool:
    """True or false. Raises as :func:`integer`."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise wrong(key, value, "true or false")
    return value


def wrong(key: str, value: object, expected: str) -> CheckpointError:
    """The error for a field that is missing or nonsense."""
    says = f"config.json says {key} {value!r}."
    found = f"The configuration has no {key}." if value is None else says
    return CheckpointError(found, expected=expected, fix=_FIX)


def architecture(config: Config) -> str:
    """The class that SGLang will look for.

    Raises:
        CheckpointError: the configuration names none, or several.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise wrong("architectures", names, "a list of one name")
    return names[0]


def weight_type(config: Config) -> str:
    """Type of unquantised weights, as safetensors headers name it.

    Raises:
        CheckpointError: none, or one that is not read here.
    """
    value = config.get("dtype") or config.get("torch_dtype")
    if value not in TYPES:
        raise wrong("dtype", value, " or ".join(TYPES))
    return TYPES[value]
