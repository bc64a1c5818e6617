"""Tensors and pools of DeepSeek-V4, its MTP layer and the drafter bundled under ``mtp.*``.

Source: SGLang 0.5.23, ``models/deepseek_v4{,_nextn,_dspark}.py``, ``layers/attention/dsv4`` and
``layers/quantization/fp8.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.v4.shape import V4Shape
from dspark_sglang.layouts.v4.tensors import v4_tensors
from dspark_sglang.planning.kv import CompressedKv, DraftKv
from dspark_sglang.planning.reading import integer, integers, optional
from dspark_sglang.planning.tensors import Split, Tensor

Config = Mapping[str, Any]

#: Width of an fp8 block, and of the run of fp4 values that shares a scale.
FP8_BLOCK, FP4_RUN = 128, 32
#: So that a target without a drafter has a V4Shape too; none of it shows in a layer's tensors.
_NO_DRAFTER = {
    "dspark_block_size": 1,
    "dspark_markov_rank": 1,
    "dspark_noise_token_id": 0,
    "dspark_target_layer_ids": [0],
}
#: Tensors of a drafter that belong to no single layer.
_DRAFTER_PARTS = {
    "main_proj": "main_proj",
    "main_norm": "norms",
    "norm": "norms",
    "hc_head": "hyper",
    "markov_head": "markov_head",
    "confidence_head": "confidence_head",
}


class Kernels(NamedTuple):
    """What hardware and MoE backend decide about how weights are kept."""

    #: Keep the target's ``wo_a`` in fp8 (Blackwell); Hopper unpacks it to bfloat16 when loading.
    fp8_wo_a: bool
    #: Routed experts are stored in fp8 blocks, not in fp4.
    fp8_experts: bool = False
    #: Smallest width of a routed expert that one rank can hold.
    expert_grain: int = 128


class Kind(NamedTuple):
    """How one tensor is stored, kept and shared."""

    stored: str
    kept: str
    part: str
    split: Split = Split.WHOLE
    dim: int = 0
    grain: int = 1


def is_quantised(config: Config) -> bool:
    """Whether weights are stored as DeepSeek publishes them; else all of them are plain (tiny test bundles)."""
    return any(config.get(key) is not None for key in ("expert_dtype", "quantization_config"))


def shape_of(config: Config) -> V4Shape:
    """Sizes of a V4 checkpoint, with or without a drafter in it.

    Raises:
        CheckpointError: a field is missing or says what SGLang's V4 is not (V4.1, another quantisation).
    """
    if is_quantised(config):
        _check_quantisation(config)
    given = {key: value for key, value in config.items() if value is not None}
    return V4Shape.from_config({**_NO_DRAFTER, **given})


def _check_quantisation(config: Config) -> None:
    if config.get("expert_dtype") not in ("fp4", "fp8"):
        raise CheckpointError(
            f"config.json says expert_dtype {config.get('expert_dtype')!r}.",
            expected="'fp4', as DeepSeek publishes V4, or 'fp8'",
            fix="Add the key as the weights are stored, or use the published checkpoint.",
        )
    quantised = config.get("quantization_config") or {}
    block = quantised.get("weight_block_size")
    if quantised.get("quant_method") != "fp8" or block != [FP8_BLOCK, FP8_BLOCK]:
        raise CheckpointError(
            f"config.json says quantisation {quantised.get('quant_method')!r} in blocks {block!r}.",
            expected=f"fp8 in blocks of {FP8_BLOCK} by {FP8_BLOCK}",
            fix="Use the published checkpoint.",
        )


def target(config: Config, kernels: Kernels) -> list[Tensor]:
    """Every tensor of the target itself (no ``mtp.*``)."""
    shape, ratios = shape_of(config), _ratios(config)
    made = [
        _plain("embed.weight", (shape.vocab, shape.hidden), "embedding", Split.VOCAB),
        _plain("head.weight", (shape.vocab, shape.hidden), "head", Split.HEAD_VOCAB),
        _plain("norm.weight", (shape.hidden,), "norms"),
        *_head_mix("", shape),
    ]
    hashed = int(optional(config, "num_hash_layers", 0))
    common = _layer(shape, kernels)
    for layer, ratio in enumerate(ratios):
        prefix = f"layers.{layer}."
        routed = [t for t in common if layer >= hashed or t.name != "ffn.gate.bias"]
        made += _named(prefix, routed)
        if layer < hashed:
            table = (shape.vocab, shape.active)
            made.append(
                Tensor(name=f"{prefix}ffn.gate.tid2eid", shape=table, stored="I64", kept="I32", part="router")
            )  # fmt: skip
        if ratio:
            made += _compressor(prefix + "attn.compressor.", shape.hidden, shape.head_dim, ratio)
        if ratio == 4:
            made += _indexer(config, prefix + "attn.indexer.", shape)
    return made


def drafter(config: Config, kernels: Kernels) -> list[Tensor]:
    """Every tensor of the bundled drafter (``mtp.0`` to ``mtp.N-1``)."""
    shape = shape_of(config)
    # The drafter's own attention never takes the fp8 kernel for wo_a.
    own = kernels._replace(fp8_wo_a=False)
    made: list[Tensor] = []
    for name, size in v4_tensors(shape).items():
        local = name.split(".", 2)[2]
        made += _tensors(name, size, _kind(local, shape, own))
    return made


def mtp_layer(config: Config, kernels: Kernels) -> list[Tensor]:
    """The multi-token-prediction layer of a checkpoint without a DSpark drafter.

    A DSpark checkpoint has its drafter in this place, so the net cost of drafting is the
    drafter's less this.
    """
    shape = shape_of(config)
    made = [_plain(f"mtp.0.{name}.weight", (shape.hidden,), "norms") for name in ("enorm", "hnorm", "norm")]  # fmt: skip
    for name in ("e_proj", "h_proj"):
        made += _tensors(
            f"mtp.0.{name}.weight", (shape.hidden, shape.hidden), Kind("F8_E4M3", "F8_E4M3", "main_proj")
        )  # fmt: skip
    made += _head_mix("mtp.0.", shape)
    return made + _named("mtp.0.", _layer(shape, kernels))


def on_cpu(tensors: Iterable[Tensor], dtype: str, *, quantised: bool) -> list[Tensor]:
    """Tensors as the CPU platform keeps them: what is published in fp8 or fp4 is unpacked while it is loaded.

    Args:
        tensors: as a GPU keeps them.
        dtype: of the server, as safetensors calls it.
        quantised: stored as published; else all plain.
    """
    made: list[Tensor] = []
    for tensor in tensors:
        packed = {"I8": 2, "F8_E4M3": 1}.get(tensor.stored)
        if tensor.stored == "F8_E8M0":
            made += [msgspec.structs.replace(tensor, kept="")] if quantised else []
        elif packed is None:
            kept = dtype if tensor.kept == "BF16" else tensor.kept
            made.append(msgspec.structs.replace(tensor, kept=kept))
        else:
            rows, columns = tensor.shape
            plain = msgspec.structs.replace(
                tensor, shape=(rows, columns * packed), stored="BF16", kept=dtype, derived=quantised
            )
            made += [msgspec.structs.replace(tensor, kept=""), plain] if quantised else [plain]
    return made


def _ratios(config: Config) -> tuple[int, ...]:
    """Compression ratio of each target layer (the list goes on with those of ``mtp.*``)."""
    ratios = integers(config, "compress_ratios")
    depth = integer(config, "num_hidden_layers")
    if len(ratios) < depth or not set(ratios) <= {0, 4, 128}:
        raise CheckpointError(
            f"compress_ratios has {len(ratios)} entries of {sorted(set(ratios))}.",
            expected=f"at least {depth}, each 0, 4 or 128",
            fix="Use the config.json of a published DeepSeek-V4 checkpoint.",
        )
    return ratios[:depth]


def _layer(shape: V4Shape, kernels: Kernels) -> list[Tensor]:
    """Tensors that every layer has, by their name in it (the drafter's layers are the target's)."""
    made: list[Tensor] = []
    for name, size in v4_tensors(shape).items():
        stage, local = name.split(".", 2)[1:]
        if stage == "0" and _drafter_part(local) is None:
            made += _tensors(local, size, _kind(local, shape, kernels))
    return made


def _named(prefix: str, tensors: list[Tensor]) -> list[Tensor]:
    return [msgspec.structs.replace(tensor, name=prefix + tensor.name) for tensor in tensors]


def _drafter_part(local: str) -> str | None:
    for prefix, part in _DRAFTER_PARTS.items():
        if local.startswith((prefix + ".", prefix + "_")):
            return part
    return None


def _kind(local: str, shape: V4Shape, kernels: Kernels) -> Kind:
    """Kind of a layer's tensor from its name within the layer."""
    fp8 = "F8_E4M3"
    if ".experts." in local:
        split = (Split.EXPERTS, 1 if ".w2." in local else 0, kernels.expert_grain)
        stored = fp8 if kernels.fp8_experts else "I8"
        return Kind(stored, stored, "experts", *split)
    if "shared_experts" in local:
        return Kind(fp8, fp8, "shared_experts", Split.SHARED, int(".w2." in local), FP8_BLOCK)
    wide = {
        "attn.wq_a.weight": Kind(fp8, fp8, "attention"),
        "attn.wkv.weight": Kind(fp8, fp8, "attention"),
        "attn.wq_b.weight": Kind(fp8, fp8, "attention", Split.ATTENTION, 0, shape.head_dim),
        "attn.wo_a.weight": Kind(
            fp8, fp8 if kernels.fp8_wo_a else "BF16", "attention", Split.ATTENTION, 0, shape.o_rank
        ),
        "attn.wo_b.weight": Kind(fp8, fp8, "attention", Split.ATTENTION, 1, shape.o_rank),
        "attn.attn_sink": Kind("F32", "F32", "attention"),
        "ffn.gate.weight": Kind("BF16", "BF16", "router"),
        "ffn.gate.bias": Kind("F32", "F32", "router"),
        "main_proj.weight": Kind(fp8, fp8, "main_proj"),
        "confidence_head.proj.weight": Kind("BF16", "F32", "confidence_head"),
    }
    if local in wide:
        return wide[local]
    if local.startswith("hc_"):
        return Kind("F32", "F32", "hyper")
    return Kind("BF16", "BF16", _drafter_part(local) or "norms")


def _tensors(name: str, size: tuple[int, ...], kind: Kind) -> list[Tensor]:
    """A tensor and, where it is quantised, its scales."""
    extent = size[kind.dim] if kind.split is not Split.WHOLE else 0
    shared = {"part": kind.part, "split": kind.split, "extent": extent, "grain": kind.grain}
    fp4, fp8 = kind.stored == "I8", kind.stored == "F8_E4M3"
    stored_size = (size[0], size[1] // 2) if fp4 else size
    made = [Tensor(name=name, shape=stored_size, stored=kind.stored, kept=kind.kept, **shared)]  # type: ignore[arg-type]
    if fp4 or fp8:
        rows, columns = size
        scales = (
            (rows, columns // FP4_RUN)
            if fp4
            else (math.ceil(rows / FP8_BLOCK), math.ceil(columns / FP8_BLOCK))
        )
        # fp4 scales stay as they are; fp8 ones become float32, or nothing where unpacked.
        kept = "F8_E8M0" if fp4 else ("F32" if kind.kept == "F8_E4M3" else "")
        scale = name.removesuffix("weight") + "scale"
        made.append(Tensor(name=scale, shape=scales, stored="F8_E8M0", kept=kept, **shared))  # type: ignore[arg-type]
    return made


def _plain(name: str, size: tuple[int, ...], part: str, split: Split = Split.WHOLE) -> Tensor:
    return Tensor(name=name, shape=size, stored="BF16", kept="BF16", part=part, split=split)


def _head_mix(prefix: str, shape: V4Shape) -> list[Tensor]:
    sizes = {
        "fn": (shape.streams, shape.streams * shape.hidden),
        "base": (shape.streams,),
        "scale": (1,),
    }
    return [
        Tensor(name=f"{prefix}hc_head_{name}", shape=size, stored="F32", kept="F32", part="hyper")
        for name, size in sizes.items()
    ]


def _compressor(prefix: str, hidden: int, dim: int, ratio: int) -> list[Tensor]:
    """Compression of keys: twice as wide where groups overlap (ratio 4)."""
    wide = dim * (2 if ratio == 4 else 1)
    made = [
        Tensor(name=f"{prefix}{name}.weight", shape=(wide, hidden), stored="BF16", kept="BF16", part="compressor")
        for name in ("wkv", "wgate")
    ]  # fmt: skip
    made.append(
        Tensor(
            name=f"{prefix}ape", shape=(ratio, wide), stored="F32", kept="F32", part="compressor"
        )
    )
    return [
        *made,
        Tensor(name=f"{prefix}norm.weight", shape=(dim,), stored="BF16", kept="F32", part="norms"),
    ]


def _indexer(config: Config, prefix: str, shape: V4Shape) -> list[Tensor]:
    """Choice of compressed positions: whole on every rank."""
    heads, dim = integer(config, "index_n_heads"), integer(config, "index_head_dim")
    kind = Kind("F8_E4M3", "F8_E4M3", "indexer")
    made = _tensors(f"{prefix}wq_b.weight", (heads * dim, shape.q_rank), kind)
    made.append(_plain(f"{prefix}weights_proj.weight", (heads, shape.hidden), "indexer"))
    return made + _compressor(f"{prefix}compressor.", shape.hidden, dim, 4)


def kv(config: Config) -> CompressedKv:
    """The target's pools."""
    shape = shape_of(config)
    return CompressedKv(
        ratios=_ratios(config),
        head_dim=shape.head_dim,
        index_dim=integer(config, "index_head_dim"),
        window=shape.window,
    )


def draft_kv(config: Config) -> DraftKv:
    """The drafter's pool."""
    return DraftKv(compressed_stages=shape_of(config).layers)


def rope_bytes(config: Config) -> int:
    """Tables of rotary angles: one complex and one real table for each kind of layer."""
    positions, dim = integer(config, "max_position_embeddings"), integer(config, "qk_rope_head_dim")
    kinds = len({ratio > 0 for ratio in _ratios(config)})
    complex_tables = kinds if kinds == 2 or "dspark_block_size" not in config else 2
    return positions * (dim // 2 * 8 * complex_tables + dim * 4 * kinds)
