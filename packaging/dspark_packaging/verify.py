"""Whether a folder is a package that may be published or served, and whether a target belongs to it.

Hashing every target would take minutes at 893 GB, and a name or a commit says nothing about the
files at hand. So a target is known by three digests: the structure (name, dtype and shape of every
tensor), the values of its small tensors (norms, biases, sinks: another revision or a fine-tune
changes them), and the vocabulary (which text a token stands for).
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import msgspec

from dspark_packaging import hub_rules, layout
from dspark_packaging.drafter import check_weight_names, read_shards
from dspark_packaging.errors import PackageError
from dspark_packaging.manifest import read_manifest, verify_manifest
from dspark_packaging.records import BundleRecord, Package, TargetFingerprint, open_package
from dspark_packaging.transfer import Progress, silent
from dspark_sglang.artifacts import SCHEMA_VERSION
from dspark_sglang.checkpoint import Shards, read_config, read_json, revision_of
from dspark_sglang.layouts.base import check_fits, is_bundle

#: Largest tensor whose values count, and how many bytes of them at most.
_SMALL, _AT_MOST = 64 << 10, 256 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FIX = "Download the bundle again, or make it again with `dspark package`."


def structure_digest(shards: Shards) -> str:
    """SHA-256 over name, dtype and shape of every tensor, in name order."""
    rows = [
        (name, stored.tensor.dtype, list(stored.tensor.shape))
        for name, stored in sorted(shards.tensors.items())
    ]
    return hashlib.sha256(msgspec.json.encode(rows)).hexdigest()


def values_digest(shards: Shards) -> str:
    """SHA-256 over the small tensors' names and bytes, in name order, however they are sharded."""
    small: dict[str, list[str]] = {}
    budget = _AT_MOST
    for name, stored in sorted(shards.tensors.items()):
        if stored.tensor.nbytes <= min(_SMALL, budget):
            budget -= stored.tensor.nbytes
            small.setdefault(stored.file, []).append(name)
    parts: dict[str, bytes] = {}
    for file, names in small.items():
        start = shards.header(file).start
        with (shards.directory / file).open("rb", buffering=0) as stream:
            for name in names:
                tensor = shards.tensors[name].tensor
                stream.seek(start + tensor.data_offsets[0])
                parts[name] = hashlib.sha256(stream.read(tensor.nbytes)).digest()
    digest = hashlib.sha256()
    for name, part in sorted(parts.items()):
        digest.update(name.encode() + b"\0" + part)
    return digest.hexdigest()


def vocabulary_digest(directory: Path) -> str | None:
    """SHA-256 over which text every token id stands for; None without ``tokenizer.json``.

    The content, not the file: libraries write the same tokenizer in different ways.

    Raises:
        CheckpointError: the file is no tokenizer.
    """
    path = directory / layout.TOKENIZER_FILE
    if not path.is_file():
        return None
    value = read_json(path, what="a tokenizer")
    vocabulary = (value.get("model") or {}).get("vocab")
    added = {str(t["content"]): t["id"] for t in value.get("added_tokens") or []}
    pairs = (
        vocabulary.items()
        if isinstance(vocabulary, dict)
        else ((entry[0], index) for index, entry in enumerate(vocabulary or []))
    )
    rows = sorted((index, text) for text, index in (dict(pairs) | added).items())
    return hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode()).hexdigest()


def fingerprint(
    directory: Path, *, drafter_sha256: str, shards: Shards | None = None
) -> TargetFingerprint:
    """Fingerprint of a target, from its headers, its small tensors and its tokenizer.

    Args:
        directory: the target.
        drafter_sha256: digest of the drafter's weights that it is recorded for.
        shards: its weights, where they are read already (those of a bundle: the target's alone).

    Raises:
        DSparkError: its weights are damaged or missing.
    """
    weights = read_shards(directory) if shards is None else shards
    return TargetFingerprint(
        schema_version=SCHEMA_VERSION,
        drafter_sha256=drafter_sha256,
        tensors=len(weights.tensors),
        nbytes=weights.nbytes,
        structure_sha256=structure_digest(weights),
        values_sha256=values_digest(weights),
        vocabulary_sha256=vocabulary_digest(directory),
        revision=revision_of(directory),
    )


def check_target(recorded: TargetFingerprint, found: TargetFingerprint, name: str) -> None:
    """Check that a target is the one that a drafter was recorded for.

    Raises:
        PackageError: another model, another revision or fine-tune, or a foreign tokenizer.
    """
    fix = f"Use the target that {layout.TARGET_FILE} was recorded from, at the same revision."
    commits = ""
    if recorded.revision and found.revision and recorded.revision != found.revision:
        commits = f" (revision {found.revision[:12]}, not {recorded.revision[:12]})"
    if recorded.structure_sha256 != found.structure_sha256:
        raise PackageError(
            f"{name} has other tensors ({found.tensors}, {found.nbytes} bytes){commits}.",
            expected=f"the target of this drafter ({recorded.tensors}, {recorded.nbytes} bytes)",
            fix=fix,
        )
    if recorded.vocabulary_sha256 != found.vocabulary_sha256:
        raise PackageError(
            f"{name} has another tokenizer.",
            expected="the vocabulary that the drafter was trained with",
            fix=fix,
        )
    if recorded.values_sha256 != found.values_sha256:
        raise PackageError(
            f"{name} holds other weights of the same shapes: another revision or a fine-tune"
            f"{commits}.",
            expected="the weights that the drafter was trained for",
            fix=fix,
        )


def check_revision(directory: Path, wanted: str | None) -> None:
    """Refuse a target whose folder says that it is another commit than the drafter's record.

    Raises:
        PackageError: both are known and differ.
    """
    found = revision_of(directory)
    if wanted and found and _COMMIT.fullmatch(wanted) and found != wanted:
        raise PackageError(
            f"{directory} is revision {found}.",
            expected=f"{wanted}, which provenance.json names",
            fix=f"Download it with `hf download REPO --revision {wanted}`.",
        )


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
    layout.require_directory(directory)
    if (directory / layout.BUNDLE_FILE).exists():
        raise PackageError(
            f"{directory} is a bundle of target and drafter.",
            expected="a drafter with its own weights",
            fix="Split it first with `dspark package BUNDLE OUT --split`.",
        )
    layout.check_names(directory)
    if checksums:
        verify_manifest(directory, progress=progress)
    package = open_package(directory)
    check_weight_names(package.shards)
    return verify_opened(package)


def verify_opened(package: Package) -> Verified:
    """Check results and card of an opened package, and say what it is.

    Only the card's front matter is checked: a card made by an older template is still a true card.

    Raises:
        PackageError: results or front matter that contradict the records, or break a rule of the Hub.
    """
    hub_rules.check_results(package)
    path, provenance = package.directory / layout.CARD_FILE, package.records.provenance
    text = path.read_text(encoding="utf-8", errors="replace")
    meta = hub_rules.check_front_matter(text, bundle=package.bundle is not None)
    for key, meant in (("base_model", provenance.target.repo_id), ("license", provenance.license)):
        if meta[key] != meant:
            raise PackageError(
                f"{path} says {key} {meta[key]}.",
                expected=f"{meant}, as {layout.PROVENANCE_FILE} says",
                fix=f"Run `dspark package {path.parent} --card write`.",
            )
    return Verified(
        name=provenance.name,
        shape=f"bundle ({package.bundle.layout})" if package.bundle else "drafter",
        gamma=package.drafter.config.gamma,
        files=sorted(read_manifest(package.directory).files),
        calibrated=package.records.sts is not None,
        measured=package.records.eval is not None,
        tensors=len(package.shards.tensors),
        nbytes=package.shards.nbytes,
    )


def verify_pair(package: Package, target: Path, shards: Shards | None = None) -> bool:
    """Check that a stand-alone drafter and a target on disk belong together.

    Args:
        package: the drafter.
        target: the folder of the target.
        shards: its weights, where they are read already.

    Returns:
        Whether the fingerprint was compared (False: the package has no ``target.json``).

    Raises:
        CheckpointError: sizes, layers or tokens do not fit, or weights are damaged.
        PackageError: another revision, other weights or a foreign tokenizer.
    """
    check_fits(package.drafter.config, read_config(target, role="target"), name=target.name)
    check_revision(target, package.records.provenance.target.revision)
    recorded = package.records.target
    if recorded is not None:
        found = fingerprint(target, drafter_sha256=package.drafter.digest, shards=shards)
        check_target(recorded, found, str(target))
    return recorded is not None


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
    layout.require_directory(directory, "the folder of a bundle")
    layout.check_bundle_names(directory)
    if checksums:
        verify_manifest(directory, progress=progress)
    package = open_package(directory)
    record = package.bundle
    if record is None:
        raise PackageError(
            f"{directory} has no {layout.BUNDLE_FILE}.", expected="a bundle", fix=_FIX
        )
    _check_record(package, record)
    if record.layout == "folder":
        _check_folder(directory, record, checksums, progress)
    elif (directory / layout.DRAFT_FOLDER).exists():
        raise PackageError(
            f"{directory} holds a folder {layout.DRAFT_FOLDER}.",
            expected=f"none: this bundle's drafter lies beside the target ({package.drafter.layout.prefix}* tensors)",
            fix=f"Move {layout.DRAFT_FOLDER} out of the folder.",
        )
    check_fits(package.drafter.config, read_config(directory, role="target"), name=directory.name)
    verified = verify_opened(package)
    _check_target_part(package, record)
    return verified


def _check_record(package: Package, record: BundleRecord) -> None:
    own = package.drafter
    for what, said, found in (
        ("gamma", record.gamma, own.config.gamma),
        ("drafter_sha256", record.drafter_sha256, own.digest),
    ):
        if said != found:
            raise PackageError(
                f"{package.directory / layout.BUNDLE_FILE} says {what} {said}.",
                expected=f"{found}, of the drafter inside",
                fix=_FIX,
            )
    here = {*record.target_files.values(), *record.drafter_files.values()}
    missing = sorted(name for name in here if not (package.directory / name).is_file())
    if missing:
        raise PackageError(
            f"{package.directory} has no {missing[0]}.",
            expected=f"every file that {layout.BUNDLE_FILE} names",
            fix=_FIX,
        )
    extra = sorted(set(package.shards.files) - here)
    if extra:
        raise PackageError(
            f"{package.directory} has weights in {extra[0]}, of neither target nor drafter.",
            expected=f"the weight files that {layout.BUNDLE_FILE} names",
            fix=_FIX,
        )


def _check_folder(
    directory: Path, record: BundleRecord, checksums: bool, progress: Progress
) -> None:
    inside = directory / layout.DRAFT_FOLDER
    found = hashlib.sha256((inside / layout.MANIFEST_FILE).read_bytes()).hexdigest()
    if found != record.drafter_manifest_sha256:
        raise PackageError(
            f"{inside / layout.MANIFEST_FILE} has SHA-256 {found[:16]}...",
            expected=f"{str(record.drafter_manifest_sha256)[:16]}..., as {layout.BUNDLE_FILE} says",
            fix=_FIX,
        )
    verify_artifact(inside, checksums=checksums, progress=progress)


def _check_target_part(package: Package, record: BundleRecord) -> None:
    """The target inside is whole and the one that the drafter was recorded for."""
    names = set(record.target_files.values())
    tensors = {n: s for n, s in package.shards.tensors.items() if s.file in names}
    drafters = package.drafter.layout
    under = sorted(drafters.own(tensors)) if drafters.bundled else []
    if under:
        raise PackageError(
            f"{under[0]} lies among the target's weights.",
            expected=f"{drafters.prefix}* tensors in the drafter's files only",
            fix=_FIX,
        )
    original = record.target_files.get(layout.INDEX_FILE)
    if original and original != layout.INDEX_FILE:
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
    had = set(json.loads(raw)["weight_map"]) - set(record.replaced)
    wrong = sorted(had ^ stored)
    if wrong:
        state = "is missing" if wrong[0] in had else "is left over"
        raise PackageError(
            f"{wrong[0]} {state} among the target's {len(stored)} tensors.",
            expected=f"the {len(had)} that {original} names ({layout.CONFIG_FILE} is the target's)",
            fix=_FIX,
        )


def verify_any(directory: Path, *, progress: Progress = silent) -> Verified:
    """Check a package of either shape.

    Raises:
        DSparkError: the first thing that is wrong.
    """
    layout.require_directory(directory)
    if (directory / layout.BUNDLE_FILE).exists():
        return verify_bundle(directory, progress=progress)
    if (
        not (directory / layout.PROVENANCE_FILE).exists()
        and (directory / layout.CONFIG_FILE).is_file()
    ):
        config = read_config(directory, role="drafter")
        if is_bundle(config):
            raise PackageError(
                f"{directory} carries a drafter, but no records of `dspark package`.",
                expected=f"{layout.BUNDLE_FILE} and {layout.PROVENANCE_FILE}",
                fix=f"Split it with `dspark package {directory} OUT --split`, add {layout.PROVENANCE_FILE} "
                "to OUT/drafter and package that.",
            )
    return verify_artifact(directory, progress=progress)


def check_tokenizer(target: Path, drafter: Path) -> None:
    """A drafter that carries a tokenizer carries the target's, byte for byte.

    Raises:
        PackageError: another one.
    """
    for path in layout.visible_entries(drafter):
        if not layout.is_tokenizer(path.name):
            continue
        theirs = target / path.name
        if not theirs.is_file() or theirs.read_bytes() != path.read_bytes():
            raise PackageError(
                f"{path} is not the target's {path.name}.",
                expected="the target's tokenizer, untouched",
                fix=f"Copy it from {target}, or leave the tokenizer out of the drafter.",
            )
