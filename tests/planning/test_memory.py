"""Bytes of weights and pools, from shapes."""

from __future__ import annotations

from typing import Any

import pytest

from dspark_sglang.errors import CheckpointError, ConfigError
from dspark_sglang.layouts.dense import memory as dense
from dspark_sglang.layouts.memory import (
    CompressedKv,
    DraftKv,
    FullKv,
    Ranks,
    Split,
    Tensor,
    by_part,
    disk_bytes,
    rank_bytes,
)
from dspark_sglang.layouts.v4 import memory as v4
from dspark_sglang.planning import kv, published
from dspark_sglang.planning.kv import Serving
from tests.planning.plan_samples import GEMMA4, LLAMA, small_v4

HOPPER, BLACKWELL = v4.Kernels(fp8_wo_a=False), v4.Kernels(fp8_wo_a=True)


def total(tensors: list[Tensor], layout: Ranks | None = None) -> int:
    return sum(by_part(tensors, layout or Ranks()).values())


def tensor(split: Split, shape: tuple[int, ...], **changes: Any) -> Tensor:
    values = {"name": "x", "stored": "BF16", "kept": "BF16", "part": "p", "extent": shape[0]}
    return Tensor(shape=shape, split=split, **(values | changes))


# --- sharing ---------------------------------------------------------------------------------


def test_a_rank_holds_its_share() -> None:
    eight = Ranks(tp=8)
    assert rank_bytes(tensor(Split.WHOLE, (64, 4)), eight) == 64 * 4 * 2
    assert rank_bytes(tensor(Split.TENSOR, (64, 4)), eight) == 8 * 4 * 2
    # Two heads of 32 for eight ranks: four ranks repeat each.
    assert rank_bytes(tensor(Split.HEADS, (64, 4), grain=32), eight) == 32 * 4 * 2
    # 100 rows are padded to 128, and to 192 for three ranks.
    assert rank_bytes(tensor(Split.VOCAB, (100, 4)), Ranks(tp=2)) == 64 * 4 * 2
    assert rank_bytes(tensor(Split.VOCAB, (100, 4)), Ranks(tp=3)) == 64 * 4 * 2
    # Without the padding: the first rank has most.
    assert rank_bytes(tensor(Split.ROWS, (100, 4)), Ranks(tp=2)) == 64 * 4 * 2
    assert rank_bytes(tensor(Split.ROWS, (100, 4)), Ranks()) == 100 * 4 * 2
    assert rank_bytes(tensor(Split.WHOLE, (64, 4), kept=""), eight) == 0


def test_attention_data_parallelism_repeats_attention_and_the_embedding() -> None:
    layout = Ranks(tp=8, attention_dp=4)
    assert rank_bytes(tensor(Split.ATTENTION, (64, 4)), layout) == 32 * 4 * 2
    assert rank_bytes(tensor(Split.VOCAB, (64, 4)), layout) == 64 * 4 * 2
    assert rank_bytes(tensor(Split.HEAD_VOCAB, (64, 4)), layout) == 32 * 4 * 2
    assert rank_bytes(tensor(Split.TENSOR, (64, 4)), layout) == 8 * 4 * 2


def test_experts_are_shared_by_expert_then_by_width() -> None:
    expert = tensor(Split.EXPERTS, (192, 4), grain=128)
    with pytest.raises(ConfigError, match="pieces of 128"):
        rank_bytes(expert, Ranks(tp=2))
    assert rank_bytes(expert, Ranks(tp=2, ep=2)) == 96 * 4 * 2
    whole = Ranks(tp=2, shared_experts_whole=True)
    assert rank_bytes(tensor(Split.SHARED, (192, 4), grain=128), whole) == 192 * 4 * 2


@pytest.mark.parametrize("split", [Split.TENSOR, Split.ATTENTION, Split.HEADS])
def test_an_uneven_share_is_refused(split: Split) -> None:
    with pytest.raises(ConfigError, match="for 4 ranks"):
        rank_bytes(tensor(split, (60, 4), grain=10), Ranks(tp=4))


# --- dense models -----------------------------------------------------------------


def test_a_llama_by_hand() -> None:
    tensors = dense.target(LLAMA, "LlamaForCausalLM", "BF16", "BF16")
    layer = 8 * 8 + 4 * 8 + 4 * 8 + 8 * 8 + 3 * 12 * 8 + 2 * 8
    assert disk_bytes(tensors) == 2 * (2 * 16 * 8 + 8 + 5 * layer)
    # On the device the vocabulary is padded to 64 rows.
    assert total(tensors) == 2 * (2 * 64 * 8 + 8 + 5 * layer)
    tied = dense.target(LLAMA | {"tie_word_embeddings": True}, "LlamaForCausalLM", "BF16", "F32")
    assert total(tied) == 4 * (64 * 8 + 8 + 5 * layer)


def test_gemma_4_has_wider_heads_where_it_sees_everything() -> None:
    pool = dense.kv(GEMMA4, "Gemma4ForCausalLM", 2)
    assert isinstance(pool, kv.SlidingKv)
    assert (pool.full.layers, pool.full.width) == (1, 12)
    assert (pool.sliding.layers, pool.sliding.width, pool.window) == (2, 8, 16)
    names = {t.name: t.shape for t in dense.target(GEMMA4, "Gemma4ForCausalLM", "BF16", "BF16")}
    assert names["model.layers.0.self_attn.q_proj.weight"] == (8, 8)
    assert names["model.layers.1.self_attn.q_proj.weight"] == (12, 8)


@pytest.mark.parametrize("key", ["enable_moe_block", "num_kv_shared_layers", "attention_k_eq_v"])
def test_gemma_4_variants_are_refused(key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        dense.kv(GEMMA4 | {key: 1}, "Gemma4ForCausalLM", 2)


# --- DeepSeek-V4 -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "disk"), [("deepseek-v4-flash-dspark", 167e9), ("deepseek-v4-pro-dspark", 893e9)]
)
def test_v4_checkpoints_have_their_published_size(name: str, disk: float) -> None:
    found = published.find(name)
    assert found is not None
    tensors = [*v4.target(found.config, HOPPER), *v4.drafter(found.config, HOPPER)]
    assert disk_bytes(tensors) == pytest.approx(disk, rel=2e-3)


def test_hopper_unpacks_one_projection_that_blackwell_keeps() -> None:
    config = small_v4()
    wide, narrow = (
        {t.name: rank_bytes(t, Ranks()) for t in v4.target(config, kernels)}
        for kernels in (HOPPER, BLACKWELL)
    )
    name = "layers.0.attn.wo_a."
    assert wide[name + "weight"] == 2 * narrow[name + "weight"]
    assert wide[name + "scale"] == 0 < narrow[name + "scale"]
    assert {key for key in wide if wide[key] != narrow[key]} == {
        f"layers.{layer}.attn.wo_a.{part}" for layer in range(4) for part in ("weight", "scale")
    }
    drafted = {t.name: t for t in v4.drafter(config, BLACKWELL)}
    assert drafted["mtp.0.attn.wo_a.weight"].kept == "BF16"


def test_fp4_experts_take_half_a_byte_and_a_scale_for_32() -> None:
    tensors = [t for t in v4.target(small_v4(), HOPPER) if t.part == "experts"]
    values = 4 * 8 * 3 * 4096 * 2048
    assert total(tensors) == values // 2 + values // 32
    assert total(tensors, Ranks(tp=8)) == total(tensors) // 8
    assert total(tensors, Ranks(tp=8, ep=8)) == total(tensors) // 8


def test_what_every_rank_keeps_whole() -> None:
    config = small_v4()
    one, eight = (by_part(v4.target(config, HOPPER), Ranks(tp=tp)) for tp in (1, 8))
    for part in ("compressor", "indexer", "router", "hyper", "norms"):
        assert one[part] == eight[part], part
    assert eight["attention"] < one["attention"]


def test_layers_that_route_by_token_have_a_table_in_place_of_a_bias() -> None:
    names = {t.name for t in v4.target(small_v4(), HOPPER)}
    assert "layers.0.ffn.gate.tid2eid" in names and "layers.0.ffn.gate.bias" not in names
    assert "layers.1.ffn.gate.bias" in names and "layers.1.ffn.gate.tid2eid" not in names


def test_the_mtp_layer_is_a_draft_layer_with_other_projections() -> None:
    config = small_v4()
    mtp = {t.name for t in v4.mtp_layer(config, HOPPER)}
    first = {t.name for t in v4.drafter(config, HOPPER) if t.name.startswith("mtp.0.")}
    assert mtp - first == {
        *(f"mtp.0.{n}_proj.{part}" for n in "eh" for part in ("weight", "scale")),
        "mtp.0.enorm.weight", "mtp.0.hnorm.weight", "mtp.0.norm.weight",
        *(f"mtp.0.hc_head_{part}" for part in ("fn", "base", "scale")),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"expert_dtype": None}, "expert_dtype"),
        ({"quantization_config": None}, "quantisation"),
        ({"compress_ratios": [0, 4]}, "compress_ratios"),
        ({"compress_ratios": [0, 4, 2, 4]}, "compress_ratios"),
        ({"hc_pre_from_prev_sublayer": True}, "hc_pre_from_prev_sublayer"),
        ({"index_n_heads": None}, "index_n_heads"),
    ],
)
def test_a_v4_configuration_that_is_not_understood_is_refused(
    change: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        v4.target(small_v4() | change, HOPPER)


# --- pools -----------------------------------------------------------------------------------

FULL = FullKv(layers=2, heads=2, width=8, element=2)
SERVING = Serving(max_running=4, draft_tokens=6)


def test_a_full_pool_shares_its_budget_with_the_drafter() -> None:
    draft = DraftKv(full=FullKv(layers=1, heads=2, width=8, element=2))
    pools = kv.size(FULL, draft, budget=96_000, serving=SERVING, layout=Ranks())
    assert pools.tokens == 96_000 // (64 + 32)
    assert pools.target_bytes == (pools.tokens + 1) * 64
    assert pools.draft_bytes == (pools.tokens + 1) * 32
    capped = Serving(max_running=4, draft_tokens=6, max_tokens=10)
    assert kv.size(FULL, draft, budget=96_000, serving=capped, layout=Ranks()).tokens == 10


def test_nothing_is_allocated_from_nothing() -> None:
    pools = kv.size(FULL, DraftKv(), budget=-5.0, serving=SERVING, layout=Ranks())
    assert pools.tokens == 0


V4_KV = CompressedKv(ratios=(0, 4, 128, 4), head_dim=512, index_dim=128, window=128)
V4_SERVING = Serving(max_running=4, draft_tokens=6, page_size=256)


def test_compressed_pools_by_hand() -> None:
    # A page of 64 latents of 584 bytes, padded to 576; 132 bytes of index; 2 latents a page of 128.
    quarter, sparse = 37440 / 64, 1728 / 2
    assert kv.compressed_token_bytes(V4_KV) == pytest.approx(2 * (quarter + 132) / 4 + sparse / 128)
    slot = 4 * 149760 / 256 + 2 * 16 / 256 * 4 * (512 + 128) * 4
    assert kv.compressed_slot_bytes(V4_KV) == pytest.approx(slot)
    rows = -(-(5 * 256 + 257) // 128) * 128
    assert kv.compressed_request_bytes(V4_KV, 4) == rows * 1024 * 4


def test_more_requests_leave_fewer_tokens() -> None:
    draft = DraftKv(compressed_stages=3)
    found = [
        kv.size(V4_KV, draft, budget=4e8, serving=Serving(max_running=n, draft_tokens=6, page_size=256), layout=Ranks())
        for n in (4, 16)
    ]  # fmt: skip
    assert found[0].tokens > found[1].tokens > 0
    assert found[0].window_tokens < found[1].window_tokens
    assert all(pools.tokens % 256 == 0 for pools in found)


def test_the_drafter_keeps_one_window_for_each_stage() -> None:
    one, three = (
        kv.size(V4_KV, DraftKv(compressed_stages=n), budget=4e8, serving=V4_SERVING, layout=Ranks())
        for n in (1, 3)
    )
    assert three.draft_bytes == pytest.approx(3 * one.draft_bytes, abs=2)
