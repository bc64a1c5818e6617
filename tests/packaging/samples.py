"""A dense drafter and a target of a few hundred parameters, with records and keys that go with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import save_file

from dspark_packaging import artifact
from dspark_packaging.records import ACCEPTED_LENGTH, SURVIVAL
from dspark_sglang.layouts.base import weights_digest
from dspark_sglang.layouts.dense.config import parse_drafter_config
from dspark_sglang.layouts.dense.tensors import dense_tensors

#: The packaged drafter of this repository.
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
TARGET_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "vocab_size": 11,
    "num_hidden_layers": 6,
}
RUN = {"created": "2026-11-23", "command": "measure --it", "versions": {"sglang": "0.5.23"}}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(path: Path, value: object) -> None:
    """Write JSON."""
    path.write_text(json.dumps(value))


def edit(path: Path, **changes: object) -> None:
    """Change fields of a JSON object."""
    put(path, json.loads(path.read_text()) | changes)


def provenance(digest: str, *, gamma: int = GAMMA) -> dict[str, Any]:
    """Fields of ``provenance.json``."""
    words = {key: f"some {key}" for key in ("data", "command", "initialisation", "objective")}
    return {
        "kind": "drafter-provenance",
        "schema_version": 1,
        "gamma": gamma,
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
    """Fields of ``sts.json``."""
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
    """Fields of ``eval.json``."""
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


def save_weights(folder: Path, tensors: dict[str, Any]) -> None:
    """Write ``model.safetensors``."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_drafter(folder: Path) -> Path:
    """A drafter as training leaves it, with its provenance."""
    folder.mkdir(parents=True)
    put(folder / "config.json", CONFIG)
    shapes = dense_tensors(parse_drafter_config(CONFIG))
    save_weights(folder, {name: np.ones(shape, np.float16) for name, shape in shapes.items()})
    put(folder / "provenance.json", provenance(weights_digest(folder)))
    return folder


def write_tokenizer(folder: Path, words: str = "abcdefghijk") -> None:
    """``tokenizer.json`` with one token a letter."""
    vocabulary = {letter: index for index, letter in enumerate(words)}
    put(folder / "tokenizer.json", {"model": {"vocab": vocabulary}, "added_tokens": []})


def write_target(folder: Path, *, shards: int = 2) -> Path:
    """A target that the drafter fits: weights in shards, index, tokenizer, card, code."""
    folder.mkdir(parents=True)
    put(folder / "config.json", TARGET_CONFIG)
    write_tokenizer(folder)
    rng = np.random.default_rng(5)
    names = ["model.embed_tokens.weight"] + [f"model.layers.{n}.weight" for n in range(6)]
    mapped: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file(
            {name: rng.standard_normal((11, 8)).astype(np.float16) for name in part}, folder / file
        )
        mapped |= dict.fromkeys(part, file)
    put(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": mapped})
    (folder / "README.md").write_text("the target's own card\n")
    (folder / "modeling_tiny.py").write_text("raise SystemExit\n")
    return folder


def write_package(folder: Path, target: Path | None = None) -> Path:
    """A packaged drafter beside its source; with ``target.json`` when the target is given."""
    source = write_drafter(folder.with_name(folder.name + "-source"))
    artifact.build(source, folder, artifact.Options(target=target))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make_keys(folder: Path) -> tuple[Path, Path]:
    """A new pair on prime256v1 in PEM: private and public file."""
    folder.mkdir(parents=True)
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "key.pem", folder / "key.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


def draft_vocabulary() -> dict[str, object]:
    """Fields of ``draft_vocab.json``."""
    tokens = {"vocab_size": CONFIG["vocab_size"], "tokens": [0, 2, 5]}
    return {
        "kind": "draft_vocab",
        "schema_version": 1,
        **tokens,
        "counted": 1000,
        "coverage": 0.931,
    }


def add_measurements(folder: Path) -> None:
    """Give a drafter ``sts.json`` and ``eval.json`` of its own."""
    digest = weights_digest(folder)
    put(folder / "sts.json", sts(digest))
    put(folder / "eval.json", evaluation(digest))
