"""Small JSON artifacts: calibration and draft vocabulary of a drafter, step cost of a server.

Each carries ``schema_version``, its kind, what it belongs to and its provenance. Reading one for
something else is an error, never a warning.
"""

from __future__ import annotations

import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from dspark_sglang.errors import ArtifactError, ConfigError

SCHEMA_VERSION = 1
STS_FILE = "sts.json"
DRAFT_VOCAB_FILE = "draft_vocab.json"


class Versioned(Protocol):
    """What every artifact has; its struct is tagged with its kind."""

    @property
    def schema_version(self) -> int: ...


Artifact = TypeVar("Artifact", bound=Versioned)


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where an artifact came from."""

    created: str
    command: str
    versions: dict[str, str]
    data: str = ""


class STSArtifact(msgspec.Struct, frozen=True, kw_only=True, tag="sts", tag_field="kind"):
    """Sequential temperature scaling of a confidence head (paper, section on calibration)."""

    schema_version: int
    gamma: int
    #: One temperature per position; the calibrated confidence is ``sigmoid(logit / t_k)``.
    temperatures: list[float]
    drafter_sha256: str
    target: str
    provenance: Provenance
    #: Blocks the fit saw, and mean expected calibration error of survival before and after,
    #: on blocks the fit did not see.
    blocks: int = 0
    ece_before: float | None = None
    ece_after: float | None = None


class DraftVocabArtifact(
    msgspec.Struct, frozen=True, kw_only=True, tag="draft_vocab", tag_field="kind"
):
    """The tokens a drafter drafts: the most frequent ones of the text it was trained on.

    The drafted distribution is ours to choose, so restricting it leaves the output's distribution as it is; the LM
    head and the Markov stage then read these rows instead of the whole vocabulary.
    """

    schema_version: int
    #: Size of the target's vocabulary.
    vocab_size: int
    #: Ascending, without repetition.
    tokens: list[int]
    #: Tokens of training text that were counted, and the share of them that is in ``tokens``.
    counted: int
    coverage: float


class CostArtifact(msgspec.Struct, frozen=True, kw_only=True, tag="cost", tag_field="kind"):
    """A measured step cost and everything it depends on."""

    schema_version: int
    #: Two servers with the same fingerprint have the same step cost.
    fingerprint: dict[str, str]
    model: dict[str, Any]
    #: Wall seconds the measurement at start-up took.
    seconds: float | None = None
    provenance: Provenance


def require_writable(path: Path, *, folder: bool = False) -> None:
    """Make the folder that ``path`` will be in, and see that it can be written.

    Args:
        folder: ``path`` is to be a folder, or is one.

    Raises:
        ConfigError: it cannot.
    """
    fix = "Name another place."
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.filename or path.parent}: {error.strerror}.",
            expected="a folder that can be made and written",
            fix=fix,
        ) from error
    if path.exists() and path.is_dir() != folder:
        kinds = ("a folder", "a file")
        raise ConfigError(
            f"{path} is {kinds[folder]}.", expected=f"{kinds[not folder]}, or none yet", fix=fix
        )


def as_json(value: object) -> str:
    """``value`` as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def write_json(path: Path, value: msgspec.Struct | dict[str, object]) -> None:
    """Write ``value`` as indented JSON, all or nothing."""
    data = as_json(value).encode() + b"\n"
    write_bytes(path, data)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` with ``data`` so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk names no file
        raise


def read_artifact(path: Path, kind: type[Artifact], what: str, fix: str) -> Artifact:
    """Decode an artifact and check its kind and schema.

    Args:
        what, fix: what errors say was expected, and what to do.

    Raises:
        ArtifactError: missing, damaged, of another kind or another schema.
    """
    try:
        data = path.read_bytes()
        artifact = msgspec.json.decode(data, type=kind)
        # msgspec takes a missing tag for the right one
        tagged = "kind" in msgspec.json.decode(data)
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist.", expected=what, fix=fix) from None
    except (msgspec.DecodeError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.", expected=what, fix=fix) from error
    if not tagged:
        tag = kind.__struct_config__.tag  # type: ignore[attr-defined]
        raise ArtifactError(
            f"{path} cannot be read: it names no kind.", expected=f'"kind": "{tag}"', fix=fix
        )
    if artifact.schema_version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema_version {artifact.schema_version}.",
            expected=str(SCHEMA_VERSION),
            fix=fix,
        )
    return artifact


def read_sts(path: Path, *, gamma: int, drafter_sha256: str | None = None) -> STSArtifact:
    """Read an STS artifact and check that it belongs here.

    Args:
        path: the artifact.
        gamma: drafted tokens a round of the running drafter.
        drafter_sha256: digest of the drafter's weights; None skips that check.

    Raises:
        ArtifactError: missing, damaged, another schema, γ or drafter, or a bad temperature.
    """
    fix = "Fit it again with `dspark calibrate`, or unset DSPARK_STS to serve without it."
    artifact = read_artifact(path, STSArtifact, "an STS calibration file", fix)
    if artifact.gamma != gamma or len(artifact.temperatures) != gamma:
        raise ArtifactError(
            f"{path} was fitted for gamma {artifact.gamma} "
            f"({len(artifact.temperatures)} temperatures).",
            expected=f"gamma {gamma}, the drafter's block size",
            fix=fix,
        )
    if not all(0.0 < t < float("inf") for t in artifact.temperatures):
        raise ArtifactError(
            f"{path} holds temperatures {artifact.temperatures}.",
            expected="finite numbers above 0",
            fix=fix,
        )
    if drafter_sha256 is not None and artifact.drafter_sha256 != drafter_sha256:
        raise ArtifactError(
            f"{path} was fitted for drafter {artifact.drafter_sha256[:12]}.",
            expected=f"{drafter_sha256[:12]}, the weights beside it",
            fix=fix,
        )
    return artifact


def read_draft_vocab(path: Path, *, vocab_size: int) -> DraftVocabArtifact:
    """Read a draft vocabulary and check that it belongs here.

    Args:
        path: the artifact.
        vocab_size: of the running target.

    Raises:
        ArtifactError: missing, damaged, another schema or vocabulary, or tokens that are not
            ascending within it.
    """
    fix = "Take it out of the drafter's directory to draft over the whole vocabulary."
    artifact = read_artifact(path, DraftVocabArtifact, "a draft vocabulary", fix)
    if artifact.vocab_size != vocab_size:
        raise ArtifactError(
            f"{path} is for a vocabulary of {artifact.vocab_size} tokens.",
            expected=f"{vocab_size}, the target's",
            fix=fix,
        )
    tokens = artifact.tokens
    ascending = all(low < high for low, high in pairwise(tokens))
    if not tokens or not ascending or tokens[0] < 0 or tokens[-1] >= vocab_size:
        raise ArtifactError(
            f"{path} holds {len(tokens)} tokens that are not ascending within the vocabulary.",
            expected=f"at least one, ascending, below {vocab_size}",
            fix=fix,
        )
    return artifact
