"""Reading model configurations strictly: what is missing or nonsense is named."""

from __future__ import annotations

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
        raise CheckpointError(
            f"config.json says {key} {value!r}.", expected=f"an integer of at least {low}", fix=_FIX
        )
    return value


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
