"""The DeepSeek-V4 drafter's configuration and tensors: the published ones, and those that do not fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.v4.config import V4Shape
from dspark_sglang.layouts.v4.drafter import V4Drafter
from dspark_sglang.layouts.v4.tensors import v4_tensors
from tests.layouts.v4_samples import FLASH, TINY, make, random_tensors

PRO = FLASH | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "routed_scaling_factor": 2.5,
    "dspark_markov_rank": 512,
    "dspark_target_layer_ids": [58, 59, 60],
}


def says(error: CheckpointError, said: str) -> None:
    """The message holds some words and a way out."""
    assert said in str(error)
    assert error.fix


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# --- configuration and tensors ------------------------------------------------------------------


def test_the_published_flash_drafter() -> None:
    shape = V4Shape.from_config(FLASH)
    assert (shape.gamma, shape.rank, shape.window, shape.layers) == (5, 256, 128, 3)
    assert shape.target_layers == (40, 41, 42)
    found = v4_tensors(shape)
    layer = {
        "attn_norm.weight": (4096,),
        "ffn_norm.weight": (4096,),
        "attn.wq_a.weight": (1024, 4096),
        "attn.q_norm.weight": (1024,),
        "attn.wq_b.weight": (32768, 1024),
        "attn.wkv.weight": (512, 4096),
        "attn.kv_norm.weight": (512,),
        "attn.attn_sink": (64,),
        "attn.wo_a.weight": (8192, 4096),
        "attn.wo_b.weight": (4096, 8192),
        "hc_attn_fn": (24, 16384),
        "hc_attn_base": (24,),
        "hc_attn_scale": (3,),
        "hc_ffn_fn": (24, 16384),
        "hc_ffn_base": (24,),
        "hc_ffn_scale": (3,),
        "ffn.gate.weight": (256, 4096),
        "ffn.gate.bias": (256,),
    }
    for expert in ["shared_experts", *(f"experts.{i}" for i in range(256))]:
        layer |= {f"ffn.{expert}.w{i}.weight": (2048, 4096) for i in (1, 3)}
        layer[f"ffn.{expert}.w2.weight"] = (4096, 2048)
    expected = {f"mtp.{i}.{name}": size for i in range(3) for name, size in layer.items()}
    expected |= {
        "mtp.0.main_proj.weight": (4096, 12288),
        "mtp.0.main_norm.weight": (4096,),
        "mtp.2.norm.weight": (4096,),
        "mtp.2.hc_head_fn": (4, 16384),
        "mtp.2.hc_head_base": (4,),
        "mtp.2.hc_head_scale": (1,),
        "mtp.2.markov_head.markov_w1.weight": (129280, 256),
        "mtp.2.markov_head.markov_w2.weight": (129280, 256),
        "mtp.2.confidence_head.proj.weight": (1, 4352),
    }
    assert found == expected


def test_the_published_pro_drafter() -> None:
    shape = V4Shape.from_config(PRO)
    assert (shape.gamma, shape.rank, shape.mask_token) == (5, 512, 128799)
    found = v4_tensors(shape)
    assert len(found) == 2 + 3 * (18 + 3 * 385) + 7
    for name, size in {
        "mtp.0.main_proj.weight": (7168, 21504),
        "mtp.1.attn.wq_b.weight": (65536, 1536),
        "mtp.1.attn.wo_a.weight": (16384, 4096),
        "mtp.1.attn.wo_b.weight": (7168, 16384),
        "mtp.1.hc_ffn_fn": (24, 28672),
        "mtp.2.ffn.experts.383.w2.weight": (7168, 3072),
        "mtp.2.markov_head.markov_w2.weight": (129280, 512),
        "mtp.2.confidence_head.proj.weight": (1, 7680),
    }.items():
        assert found[name] == size, name


@pytest.mark.parametrize(
    ("config", "published"), [(FLASH, 10.3), (PRO, 40.4)], ids=["flash", "pro"]
)
def test_the_sizes_give_the_published_memory(config: dict[str, Any], published: float) -> None:
    """Routed experts at mxfp4 (4.25 bits a weight) are nearly all of the extra memory."""
    sizes = v4_tensors(V4Shape.from_config(config))
    experts = sum(math.prod(size) for name, size in sizes.items() if ".experts." in name)
    assert experts * 4.25 / 8e9 == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"o_lora_rank": None}, "o_lora_rank"),
        ({"routed_scaling_factor": None}, "routed_scaling_factor"),
        ({"dspark_target_layer_ids": None}, "dspark_target_layer_ids"),
        ({"dspark_target_layer_ids": [4, 6]}, "0..5"),
        ({"dspark_target_layer_ids": []}, "list of layers"),
        ({"dspark_block_size": 0}, "at least 1"),
        ({"dspark_block_size": "5"}, "integer"),
        ({"dspark_markov_rank": True}, "integer"),
        ({"dspark_noise_token_id": 13}, "below 13"),
        ({"qk_rope_head_dim": 3}, "even number"),
        ({"qk_rope_head_dim": 10}, "head_dim 8"),
        ({"o_groups": 3}, "divisor of 4"),
        ({"num_experts_per_tok": 6}, "at most 5"),
        ({"hc_eps": -1.0}, "positive"),
        ({"norm_topk_prob": 1}, "true or false"),
        ({"scoring_func": "sigmoid"}, "sqrtsoftplus"),
        ({"dspark_markov_head_type": "rnn"}, "vanilla"),
        ({"hc_pre_from_prev_sublayer": True}, "False"),
        ({"enable_confidence_head": False}, "True"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_an_error(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        V4Shape.from_config(TINY | changes)
    says(caught.value, said)


def test_defaults_and_other_spellings() -> None:
    spelled = {
        k: v for k, v in TINY.items() if k not in ("sliding_window", "rope_theta", "head_dim")
    }
    spelled |= {"window_size": 6, "qk_nope_head_dim": 4}
    nested = {"rope_parameters": {"main": {"rope_theta": 10000}, "compress": {"rope_theta": 4e4}}}
    assert V4Shape.from_config(spelled | nested) == V4Shape.from_config(TINY)
    fewer = V4Shape.from_config(TINY | {"dspark_n_routed_experts": 3})
    assert (fewer.experts, fewer.active) == (3, 2)
    assert V4Shape.from_config(TINY).rows == 3
    assert V4Shape.from_config(TINY | {"sample_from_anchor": False}).rows == 4


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): value for name, value in tensors.items()}


def test_tensors_that_do_not_fit_are_errors() -> None:
    shape, tensors, _ = make()
    one = "mtp.1.attn.wkv.weight"
    fp8 = tensors[one].to(torch.float8_e4m3fn)
    for given, said in (
        ({k: v for k, v in tensors.items() if k != one}, one),
        (tensors | {one: tensors[one].T}, "[8, 16]"),
        (tensors | {"mtp.1.e_proj.weight": torch.ones(2)}, "mtp.1.e_proj.weight"),
        (tensors | {"mtp.1.attn.wkv.scale": torch.ones(1, 1)}, "quantised"),
        (tensors | {"mtp.1.attn.wkv.weight_scale_inv": torch.ones(1, 1)}, "quantised"),
        (tensors | {one: fp8}, "quantised"),
        (tensors | {one: torch.ones(8, 16, dtype=torch.int8)}, "quantised"),
    ):
        with pytest.raises(CheckpointError) as caught:
            V4Drafter.load(given, shape, torch.randn(13, 16))
        says(caught.value, said)


def test_the_targets_own_tensors_and_the_heads_other_names_are_accepted() -> None:
    shape, tensors, drafter = make()
    given = rename(tensors, "markov_w1", "embed") | {"embed.weight": torch.ones(1)}
    given = rename(given, "markov_w2", "head") | {"layers.0.attn.wkv.scale": torch.ones(1)}
    loaded = V4Drafter.load(given, shape, torch.randn(13, 16))
    assert loaded.markov.w1 is drafter.markov.w1
    assert loaded.markov.w2 is drafter.markov.w2


def test_random_tensors_repeat() -> None:
    shape, tensors, _ = make(seed=3)
    assert all(torch.equal(a, tensors[n]) for n, a in random_tensors(shape, 3).items())
    assert not torch.equal(
        random_tensors(shape, 4)["mtp.0.hc_attn_fn"], tensors["mtp.0.hc_attn_fn"]
    )
