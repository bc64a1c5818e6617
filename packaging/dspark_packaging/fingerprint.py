"""Which target a drafter belongs to, by what can be read of it in seconds.

Hashing every target would take minutes at 893 GB, and a name or a commit says nothing about the
files at hand. So three digests: the structure (name, dtype and shape of every tensor), the values
of its small tensors (norms, biases, sinks: another revision or a fine-tune changes them), and the
vocabulary (which text a token stands for). Written by ``dspark package --target`` as ``target.json``.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import msgspec

from dspark_packaging.errors import PackageError
from dspark_packaging.layout import TOKENIZER_FILE
from dspark_packaging.record import read_record
from dspark_packaging.schemas import TARGET_FILE, Digest
from dspark_packaging.shards import Shards, read_shards
from dspark_sglang.artifacts import SCHEMA_VERSION
from dspark_sglang.checkpoint import read_json

#: Largest tensor whose values count, and how many bytes of them at most.
_SMALL, _AT_MOST = 64 << 10, 256 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")


class TargetFingerprint(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="target-fingerprint",
    tag_field="kind",
):
    """The content of ``target.json``."""

    schema_version: int
    #: Of the drafter that belongs to it.
    drafter_sha256: Digest
    tensors: int
    nbytes: int
    structure_sha256: Digest
    #: Over the tensors of at most 64 KiB.
    values_sha256: Digest
    #: None for a target without ``tokenizer.json``.
    vocabulary_sha256: Digest | None
    #: Commit on the Hub that the files came from, where their folder says so.
    revision: str | None = None


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
    path = directory / TOKENIZER_FILE
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


def revision_of(directory: Path) -> str | None:
    """The Hub commit that a folder was downloaded from, where its place or ``hf`` says so."""
    place = directory.resolve()
    if place.parent.name == "snapshots" and _COMMIT.fullmatch(place.name):
        return place.name
    # `hf download --local-dir` leaves the commit in the first line of these.
    for path in sorted((place / ".cache/huggingface/download").glob("*.metadata")):
        first = path.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0].strip()
        if _COMMIT.fullmatch(first):
            return first
    return None


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


def read_target(path: Path, *, drafter_sha256: str) -> TargetFingerprint:
    """Read ``target.json`` and check that it was recorded for these weights.

    Raises:
        ArtifactError: missing, malformed, or of another drafter.
    """
    return read_record(
        path,
        TargetFingerprint,
        what="a target's fingerprint",
        fix="Record it again with `dspark package SOURCE OUT --target DIR`.",
        schema_version=SCHEMA_VERSION,
        drafter_sha256=drafter_sha256,
    )


def check_target(recorded: TargetFingerprint, found: TargetFingerprint, name: str) -> None:
    """Check that a target is the one that a drafter was recorded for.

    Raises:
        PackageError: another model, another revision or fine-tune, or a foreign tokenizer.
    """
    fix = f"Use the target that {TARGET_FILE} was recorded from, at the same revision."
    same_commit = recorded.revision == found.revision
    commits = ""
    if recorded.revision and found.revision and not same_commit:
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
