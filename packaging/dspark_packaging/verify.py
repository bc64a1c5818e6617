"""Whether a folder is a package that may be published or served."""

from __future__ import annotations

from pathlib import Path

import msgspec

from dspark_packaging import hub_rules
from dspark_packaging.contents import Package, open_package
from dspark_packaging.errors import PackageError
from dspark_packaging.eval_results import check_eval_results
from dspark_packaging.fingerprint import check_revision, check_target, fingerprint
from dspark_packaging.layout import CARD_FILE, check_names, require_directory
from dspark_packaging.manifest import verify_manifest
from dspark_packaging.progress import Progress, silent
from dspark_packaging.schemas import BUNDLE_FILE, PROVENANCE_FILE, DrafterProvenance
from dspark_packaging.shards import check_weight_names
from dspark_sglang.checkpoint import check_fits, read_config


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What was checked."""

    name: str
    #: ``drafter``, or ``bundle`` with its layout.
    shape: str
    gamma: int
    files: list[str]
    calibrated: bool
    measured: bool
    tensors: int
    nbytes: int


def verify_artifact(
    directory: Path, *, checksums: bool = True, progress: Progress = silent
) -> Verified:
    """Check a stand-alone drafter: names, checksums, tensors, every record, the card's front matter.

    The order goes from "is this the folder that was published" to "does it make sense", so
    that a damaged download is reported as one.

    Args:
        directory: the package.
        checksums: hash every file; False where they were just computed.
        progress: shows how far hashing is.

    Raises:
        PackageError: a file that does not belong, is missing or changed; bad front matter.
        CheckpointError: weights and configuration do not fit, or are no drafter.
        ArtifactError: a JSON file is malformed or belongs to other weights.
    """
    require_directory(directory)
    if (directory / BUNDLE_FILE).exists():
        raise PackageError(
            f"{directory} is a bundle of target and drafter.",
            expected="a drafter with its own weights",
            fix="Split it first with `dspark package BUNDLE OUT --split`.",
        )
    check_names(directory)
    if checksums:
        verify_manifest(directory, progress=progress)
    package = open_package(directory)
    check_weight_names(package.shards)
    check_contents(package)
    return summary(package, "drafter")


def check_contents(package: Package) -> None:
    """Check results and front matter of an opened package.

    Raises:
        DSparkError: as :func:`verify_artifact`.
    """
    check_eval_results(package.directory, package.home)
    check_card_of(
        package.directory / CARD_FILE,
        package.records.provenance,
        bundle=package.bundle is not None,
    )


def summary(package: Package, shape: str) -> Verified:
    """What was checked, for the user."""
    from dspark_packaging.manifest import read_manifest

    return Verified(
        name=package.records.provenance.name,
        shape=shape,
        gamma=package.drafter.config.gamma,
        files=sorted(read_manifest(package.directory).files),
        calibrated=package.records.sts is not None,
        measured=package.records.eval is not None,
        tensors=len(package.shards.tensors),
        nbytes=package.shards.nbytes,
    )


def check_card_of(path: Path, provenance: DrafterProvenance, *, bundle: bool) -> None:
    """Front matter only: a card made by an older template is still a true card.

    Raises:
        PackageError: it breaks a rule of the Hub or contradicts ``provenance.json``.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    meta = hub_rules.check_front_matter(text, bundle=bundle)
    for key, said, meant in (
        ("base_model", meta["base_model"], provenance.target.repo_id),
        ("license", meta["license"], provenance.license),
    ):
        if said != meant:
            raise PackageError(
                f"{path} says {key} {said}.",
                expected=f"{meant}, as {PROVENANCE_FILE} says",
                fix=f"Run `dspark card {path.parent}`.",
            )


def verify_pair(directory: Path, target: Path) -> bool:
    """Check that a stand-alone drafter and a target on disk belong together.

    Returns:
        Whether the fingerprint was compared (False: the package has no ``target.json``).

    Raises:
        DSparkError: they do not, or either is damaged.
    """
    package = open_package(directory)
    check_fits(package.drafter.config, read_config(target, role="target"), name=target.name)
    check_revision(target, package.records.provenance.target.revision)
    recorded = package.records.target
    if recorded is not None:
        found = fingerprint(target, drafter_sha256=package.drafter.digest)
        check_target(recorded, found, str(target))
    return recorded is not None
