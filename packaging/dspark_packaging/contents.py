"""A package opened: which shape it has, its drafter and the records that belong to it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from dspark_packaging.bundle_record import BundleRecord, read_record
from dspark_packaging.drafter import (
    Drafter,
    check_drafter,
    digest_of,
    of_drafter,
    read_drafter,
)
from dspark_packaging.layout import DRAFT_FOLDER, require_directory
from dspark_packaging.records import Records, read_records
from dspark_packaging.schemas import BUNDLE_FILE
from dspark_packaging.shards import Shards, read_shards
from dspark_sglang.checkpoint import parse_drafter_config, read_config


class Package(msgspec.Struct, frozen=True, kw_only=True):
    """A stand-alone drafter or a bundle."""

    directory: Path
    #: Where the drafter's records lie: the folder itself, or its ``dspark/``.
    home: Path
    #: Weights of the folder itself: the drafter's, the target's, or both.
    shards: Shards
    drafter: Drafter
    records: Records
    #: None for a stand-alone drafter.
    bundle: BundleRecord | None


def open_package(directory: Path) -> Package:
    """Read headers, configuration and records of a package, and check them against each other.

    Raises:
        DSparkError: one of them is missing, damaged or belongs to something else.
    """
    require_directory(directory)
    bundle = read_record(directory) if (directory / BUNDLE_FILE).is_file() else None
    shards = read_shards(directory)
    home = directory
    if bundle is None:
        drafter = read_drafter(directory, shards)
    elif bundle.layout == "folder":
        home = directory / DRAFT_FOLDER
        require_directory(home)
        drafter = read_drafter(home)
    else:
        drafter = _inside(directory, shards, bundle)
    # Before the records: weights that are no drafter say more than a digest that differs.
    check_drafter(home, drafter)
    return Package(
        directory=directory,
        home=home,
        shards=shards,
        drafter=drafter,
        records=read_records(home, drafter),
        bundle=bundle,
    )


def _inside(directory: Path, shards: Shards, bundle: BundleRecord) -> Drafter:
    raw = read_config(directory, role="bundle")
    files = {o: h for o, h in bundle.drafter_files.items() if h.endswith(".safetensors")}
    return Drafter(
        raw=raw,
        config=parse_drafter_config(raw),
        tensors={name: stored.tensor for name, stored in of_drafter(shards).items()},
        digest=digest_of(directory, files, v4=True),
    )
