"""Bundles that cannot be served are refused from their headers, one line each, before weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_sglang.checkpoint import INDEX_FILE as INDEX
from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.v4 import tiny
from dspark_sglang.layouts.v4.config import release
from dspark_sglang.layouts.v4.layout import check_bundle
from dspark_sglang.planning import published

Tensors = dict[str, torch.Tensor]
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("v4")
    tiny.write(root / "plain", dtype=torch.float32)
    tiny.write(root / "published", published=True)
    return root / "plain", root / "published"


@pytest.fixture
def plain(bundles: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles[0], tmp_path / "bundle"))


@pytest.fixture
def shards(bundles: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles[1], tmp_path / "bundle"))


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(path)), path)


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda held: {n: v for n, v in held.items() if not any(part in n for part in parts)}


def refused(folder: Path, *said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_bundle(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.fix
    for part in said:
        assert part in text


def test_both_forms_are_accepted(bundles: tuple[Path, Path]) -> None:
    assert [check_bundle(folder) for folder in bundles] == [False, True]


def test_no_weight_is_read(shards: Path) -> None:
    """Files as large as they say, with holes where the weights were."""
    for path in shards.glob("*.safetensors"):
        size = path.stat().st_size
        head = path.read_bytes()[: 8 + int.from_bytes(path.read_bytes()[:8], "little")]
        path.write_bytes(head)
        with path.open("ab") as stream:
            stream.truncate(size)
    assert check_bundle(shards)


# --- files ----------------------------------------------------------------------------------------


def test_a_missing_shard(shards: Path) -> None:
    (shards / "model-00004-of-00004.safetensors").unlink()
    refused(shards, "lacks 1 files", "model-00004-of-00004.safetensors")


def test_a_truncated_shard(shards: Path) -> None:
    path = shards / "model-00002-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(shards, "damaged", path.name)


def test_shards_without_an_index(shards: Path) -> None:
    (shards / INDEX).unlink()
    refused(shards, "4 .safetensors files", INDEX)


def test_an_index_of_another_revision(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    del index["weight_map"][name]
    (shards / INDEX).write_text(json.dumps(index))
    refused(shards, "wrong about 1 tensors", name)


def test_a_total_of_another_revision(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    index["metadata"]["total_size"] *= 2
    (shards / INDEX).write_text(json.dumps(index))
    refused(shards, "its files hold")


# --- tensors --------------------------------------------------------------------------------------


def test_half_a_bundle(plain: Path) -> None:
    rewrite(plain / FILE, without("mtp."))
    refused(plain, "half a bundle")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("mtp.1.", "drafter"),
        ("layers.3.attn.wkv", "layers.3.attn.wkv.weight (target)"),
        ("layers.4.hc_ffn_fn", "hyper-connection"),
        ("mtp.2.hc_head", "hyper-connection"),
        ("layers.2.attn.indexer.weights_proj", "indexer"),
        ("layers.5.attn.compressor.ape", "compressor"),
        ("embed.weight", "embed.weight"),
    ],
)
def test_missing_tensors(plain: Path, part: str, said: str) -> None:
    rewrite(plain / FILE, without(part))
    refused(plain, "lacks", said)


def test_a_tensor_more(plain: Path) -> None:
    rewrite(plain / FILE, lambda held: held | {"layers.9.attn.wkv.weight": torch.ones(1)})
    refused(plain, "1 tensors more", "layers.9.attn.wkv.weight")


def test_a_next_token_layer_in_the_drafters_place(plain: Path) -> None:
    rewrite(plain / FILE, lambda held: held | {"mtp.0.e_proj.weight": torch.ones(128, 128)})
    refused(plain, "next-token layer")


def test_engram_tensors(plain: Path) -> None:
    rewrite(plain / FILE, lambda held: held | {"layers.1.engram.wkv.weight": torch.ones(1)})
    refused(plain, "Engram tensors", "DSPARK_PLUGIN=off")


def test_a_drafter_of_a_wider_target(plain: Path) -> None:
    def change(held: Tensors) -> Tensors:
        return held | {"mtp.0.main_proj.weight": torch.ones(128, 3 * 256)}

    rewrite(plain / FILE, change)
    refused(plain, "another target", "mtp.0.main_proj.weight", "[128, 384]")


def test_a_drafter_that_reads_other_layers(plain: Path) -> None:
    configure(plain, dspark_target_layer_ids=[4, 5, 6])
    refused(plain, "dspark_target_layer_ids", "0..5")
    configure(plain, dspark_target_layer_ids=[4, 5])
    refused(plain, "mtp.")


@pytest.mark.parametrize("name", ["markov_head.markov_w2", "confidence_head.proj"])
def test_heads_that_do_not_fit(plain: Path, name: str) -> None:
    def change(held: Tensors) -> Tensors:
        full = f"mtp.2.{name}.weight"
        return held | {full: held[full][:, :-1].contiguous()}

    rewrite(plain / FILE, change)
    refused(plain, "heads do not fit", name)


def test_another_rank(plain: Path) -> None:
    configure(plain, dspark_markov_rank=64)
    refused(plain, "heads do not fit", "dspark_markov_rank")


@pytest.mark.parametrize("value", [0, -1, "5", 1.5, 129])
def test_a_wrong_block_size(plain: Path, value: Any) -> None:
    configure(plain, dspark_block_size=value)
    refused(plain, "dspark_block_size", str(value))


def test_a_quantised_weight_without_its_scale(shards: Path) -> None:
    path = shards / "model-00004-of-00004.safetensors"
    rewrite(path, without("mtp.1.attn.wkv.scale"))
    index = json.loads((shards / INDEX).read_text())
    del index["weight_map"]["mtp.1.attn.wkv.scale"]
    index["metadata"]["total_size"] -= 4
    (shards / INDEX).write_text(json.dumps(index))
    refused(shards, "mtp.1.attn.wkv.weight is F8_E4M3 and has no mtp.1.attn.wkv.scale")


def test_a_type_that_nothing_loads(plain: Path) -> None:
    def change(held: Tensors) -> Tensors:
        return held | {"layers.0.attn_norm.weight": torch.ones(128, dtype=torch.int8)}

    rewrite(plain / FILE, change)
    refused(plain, "layers.0.attn_norm.weight is I8")


# --- configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([0, 0, 4, 128, 4, 64], "64 (layer 5)"),
        ([0, 0, 2, 2, 1, 1], "2 (layer 2)"),
        ([0, 0, 4], "3 entries"),
        (None, "no list"),
        ([0, 0, 4, 128, 4, 128, 4], "ends in [4]"),
    ],
    ids=str,
)
def test_compress_ratios(plain: Path, ratios: Any, said: str) -> None:
    configure(plain, compress_ratios=ratios)
    refused(plain, said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dspark_markov_rank": None}, "dspark_markov_rank"),
        ({"rope_scaling": {"factor": 4}}, "rope_scaling"),
        ({"compress_rope_theta": "x"}, "compress_rope_theta"),
        ({"index_topk": None}, "index_topk"),
        ({"num_hash_layers": 7}, "num_hash_layers"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": None}, "no architecture"),
    ],
    ids=str,
)
def test_configurations(plain: Path, change: dict[str, Any], said: str) -> None:
    configure(plain, **change)
    refused(plain, said)


def test_a_checkpoint_without_a_drafter(plain: Path) -> None:
    config = json.loads((plain / "config.json").read_text())
    kept = {key: value for key, value in config.items() if not key.startswith("dspark")}
    (plain / "config.json").write_text(json.dumps(kept))
    refused(plain, "no dspark_* keys", "-DSpark")


#: What is published of V4.1-Flash that tells it from V4.
V41 = {
    "num_hidden_layers": 40,
    "hidden_size": 5120,
    "compress_ratios": [0, 0, *[2] * 18, *[1] * 20, 0, 0, 0],
    "engram_layer_ids": [1, 14],
    "dspark_target_layer_ids": [37, 38, 39],
    "dspark_block_size": 5,
}


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["DeepseekV41ForCausalLM"], "model_type": "deepseek_v41", **V41},
        {"architectures": ["DeepseekV41ForCausalLM"], "text_config": V41},
        {"architectures": ["DeepseekV4ForCausalLM"], **V41},
    ],
    ids=["flat", "nested", "by its Engram"],
)
def test_v41_is_recognised_and_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        release(config)
    for said in ("V4.1", "Engram at layers [1, 14]", "[37, 38, 39]", "block 5", "DSPARK_PLUGIN"):
        assert said in str(caught.value)


def test_releases_are_recognised() -> None:
    for name, said in (("flash", "V4-Flash (DSpark, 0731)"), ("pro", "V4-Pro (DSpark, 0813)")):
        for drafter in ("", "-dspark"):
            found = published.find(f"deepseek-v4-{name}{drafter}")
            assert found is not None
            assert said in release(found.config)
    assert release(tiny.CONFIG) == "DeepSeek-V4 of 6 layers"
