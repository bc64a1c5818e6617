"""Names, types and shapes of published V4 checkpoints, against what others saw in the files' headers.

The facts are from public listings: every tensor of V4-Pro by pattern, with the count of all
(``mtp.0`` is the next-token layer there); names of V4-Flash-DSpark by part and type.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from dspark_sglang.checkpoint import Tensor
from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.base import Stored, compare
from dspark_sglang.layouts.v4 import tiny
from dspark_sglang.layouts.v4.config import has_drafter
from dspark_sglang.layouts.v4.tensors import (
    expected,
    plain_bundle,
    published_bundle,
    usual,
)
from dspark_sglang.planning import published

NAMES = (
    "deepseek-v4-flash",
    "deepseek-v4-flash-dspark",
    "deepseek-v4-pro",
    "deepseek-v4-pro-dspark",
)


def config(name: str) -> dict[str, Any]:
    found = published.find(name)
    assert found is not None
    return found.config


@pytest.fixture(scope="module")
def lists() -> dict[str, dict[str, Stored]]:
    return {name: published_bundle(config(name)) for name in NAMES}


def test_counts_are_the_published_ones(lists: dict[str, dict[str, Stored]]) -> None:
    assert len(lists["deepseek-v4-pro"]) == 145_116
    flash = lists["deepseek-v4-flash-dspark"]
    assert len(flash) == 72_317
    drafter = {name: stored for name, stored in flash.items() if name.startswith("mtp.")}
    assert len(drafter) == 4_705
    types = Counter(stored.dtype for stored in drafter.values())
    assert types == {"I8": 2304, "F8_E8M0": 2329, "F8_E4M3": 25, "BF16": 20, "F32": 27}
    assert sum(".indexer." in name for name in flash) == 147


PRO = {
    "embed.weight": ("BF16", (129280, 7168)),
    "hc_head_base": ("F32", (4,)),
    "hc_head_fn": ("F32", (4, 28672)),
    "hc_head_scale": ("F32", (1,)),
    "head.weight": ("BF16", (129280, 7168)),
    "norm.weight": ("BF16", (7168,)),
    "layers.1.attn.compressor.ape": ("F32", (128, 512)),
    "layers.1.attn.compressor.wgate.weight": ("BF16", (512, 7168)),
    "layers.1.attn.compressor.wkv.weight": ("BF16", (512, 7168)),
    "layers.2.ffn.gate.tid2eid": ("I64", (129280, 6)),
    "layers.0.attn.attn_sink": ("F32", (128,)),
    "layers.0.attn.compressor.norm.weight": ("BF16", (512,)),
    "layers.0.attn.kv_norm.weight": ("BF16", (512,)),
    "layers.0.attn.q_norm.weight": ("BF16", (1536,)),
    "layers.0.attn.wkv.scale": ("F8_E8M0", (4, 56)),
    "layers.0.attn.wkv.weight": ("F8_E4M3", (512, 7168)),
    "layers.0.attn.wo_a.scale": ("F8_E8M0", (128, 32)),
    "layers.0.attn.wo_a.weight": ("F8_E4M3", (16384, 4096)),
    "layers.0.attn.wo_b.scale": ("F8_E8M0", (56, 128)),
    "layers.0.attn.wo_b.weight": ("F8_E4M3", (7168, 16384)),
    "layers.0.attn.wq_a.scale": ("F8_E8M0", (12, 56)),
    "layers.0.attn.wq_a.weight": ("F8_E4M3", (1536, 7168)),
    "layers.0.attn.wq_b.scale": ("F8_E8M0", (512, 12)),
    "layers.0.attn.wq_b.weight": ("F8_E4M3", (65536, 1536)),
    "layers.0.attn_norm.weight": ("BF16", (7168,)),
    "layers.60.ffn.experts.383.w1.scale": ("F8_E8M0", (3072, 224)),
    "layers.60.ffn.experts.383.w1.weight": ("I8", (3072, 3584)),
    "layers.60.ffn.experts.383.w2.scale": ("F8_E8M0", (7168, 96)),
    "layers.60.ffn.experts.383.w2.weight": ("I8", (7168, 1536)),
    "layers.60.ffn.experts.383.w3.scale": ("F8_E8M0", (3072, 224)),
    "layers.60.ffn.experts.383.w3.weight": ("I8", (3072, 3584)),
    "layers.60.ffn.gate.weight": ("BF16", (384, 7168)),
    "layers.60.ffn.shared_experts.w1.scale": ("F8_E8M0", (24, 56)),
    "layers.60.ffn.shared_experts.w1.weight": ("F8_E4M3", (3072, 7168)),
    "layers.60.ffn.shared_experts.w2.scale": ("F8_E8M0", (56, 24)),
    "layers.60.ffn.shared_experts.w2.weight": ("F8_E4M3", (7168, 3072)),
    "layers.60.ffn_norm.weight": ("BF16", (7168,)),
    "layers.60.hc_attn_base": ("F32", (24,)),
    "layers.60.hc_attn_fn": ("F32", (24, 28672)),
    "layers.60.hc_ffn_scale": ("F32", (3,)),
    "layers.60.attn.compressor.ape": ("F32", (4, 1024)),
    "layers.60.attn.compressor.wgate.weight": ("BF16", (1024, 7168)),
    "layers.60.attn.compressor.wkv.weight": ("BF16", (1024, 7168)),
    "layers.60.attn.indexer.compressor.ape": ("F32", (4, 256)),
    "layers.60.attn.indexer.compressor.norm.weight": ("BF16", (128,)),
    "layers.60.attn.indexer.compressor.wgate.weight": ("BF16", (256, 7168)),
    "layers.60.attn.indexer.compressor.wkv.weight": ("BF16", (256, 7168)),
    "layers.60.attn.indexer.weights_proj.weight": ("BF16", (64, 7168)),
    "layers.60.attn.indexer.wq_b.scale": ("F8_E8M0", (64, 12)),
    "layers.60.attn.indexer.wq_b.weight": ("F8_E4M3", (8192, 1536)),
    "layers.3.ffn.gate.bias": ("F32", (384,)),
    "mtp.0.e_proj.scale": ("F8_E8M0", (56, 56)),
    "mtp.0.e_proj.weight": ("F8_E4M3", (7168, 7168)),
    "mtp.0.h_proj.weight": ("F8_E4M3", (7168, 7168)),
    "mtp.0.enorm.weight": ("BF16", (7168,)),
    "mtp.0.hnorm.weight": ("BF16", (7168,)),
    "mtp.0.norm.weight": ("BF16", (7168,)),
    "mtp.0.hc_head_fn": ("F32", (4, 28672)),
    "mtp.0.ffn.gate.bias": ("F32", (384,)),
    "mtp.0.ffn.experts.0.w2.weight": ("I8", (7168, 1536)),
}
FLASH_DRAFTER = {
    "mtp.0.main_proj.weight": ("F8_E4M3", (4096, 12288)),
    "mtp.0.main_proj.scale": ("F8_E8M0", (32, 96)),
    "mtp.2.confidence_head.proj.weight": ("BF16", (1, 4352)),
    "mtp.2.markov_head.markov_w1.weight": ("BF16", (129280, 256)),
    "mtp.2.markov_head.markov_w2.weight": ("BF16", (129280, 256)),
    "mtp.1.attn.wo_a.scale": ("F8_E8M0", (64, 32)),
    "mtp.1.ffn.experts.255.w1.weight": ("I8", (2048, 2048)),
    "mtp.1.ffn.experts.255.w1.scale": ("F8_E8M0", (2048, 128)),
}


def test_types_and_shapes_are_the_published_ones(lists: dict[str, dict[str, Stored]]) -> None:
    for name, wanted in (("deepseek-v4-pro", PRO), ("deepseek-v4-flash-dspark", FLASH_DRAFTER)):
        found = {key: tuple(lists[name][key]) for key in wanted}
        assert found == wanted


def test_bytes_and_numbers_are_the_published_ones(lists: dict[str, dict[str, Stored]]) -> None:
    widths = {"BF16": 2, "F32": 4, "I64": 8, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1}

    def total(held: dict[str, Stored]) -> tuple[int, int]:
        numbers = values = 0
        for dtype, shape in held.values():
            product = 1
            for size in shape:
                product *= size
            numbers += product
            values += widths[dtype] * product
        return numbers, values

    # As listed: elements as stored, two fp4 values in one.
    assert total(lists["deepseek-v4-pro"])[0] == 861_608_274_846
    flash = lists["deepseek-v4-flash-dspark"]
    drafter = {name: stored for name, stored in flash.items() if name.startswith("mtp.")}
    assert total(drafter)[1] / 1e9 == pytest.approx(10.863, abs=5e-4)


def headers(held: dict[str, Stored]) -> dict[str, Tensor]:
    return {name: Tensor(*stored, (0, 0)) for name, stored in held.items()}


def check(held: dict[str, Tensor], given: dict[str, Any]) -> None:
    named = {usual(name): header for name, header in held.items()}
    compare(named, expected(named, plain_bundle(given), given), where="It")


@pytest.mark.parametrize("name", NAMES)
def test_every_published_name_is_expected(name: str, lists: dict[str, dict[str, Stored]]) -> None:
    check(headers(lists[name]), config(name))


PLAIN = {name: Tensor("F32", shape, (0, 0)) for name, shape in plain_bundle(tiny.CONFIG).items()}


def test_what_is_missing_is_named() -> None:
    lacking = {n: h for n, h in PLAIN.items() if n != "layers.2.attn.indexer.wq_b.weight"}
    with pytest.raises(CheckpointError, match=r"no tensor layers\.2\.attn\.indexer\.wq_b\.weight"):
        check(lacking, tiny.CONFIG)


@pytest.mark.parametrize(
    "name", ["layers.0.engram.wkv.weight", "layers.0.attn_norm.scale", "mtp.3.attn.wkv.weight"]
)
def test_what_is_left_over_is_named(name: str) -> None:
    more = Tensor("F32", (1,), (0, 0))
    with pytest.raises(CheckpointError, match=f"the first {name}"):
        check(PLAIN | {name: more}, tiny.CONFIG)


def test_a_scale_alone_is_not_its_weight() -> None:
    held = headers(published_bundle(tiny.CONFIG | tiny.PUBLISHED))
    del held["mtp.1.attn.wkv.weight"]
    with pytest.raises(CheckpointError, match=r"no tensor mtp\.1\.attn\.wkv\.weight"):
        check(held, tiny.CONFIG)


def test_other_names_of_the_markov_head_and_of_scales_are_taken() -> None:
    held = headers(published_bundle(tiny.CONFIG | tiny.PUBLISHED))
    renamed = {
        name.replace("markov_w1", "embed")
        .replace("markov_w2", "head")
        .replace("wkv.scale", "wkv.weight_scale_inv"): header
        for name, header in held.items()
    }
    assert renamed.keys() != held.keys()
    check(renamed, tiny.CONFIG)


def test_some_of_the_drafters_keys_are_an_error() -> None:
    lacking = {k: v for k, v in tiny.CONFIG.items() if k != "dspark_markov_rank"}
    with pytest.raises(CheckpointError, match="no dspark_markov_rank"):
        has_drafter(lacking)
    assert not has_drafter({k: v for k, v in tiny.CONFIG.items() if not k.startswith("dspark")})
