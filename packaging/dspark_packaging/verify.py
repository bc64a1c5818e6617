"""Whether a folder is a packaged drafter that may be published or served."""

from __future__ import annotations

from pathlib import Path

import msgspec

from dspark_packaging import hub_rules
from dspark_packaging.errors import PackageError
from dspark_packaging.layout import CARD_FILE, check_names, require_directory
from dspark_packaging.manifest import verify_manifest
from dspark_packaging.schemas import (
    EVAL_FILE,
    PROVENANCE_FILE,
    DrafterProvenance,
    read_eval,
    read_provenance,
)
from dspark_packaging.weights import check_shards
from dspark_sglang.artifacts import DRAFT_VOCAB_FILE, STS_FILE, read_draft_vocab, read_sts
from dspark_sglang.checkpoint import (
    check_tensors,
    parse_drafter_config,
    read_config,
    weights_digest,
)


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What was checked."""

    name: str
    gamma: int
    files: list[str]
    calibrated: bool
    measured: bool


def verify_artifact(directory: Path) -> Verified:
    """Check names, checksums, tensors, every JSON file and the card's front matter.

    The order goes from "is this the folder that was published" to "does it make sense", so
    that a damaged download is reported as one.

    Raises:
        PackageError: a file that does not belong, is missing or changed; bad front matter.
        CheckpointError: weights and configuration do not fit, or are no dense drafter.
        ArtifactError: a JSON file is malformed or belongs to other weights.
    """
    require_directory(directory)
    check_names(directory)
    manifest = verify_manifest(directory)
    config = parse_drafter_config(read_config(directory, role="drafter"))
    if config.bundled:
        raise PackageError(
            f"{directory} is a target checkpoint with a drafter inside it.",
            expected="a drafter with its own weights (Qwen3DSparkModel layout)",
            fix="Serve such a checkpoint as it is; only separate drafters are packaged.",
        )
    check_shards(directory)
    check_tensors(directory, config)
    digest = weights_digest(directory)
    provenance = read_provenance(
        directory / PROVENANCE_FILE, gamma=config.gamma, drafter_sha256=digest
    )
    sts, measured = directory / STS_FILE, directory / EVAL_FILE
    if sts.exists():
        read_sts(sts, gamma=config.gamma, drafter_sha256=digest)
    if (directory / DRAFT_VOCAB_FILE).exists():
        read_draft_vocab(directory / DRAFT_VOCAB_FILE, vocab_size=config.vocab_size)
    if measured.exists():
        read_eval(measured, gamma=config.gamma, drafter_sha256=digest)
    _check_card(directory / CARD_FILE, provenance)
    return Verified(
        name=provenance.name,
        gamma=config.gamma,
        files=sorted(manifest.files),
        calibrated=sts.exists(),
        measured=measured.exists(),
    )


def _check_card(path: Path, provenance: DrafterProvenance) -> None:
    """Front matter only: a card made by an older template is still a true card."""
    meta = hub_rules.check_front_matter(path.read_text(encoding="utf-8", errors="replace"))
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
