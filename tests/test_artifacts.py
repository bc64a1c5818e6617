"""Artifacts: written whole or not at all, and refused where they do not belong."""

from __future__ import annotations

import json
import resource
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dspark_sglang.artifacts import (
    DRAFT_VOCAB_FILE,
    SCHEMA_VERSION,
    DraftVocabArtifact,
    Provenance,
    STSArtifact,
    read_draft_vocab,
    read_sts,
    write_bytes,
    write_json,
)
from dspark_sglang.errors import ArtifactError

DIGEST = "ab" * 32


def artifact() -> STSArtifact:
    return STSArtifact(
        schema_version=SCHEMA_VERSION,
        gamma=3,
        temperatures=[0.8, 1.0, 1.25],
        drafter_sha256=DIGEST,
        target="some/target",
        provenance=Provenance(created="2026-01-01", command="dspark calibrate", versions={}),
        blocks=12,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_json(tmp_path / "sts.json", artifact())
    return tmp_path / "sts.json"


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


# --- writing -------------------------------------------------------------------------------


def test_round_trip(path: Path) -> None:
    assert read_sts(path, gamma=3, drafter_sha256=DIGEST) == artifact()
    content = json.loads(path.read_text())
    assert content["kind"] == "sts" and content["schema_version"] == SCHEMA_VERSION
    assert path.read_bytes().endswith(b"}\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_writing_makes_the_folder_and_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.json"
    write_bytes(path, b"old and longer")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_in_the_middle_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the disk is full after this
    try:
        with pytest.raises(OSError):
            write_bytes(path, b"x" * 1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_cannot_replace_leaves_no_remains(tmp_path: Path) -> None:
    (tmp_path / "x.json" / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        write_bytes(tmp_path / "x.json", b"data")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_unencodable_content_touches_nothing(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(path, {"value": object()})
    assert path.read_bytes() == before


# --- refusing ------------------------------------------------------------------------------


def refused(path: Path, *, gamma: int = 3, digest: str | None = DIGEST) -> ArtifactError:
    with pytest.raises(ArtifactError) as caught:
        read_sts(path, gamma=gamma, drafter_sha256=digest)
    error = caught.value
    assert str(path) in error.found
    assert "dspark calibrate" in error.fix and "DSPARK_STS" in error.fix
    assert all(part in str(error) for part in (error.found, error.expected, error.fix))
    return error


def test_missing(tmp_path: Path) -> None:
    error = refused(tmp_path / "none.json")
    assert "does not exist" in error.found
    assert error.expected == "an STS calibration file"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"kind": "sts"}', b"null"],
    ids=["empty", "cut", "list", "not-utf8", "no-fields", "null"],
)
def test_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sts.json").write_bytes(content)
    assert "cannot be read" in refused(tmp_path / "sts.json").found


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "cost"},
        {"kind": ...},
        {"temperatures": ["1"]},
        {"provenance": ...},
    ],
    ids=["other-kind", "no-kind", "text-temperatures", "no-provenance"],
)
def test_of_another_type(path: Path, changes: dict[str, Any]) -> None:
    edit(path, **changes)
    assert "cannot be read" in refused(path).found


def test_truncated_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])
    assert "cannot be read" in refused(path).found


def test_other_schema(path: Path) -> None:
    edit(path, schema_version=SCHEMA_VERSION + 1)
    error = refused(path)
    assert f"schema_version {SCHEMA_VERSION + 1}" in error.found
    assert error.expected == str(SCHEMA_VERSION)


def test_other_gamma(path: Path) -> None:
    error = refused(path, gamma=7)
    assert "gamma 3" in error.found and "gamma 7" in error.expected


def test_temperatures_that_do_not_match_gamma(path: Path) -> None:
    edit(path, temperatures=[1.0, 1.0])
    error = refused(path)
    assert "2 temperatures" in error.found and "gamma 3" in error.expected


@pytest.mark.parametrize("bad", [0.0, -1.0], ids=["zero", "negative"])
def test_temperatures_that_cannot_scale(path: Path, bad: float) -> None:
    edit(path, temperatures=[1.0, bad, 1.0])
    error = refused(path)
    assert str(bad) in error.found and error.expected == "finite numbers above 0"


def test_other_drafter(path: Path) -> None:
    error = refused(path, digest="cd" * 32)
    assert "abab" in error.found and "cdcd" in error.expected
    assert read_sts(path, gamma=3, drafter_sha256=None) == artifact()


@pytest.mark.parametrize(
    "break_",
    [lambda a: setattr(a, "gamma", 4), lambda a: delattr(a, "gamma")],
    ids=["set", "delete"],
)
def test_artifacts_do_not_change(break_: Callable[[STSArtifact], None]) -> None:
    with pytest.raises((AttributeError, TypeError)):
        break_(artifact())
    assert isinstance(artifact(), msgspec.Struct)


# --- draft vocabulary -----------------------------------------------------------------------------


def vocabulary(**changes: Any) -> DraftVocabArtifact:
    fields = {"schema_version": SCHEMA_VERSION, "vocab_size": 9, "tokens": [0, 3, 8]}
    return DraftVocabArtifact(**{**fields, "counted": 100, "coverage": 0.9, **changes})


def test_draft_vocabulary_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / DRAFT_VOCAB_FILE, vocabulary())
    assert read_draft_vocab(tmp_path / DRAFT_VOCAB_FILE, vocab_size=9) == vocabulary()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "0 tokens"),
        ({"tokens": [3, 3]}, "not ascending"),
        ({"tokens": [3, 0]}, "not ascending"),
        ({"tokens": [-1, 0]}, "not ascending"),
        ({"tokens": [0, 9]}, "not ascending"),
        ({"vocab_size": 10}, "vocabulary of 10"),
        ({"schema_version": SCHEMA_VERSION + 1}, "schema_version"),
    ],
)
def test_a_wrong_draft_vocabulary_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / DRAFT_VOCAB_FILE
    write_json(path, vocabulary(**changes))
    with pytest.raises(ArtifactError, match=message) as caught:
        read_draft_vocab(path, vocab_size=9)
    assert str(path) in caught.value.found
    assert "whole vocabulary" in caught.value.fix


def test_calibration_is_no_draft_vocabulary(path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_draft_vocab(path, vocab_size=9)
