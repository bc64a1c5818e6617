"""What plans take from SGLang's source is still there, and SGLang computes the same."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from dspark_sglang.layouts import memory as tensors
from dspark_sglang.layouts.dense.memory import ARCHITECTURES as DENSE
from dspark_sglang.layouts.memory import CompressedKv, DraftKv, FullKv, Ranks, SlidingKv
from dspark_sglang.layouts.v4.config import ARCHITECTURE as V4
from dspark_sglang.planning import hardware, kv, plan, sizing
from dspark_sglang.planning.kv import Serving
from dspark_sglang.planning.options import Options
from dspark_sglang.planning.rules import RULES
from dspark_sglang.verify_mode import RAGGED_BACKENDS, RAGGED_LATENT
from tests.deploy.sglang_source import sglang_environment, sglang_flags

ROOT = Path(__file__).resolve().parents[2]
(SGLANG,) = map(Path, importlib.util.find_spec("sglang").submodule_search_locations)  # type: ignore[union-attr, arg-type]
MODELS = SGLANG / "srt/models"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_the_cited_line_says_so(rule: Any) -> None:
    ours = rule.file.startswith("dspark_sglang/")
    text = ((ROOT if ours else SGLANG) / rule.file).read_text()
    if rule.line is None:
        assert ours and rule.text in text
    else:
        assert rule.text in text.splitlines()[rule.line - 1]


def classes() -> dict[str, str]:
    """Source of the file that has each model class."""
    found = {}
    for path in MODELS.glob("*.py"):
        text = path.read_text()
        found |= dict.fromkeys(re.findall(r"^class (\w+)\(", text, flags=re.MULTILINE), text)
    return found


@pytest.mark.parametrize("name", (*DENSE, V4))
def test_planned_targets_exist_and_all_but_one_can_be_drafted_for(name: str) -> None:
    text = classes()[name]
    captures = "set_dspark_layers_to_capture" in text or "set_dflash_layers_to_capture" in text
    assert captures == (name != "Gemma3ForCausalLM")


def test_backends_that_verify_ragged_blocks() -> None:
    files = {
        "fa3": "flashattention", "fa4": "flashattention", "trtllm_mha": "trtllm_mha", "dsv4": "deepseek_v4",
        "flashinfer": "flashinfer_mla", "trtllm_mla": "trtllm_mla",
    }  # fmt: skip
    assert files.keys() == {*RAGGED_BACKENDS, *RAGGED_LATENT}
    for name in files.values():
        text = (SGLANG / f"srt/layers/attention/{name}_backend.py").read_text()
        assert "supports_ragged_verify_graph: bool = True" in text
    for name in ("flashinfer", "triton"):
        text = (SGLANG / f"srt/layers/attention/{name}_backend.py").read_text()
        assert "supports_ragged_verify_graph" not in text


def test_commands_use_flags_that_sglang_has() -> None:
    options = Options(
        attention_dp=2, ep=8, tp=16, eplb=True, hicache=True, moe_a2a="none", dtype="bfloat16",
        moe_runner="marlin", chunked_prefill=4096, max_total_tokens=100_000, page_size=256,
        kv_cache_dtype="fp8_e4m3", attention_backend="dsv4",
    )  # fmt: skip
    name = "deepseek-v4-pro-dspark"
    made = plan.make(name, None, hardware.read("2xh200x8"), options)
    plain = plan.make(name, None, hardware.read("2xh100x8"))
    flags, environment = sglang_flags(SGLANG), sglang_environment(SGLANG)
    words = [*shlex.split(made.command), *shlex.split(plain.command)]
    used = {word for word in words if word.startswith("--")}
    assert len(used) > 15 and used <= flags.keys(), used - flags.keys()
    variables = {word.split("=")[0] for word in words if word.startswith("SGLANG_")}
    assert variables == {"SGLANG_SHARED_EXPERT_TP1"} <= environment


# --- the same arithmetic ---------------------------------------------------------------------


@pytest.mark.parametrize("page", [256, 64, 2])
def test_pages_of_compressed_latents(page: int) -> None:
    from sglang.kernels.ops.attention.dsv4.kv_layout import KVLayout

    assert kv.page_bytes(page) == KVLayout.V4.page_bytes(page)


def test_prefill_graphs() -> None:
    from sglang.srt.arg_groups.cuda_graph_hook import generate_prefill_cuda_graph_batch_sizes

    for tokens in (2048, 4096, 8192, 16384):
        sizes = generate_prefill_cuda_graph_batch_sizes(tokens)
        assert sizing._prefill_graphs(tokens) == len(sizes)


def test_vocabulary_padding() -> None:
    from sglang.srt.layers.vocab_parallel_embedding import pad_vocab_size

    for rows in (1, 63, 64, 65, 49152, 151936):
        assert tensors._padded_rows(rows, 1) == pad_vocab_size(rows)


POOL = CompressedKv(ratios=(0, 0, 4, 128, 4, 128, 4), head_dim=512, index_dim=128, window=128)


def configurator(monkeypatch: pytest.MonkeyPatch, drafted: bool) -> Any:
    """SGLang's own, with a V4 model's sizes and none of its process."""
    from sglang.srt.mem_cache import deepseek_v4_memory_pool as pool
    from sglang.srt.model_executor import pool_configurator

    stub = SimpleNamespace(kernel=SimpleNamespace(dsv4_attn_backend="flashmla"))
    monkeypatch.setattr(pool_configurator, "get_exec", lambda: stub)
    monkeypatch.setattr(pool, "get_exec", lambda: stub)
    made: Any = object.__new__(pool_configurator.DSV4PoolConfigurator)
    draft_tokens = 6 if drafted else 0
    made.__dict__ |= {
        "_unified": False, "encoder_replay": False, "page_size": 256, "attn_head_dim": 512,
        "indexer_head_dim": 128, "num_layers_total": len(POOL.ratios), "c4_shrink_factor": 1,
        "ring_sizes": {r: pool.get_compress_state_ring_size(r, draft_tokens) for r in (4, 128)},
        "stage_owner_layers": pool.collect_sources_by_ratio(POOL.ratios, [], range(7)),
        "indexer_bytes_per_token": pool.get_dsv4_indexer_bytes_per_token(128, False),
        "disaggregation_mode": "null", "swa_cap_tokens": 1, "swa_ratio": 0.1,
        "online_c128_mtp_max_draft_tokens": draft_tokens,
    }  # fmt: skip
    made.bytes_per_swa_token = made._get_bytes_per_swa_token()
    return made


def test_compressed_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = configurator(monkeypatch, True)
    assert kv.compressed_slot_bytes(POOL) == pytest.approx(theirs.bytes_per_swa_token)
    assert kv.compressed_token_bytes(POOL) == pytest.approx(theirs._get_bytes_per_full_token())
    for requests in (1, 7, 48, 256):
        assert kv.compressed_request_bytes(POOL, requests) == theirs._get_c128_state_fixed_bytes(
            requests
        )


def test_window_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.model_executor import pool_configurator

    for overlap in (True, False):
        serving = Serving(max_running=48, draft_tokens=6, page_size=256, overlap=overlap)
        spec = SimpleNamespace(
            speculative_num_draft_tokens=6, speculative_algorithm="DSPARK",
            speculative_num_steps=1, speculative_eagle_topk=1,
        )  # fmt: skip
        schedule = SimpleNamespace(
            disable_overlap_schedule=not overlap, chunked_prefill_size=8192, max_running_requests=48
        )
        monkeypatch.setattr(pool_configurator, "get_spec", lambda spec=spec: spec)
        monkeypatch.setattr(pool_configurator, "get_schedule", lambda s=schedule: s)
        monkeypatch.setattr(
            pool_configurator, "get_disagg", lambda: SimpleNamespace(disaggregation_mode="null")
        )
        monkeypatch.setattr(pool_configurator, "get_alloc_len_per_decode", lambda: 6)
        for groups in (1, 4):
            theirs = pool_configurator.compute_swa_request_cap(
                page_size=256, window=128, attn_dp_size=groups
            )
            assert kv.window_slots(128, serving, groups) == theirs


def test_sliding_pools() -> None:
    from sglang.srt.model_executor.pool_configurator import HybridSWAPoolConfigurator

    full = FullKv(layers=2, heads=2, width=96, element=2)
    sliding = FullKv(layers=4, heads=2, width=64, element=2)
    draft = FullKv(layers=1, heads=2, width=96, element=2)
    theirs: Any = object.__new__(HybridSWAPoolConfigurator)
    theirs.__dict__ |= {
        "_full_layers_num": 2, "_swa_layers_num": 4, "_full_per_token": 384, "_swa_per_token": 256,
        "_draft_full_layers_num": 0, "_draft_swa_layers_num": 0, "_draft_swa_full_layers_num": 0,
        "_draft_cell_size": 384, "_fused_full_entry": None, "_fused_swa_entry": None,
        "_swa_full_tokens_ratio": 0.8, "_sliding_window_size": 64, "_page_size": 16,
        "_enable_unified_memory": False,
    }  # fmt: skip
    theirs._recompute_cell_size()
    wanted = theirs.calculate_pool_sizes(50_000_000, 16)
    ours = kv.size(
        SlidingKv(full=full, sliding=sliding, window=64),
        DraftKv(full=draft),
        budget=50_000_000,
        serving=Serving(max_running=4, draft_tokens=4, page_size=16),
        layout=Ranks(),
    )
    assert ours.tokens == wanted.full_max_total_num_tokens
    assert ours.window_tokens == wanted.swa_max_total_num_tokens


def test_the_share_of_sliding_windows_is_sglangs_default() -> None:
    text = (SGLANG / "srt/arg_groups/fields/schedule.py").read_text()
    declared = text[text.index("    swa_full_tokens_ratio: A[") :]
    found = re.search(r"fallback=([\d.]+)", declared[: declared.index("] = None")])
    assert found is not None
    assert float(found[1]) == Serving(max_running=1, draft_tokens=1).swa_ratio
