"""``dspark_bundle.json``: how a bundle was put together, so that it can be taken apart."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from dspark_packaging.schemas import BUNDLE_FILE, Digest
from dspark_sglang.errors import ArtifactError

Layout = Literal["mtp", "folder"]


class BundleRecord(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="bundle",
    tag_field="kind",
):
    """How a bundle was put together: ``dspark_bundle.json``."""

    schema_version: int
    layout: Layout
    gamma: int
    drafter_sha256: Digest
    #: The target's files by the name they had, and the name they have here.
    target_files: dict[str, str]
    #: The same of the drafter's (layout ``mtp``).
    drafter_files: dict[str, str] = {}
    #: Digest of ``dspark/checksums.json`` (layout ``folder``), which lists the drafter's files.
    drafter_manifest_sha256: Digest | None = None
    #: Files of the target that were not carried (code, images), and tensors that were replaced.
    left_out: list[str] = []
    replaced: list[str] = []
    replaced_bytes: int = 0


def read_record(directory: Path) -> BundleRecord:
    """Read ``dspark_bundle.json``.

    Raises:
        ArtifactError: missing, malformed, or naming files outside the folder.
    """
    path = directory / BUNDLE_FILE
    fix = "Download the bundle again, or make it again with `dspark package`."
    try:
        record = msgspec.json.decode(path.read_bytes(), type=BundleRecord)
    except (OSError, msgspec.DecodeError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}.", expected="a record of the bundle", fix=fix
        ) from error
    names = [*record.target_files.items(), *record.drafter_files.items()]
    for name in (name for pair in names for name in pair):
        if name != Path(name).name or name in ("", ".", ".."):
            raise ArtifactError(f"{path} names {name!r}.", expected="plain file names", fix=fix)
    return record
