"""The file a measured step cost is kept in."""

from __future__ import annotations

from typing import Any

import msgspec

from dspark_sglang.artifacts import Provenance


class CostArtifact(msgspec.Struct, frozen=True, kw_only=True, tag="cost", tag_field="kind"):
    """A measured step cost and everything it depends on."""

    schema_version: int
    #: Two servers with the same fingerprint have the same step cost.
    fingerprint: dict[str, str]
    model: dict[str, Any]
    #: Wall seconds the measurement at start-up took.
    seconds: float | None = None
    provenance: Provenance
