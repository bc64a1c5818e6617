"""Every record beside a drafter's weights, read and checked against them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from dspark_packaging.drafter import Drafter
from dspark_packaging.fingerprint import TargetFingerprint, read_target
from dspark_packaging.layout import COST_FILE, RECORDS
from dspark_packaging.schemas import (
    EVAL_FILE,
    PROVENANCE_FILE,
    TARGET_FILE,
    THROUGHPUT_FILE,
    DrafterProvenance,
    EvalArtifact,
    read_eval,
    read_provenance,
)
from dspark_packaging.throughput import ThroughputArtifact, read_throughput
from dspark_sglang.artifacts import (
    DRAFT_VOCAB_FILE,
    STS_FILE,
    DraftVocabArtifact,
    STSArtifact,
    read_draft_vocab,
    read_sts,
)
from dspark_sglang.checkpoint import read_json
from dspark_sglang.errors import ArtifactError


class Records(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about a drafter; None where there is no file."""

    provenance: DrafterProvenance
    sts: STSArtifact | None
    vocabulary: DraftVocabArtifact | None
    eval: EvalArtifact | None
    throughput: ThroughputArtifact | None
    target: TargetFingerprint | None
    #: Fields of ``cost.json`` (written and checked by the server that measured it).
    cost: dict[str, object] | None


def read_records(directory: Path, drafter: Drafter) -> Records:
    """Read the records of a folder.

    Raises:
        ArtifactError: one is malformed, of another γ or of other weights.
    """
    gamma, digest = drafter.config.gamma, drafter.digest

    files = {name: directory / name for name in RECORDS if (directory / name).exists()}
    sts, vocabulary, measured = (files.get(n) for n in (STS_FILE, DRAFT_VOCAB_FILE, EVAL_FILE))
    speed, target, cost = (files.get(n) for n in (THROUGHPUT_FILE, TARGET_FILE, COST_FILE))
    vocab = drafter.config.vocab_size
    return Records(
        provenance=read_provenance(directory / PROVENANCE_FILE, gamma=gamma, drafter_sha256=digest),
        sts=read_sts(sts, gamma=gamma, drafter_sha256=digest) if sts else None,
        vocabulary=read_draft_vocab(vocabulary, vocab_size=vocab) if vocabulary else None,
        eval=read_eval(measured, gamma=gamma, drafter_sha256=digest) if measured else None,
        throughput=read_throughput(speed, gamma=gamma, drafter_sha256=digest) if speed else None,
        target=read_target(target, drafter_sha256=digest) if target else None,
        cost=_read_cost(cost, gamma=gamma, digest=digest) if cost else None,
    )


def _read_cost(path: Path, *, gamma: int, digest: str) -> dict[str, object]:
    value = read_json(path, what="a step cost that `dspark profile` wrote")
    of = value.get("fingerprint")
    of = of if isinstance(of, dict) else {}
    for key, wanted in (("gamma", str(gamma)), ("drafter", digest)):
        if of.get(key) != wanted:
            raise ArtifactError(
                f"{path} was measured with {key} {of.get(key)}.",
                expected=wanted,
                fix="Measure it again with `dspark profile`, or leave it out.",
            )
    return value
