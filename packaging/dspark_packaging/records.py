"""The JSON files of a package, and a package opened: what each says, checked against the weights.

Every record names the weights it belongs to (γ and :func:`dspark_sglang.layouts.base.weights_digest`),
so that numbers of one drafter can never be printed on the card of another. A speed without a
baseline, a spread, a command and a machine cannot be written down here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from dspark_packaging import layout
from dspark_packaging.drafter import Drafter, digest_of, read_drafter, read_shards
from dspark_sglang.artifacts import (
    DRAFT_VOCAB_FILE,
    SCHEMA_VERSION,
    STS_FILE,
    DraftVocabArtifact,
    Provenance,
    STSArtifact,
    read_draft_vocab,
    read_sts,
)
from dspark_sglang.checkpoint import Shards, read_config, read_json
from dspark_sglang.errors import ArtifactError
from dspark_sglang.layouts.base import layout_of

Kind = Literal["chat", "math", "code", "instructions"]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
RepoId = Annotated[str, msgspec.Meta(pattern=r"^[\w.-]+/[\w.-]+$")]
Text = Annotated[str, msgspec.Meta(min_length=1)]
Length = Annotated[float, msgspec.Meta(ge=1)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Layout = Literal["mtp", "folder"]
Rate = Annotated[float, msgspec.Meta(gt=0)]
Spread = Annotated[float, msgspec.Meta(ge=0)]
MEASURE_AGAIN = (
    "Measure again with `make bench-load`, or leave the file out: the card then says so."
)

#: For whoever measures: what the numbers mean unless the measurement differs.
ACCEPTED_LENGTH = (
    "Tokens produced a verification round: generated tokens divided by target forward passes "
    "of decoding, the target's own (bonus) token included, with the whole block verified."
)
SURVIVAL = "Share of rounds in which the drafted token at this position was accepted."
Record = TypeVar("Record", bound=msgspec.Struct)


def read_record(
    path: Path, kind: type[Record], *, what: str, fix: str, of: Mapping[str, object] | None = None
) -> Record:
    """Decode a record and check that it is of the weights beside it.

    Args:
        path: the file.
        kind: what it holds.
        what, fix: what errors say was expected, and what to do.
        of: values that its fields must have: :func:`_own` of a drafter.

    Raises:
        ArtifactError: missing, malformed, or of other weights.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist.", expected=what, fix=fix) from None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.", expected=what, fix=fix) from error
    for name, wanted in (of or {}).items():
        said = getattr(found, name)
        if said != wanted:
            raise ArtifactError(
                f"{path} has {name} {said}.",
                expected=f"{wanted}, that of the weights beside it",
                fix=fix,
            )
    return found


def _own(**fields: object) -> dict[str, object]:
    return {"schema_version": SCHEMA_VERSION, **fields}


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A record, or a part of one: a field that it does not have is an error."""


class AcceptedLength(Strict, frozen=True, kw_only=True):
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


class Reliability(Strict, frozen=True, kw_only=True):
    """Predicted against observed survival of one position, bin by bin."""

    predicted: list[Share]
    observed: list[Share]
    blocks: list[Annotated[int, msgspec.Meta(ge=1)]]


class Calibration(Strict, frozen=True, kw_only=True):
    """How well the confidence head predicts survival at temperature 1, before and after STS."""

    blocks: Annotated[int, msgspec.Meta(ge=1)]
    #: Expected calibration error, mean over positions and by position; after: None without ``sts.json``.
    ece_before: Share
    ece_after: Share | None
    per_position_before: list[Share]
    per_position_after: list[Share] | None
    #: Area under the ROC curve of survival, by position; STS hardly moves it.
    per_position_auc: list[Share] | None = None
    #: One entry a position, of the bins that hold enough blocks.
    reliability_before: list[Reliability] = []
    reliability_after: list[Reliability] | None = None


class EvalArtifact(Strict, frozen=True, kw_only=True, tag="eval", tag_field="kind"):
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


class Target(Strict, frozen=True, kw_only=True):
    """The model a drafter drafts for."""

    repo_id: RepoId
    #: Lower-case family name, used as a Hub tag ("qwen3", "smollm2").
    family: Annotated[str, msgspec.Meta(pattern="^[a-z0-9.-]+$")]
    #: Commit on the Hub; None when the weights came from elsewhere (``source`` says where).
    revision: Annotated[str, msgspec.Meta(pattern=r"^[\w./-]+$")] | None = None
    source: Text
    checkpoint_file: Text
    checkpoint_sha256: Digest


class Training(Strict, frozen=True, kw_only=True):
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
    Strict, frozen=True, kw_only=True, tag="drafter-provenance", tag_field="kind"
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


def read_provenance(path: Path, *, gamma: int, drafter_sha256: str) -> DrafterProvenance:
    """Read ``provenance.json`` and check that it describes these weights.

    Raises:
        ArtifactError: missing, malformed, or of another drafter.
    """
    fix = "Describe these weights in provenance.json (fields: dspark_packaging.records)."
    return read_record(
        path,
        DrafterProvenance,
        what="a record of where the weights came from",
        fix=fix,
        of=_own(gamma=gamma, drafter_sha256=drafter_sha256),
    )


def read_eval(path: Path, *, gamma: int, drafter_sha256: str) -> EvalArtifact:
    """Read ``eval.json`` and check that it measures these weights.

    Raises:
        ArtifactError: missing, malformed, of another drafter, or with impossible numbers.
    """
    fix = "Measure these weights again, or remove eval.json: the card then says not measured."
    artifact = read_record(
        path,
        EvalArtifact,
        what="what `dspark eval --record` wrote",
        fix=fix,
        of=_own(gamma=gamma, drafter_sha256=drafter_sha256),
    )
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


class BundleRecord(Strict, frozen=True, kw_only=True, tag="bundle", tag_field="kind"):
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


def read_bundle(directory: Path) -> BundleRecord:
    """Read ``dspark_bundle.json``.

    Raises:
        ArtifactError: missing, malformed, or naming files outside the folder.
    """
    path = directory / layout.BUNDLE_FILE
    fix = "Download the bundle again, or make it again with `dspark package`."
    record = read_record(path, BundleRecord, what="a record of the bundle", fix=fix)
    names = [*record.target_files.items(), *record.drafter_files.items()]
    for name in (name for pair in names for name in pair):
        if name != Path(name).name or name in ("", ".", ".."):
            raise ArtifactError(f"{path} names {name!r}.", expected="plain file names", fix=fix)
    return record


class Speed(Strict, frozen=True, kw_only=True):
    """One condition, with and without the drafter in turn."""

    temperature: Annotated[float, msgspec.Meta(ge=0)]
    #: Requests in flight.
    concurrency: Annotated[int, msgspec.Meta(ge=1)]
    dtype: Text
    #: Output tokens a second of all requests together, and the standard deviation over blocks.
    baseline_tok_s: Rate
    baseline_spread: Spread
    tok_s: Rate
    spread: Spread
    #: Of paired blocks: lowest, middle, highest.
    ratio: tuple[Rate, Rate, Rate]


class ThroughputArtifact(Strict, frozen=True, kw_only=True, tag="throughput", tag_field="kind"):
    """The content of ``throughput.json``."""

    schema_version: int
    gamma: int
    drafter_sha256: Digest
    hardware: Text
    #: Turns each way of serving had, and how long each was timed.
    blocks: Annotated[int, msgspec.Meta(ge=1)]
    window_s: Rate
    provenance: Provenance
    rows: Annotated[list[Speed], msgspec.Meta(min_length=1)]


def read_throughput(path: Path, *, gamma: int, drafter_sha256: str) -> ThroughputArtifact:
    """Read ``throughput.json`` and check that it was measured with these weights.

    Raises:
        ArtifactError: malformed, without a command or a machine, or of another drafter.
    """
    found = read_record(
        path,
        ThroughputArtifact,
        what="measured speeds",
        fix=MEASURE_AGAIN,
        of=_own(gamma=gamma, drafter_sha256=drafter_sha256),
    )
    if not found.provenance.command.strip():
        raise ArtifactError(
            f"{path} names no command.", expected="the command that measured it", fix=MEASURE_AGAIN
        )
    return found


class TargetFingerprint(
    Strict, frozen=True, kw_only=True, tag="target-fingerprint", tag_field="kind"
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
        of=_own(drafter_sha256=drafter_sha256),
    )


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
    files = {name: directory / name for name in layout.RECORDS if (directory / name).exists()}
    sts, vocabulary, measured = (
        files.get(n) for n in (STS_FILE, DRAFT_VOCAB_FILE, layout.EVAL_FILE)
    )
    speed, target, cost = (
        files.get(n) for n in (layout.THROUGHPUT_FILE, layout.TARGET_FILE, layout.COST_FILE)
    )
    vocab = drafter.config.vocab_size
    return Records(
        provenance=read_provenance(
            directory / layout.PROVENANCE_FILE, gamma=gamma, drafter_sha256=digest
        ),
        sts=read_sts(sts, gamma=gamma, drafter_sha256=digest) if sts else None,
        vocabulary=read_draft_vocab(vocabulary, vocab_size=vocab) if vocabulary else None,
        eval=read_eval(measured, gamma=gamma, drafter_sha256=digest) if measured else None,
        throughput=read_throughput(speed, gamma=gamma, drafter_sha256=digest) if speed else None,
        target=read_target(target, drafter_sha256=digest) if target else None,
        cost=_read_cost(cost, gamma=gamma, digest=digest) if cost else None,
    )


def _read_cost(path: Path, *, gamma: int, digest: str) -> dict[str, object]:
    value = read_json(path, what="a step cost that `dspark calibrate --cost` wrote")
    of = value.get("fingerprint")
    of = of if isinstance(of, dict) else {}
    for key, wanted in (("gamma", str(gamma)), ("drafter", digest)):
        if of.get(key) != wanted:
            raise ArtifactError(
                f"{path} was measured with {key} {of.get(key)}.",
                expected=wanted,
                fix="Measure it again with `dspark calibrate --cost`, or leave it out.",
            )
    return value


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
    layout.require_directory(directory)
    bundle = read_bundle(directory) if (directory / layout.BUNDLE_FILE).is_file() else None
    shards = read_shards(directory)
    home = directory
    if bundle is None:
        drafter = read_drafter(directory, shards)
    elif bundle.layout == "folder":
        home = directory / layout.DRAFT_FOLDER
        layout.require_directory(home)
        drafter = read_drafter(home)
    else:
        drafter = _inside(directory, shards, bundle)
    # Before the records: weights that are no drafter say more than a digest that differs.
    drafter.layout.check_stored(drafter.tensors, drafter.raw, home.name)
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
    drafters = layout_of(raw)
    files = {o: h for o, h in bundle.drafter_files.items() if h.endswith(".safetensors")}
    return Drafter(
        raw=raw,
        layout=drafters,
        config=drafters.read(raw),
        tensors={name: shards.tensors[name].tensor for name in drafters.own(shards.tensors)},
        digest=digest_of(directory, files, drafters),
    )
