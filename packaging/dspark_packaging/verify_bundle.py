"""Whether a bundle is whole: target and drafter, each as it was, and the record that joins them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from dspark_packaging.bundle_record import BundleRecord
from dspark_packaging.contents import Package, open_package
from dspark_packaging.drafter import V4_PREFIX
from dspark_packaging.errors import PackageError
from dspark_packaging.fingerprint import check_target, fingerprint
from dspark_packaging.layout import (
    CONFIG_FILE,
    DRAFT_FOLDER,
    INDEX_FILE,
    check_bundle_names,
    require_directory,
)
from dspark_packaging.manifest import MANIFEST_FILE, verify_manifest
from dspark_packaging.progress import Progress, silent
from dspark_packaging.schemas import BUNDLE_FILE, PROVENANCE_FILE
from dspark_packaging.verify import Verified, check_contents, summary, verify_artifact
from dspark_sglang.checkpoint import BUNDLED_KEYS, check_fits, read_config

_FIX = "Download the bundle again, or make it again with `dspark package`."


def verify_bundle(
    directory: Path, *, checksums: bool = True, progress: Progress = silent
) -> Verified:
    """Check a bundle that ``dspark package`` made.

    Args:
        directory: the bundle.
        checksums: hash every file; False where they were just computed.
        progress: shows how far hashing is.

    Raises:
        DSparkError: a file or tensor that is missing, changed, left over or of another drafter.
    """
    require_directory(directory, "the folder of a bundle")
    check_bundle_names(directory)
    if checksums:
        verify_manifest(directory, progress=progress)
    package = open_package(directory)
    record = package.bundle
    if record is None:
        raise PackageError(f"{directory} has no {BUNDLE_FILE}.", expected="a bundle", fix=_FIX)
    _check_record(package, record)
    if record.layout == "folder":
        _check_folder(directory, record, checksums, progress)
    elif (directory / DRAFT_FOLDER).exists():
        raise PackageError(
            f"{directory} holds a folder {DRAFT_FOLDER}.",
            expected=f"none: this bundle's drafter lies beside the target ({V4_PREFIX}* tensors)",
            fix=f"Move {DRAFT_FOLDER} out of the folder.",
        )
    check_fits(package.drafter.config, read_config(directory, role="target"), name=directory.name)
    check_contents(package)
    _check_target_part(package, record)
    return summary(package, f"bundle ({record.layout})")


def _check_record(package: Package, record: BundleRecord) -> None:
    own = package.drafter
    for what, said, found in (
        ("gamma", record.gamma, own.config.gamma),
        ("drafter_sha256", record.drafter_sha256, own.digest),
    ):
        if said != found:
            raise PackageError(
                f"{package.directory / BUNDLE_FILE} says {what} {said}.",
                expected=f"{found}, of the drafter inside",
                fix=_FIX,
            )
    here = {*record.target_files.values(), *record.drafter_files.values()}
    missing = sorted(name for name in here if not (package.directory / name).is_file())
    if missing:
        raise PackageError(
            f"{package.directory} has no {missing[0]}.",
            expected=f"every file that {BUNDLE_FILE} names",
            fix=_FIX,
        )
    extra = sorted(set(package.shards.files) - here)
    if extra:
        raise PackageError(
            f"{package.directory} has weights in {extra[0]}, of neither target nor drafter.",
            expected=f"the weight files that {BUNDLE_FILE} names",
            fix=_FIX,
        )


def _check_folder(
    directory: Path, record: BundleRecord, checksums: bool, progress: Progress
) -> None:
    inside = directory / DRAFT_FOLDER
    found = hashlib.sha256((inside / MANIFEST_FILE).read_bytes()).hexdigest()
    if found != record.drafter_manifest_sha256:
        raise PackageError(
            f"{inside / MANIFEST_FILE} has SHA-256 {found[:16]}...",
            expected=f"{str(record.drafter_manifest_sha256)[:16]}..., as {BUNDLE_FILE} says",
            fix=_FIX,
        )
    verify_artifact(inside, checksums=checksums, progress=progress)


def _check_target_part(package: Package, record: BundleRecord) -> None:
    """The target inside is whole and the one that the drafter was recorded for."""
    names = set(record.target_files.values())
    tensors = {n: s for n, s in package.shards.tensors.items() if s.file in names}
    under = sorted(name for name in tensors if name.startswith(V4_PREFIX))
    if under:
        raise PackageError(
            f"{under[0]} lies among the target's weights.",
            expected=f"{V4_PREFIX}* tensors in the drafter's files only",
            fix=_FIX,
        )
    original = record.target_files.get(INDEX_FILE)
    if original and original != INDEX_FILE:
        _check_original_index(package, record, set(tensors), original)
    recorded = package.records.target
    if recorded is not None and not record.replaced:
        shards = msgspec.structs.replace(
            package.shards,
            files=tuple(name for name in package.shards.files if name in names),
            tensors=tensors,
        )
        found = fingerprint(package.directory, drafter_sha256=package.drafter.digest, shards=shards)
        check_target(recorded, found, f"the target in {package.directory}")


def _check_original_index(
    package: Package, record: BundleRecord, stored: set[str], original: str
) -> None:
    """Every tensor that the target had is there, and none more."""
    raw = (package.directory / original).read_bytes()
    had = set(msgspec.json.decode(raw, type=_Index).weight_map) - set(record.replaced)
    wrong = sorted(had ^ stored)
    if wrong:
        state = "is missing" if wrong[0] in had else "is left over"
        raise PackageError(
            f"{wrong[0]} {state} among the target's {len(stored)} tensors.",
            expected=f"the {len(had)} that {original} names ({CONFIG_FILE} is the target's)",
            fix=_FIX,
        )


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def verify_any(directory: Path, *, progress: Progress = silent) -> Verified:
    """Check a package of either shape.

    Raises:
        DSparkError: the first thing that is wrong.
    """
    require_directory(directory)
    if (directory / BUNDLE_FILE).exists():
        return verify_bundle(directory, progress=progress)
    if not (directory / PROVENANCE_FILE).exists() and (directory / CONFIG_FILE).is_file():
        config = read_config(directory, role="drafter")
        if any(config.get(key) is not None for key in BUNDLED_KEYS):
            raise PackageError(
                f"{directory} carries a drafter, but no records of `dspark package`.",
                expected=f"{BUNDLE_FILE} and {PROVENANCE_FILE}",
                fix=f"Split it with `dspark package {directory} OUT --split`, add {PROVENANCE_FILE} "
                "to OUT/drafter and package that.",
            )
    return verify_artifact(directory, progress=progress)
