"""Tensors of DeepSeek-V3 (latent attention, experts in fp8 blocks or unquantised).

Source: SGLang 0.5.23, ``models/deepseek_v2.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dspark_sglang.planning.kv import FullKv
from dspark_sglang.planning.reading import integer, optional
from dspark_sglang.planning.tensors import Split, Tensor

Config = Mapping[str, Any]


class Weights(NamedTuple):
    """Types of a checkpoint: ``block`` is the fp8 block width, 0 where nothing is quantised."""

    stored: str
    kept: str
    block: int


class _Linear(NamedTuple):
    name: str
    shape: tuple[int, int]
    part: str
    split: Split = Split.WHOLE
    dim: int = 0
    grain: int = 1


def target(config: Config, weights: Weights) -> list[Tensor]:
    """Every tensor of the target; those of the MTP layer behind it are on disk only."""
    hidden, vocab = integer(config, "hidden_size"), integer(config, "vocab_size")
    made = [
        _plain("model.embed_tokens.weight", (vocab, hidden), "embedding", weights, Split.VOCAB),
        _plain("model.norm.weight", (hidden,), "norms", weights),
        _plain("lm_head.weight", (vocab, hidden), "head", weights, Split.HEAD_VOCAB),
    ]
    depth = integer(config, "num_hidden_layers")
    extra = int(optional(config, "num_nextn_predict_layers", 0))
    for layer in range(depth + extra):
        prefix = f"model.layers.{layer}."
        tensors = list(_layer(config, layer, prefix, weights))
        if layer >= depth:
            tensors += _nextn(prefix, hidden, vocab, weights)
            tensors = [_unloaded(tensor) for tensor in tensors if not tensor.derived]
        made += tensors
    return made


def _unloaded(tensor: Tensor) -> Tensor:
    return Tensor(name=tensor.name, shape=tensor.shape, stored=tensor.stored, kept="", part="mtp")


def _plain(
    name: str, shape: tuple[int, ...], part: str, weights: Weights, split: Split = Split.WHOLE
) -> Tensor:
    return Tensor(
        name=name, shape=shape, stored=weights.stored, kept=weights.kept, part=part, split=split
    )


def _nextn(prefix: str, hidden: int, vocab: int, weights: Weights) -> list[Tensor]:
    sizes: dict[str, tuple[int, ...]] = {
        "enorm.weight": (hidden,),
        "hnorm.weight": (hidden,),
        "eh_proj.weight": (hidden, 2 * hidden),
        "embed_tokens.weight": (vocab, hidden),
        "shared_head.norm.weight": (hidden,),
        "shared_head.head.weight": (vocab, hidden),
    }
    return [_plain(prefix + name, size, "mtp", weights) for name, size in sizes.items()]


def _layer(config: Config, layer: int, prefix: str, weights: Weights) -> Iterator[Tensor]:
    hidden = integer(config, "hidden_size")
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield _plain(f"{prefix}{norm}.weight", (hidden,), "norms", weights)
    rank, latent = integer(config, "q_lora_rank"), integer(config, "kv_lora_rank")
    yield _plain(f"{prefix}self_attn.q_a_layernorm.weight", (rank,), "norms", weights)
    yield _plain(f"{prefix}self_attn.kv_a_layernorm.weight", (latent,), "norms", weights)
    for linear in _attention(config):
        yield from _linear(prefix + "self_attn.", linear, weights)
    yield _absorbed(config, prefix, latent)
    dense = layer < integer(config, "first_k_dense_replace", 0)
    if dense:
        width = integer(config, "intermediate_size")
        yield from _mlp(prefix + "mlp.", hidden, width, "mlp", Split.TENSOR, weights)
        return
    experts, width = integer(config, "n_routed_experts"), integer(config, "moe_intermediate_size")
    yield _plain(f"{prefix}mlp.gate.weight", (experts, hidden), "router", weights)
    bias = f"{prefix}mlp.gate.e_score_correction_bias"
    yield Tensor(name=bias, shape=(experts,), stored="F32", kept="F32", part="router")
    for expert in range(experts):
        name = f"{prefix}mlp.experts.{expert}."
        yield from _mlp(name, hidden, width, "experts", Split.EXPERTS, weights)
    wide = width * integer(config, "n_shared_experts")
    name = f"{prefix}mlp.shared_experts."
    yield from _mlp(name, hidden, wide, "shared_experts", Split.SHARED, weights)


def _attention(config: Config) -> list[_Linear]:
    hidden, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    rank, latent = integer(config, "q_lora_rank"), integer(config, "kv_lora_rank")
    nope, rope = integer(config, "qk_nope_head_dim"), integer(config, "qk_rope_head_dim")
    value = integer(config, "v_head_dim")
    part, split = "attention", Split.ATTENTION
    return [
        _Linear("q_a_proj", (rank, hidden), part),
        _Linear("kv_a_proj_with_mqa", (latent + rope, hidden), part),
        _Linear("q_b_proj", (heads * (nope + rope), rank), part, split, 0, nope + rope),
        _Linear("kv_b_proj", (heads * (nope + value), latent), part, split, 0, nope + value),
        _Linear("o_proj", (hidden, heads * value), part, split, 1, value),
    ]


def _absorbed(config: Config, prefix: str, latent: int) -> Tensor:
    """The two bfloat16 copies of ``kv_b_proj`` that decoding multiplies with."""
    heads = integer(config, "num_attention_heads")
    wide = integer(config, "qk_nope_head_dim") + integer(config, "v_head_dim")
    return Tensor(
        name=f"{prefix}self_attn.w_kc_w_vc",
        shape=(heads * wide, latent),
        stored="BF16",
        kept="BF16",
        part="attention",
        split=Split.ATTENTION,
        extent=heads * wide,
        grain=wide,
        derived=True,
    )


def _mlp(
    prefix: str, hidden: int, width: int, part: str, split: Split, weights: Weights
) -> Iterator[Tensor]:
    grain = weights.block or 1
    for name in ("gate_proj", "up_proj"):
        yield from _linear(prefix, _Linear(name, (width, hidden), part, split, 0, grain), weights)
    yield from _linear(
        prefix, _Linear("down_proj", (hidden, width), part, split, 1, grain), weights
    )


def _linear(prefix: str, linear: _Linear, weights: Weights) -> Iterator[Tensor]:
    extent = linear.shape[linear.dim] if linear.split is not Split.WHOLE else 0
    stored, kept = ("F8_E4M3", "F8_E4M3") if weights.block else (weights.stored, weights.kept)
    name = f"{prefix}{linear.name}.weight"
    sizes = [(name, linear.shape, stored, kept)]
    if weights.block:
        rows, columns = (math.ceil(side / weights.block) for side in linear.shape)
        sizes.append((name + "_scale_inv", (rows, columns), "F32", "F32"))
    for name, shape, stored, kept in sizes:
        yield Tensor(
            name=name, shape=shape, stored=stored, kept=kept, part=linear.part,
            split=linear.split, extent=extent, grain=linear.grain,
        )  # fmt: skip


def kv(config: Config, element: int) -> FullKv:
    """The target's pool: one latent and one rotary key a token, the same on every rank."""
    width = integer(config, "kv_lora_rank") + integer(config, "qk_rope_head_dim")
    layers = integer(config, "num_hidden_layers")
    return FullKv(layers=layers, heads=1, width=width, element=element)
