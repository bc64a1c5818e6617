"""Reading model configurations strictly: what is missing or nonsense is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_sglang.errors import CheckpointError

Config = Mapping[str, Any]
_FIX = "Download config.json of this model again with `hf download`."
#: Names in configurations and safetensors headers of the types weights come in.
TYPES = {"bfloat16": "BF16", "float16": "F16", "half": "F16", "float32": "F32", "float": "F32"}


def integer(config: Config, key: str, low: int = 1) -> int:
    """A required integer of at least ``low``.

    Raises:
        CheckpointError: missing, of another type or too small.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise CheckpointError(
            f"config.json says {key} {value!r}.", expected=f"an integer of at least {low}", fix=_FIX
        )
    return value


def integers(config: Config, key: str) -> tuple[int, ...]:
    """A required list of integers.

    Raises:
        CheckpointError: missing or anything else.
    """
    value = config.get(key)
    if not isinstance(value, list) or not value or not all(type(item) is int for item in value):
        raise CheckpointError(
            f"config.json says {key} {value!r}.", expected="a list of integers", fix=_FIX
        )
    return tuple(value)


def optional(config: Config, key: str, default: Any) -> Any:
    """A value, or ``default`` where it is missing or null."""
    value = config.get(key)
    return default if value is None else value


def text(config: Config) -> Config:
    """The language model's part of a configuration, nested or not."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def architecture(config: Config) -> str:
    """The class that SGLang will look for.

    Raises:
        CheckpointError: the configuration names none, or several.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(
            f"config.json says architectures {names!r}.", expected="a list of one name", fix=_FIX
        )
    return names[0]


def weight_type(config: Config) -> str:
    """Type of unquantised weights, as safetensors headers name it.

    Raises:
        CheckpointError: none, or one that is not read here.
    """
    value = config.get("dtype") or config.get("torch_dtype")
    if value not in TYPES:
        raise CheckpointError(
            f"config.json says dtype {value!r}.", expected=" or ".join(TYPES), fix=_FIX
        )
    return TYPES[value]
