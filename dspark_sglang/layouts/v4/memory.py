"""DeepSeek-V4 as SGLang keeps and shares it: types, parts and ranks of the tensors that ``layouts/v4`` names.

Source: SGLang 0.5.23, ``models/deepseek_v4{,_nextn,_dspark}.py``, ``layers/attention/dsv4`` and
``layers/quantization/fp8.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts import reading
from dspark_sglang.layouts.memory import (
    CompressedKv,
    DrafterMemory,
    DraftKv,
    Loading,
    Split,
    TargetMemory,
    Tensor,
)
from dspark_sglang.layouts.v4.config import FP8_BLOCK, TargetShape, V4Shape
from dspark_sglang.layouts.v4.tensors import plain_next_token, plain_target, published, v4_tensors

Config = Mapping[str, Any]
Sizes = Mapping[str, tuple[int, ...]]

#: Part of a tensor by what its name within a layer holds; the first that matches.
_PARTS = {
    ".experts.": "experts",
    "shared_experts": "shared_experts",
    "norm": "norms",
    "compressor": "compressor",
    "indexer": "indexer",
    "hc_": "hyper",
    "ffn.gate": "router",
    "main_proj": "main_proj",
    "e_proj": "main_proj",
    "h_proj": "main_proj",
    "markov_head": "markov_head",
    "confidence_head": "confidence_head",
    "attn.": "attention",
    "embed": "embedding",
    "head": "head",
}
#: Kept in another plain type than stored.
_KEPT = {"confidence_head.proj.weight": "F32", "compressor.norm.weight": "F32", "tid2eid": "I32"}


class Kernels(NamedTuple):
    """What hardware and MoE backend decide about how weights are kept."""

    #: Keep the target's ``wo_a`` in fp8 (Blackwell); Hopper unpacks it to bfloat16 when loading.
    fp8_wo_a: bool
    #: Smallest width of a routed expert that one rank can hold.
    expert_grain: int = 128


def is_quantised(config: Config) -> bool:
    """Whether weights are stored as DeepSeek publishes them; else all of them are plain (tiny test bundles)."""
    return any(config.get(key) is not None for key in ("expert_dtype", "quantization_config"))


def shape_of(config: Config) -> TargetShape:
    """Sizes of a V4 target.

    Raises:
        CheckpointError: a field is missing or says what SGLang's V4 is not (V4.1, another quantisation).
    """
    if is_quantised(config):
        _check_quantisation(config)
    return TargetShape.from_config(config)


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


def describe_target(config: Config, loading: Loading) -> TargetMemory:
    """A target, without the drafter that it may bundle.

    Raises:
        CheckpointError: a field is missing or says what SGLang's V4 is not.
    """
    kernels, context = _kernels(loading), reading.integer(config, "max_position_embeddings")
    return TargetMemory(
        tensors=_loaded(target(config, kernels), config, loading),
        mtp_tensors=_loaded(mtp_layer(config, kernels), config, loading),
        kv=kv(config),
        context=context,
        rope_bytes=rope_bytes(config, context),
        heads=reading.integer(config, "num_attention_heads"),
    )


def describe_drafter(config: Config, loading: Loading) -> DrafterMemory:
    """A bundled drafter. Raises as :func:`describe_target`."""
    return DrafterMemory(
        tensors=_loaded(drafter(config, _kernels(loading)), config, loading),
        kv=DraftKv(compressed_stages=V4Shape.from_config(config).layers),
    )


def _kernels(loading: Loading) -> Kernels:
    return Kernels(fp8_wo_a=loading.blackwell, expert_grain=64 if loading.marlin else 128)


def _loaded(tensors: list[Tensor], config: Config, loading: Loading) -> list[Tensor]:
    quantised = is_quantised(config)
    if quantised and not loading.on_cpu:
        return tensors
    stored = "BF16" if quantised else reading.weight_type(config)
    named = reading.TYPES[loading.dtype] if loading.dtype else stored
    return on_cpu(tensors, named, quantised=quantised)


def target(config: Config, kernels: Kernels) -> list[Tensor]:
    """Every tensor of the target itself (no ``mtp.*``)."""
    shape = shape_of(config)
    return _kept(plain_target(shape), config, shape.layer, kernels)


def drafter(config: Config, kernels: Kernels) -> list[Tensor]:
    """Every tensor of the bundled drafter (``mtp.0`` to ``mtp.N-1``)."""
    # The drafter's own attention never takes the fp8 kernel for wo_a.
    shape, own = V4Shape.from_config(config), kernels._replace(fp8_wo_a=False)
    return _kept(v4_tensors(shape), config, shape, own)


def mtp_layer(config: Config, kernels: Kernels) -> list[Tensor]:
    """The multi-token-prediction layer of a checkpoint without a DSpark drafter.

    A DSpark checkpoint has its drafter in this place, so the net cost of drafting is the drafter's less this.
    """
    shape = shape_of(config)
    return _kept(plain_next_token(shape), config, shape.layer, kernels)


def _kept(sizes: Sizes, config: Config, shape: V4Shape, kernels: Kernels) -> list[Tensor]:
    """Stored tensors of plain ones, scales included, with what SGLang makes of each when it loads."""
    fp8_experts = config.get("expert_dtype") == "fp8"
    made: list[Tensor] = []
    for name, size in sizes.items():
        local = name.split(".", 2)[2] if name.startswith(("layers.", "mtp.")) else name
        split, dim, grain = _share(local, shape, kernels)
        unpacked = local == "attn.wo_a.weight" and not kernels.fp8_wo_a
        for stored_name, (stored, stored_size) in published(name, size, fp8_experts=fp8_experts).items():  # fmt: skip
            kept = next((kind for end, kind in _KEPT.items() if local.endswith(end)), stored)
            if stored == "F8_E8M0":
                # fp4 scales stay as they are; fp8 ones become float32, or nothing where unpacked.
                kept = stored if made[-1].stored == "I8" else "" if unpacked else "F32"
            elif unpacked:
                kept = "BF16"
            made.append(
                Tensor(
                    name=stored_name, shape=stored_size, stored=stored, kept=kept, part=_part(local),
                    split=split, extent=0 if split is Split.WHOLE else size[dim], grain=grain,
                )
            )  # fmt: skip
    return made


@functools.cache
def _part(local: str) -> str:
    return next(part for held, part in _PARTS.items() if held in local)


def _share(local: str, shape: V4Shape, kernels: Kernels) -> tuple[Split, int, int]:
    """How ranks share a tensor: kind, dimension, smallest piece of it."""
    if ".experts." in local:
        return Split.EXPERTS, int(".w2." in local), kernels.expert_grain
    if "shared_experts" in local:
        return Split.SHARED, int(".w2." in local), FP8_BLOCK
    shared = {
        "embed.weight": (Split.VOCAB, 0, 1),
        "head.weight": (Split.HEAD_VOCAB, 0, 1),
        "attn.wq_b.weight": (Split.ATTENTION, 0, shape.head_dim),
        "attn.wo_a.weight": (Split.ATTENTION, 0, shape.o_rank),
        "attn.wo_b.weight": (Split.ATTENTION, 1, shape.o_rank),
    }
    return shared.get(local, (Split.WHOLE, 0, 1))


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


def kv(config: Config) -> CompressedKv:
    """The target's pools."""
    shape = shape_of(config)
    return CompressedKv(
        ratios=shape.ratios,
        head_dim=shape.layer.head_dim,
        index_dim=shape.index_dim,
        window=shape.layer.window,
    )


def rope_bytes(config: Config, positions: int) -> int:
    """Tables of rotary angles: one complex and one real table for each kind of layer."""
    shape = shape_of(config)
    kinds = len({ratio > 0 for ratio in shape.ratios})
    complex_tables = kinds if kinds == 2 or "dspark_block_size" not in config else 2
    return positions * shape.layer.rope_dim * 4 * (complex_tables + kinds)
