"""Tensors of dense decoder models (Llama, Qwen3, Gemma 3 and 4) and of stand-alone drafters.

Source: SGLang 0.5.23, ``models/{llama,qwen3,gemma3_causal,gemma4_causal,dflash,dspark}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from dspark_sglang.checkpoint import DrafterConfig, dense_tensors
from dspark_sglang.errors import CheckpointError
from dspark_sglang.planning.kv import DraftKv, FullKv, SlidingKv
from dspark_sglang.planning.reading import integer, optional
from dspark_sglang.planning.tensors import SIZES, Split, Tensor

Config = Mapping[str, Any]

GEMMA3, GEMMA4 = "Gemma3ForCausalLM", "Gemma4ForCausalLM"
_GEMMAS = (GEMMA3, GEMMA4)
_QK_NORM = ("Qwen3ForCausalLM", *_GEMMAS)
#: Parts of Gemma 4 that some of its checkpoints have and a plan does not know.
_UNPLANNED = (
    "enable_moe_block",
    "hidden_size_per_layer_input",
    "num_kv_shared_layers",
    "attention_k_eq_v",
)
_SLIDING, _FULL = "sliding_attention", "full_attention"


class Heads(NamedTuple):
    """Attention of one layer: query heads, key and value heads, width of each."""

    query: int
    groups: int
    dim: int


def heads(config: Config, architecture: str, layer: int) -> Heads:
    """Attention of a layer.

    Raises:
        CheckpointError: a field is missing or nonsense, or asks for what is not planned.
    """
    query = integer(config, "num_attention_heads")
    groups = query if config.get("num_key_value_heads") is None else integer(config, "num_key_value_heads")  # fmt: skip
    dim = integer(config, "hidden_size") // query
    dim = dim if config.get("head_dim") is None else integer(config, "head_dim")
    if architecture == GEMMA4 and layer_types(config)[layer] == _FULL:
        dim = dim if config.get("global_head_dim") is None else integer(config, "global_head_dim")
    return Heads(query, groups, dim)


def layer_types(config: Config) -> list[str]:
    """Gemma 4: whether each layer attends to everything or to a window.

    Raises:
        CheckpointError: not a list of one of the two for each layer, or a variant not planned.
    """
    for key in _UNPLANNED:
        if config.get(key):
            raise CheckpointError(
                f"config.json says {key} {config[key]!r}.",
                expected="a dense Gemma 4 without it",
                fix="Its memory cannot be planned; nothing is assumed to fit.",
            )
    found, depth = config.get("layer_types"), integer(config, "num_hidden_layers")
    if not isinstance(found, list) or len(found) != depth or set(found) - {_SLIDING, _FULL}:
        raise CheckpointError(
            f"config.json says layer_types {found!r}.",
            expected=f"{depth} times {_SLIDING} or {_FULL}",
            fix="Download config.json of this model again with `hf download`.",
        )
    return found


def _tied(config: Config, architecture: str) -> bool:
    return bool(optional(config, "tie_word_embeddings", architecture in _GEMMAS))


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
    rows = Split.WHOLE if architecture in _GEMMAS else Split.VOCAB
    made = [_tensor("model.embed_tokens.weight", (vocab, hidden), "embedding", rows)]
    made.append(_tensor("model.norm.weight", (hidden,), "norms"))
    if not _tied(config, architecture):
        made.append(_tensor("lm_head.weight", (vocab, hidden), "head", Split.HEAD_VOCAB))
    for layer in range(integer(config, "num_hidden_layers")):
        made += _layer(config, architecture, layer)
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


def _layer(config: Config, architecture: str, layer: int) -> list[Tensor]:
    prefix = f"model.layers.{layer}."
    hidden, wide = integer(config, "hidden_size"), integer(config, "intermediate_size")
    query, groups, dim = heads(config, architecture, layer)
    attention = [
        ("q_proj", (query * dim, hidden), Split.ATTENTION, 0),
        ("k_proj", (groups * dim, hidden), Split.HEADS, 0),
        ("v_proj", (groups * dim, hidden), Split.HEADS, 0),
        ("o_proj", (hidden, query * dim), Split.ATTENTION, 1),
    ]
    made = []
    for name, shape, split, axis in attention:
        name = f"{prefix}self_attn.{name}"
        made.append(_tensor(f"{name}.weight", shape, "attention", split, dim=axis, grain=dim))
        if config.get("attention_bias"):
            shared = split if axis == 0 else Split.WHOLE
            made.append(_tensor(f"{name}.bias", shape[:1], "attention", shared, grain=dim))
    if architecture in _QK_NORM:
        made += [_tensor(f"{prefix}self_attn.{n}_norm.weight", (dim,), "norms") for n in "qk"]
    made += [
        _tensor(f"{prefix}mlp.{name}_proj.weight", (wide, hidden), "mlp", Split.TENSOR)
        for name in ("gate", "up")
    ]
    down = f"{prefix}mlp.down_proj.weight"
    made.append(_tensor(down, (hidden, wide), "mlp", Split.TENSOR, dim=1))
    norms = ["input_layernorm", "post_attention_layernorm"]
    if architecture in _GEMMAS:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if architecture == GEMMA4:
        made.append(_tensor(f"{prefix}layer_scalar", (1,), "norms"))
    return made + [_tensor(f"{prefix}{name}.weight", (hidden,), "norms") for name in norms]


def kv(config: Config, architecture: str, element: int) -> FullKv | SlidingKv:
    """The target's pools; ``element`` is the bytes of one value."""
    depth = integer(config, "num_hidden_layers")
    # SGLang keeps every token in every layer of Gemma 3, windows or not.
    if architecture != GEMMA4:
        return _pool(heads(config, architecture, 0), depth, element)
    types = layer_types(config)
    if _SLIDING not in types or _FULL not in types:
        raise CheckpointError(
            f"config.json says layer_types {sorted(set(types))} only.",
            expected="layers of both kinds",
            fix="Its memory cannot be planned; nothing is assumed to fit.",
        )
    full, sliding = (
        _pool(heads(config, architecture, types.index(kind)), types.count(kind), element)
        for kind in (_FULL, _SLIDING)
    )
    return SlidingKv(full=full, sliding=sliding, window=integer(config, "sliding_window"))


def _pool(shape: Heads, layers: int, element: int) -> FullKv:
    return FullKv(layers=layers, heads=shape.groups, width=2 * shape.dim, element=element)


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
