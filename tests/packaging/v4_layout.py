"""A checkpoint with the keys of DeepSeek-V4-Pro and of its drafter, at any width.

Names are those that SGLang 0.5.23 loads: ``models/deepseek_v4.py`` (``remap_weight_name_to_dpsk_hf_format``,
the compressor's ``wkv`` and ``wgate``, ``hc_*``), ``layers/attention/dsv4/indexer.py``, and
``models/deepseek_v4_dspark.py`` (``_remap_dspark_weight_name``). Storage as published: fp8 with block
scales, routed experts in four bits. The pattern of compressed layers is made up; values are random or,
for layouts of hundreds of gigabytes, holes in sparse files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dspark_packaging import artifact
from dspark_packaging.layout import CONFIG_FILE, INDEX_FILE
from dspark_sglang.checkpoint import Tensor, encode_header
from dspark_sglang.layouts.base import weights_digest
from tests.packaging.samples import provenance, put, write_tokenizer

#: DeepSeek-V4-Pro's: layers, layers read, block, noise token, vocabulary.
LAYERS, READ, GAMMA, NOISE, VOCAB = 61, (58, 59, 60), 5, 128799, 129280
Named = tuple[str, str, tuple[int, ...]]
_BITS = {"BF16": 16, "F32": 32, "F8_E4M3": 8, "F8_E8M0": 8, "I8": 8, "I64": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """How wide the tensors are; the keys do not depend on it, but on ``experts``."""

    experts: int = 384
    hidden: int = 8
    expert: int = 4
    heads: int = 4
    head: int = 4
    rank: int = 2
    markov: int = 2


def config(width: Width, *, drafter: bool) -> dict[str, Any]:
    """``config.json`` of the target, or with the drafter's keys."""
    plain: dict[str, Any] = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "hidden_size": width.hidden,
        "vocab_size": VOCAB,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": width.heads,
        "num_key_value_heads": 1,
        "head_dim": width.head,
        "qk_rope_head_dim": 2,
        "q_lora_rank": width.rank,
        "o_lora_rank": width.rank,
        "o_groups": 2,
        "n_routed_experts": width.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": min(6, width.experts),
        "moe_intermediate_size": width.expert,
        "hc_mult": 4,
        "routed_scaling_factor": 2.5,
        "sliding_window": 128,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
    }
    if not drafter:
        return plain
    return plain | {
        "dspark_block_size": GAMMA,
        "dspark_markov_rank": width.markov,
        "dspark_noise_token_id": NOISE,
        "dspark_target_layer_ids": list(READ),
    }


def _fp8(name: str, rows: int, columns: int) -> Iterator[Named]:
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.scale", "F8_E8M0", (-(-rows // 128), -(-columns // 128))


def _fp4(name: str, rows: int, columns: int) -> Iterator[Named]:
    yield f"{name}.weight", "I8", (rows, -(-columns // 2))
    yield f"{name}.scale", "F8_E8M0", (rows, -(-columns // 32))


def _block(prefix: str, width: Width) -> Iterator[Named]:
    """What target layers and draft layers share."""
    hidden, attention = width.hidden, f"{prefix}attn."
    wide, grouped = width.heads * width.head, 2 * width.rank
    for part in ("attn", "ffn"):
        yield f"{prefix}{part}_norm.weight", "BF16", (hidden,)
        yield f"{prefix}hc_{part}_fn", "F32", (24, 4 * hidden)
        yield f"{prefix}hc_{part}_base", "F32", (24,)
        yield f"{prefix}hc_{part}_scale", "F32", (3,)
    yield from _fp8(attention + "wq_a", width.rank, hidden)
    yield attention + "q_norm.weight", "BF16", (width.rank,)
    yield from _fp8(attention + "wq_b", wide, width.rank)
    yield from _fp8(attention + "wkv", width.head, hidden)
    yield attention + "kv_norm.weight", "BF16", (width.head,)
    yield attention + "attn_sink", "F32", (width.heads,)
    yield from _fp8(attention + "wo_a", grouped, wide // 2)
    yield from _fp8(attention + "wo_b", hidden, grouped)
    yield f"{prefix}ffn.gate.weight", "BF16", (width.experts, hidden)
    for expert in range(width.experts):
        name = f"{prefix}ffn.experts.{expert}."
        yield from _fp4(name + "w1", width.expert, hidden)
        yield from _fp4(name + "w2", hidden, width.expert)
        yield from _fp4(name + "w3", width.expert, hidden)
    yield from _fp8(f"{prefix}ffn.shared_experts.w1", width.expert, hidden)
    yield from _fp8(f"{prefix}ffn.shared_experts.w2", hidden, width.expert)
    yield from _fp8(f"{prefix}ffn.shared_experts.w3", width.expert, hidden)


def _compressor(prefix: str, width: Width, ratio: int) -> Iterator[Named]:
    yield f"{prefix}ape", "F32", (ratio, width.head)
    yield f"{prefix}wkv.weight", "BF16", (width.head, width.hidden)
    yield f"{prefix}wgate.weight", "BF16", (width.head, width.hidden)
    yield f"{prefix}norm.weight", "BF16", (width.head,)


def target_tensors(width: Width) -> Iterator[Named]:
    """Every tensor of the target: name, dtype, shape."""
    hidden = width.hidden
    yield "embed.weight", "BF16", (VOCAB, hidden)
    for layer in range(LAYERS):
        prefix = f"layers.{layer}."
        yield from _block(prefix, width)
        if layer < 3:  # the first layers route by token, not by score
            yield prefix + "ffn.gate.tid2eid", "I64", (VOCAB, 1)
        else:
            yield prefix + "ffn.gate.bias", "F32", (width.experts,)
        ratio = 4 if layer % 2 else 128
        yield from _compressor(prefix + "attn.compressor.", width, ratio)
        if ratio == 4:
            yield from _fp8(prefix + "attn.indexer.wq_b", width.heads * width.head, width.rank)
            yield prefix + "attn.indexer.weights_proj.weight", "BF16", (width.heads, hidden)
            yield from _compressor(prefix + "attn.indexer.compressor.", width, ratio)
    yield "norm.weight", "BF16", (hidden,)
    yield "head.weight", "BF16", (VOCAB, hidden)
    yield from _head("", width)


def _head(prefix: str, width: Width) -> Iterator[Named]:
    yield f"{prefix}hc_head_fn", "F32", (4, 4 * width.hidden)
    yield f"{prefix}hc_head_base", "F32", (4,)
    yield f"{prefix}hc_head_scale", "F32", (1,)


def drafter_tensors(width: Width) -> Iterator[Named]:
    """Every tensor of the drafter."""
    yield from _fp8("mtp.0.main_proj", width.hidden, len(READ) * width.hidden)
    yield "mtp.0.main_norm.weight", "BF16", (width.hidden,)
    for layer in range(len(READ)):
        yield from _block(f"mtp.{layer}.", width)
        yield f"mtp.{layer}.ffn.gate.bias", "F32", (width.experts,)
    last = f"mtp.{len(READ) - 1}."
    yield last + "norm.weight", "BF16", (width.hidden,)
    yield from _head(last, width)
    yield last + "markov_head.markov_w1.weight", "BF16", (VOCAB, width.markov)
    yield last + "markov_head.markov_w2.weight", "BF16", (VOCAB, width.markov)
    yield last + "confidence_head.proj.weight", "BF16", (1, width.hidden + width.markov)


def next_token_tensors(width: Width) -> Iterator[Named]:
    """The next-token layer that the original V4 checkpoints carry."""
    for name in ("e_proj", "h_proj"):
        yield from _fp8(f"mtp.0.{name}", width.hidden, width.hidden)
    for name in ("enorm", "hnorm", "norm"):
        yield f"mtp.0.{name}.weight", "BF16", (width.hidden,)
    yield from _block("mtp.0.", width)
    yield "mtp.0.ffn.gate.bias", "F32", (width.experts,)
    yield from _head("mtp.0.", width)


def write_shards(
    folder: Path, named: list[Named], shards: int, *, sparse: bool = False
) -> dict[str, str]:
    """Write safetensors files and an index.

    Args:
        folder: where to.
        named: the tensors.
        shards: files, of about equally many tensors.
        sparse: holes instead of random bytes.

    Returns:
        The weight map.
    """
    rng = np.random.default_rng(11)
    mapped: dict[str, str] = {}
    size = -(-len(named) // shards)
    for number in range(shards):
        part = named[number * size : (number + 1) * size]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        end = 0
        for name, dtype, shape in part:
            nbytes = int(np.prod(shape, dtype=np.int64)) * _BITS[dtype] // 8
            tensors[name] = Tensor(dtype, shape, (end, end + nbytes))
            end += nbytes
        with (folder / file).open("wb") as stream:
            stream.write(encode_header(tensors, {"format": "pt"}))
            if sparse:
                stream.truncate(stream.tell() + end)
            else:
                # Half of the bits of an exponent stay clear, so that every value is finite.
                stream.write((np.frombuffer(rng.bytes(end), np.uint8) & 0x3F).tobytes())
        mapped |= dict.fromkeys(tensors, file)
    total = {"metadata": {"total_size": 0}, "weight_map": mapped}
    (folder / INDEX_FILE).write_text(json.dumps(total, indent=2))
    return mapped


def write_target(
    folder: Path,
    width: Width,
    *,
    shards: int,
    sparse: bool = False,
    next_token: bool = False,
) -> Path:
    """A target with V4-Pro's keys."""
    folder.mkdir(parents=True)
    named = list(target_tensors(width))
    if next_token:
        named += next_token_tensors(width)
    write_shards(folder, named, shards, sparse=sparse)
    put(folder / CONFIG_FILE, config(width, drafter=False))
    write_tokenizer(folder)
    (folder / "LICENSE").write_text("the target's licence\n")
    return folder


def write_drafter(folder: Path, width: Width, *, shards: int = 2, sparse: bool = False) -> Path:
    """Its drafter, not packaged yet."""
    folder.mkdir(parents=True)
    write_shards(folder, list(drafter_tensors(width)), shards, sparse=sparse)
    put(folder / CONFIG_FILE, config(width, drafter=True))
    record = provenance(weights_digest(folder), gamma=GAMMA)
    record["name"] = "v4-pro-layout"
    record["target"] |= {"repo_id": "deepseek-ai/DeepSeek-V4-Pro", "family": "deepseek-v4"}
    put(folder / "provenance.json", record)
    return folder


def write_pair(
    root: Path, width: Width, *, shards: int = 8, sparse: bool = False, fingerprint: bool = True
) -> tuple[Path, Path]:
    """A target and its packaged drafter in ``root``."""
    target = write_target(root / "target", width, shards=shards, sparse=sparse)
    source = write_drafter(root / "drafter-source", width, sparse=sparse)
    options = artifact.Options(target=target if fingerprint else None, method="auto")
    artifact.build(source, root / "drafter", options)
    return target, root / "drafter"
