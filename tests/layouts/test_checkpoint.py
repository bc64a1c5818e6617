"""Drafter checkpoints: every published layout is read, every misfit is named."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dspark_sglang.checkpoint import read_config, read_headers, read_json
from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.base import check_fits, layout_of, weights_digest
from dspark_sglang.layouts.dense.config import parse_drafter_config
from dspark_sglang.layouts.dense.tensors import check_tensors
from tests.layouts.drafter_samples import DSPARK_KEYS, FLAT, SHAPES, TARGET, actionable, write
from tests.layouts.v4_samples import TINY


def nested(section: str, config: Mapping[str, Any] = FLAT) -> dict[str, Any]:
    inner = {key: config[key] for key in DSPARK_KEYS}
    return {k: v for k, v in config.items() if k not in DSPARK_KEYS} | {section: inner}


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    return write(tmp_path / "drafter", FLAT, SHAPES)


# --- configuration -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [FLAT, nested("dspark_config"), nested("dflash_config")],
    ids=["flat", "dspark_config", "dflash_config"],
)
def test_published_layouts_read_alike(config: dict[str, Any]) -> None:
    parsed = parse_drafter_config(config)
    assert parsed == parse_drafter_config(FLAT)
    assert (parsed.gamma, parsed.markov_rank, parsed.markov_head) == (3, 2, "vanilla")
    assert (parsed.mask_token_id, parsed.target_layer_ids) == (15, (1, 3))
    assert not parsed.bundled


def test_a_bundle_has_its_targets_layout() -> None:
    layout = layout_of(TINY)
    parsed = layout.read(TINY)
    assert parsed.bundled and layout.bundled and not layout_of(FLAT).bundled
    assert (parsed.gamma, parsed.markov_rank, parsed.mask_token_id) == (3, 4, 11)
    assert parsed.target_layer_ids == (3, 4, 5) and parsed.num_layers == 3
    assert parsed.markov_head == "vanilla"


def test_defaults_of_what_checkpoints_leave_out() -> None:
    optional = (
        "head_dim",
        "num_key_value_heads",
        "confidence_head_with_markov",
        "markov_head_type",
    )
    parsed = parse_drafter_config({k: v for k, v in FLAT.items() if k not in optional})
    assert (parsed.head_dim, parsed.num_kv_heads) == (4, 2)
    assert parsed.confidence_with_markov and parsed.markov_head == "vanilla"
    assert parsed.rope_theta == 10000.0


@pytest.mark.parametrize(
    "given",
    [{"rope_theta": 5e6}, {"rope_parameters": {"rope_theta": 5e6}}],
    ids=["top-level", "rope_parameters"],
)
def test_rope_theta(given: dict[str, Any]) -> None:
    assert parse_drafter_config(FLAT | given).rope_theta == 5e6


@pytest.mark.parametrize("key", ["block_size", "markov_rank", "mask_token_id", "target_layer_ids"])
def test_a_drafter_of_another_algorithm_is_named(key: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_drafter_config({k: v for k, v in FLAT.items() if k != key})
    actionable(caught.value, found=f"has no {key}", expected="a DSpark drafter")


@pytest.mark.parametrize(
    ("changes", "found", "expected"),
    [
        ({"markov_head_type": "lstm"}, "'lstm'", "vanilla or gated or rnn"),
        ({"block_size": 0}, "block_size 0", "at least 1"),
        ({"markov_rank": 0}, "markov_rank 0", "at least 1"),
        ({"target_layer_ids": []}, "target_layer_ids []", "at least one target layer"),
    ],
    ids=["head", "gamma", "rank", "layers"],
)
def test_values_out_of_range(changes: dict[str, Any], found: str, expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_drafter_config(FLAT | changes)
    actionable(caught.value, found=found, expected=expected)


@pytest.mark.parametrize(
    "changes",
    [{"block_size": "seven"}, {"target_layer_ids": 3}, {"hidden_size": [8]}],
    ids=["text", "no-list", "list"],
)
def test_values_of_another_type_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        parse_drafter_config(FLAT | changes)


# --- files ---------------------------------------------------------------------------------


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path / "none", role="drafter")
    actionable(caught.value, found="drafter path", expected="a model directory")
    assert "hf download" in caught.value.fix


@pytest.mark.parametrize(
    ("content", "found"),
    [(None, "does not exist"), ("{", "is not JSON"), ("[1]", "holds a list")],
    ids=["missing", "cut", "list"],
)
def test_unusable_config_json(tmp_path: Path, content: str | None, found: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path, role="target")
    actionable(caught.value, found=found, expected="the target's config.json")


def test_config_json_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path / "config.json", what="a file")
    actionable(caught.value, found="is not JSON", expected="a file")


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        read_headers(tmp_path)
    actionable(caught.value, found="no .safetensors file", expected="safetensors weights")


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "length", "header", "data"])
def test_truncated_weights(drafter: Path, keep: int) -> None:
    path = drafter / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError) as caught:
        check_tensors(drafter, parse_drafter_config(FLAT))
    actionable(caught.value, found="is damaged", expected="a complete safetensors file")
    assert str(path) in caught.value.found


def test_shapes_of_all_shards(drafter: Path) -> None:
    save_file({"extra": np.zeros((2, 3), np.float32)}, drafter / "model-2.safetensors")
    found = {name: tensor.shape for name, tensor in read_headers(drafter).items()}
    assert found == SHAPES | {"extra": (2, 3)}


# --- tensors -------------------------------------------------------------------------------


def test_a_complete_drafter_passes(drafter: Path) -> None:
    check_tensors(drafter, parse_drafter_config(FLAT))


def test_names_may_carry_the_model_prefix_and_an_embedding_copy(tmp_path: Path) -> None:
    shapes = {"model." + name: shape for name, shape in SHAPES.items()}
    folder = write(tmp_path, FLAT, shapes | {"model.embed_tokens.weight": (16, 8)})
    check_tensors(folder, parse_drafter_config(FLAT))


HEADS = {
    "gated": {"gate_proj.weight": (2, 10), "gate_proj.bias": (2,)},
    "rnn": {"joint_proj.weight": (6, 12), "joint_proj.bias": (6,)},
}


@pytest.mark.parametrize("kind", HEADS)
def test_other_heads_need_their_tensors(tmp_path: Path, kind: str) -> None:
    config = FLAT | {"markov_head_type": kind}
    extra = {"markov_head." + name: shape for name, shape in HEADS[kind].items()}
    check_tensors(write(tmp_path / "ok", config, SHAPES | extra), parse_drafter_config(config))
    with pytest.raises(CheckpointError) as caught:
        check_tensors(write(tmp_path / "short", config, SHAPES), parse_drafter_config(config))
    name = "markov_head." + next(iter(HEADS[kind]))
    actionable(caught.value, found=f"has no tensor {name}", expected="of shape")


@pytest.mark.parametrize("name", sorted(set(SHAPES) - {"confidence_head.proj.weight"}))
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, FLAT, {k: v for k, v in SHAPES.items() if k != name})
    with pytest.raises(CheckpointError) as caught:
        check_tensors(folder, parse_drafter_config(FLAT))
    actionable(caught.value, found=f"no tensor {name}", expected=f"{list(SHAPES[name])}")


@pytest.mark.parametrize("name", ["fc.weight", "markov_head.markov_w2.weight", "norm.weight"])
def test_a_wrong_shape_is_named(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, FLAT, SHAPES | {name: (3, 3)})
    with pytest.raises(CheckpointError) as caught:
        check_tensors(folder, parse_drafter_config(FLAT))
    actionable(caught.value, found="[3, 3]", expected=f"{list(SHAPES[name])}")
    assert name in caught.value.found


@pytest.mark.parametrize(
    ("config", "said"),
    [(FLAT, "says"), (FLAT | {"enable_confidence_head": False}, "turns off")],
    ids=["promised", "turned-off"],
)
def test_a_missing_confidence_head(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    shapes = {k: v for k, v in SHAPES.items() if not k.startswith("confidence_head.")}
    with pytest.raises(CheckpointError) as caught:
        check_tensors(write(tmp_path, config, shapes), parse_drafter_config(config))
    actionable(caught.value, found=said, expected="confidence_head.proj.weight")
    assert "DSPARK_PLUGIN=off" in caught.value.fix


def test_a_confidence_head_without_markov_features(tmp_path: Path) -> None:
    config = FLAT | {"confidence_head_with_markov": False}
    parsed = parse_drafter_config(config)
    shapes = SHAPES | {"confidence_head.proj.weight": (1, 8)}
    check_tensors(write(tmp_path / "ok", config, shapes), parsed)
    with pytest.raises(CheckpointError, match="confidence_head"):
        check_tensors(write(tmp_path / "wide", config, SHAPES), parsed)


# --- target --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [TARGET, {"text_config": TARGET}, {}], ids=str)
def test_a_fitting_target_passes(target: dict[str, Any]) -> None:
    check_fits(parse_drafter_config(FLAT), target)


@pytest.mark.parametrize(
    ("target", "drafter", "found", "expected"),
    [
        ({"hidden_size": 9}, {}, "hidden_size is 8", "9, as in T"),
        ({"vocab_size": 32}, {}, "vocab_size is 16", "32, as in T"),
        ({"num_hidden_layers": 6}, {}, "num_target_layers is 5", "6, as in T"),
        ({}, {"target_layer_ids": [1, 5]}, "layers [5]", "-1 to 4 of T"),
        ({}, {"target_layer_ids": [-2]}, "layers [-2]", "-1 to 4 of T"),
        ({}, {"mask_token_id": 16}, "mask_token_id is 16", "a token below 16"),
        ({}, {"mask_token_id": -1}, "mask_token_id is -1", "a token below 16"),
    ],
    ids=["hidden", "vocab", "depth", "layer-high", "layer-low", "mask-high", "mask-low"],
)
def test_a_foreign_target(
    target: dict[str, Any], drafter: dict[str, Any], found: str, expected: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_fits(parse_drafter_config(FLAT | drafter), TARGET | target, name="T")
    actionable(caught.value, found=found, expected=expected)
    assert "T" in caught.value.fix


def test_a_padded_vocabulary_may_hold_the_mask_token() -> None:
    check_fits(
        parse_drafter_config(FLAT | {"mask_token_id": 17}), TARGET | {"padded_vocab_size": 20}
    )


# --- identity ------------------------------------------------------------------------------


def test_digest_is_of_names_and_bytes_in_name_order(drafter: Path) -> None:
    (drafter / "a.safetensors").write_bytes(b"1" * 3_000_000)
    (drafter / "notes.txt").write_text("not weights")
    wanted = hashlib.sha256()
    for name in ("a.safetensors", "model.safetensors"):
        wanted.update(name.encode() + (drafter / name).read_bytes())
    assert weights_digest(drafter) == wanted.hexdigest()
    (drafter / "a.safetensors").write_bytes(b"1" * 2_999_999 + b"2")
    assert weights_digest(drafter) != wanted.hexdigest()
