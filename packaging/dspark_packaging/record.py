"""Records in a package that belong to its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from dspark_sglang.errors import ArtifactError

Record = TypeVar("Record", bound=msgspec.Struct)


def read_record(path: Path, kind: type[Record], *, what: str, fix: str, **own: Any) -> Record:
    """Decode a record and check that it is of the weights beside it.

    Args:
        what, fix: what errors say was expected, and what to do.
        own: values that its fields must have.

    Raises:
        ArtifactError: missing, malformed, or of other weights.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.", expected=what, fix=fix) from error
    for name, wanted in own.items():
        said = getattr(found, name)
        if said != wanted:
            raise ArtifactError(
                f"{path} has {name} {said}.",
                expected=f"{wanted}, that of the weights beside it",
                fix=fix,
            )
    return found
