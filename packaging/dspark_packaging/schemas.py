"""The JSON files behind a drafter's card: ``provenance.json`` and ``eval.json``.

Both name the weights they belong to (γ and :func:`dspark_sglang.checkpoint.weights_digest`),
so that numbers of one drafter can never be printed on the card of another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from dspark_sglang.artifacts import SCHEMA_VERSION, Provenance
from dspark_sglang.errors import ArtifactError

EVAL_FILE = "eval.json"
PROVENANCE_FILE = "provenance.json"
THROUGHPUT_FILE = "throughput.json"
TARGET_FILE = "target.json"
BUNDLE_FILE = "dspark_bundle.json"

Kind = Literal["chat", "math", "code", "instructions"]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
RepoId = Annotated[str, msgspec.Meta(pattern=r"^[\w.-]+/[\w.-]+$")]
Text = Annotated[str, msgspec.Meta(min_length=1)]
Length = Annotated[float, msgspec.Meta(ge=1)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

#: For whoever measures: what the numbers mean unless the measurement differs.
ACCEPTED_LENGTH = (
    "Tokens produced a verification round: generated tokens divided by target forward passes "
    "of decoding, the target's own (bonus) token included, with the whole block verified."
)
SURVIVAL = "Share of rounds in which the drafted token at this position was accepted."


class AcceptedLength(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Accepted length at one sampling temperature (0 is greedy)."""

    temperature: Annotated[float, msgspec.Meta(ge=0)]
    #: Verification rounds behind ``overall``.
    rounds: Annotated[int, msgspec.Meta(ge=1)]
    overall: Length
    by_kind: dict[Kind, Length]
    #: One share a position, first drafted token first; see ``EvalArtifact.position_definition``.
    by_position: list[Share]
    #: 95% confidence interval of ``overall``.
    ci95: tuple[float, float] | None = None


class Reliability(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Predicted against observed survival of one position, bin by bin."""

    predicted: list[Share]
    observed: list[Share]
    blocks: list[Annotated[int, msgspec.Meta(ge=1)]]


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How well the confidence head predicts survival at temperature 1, before and after STS."""

    blocks: Annotated[int, msgspec.Meta(ge=1)]
    #: Expected calibration error, mean over positions and by position.
    ece_before: Share
    ece_after: Share | None
    per_position_before: list[Share]
    per_position_after: list[Share] | None
    per_position_auc: list[Share] | None = None
    reliability_before: list[Reliability] = []
    reliability_after: list[Reliability] | None = None


class EvalArtifact(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="eval",
    tag_field="kind",
):
    """Accepted length of a drafter as it was measured in serving."""

    schema_version: int
    gamma: int
    drafter_sha256: Digest
    target: Text
    #: What "accepted length" means here; :data:`ACCEPTED_LENGTH` unless measured otherwise.
    definition: Text
    #: What a number by position means; :data:`SURVIVAL` unless measured otherwise.
    position_definition: Text
    #: Which prompts, how many of each kind, and how many tokens were generated for each.
    prompts: Text
    hardware: Text
    provenance: Provenance
    accepted_length: Annotated[list[AcceptedLength], msgspec.Meta(min_length=1)]
    #: None where confidences were not judged (a measurement through a server).
    calibration: Calibration | None = None


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model a drafter drafts for."""

    repo_id: RepoId
    #: Lower-case family name, used as a Hub tag ("qwen3", "smollm2").
    family: Annotated[str, msgspec.Meta(pattern="^[a-z0-9.-]+$")]
    #: Commit on the Hub; None when the weights came from elsewhere (``source`` says where).
    revision: Annotated[str, msgspec.Meta(pattern=r"^[\w./-]+$")] | None = None
    source: Text
    checkpoint_file: Text
    checkpoint_sha256: Digest


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the weights were made, in words."""

    data: Text
    command: Text
    initialisation: Text
    objective: Text
    duration: Text
    hardware: Text
    #: What training itself saw on held-out text. Not a serving measurement.
    validation: str = ""


class DrafterProvenance(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="drafter-provenance",
    tag_field="kind",
):
    """Where a drafter came from: ``provenance.json``."""

    schema_version: int
    gamma: int
    drafter_sha256: Digest
    name: Annotated[str, msgspec.Meta(pattern=r"^[\w.-]+$")]
    #: Where the drafter itself is published, when it is.
    repo_id: RepoId | None = None
    #: Hub licence identifier; "other" needs ``license_name``.
    license: Text
    license_name: str | None = None
    language: list[str] = []
    target: Target
    training: Training
    #: Commit of dspark-sglang that trained it.
    commit: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{7,40}$")] | None = None
    #: Libraries that trained it.
    versions: dict[str, str]
    #: The SGLang release that served it.
    sglang: Text
    #: What a user must know before relying on it, one sentence each.
    limits: list[str] = []


_Artifact = TypeVar("_Artifact", EvalArtifact, DrafterProvenance)


def _read(
    path: Path, kind: type[_Artifact], *, gamma: int, drafter_sha256: str, fix: str
) -> _Artifact:
    try:
        artifact = msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} does not exist.", expected=f"a {kind.__name__} file", fix=fix
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}.", expected=f"a {kind.__name__} file", fix=fix
        ) from error
    for what, found, wanted in (
        ("schema_version", artifact.schema_version, SCHEMA_VERSION),
        ("gamma", artifact.gamma, gamma),
        ("drafter_sha256", artifact.drafter_sha256, drafter_sha256),
    ):
        if found != wanted:
            raise ArtifactError(
                f"{path} has {what} {found}.",
                expected=f"{wanted}, that of the weights beside it",
                fix=fix,
            )
    return artifact


def read_provenance(path: Path, *, gamma: int, drafter_sha256: str) -> DrafterProvenance:
    """Read ``provenance.json`` and check that it describes these weights.

    Raises:
        ArtifactError: missing, malformed, or of another drafter.
    """
    fix = "Describe these weights in provenance.json (fields: dspark_packaging.schemas)."
    return _read(path, DrafterProvenance, gamma=gamma, drafter_sha256=drafter_sha256, fix=fix)


def read_eval_as_it_is(path: Path) -> EvalArtifact:
    """Decode ``eval.json``; whether it belongs to the weights is checked by :func:`read_eval`.

    Raises:
        ArtifactError: malformed.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=EvalArtifact)
    except (OSError, msgspec.DecodeError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}.",
            expected="what `dspark eval --record` wrote",
            fix="Measure these weights again, or remove the file.",
        ) from error


def read_eval(path: Path, *, gamma: int, drafter_sha256: str) -> EvalArtifact:
    """Read ``eval.json`` and check that it measures these weights.

    Raises:
        ArtifactError: missing, malformed, of another drafter, or with impossible numbers.
    """
    fix = "Measure these weights again, or remove eval.json: the card then says not measured."
    artifact = _read(path, EvalArtifact, gamma=gamma, drafter_sha256=drafter_sha256, fix=fix)
    temperatures = [row.temperature for row in artifact.accepted_length]
    if len(set(temperatures)) != len(temperatures):
        raise ArtifactError(
            f"{path} measures temperatures {temperatures}.",
            expected="each temperature once",
            fix=fix,
        )
    for row in artifact.accepted_length:
        lengths = [row.overall, *row.by_kind.values()]
        falling = all(b <= a for a, b in zip(row.by_position, row.by_position[1:], strict=False))
        if max(lengths) > gamma + 1 or len(row.by_position) != gamma or not falling:
            raise ArtifactError(
                f"{path} says accepted length {max(lengths)} and positions {row.by_position} at "
                f"temperature {row.temperature}.",
                expected=f"at most {gamma + 1}, and {gamma} shares that never rise (a token is "
                "accepted only if all before it are)",
                fix=fix,
            )
    return artifact
