"""Tensors of dense decoder models (Llama, Qwen2, Qwen3, Gemma 3) and of stand-alone drafters.

Source: SGLang 0.5.23, ``models/{llama,qwen2,qwen3,gemma3_causal,dflash,dspark}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from dspark_sglang.checkpoint import DrafterConfig, dense_tensors
from dspark_sglang.planning.kv import DraftKv, FullKv
from dspark_sglang.planning.reading import integer, optional
from dspark_sglang.planning.tensors import SIZES, Split, Tensor

Config = Mapping[str, Any]

_QK_NORM = ("Qwen3ForCausalLM", "Gemma3ForCausalLM")
_GEMMA = "Gemma3ForCausalLM"


def _tied(config: Config, architecture: str) -> bool:
    return bool(optional(config, "tie_word_embeddings", architecture == _GEMMA))


def target(config: Config, architecture: str, stored: str, kept: str) -> list[Tensor]:
    """Every tensor of a dense target.

    Args:
        config: the text configuration.
        architecture: its class in SGLang.
        stored: type on disk.
        kept: type on the device.
    """
    hidden, vocab = integer(config, "hidden_size"), integer(config, "vocab_size")
    # Gemma's embedding is an ordinary one there, whole on every rank.
    rows = Split.WHOLE if architecture == _GEMMA else Split.VOCAB
    made = [_tensor("model.embed_tokens.weight", (vocab, hidden), "embedding", rows)]
    made.append(_tensor("model.norm.weight", (hidden,), "norms"))
    if not _tied(config, architecture):
        made.append(_tensor("lm_head.weight", (vocab, hidden), "head", Split.HEAD_VOCAB))
    for layer in range(integer(config, "num_hidden_layers")):
        made += _layer(config, architecture, f"model.layers.{layer}.")
    return [msgspec.structs.replace(tensor, stored=stored, kept=kept) for tensor in made]


def _tensor(
    name: str, shape: tuple[int, ...], part: str, split: Split = Split.WHOLE, *, dim: int = 0,
    grain: int = 1,
) -> Tensor:  # fmt: skip
    extent = shape[dim] if split is not Split.WHOLE else 0
    return Tensor(
        name=name,
        shape=shape,
        stored="",
        kept="",
        part=part,
        split=split,
        extent=extent,
        grain=grain,
    )


def _layer(config: Config, architecture: str, prefix: str) -> list[Tensor]:
    hidden, wide = integer(config, "hidden_size"), integer(config, "intermediate_size")
    heads = integer(config, "num_attention_heads")
    groups, dim = kv_heads(config), head_dim(config)
    attention = [
        ("q_proj", (heads * dim, hidden), Split.ATTENTION, 0, dim),
        ("k_proj", (groups * dim, hidden), Split.HEADS, 0, dim),
        ("v_proj", (groups * dim, hidden), Split.HEADS, 0, dim),
        ("o_proj", (hidden, heads * dim), Split.ATTENTION, 1, dim),
    ]
    made = [
        _tensor(
            f"{prefix}self_attn.{name}.weight", shape, "attention", split, dim=axis, grain=grain
        )
        for name, shape, split, axis, grain in attention
    ]
    if optional(config, "attention_bias", architecture == "Qwen2ForCausalLM"):
        biased = attention[:3] if architecture == "Qwen2ForCausalLM" else attention
        for name, shape, split, axis, grain in biased:
            split = split if axis == 0 else Split.WHOLE
            made.append(
                _tensor(
                    f"{prefix}self_attn.{name}.bias", shape[:1], "attention", split, grain=grain
                )
            )
    if architecture in _QK_NORM:
        made += [_tensor(f"{prefix}self_attn.{n}_norm.weight", (dim,), "norms") for n in "qk"]
    made += [
        _tensor(f"{prefix}mlp.{name}_proj.weight", (wide, hidden), "mlp", Split.TENSOR)
        for name in ("gate", "up")
    ]
    down = f"{prefix}mlp.down_proj.weight"
    made.append(_tensor(down, (hidden, wide), "mlp", Split.TENSOR, dim=1))
    norms = ["input_layernorm", "post_attention_layernorm"]
    if architecture == _GEMMA:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    return made + [_tensor(f"{prefix}{name}.weight", (hidden,), "norms") for name in norms]


def head_dim(config: Config) -> int:
    """Width of one attention head."""
    given = config.get("head_dim")
    if given is not None:
        return integer(config, "head_dim")
    return integer(config, "hidden_size") // integer(config, "num_attention_heads")


def kv_heads(config: Config) -> int:
    """Key and value heads of a layer."""
    if config.get("num_key_value_heads") is None:
        return integer(config, "num_attention_heads")
    return integer(config, "num_key_value_heads")


def kv(config: Config, element: int) -> FullKv:
    """The target's pool; ``element`` is the bytes of one value."""
    return FullKv(
        layers=integer(config, "num_hidden_layers"),
        heads=kv_heads(config),
        width=2 * head_dim(config),
        element=element,
    )


def drafter(config: DrafterConfig, stored: str, kept: str) -> list[Tensor]:
    """Every tensor of a stand-alone drafter: layers shared like the target's, heads whole."""
    made = []
    for name, shape in dense_tensors(config).items():
        split, dim, grain = _draft_split(name, config)
        extent = shape[dim] if split is not Split.WHOLE else 0
        # SGLang keeps the confidence head in float32 (models/dspark.py:431).
        own = "F32" if name.startswith("confidence_head.") else kept
        made.append(
            Tensor(
                name=name, shape=shape, stored=stored, kept=own, part=_draft_part(name),
                split=split, extent=extent, grain=grain,
            )
        )  # fmt: skip
    return made


def _draft_part(name: str) -> str:
    for prefix in ("markov_head", "confidence_head", "fc"):
        if name.startswith(prefix):
            return prefix
    return "layers"


def _draft_split(name: str, config: DrafterConfig) -> tuple[Split, int, int]:
    if not name.startswith("layers.") or name.endswith(("norm.weight", "scalar")):
        return Split.WHOLE, 0, 1
    if "mlp." in name:
        return Split.TENSOR, int("down_proj" in name), 1
    if ".k_proj" in name or ".v_proj" in name:
        return Split.HEADS, 0, config.head_dim
    return Split.ATTENTION, int("o_proj" in name), config.head_dim


def draft_kv(config: DrafterConfig, kept: str) -> DraftKv:
    """The pool of a stand-alone drafter."""
    return DraftKv(
        full=FullKv(
            layers=config.num_layers,
            heads=config.num_kv_heads,
            width=2 * config.head_dim,
            element=SIZES[kept],
        )
    )
