"""The tiny drafter of the packaging tests, as fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_packaging.build import build_artifact
from dspark_packaging.check.samples import (
    CONFIG,
    GAMMA,
    edit,
    evaluation,
    provenance,
    put,
    save_weights,
    sts,
    tree,
    write_drafter,
)
from dspark_sglang.checkpoint import weights_digest

__all__ = ["CONFIG", "GAMMA", "edit", "evaluation", "provenance", "put", "save_weights", "sts"]

COMMITTED = Path(__file__).parents[2] / "model_cards" / "smollm2-135m-instruct-dspark"
contents = tree


def draft_vocabulary() -> dict[str, object]:
    tokens = {"vocab_size": CONFIG["vocab_size"], "tokens": [0, 2, 5]}
    return {
        "kind": "draft_vocab",
        "schema_version": 1,
        **tokens,
        "counted": 1000,
        "coverage": 0.931,
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_drafter(tmp_path / "source")


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    build_artifact(source, tmp_path / "out")
    return tmp_path / "out"


def add_measurements(folder: Path) -> None:
    digest = weights_digest(folder)
    put(folder / "sts.json", sts(digest))
    put(folder / "eval.json", evaluation(digest))
