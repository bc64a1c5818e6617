"""A drafter of a few hundred parameters, and the records that go with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dspark_packaging.build import build_artifact
from dspark_packaging.schemas import ACCEPTED_LENGTH, SURVIVAL
from dspark_sglang.checkpoint import dense_tensors, parse_drafter_config, weights_digest

COMMITTED = Path(__file__).parents[2] / "model_cards" / "smollm2-135m-instruct-dspark"
GAMMA = 3
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3DSparkModel"],
    "hidden_size": 8,
    "vocab_size": 11,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_hidden_layers": 1,
    "num_target_layers": 6,
    "block_size": GAMMA,
    "target_layer_ids": [1, 4],
    "mask_token_id": 3,
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "markov_rank": 2,
    "markov_head_type": "vanilla",
}
RUN = {"created": "2026-11-23", "command": "measure --it", "versions": {"sglang": "0.5.23"}}


def put(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def edit(path: Path, **changes: object) -> None:
    put(path, json.loads(path.read_text()) | changes)


def provenance(digest: str) -> dict[str, Any]:
    words = {key: f"some {key}" for key in ("data", "command", "initialisation", "objective")}
    return {
        "kind": "drafter-provenance",
        "schema_version": 1,
        "gamma": GAMMA,
        "drafter_sha256": digest,
        "name": "tiny-dspark",
        "license": "apache-2.0",
        "target": {
            "repo_id": "owner/tiny",
            "family": "tiny",
            "source": "made up",
            "checkpoint_file": "model.safetensors",
            "checkpoint_sha256": "0" * 64,
        },
        "training": words | {"duration": "no time", "hardware": "none"},
        "versions": {"torch": "2.14.1"},
        "sglang": "0.5.23",
    }


def sts(digest: str) -> dict[str, Any]:
    return {
        "kind": "sts",
        "schema_version": 1,
        "gamma": GAMMA,
        "temperatures": [1.125, 0.875, 1.5],
        "drafter_sha256": digest,
        "target": "owner/tiny",
        "provenance": RUN,
        "blocks": 4321,
        "ece_before": 0.0625,
        "ece_after": 0.0123,
    }


def evaluation(digest: str) -> dict[str, Any]:
    row = {
        "temperature": 0,
        "rounds": 9876,
        "overall": 2.34,
        "by_kind": {"chat": 2.11, "code": 2.77},
        "by_position": [0.711, 0.422, 0.233],
        "ci95": [2.28, 2.41],
    }
    return {
        "kind": "eval",
        "schema_version": 1,
        "gamma": GAMMA,
        "drafter_sha256": digest,
        "target": "owner/tiny",
        "definition": ACCEPTED_LENGTH,
        "position_definition": SURVIVAL,
        "prompts": "some prompts",
        "hardware": "some machine",
        "provenance": RUN,
        "accepted_length": [row],
    }


def draft_vocabulary() -> dict[str, object]:
    tokens = {"vocab_size": CONFIG["vocab_size"], "tokens": [0, 2, 5]}
    return {
        "kind": "draft_vocab",
        "schema_version": 1,
        **tokens,
        "counted": 1000,
        "coverage": 0.931,
    }


def save_weights(folder: Path, tensors: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    put(folder / "config.json", CONFIG)
    shapes = dense_tensors(parse_drafter_config(CONFIG))
    save_weights(folder, {name: np.ones(shape, np.float16) for name, shape in shapes.items()})
    put(folder / "provenance.json", provenance(weights_digest(folder)))
    return folder


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    build_artifact(source, tmp_path / "out")
    return tmp_path / "out"


def add_measurements(folder: Path) -> None:
    digest = weights_digest(folder)
    put(folder / "sts.json", sts(digest))
    put(folder / "eval.json", evaluation(digest))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
