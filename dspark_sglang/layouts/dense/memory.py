"""Tensors of dense decoder models (Llama, Qwen3, Gemma 3 and 4) and of stand-alone drafters.

Source: SGLang 0.5.23, ``models/{llama,qwen3,gemma3_causal,gemma4_causal,dflash,dspark}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts import reading
from dspark_sglang.layouts.base import text_config
from dspark_sglang.layouts.dense.config import DenseConfig, parse_drafter_config
from dspark_sglang.layouts.dense.tensors import dense_layer, dense_tensors
from dspark_sglang.layouts.memory import (
    SIZES,
    DrafterMemory,
    DraftKv,
    FullKv,
    Loading,
    SlidingKv,
    Split,
    TargetMemory,
    Tensor,
)
from dspark_sglang.layouts.reading import integer

Config = Mapping[str, Any]

GEMMA3, GEMMA4 = "Gemma3ForCausalLM", "Gemma4ForCausalLM"
#: Targets whose memory is known here.
ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM", GEMMA3, GEMMA4)
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


def describe_target(raw: Config, loading: Loading) -> TargetMemory:
    """A dense target.

    Raises:
        CheckpointError: an architecture that is not planned, quantised weights, or a field that is missing or nonsense.
    """
    architecture = reading.architecture(raw)
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"The target is a {architecture}.",
            expected=f"{' or '.join(ARCHITECTURES)}, or a layout of its own",
            fix="Its memory cannot be planned; nothing is assumed to fit.",
        )
    config = text_config(raw)
    stored, kept = _types({**raw, **config}, loading)
    _unquantised(raw)
    context, own = integer(config, "max_position_embeddings"), heads(config, architecture, 0)
    return TargetMemory(
        kv=kv(config, architecture, loading.kv_element or SIZES[kept]),
        tensors=target(config, architecture, stored, kept),
        context=context,
        rope_bytes=context * own.dim * 4,
        heads=own.query,
    )


def describe_drafter(raw: Config, loading: Loading) -> DrafterMemory:
    """A stand-alone drafter. Raises as :func:`describe_target`."""
    config, (stored, kept) = parse_drafter_config(raw), _types(raw, loading)
    pool = draft_kv(config, kept)
    return DrafterMemory(
        tensors=drafter(config, stored, kept), kv=DraftKv(full=pool), heads=config.num_heads
    )


def _types(config: Config, loading: Loading) -> tuple[str, str]:
    """Types of weights as stored, and as kept."""
    stored = reading.weight_type(config)
    return stored, reading.TYPES[loading.dtype] if loading.dtype else stored


def _unquantised(config: Config) -> None:
    found = config.get("quantization_config") or text_config(config).get("quantization_config")
    if found:
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        raise CheckpointError(
            f"The target is quantised ({method!r}).",
            expected="bfloat16, float16 or float32 weights for this architecture",
            fix="Its memory cannot be planned; nothing is assumed to fit.",
        )


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
    groups = integer(config, "num_key_value_heads", default=query)
    dim = integer(config, "head_dim", default=integer(config, "hidden_size") // query)
    if architecture == GEMMA4 and layer_types(config)[layer] == _FULL:
        dim = integer(config, "global_head_dim", default=dim)
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


def target(config: Config, architecture: str, stored: str, kept: str) -> list[Tensor]:
    """Every tensor of a dense target.

    Args:
        config: the text configuration.
        architecture: its class in SGLang.
        stored: type on disk.
        kept: type on the device.
    """
    gemma = architecture in _GEMMAS
    hidden, vocab = integer(config, "hidden_size"), integer(config, "vocab_size")
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    tied = config.get("tie_word_embeddings")
    if not (gemma if tied is None else tied):
        shapes["lm_head.weight"] = (vocab, hidden)
    made = [
        # Gemma's embedding is an ordinary one there, whole on every rank.
        _tensor(name, shape, stored, kept, whole=gemma and "embed" in name)
        for name, shape in shapes.items()
    ]
    for layer in range(integer(config, "num_hidden_layers")):
        own = heads(config, architecture, layer)
        for local, shape in _layer(config, architecture, own).items():
            name = f"model.layers.{layer}.{local}"
            made.append(_tensor(name, shape, stored, kept, width=own.dim))
    return made


def _layer(config: Config, architecture: str, own: Heads) -> dict[str, tuple[int, ...]]:
    """What a layer of a target has, by the name in it."""
    shapes = dense_layer(
        hidden=integer(config, "hidden_size"),
        wide=integer(config, "intermediate_size"),
        heads=own.query,
        kv_heads=own.groups,
        head_dim=own.dim,
        gemma4=architecture in _GEMMAS,
    )
    if architecture not in _QK_NORM:
        del shapes["self_attn.q_norm.weight"], shapes["self_attn.k_norm.weight"]
    if architecture == GEMMA3:
        del shapes["layer_scalar"]
    if config.get("attention_bias"):
        for name in "qkvo":
            weight = shapes[f"self_attn.{name}_proj.weight"]
            shapes[f"self_attn.{name}_proj.bias"] = weight[:1]
    return shapes


def _tensor(
    name: str, shape: tuple[int, ...], stored: str, kept: str, *, width: int = 1, whole: bool = False
) -> Tensor:  # fmt: skip
    """A tensor with its share, by its name; ``width`` is that of a head."""
    part, split, dim, grain = _share(name, width)
    if whole:
        split, grain = Split.WHOLE, 1
    extent = 0 if split is Split.WHOLE else shape[dim]
    return Tensor(
        name=name, shape=shape, stored=stored, kept=kept, part=part, split=split, extent=extent, grain=grain
    )  # fmt: skip


def _share(name: str, width: int) -> tuple[str, Split, int, int]:
    """Part, kind of sharing, shared dimension and smallest piece of it, from the name of a tensor."""
    if "norm" in name or name.endswith(("layer_scalar", "o_proj.bias")):
        return "attention" if "o_proj" in name else "norms", Split.WHOLE, 0, 1
    if "mlp." in name:
        return "mlp", Split.TENSOR, int("down_proj" in name), 1
    if ".k_proj" in name or ".v_proj" in name:
        return "attention", Split.HEADS, 0, width
    if "self_attn." in name:
        return "attention", Split.ATTENTION, int("o_proj" in name), width
    return ("head", Split.HEAD_VOCAB, 0, 1) if "lm_head" in name else ("embedding", Split.VOCAB, 0, 1)  # fmt: skip


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


def drafter(config: DenseConfig, stored: str, kept: str) -> list[Tensor]:
    """Every tensor of a stand-alone drafter: layers shared like the target's, heads whole."""
    made = []
    for name, shape in dense_tensors(config).items():
        part = next((p for p in ("markov_head", "confidence_head", "fc") if name.startswith(p)), "layers")  # fmt: skip
        # SGLang keeps the confidence head in float32 (models/dspark.py:431).
        own = "F32" if part == "confidence_head" else kept
        whole = not name.startswith("layers.")
        one = _tensor(name, shape, stored, own, width=config.head_dim, whole=whole)
        made.append(msgspec.structs.replace(one, part=part))
    return made


def draft_kv(config: DenseConfig, kept: str) -> FullKv:
    """The pool of a stand-alone drafter."""
    heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim)
    return _pool(heads, config.num_layers, SIZES[kept])
