"""Every tensor of a V4 checkpoint: name, type and shape, computed from ``config.json``.

Storage as published: fp8 e4m3 with one ue8m0 scale for 128 by 128 (``.scale`` beside ``.weight``),
routed experts as fp4 in bytes with one ue8m0 scale for 32 columns, float32 for hyper-connections,
sinks, position biases and routing biases, int64 tables of hashed layers, bfloat16 for the rest.

What the list rests on. The published indexes themselves could not be read here. It follows SGLang
0.5.23's loader (``models/deepseek_v4.py``, ``models/deepseek_v4_dspark.py``) and was compared with what
others published of the files' headers: a listing of V4-Pro's by pattern, with dtype and shape of
every tensor, 145,116 in all; and of V4-Flash-DSpark's 72,317 names, 4,705 under ``mtp.*``, the
latter counted by dtype. ``tests/layouts/test_v4_names.py`` holds those facts. V4-Flash-0731 has the
names, dtypes and shapes of V4-Flash-DSpark. Of V4-Pro-DSpark no listing was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_sglang.checkpoint import Tensor
from dspark_sglang.layouts.base import FLOATS, Stored
from dspark_sglang.layouts.v4.config import FP4_RUN, FP8_BLOCK, TargetShape, V4Shape, has_drafter

Config = Mapping[str, Any]

#: How the Markov head's matrices may also be called (V4.1 does).
_ALIASES = {
    ".markov_head.embed.": ".markov_head.markov_w1.",
    ".markov_head.head.": ".markov_head.markov_w2.",
}
#: How a scale may also be called.
_SCALE_ALIAS = ".weight_scale_inv"
#: Kept in float32, by the end of the name or what it holds.
_FLOAT32 = ("attn_sink", ".ape", "gate.bias")
#: Linear weights of a layer that are fp8.
_FP8 = (
    "attn.wq_a",
    "attn.wq_b",
    "attn.wkv",
    "attn.wo_a",
    "attn.wo_b",
    "attn.indexer.wq_b",
    "ffn.shared_experts.w1",
    "ffn.shared_experts.w2",
    "ffn.shared_experts.w3",
    "main_proj",
    "e_proj",
    "h_proj",
)


def v4_tensors(shape: V4Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor under ``mtp.*`` and its shape."""
    hidden, streams = shape.hidden, shape.streams
    shapes: dict[str, tuple[int, ...]] = {
        "mtp.0.main_proj.weight": (hidden, shape.layers * hidden),
        "mtp.0.main_norm.weight": (hidden,),
    }
    for layer in range(shape.layers):
        own = _attention(shape) | _experts(shape)
        for part in ("attn", "ffn"):
            mixes = (2 + streams) * streams
            own |= {
                f"{part}_norm.weight": (hidden,),
                f"hc_{part}_fn": (mixes, streams * hidden),
                f"hc_{part}_base": (mixes,),
                f"hc_{part}_scale": (3,),
            }
        shapes |= {f"mtp.{layer}.{name}": size for name, size in own.items()}
    features = hidden + (shape.rank if shape.confidence_with_markov else 0)
    last = {
        "norm.weight": (hidden,),
        "hc_head_fn": (streams, streams * hidden),
        "hc_head_base": (streams,),
        "hc_head_scale": (1,),
        "markov_head.markov_w1.weight": (shape.vocab, shape.rank),
        "markov_head.markov_w2.weight": (shape.vocab, shape.rank),
        "confidence_head.proj.weight": (1, features),
    }
    return shapes | {f"mtp.{shape.layers - 1}.{name}": size for name, size in last.items()}


def _attention(shape: V4Shape) -> dict[str, tuple[int, ...]]:
    width, grouped = shape.heads * shape.head_dim, shape.o_groups * shape.o_rank
    return {
        "attn.wq_a.weight": (shape.q_rank, shape.hidden),
        "attn.q_norm.weight": (shape.q_rank,),
        "attn.wq_b.weight": (width, shape.q_rank),
        "attn.wkv.weight": (shape.head_dim, shape.hidden),
        "attn.kv_norm.weight": (shape.head_dim,),
        "attn.attn_sink": (shape.heads,),
        "attn.wo_a.weight": (grouped, width // shape.o_groups),
        "attn.wo_b.weight": (shape.hidden, grouped),
    }


def _experts(shape: V4Shape) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "ffn.gate.weight": (shape.experts, shape.hidden),
        "ffn.gate.bias": (shape.experts,),
    }
    widths = {f"experts.{expert}": shape.expert_width for expert in range(shape.experts)}
    widths["shared_experts"] = shape.shared * shape.expert_width
    for name, width in widths.items():
        shapes |= {
            f"ffn.{name}.w1.weight": (width, shape.hidden),
            f"ffn.{name}.w2.weight": (shape.hidden, width),
            f"ffn.{name}.w3.weight": (width, shape.hidden),
        }
    return shapes


def plain_target(shape: TargetShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the target, unquantised, and its shape."""
    sizes = shape.layer
    hidden, streams = sizes.hidden, sizes.streams
    found: dict[str, tuple[int, ...]] = {
        "embed.weight": (sizes.vocab, hidden),
        "head.weight": (sizes.vocab, hidden),
        "norm.weight": (hidden,),
        "hc_head_fn": (streams, streams * hidden),
        "hc_head_base": (streams,),
        "hc_head_scale": (1,),
    }
    common = _layer(sizes)
    for layer, ratio in enumerate(shape.ratios):
        own = dict(common)
        if layer < shape.hashed:
            del own["ffn.gate.bias"]
            own["ffn.gate.tid2eid"] = (sizes.vocab, sizes.active)
        if ratio:
            own |= _compressor("attn.compressor", sizes, sizes.head_dim, ratio)
        if ratio == 4:
            own |= {
                "attn.indexer.wq_b.weight": (shape.index_heads * shape.index_dim, sizes.q_rank),
                "attn.indexer.weights_proj.weight": (shape.index_heads, hidden),
            }
            own |= _compressor("attn.indexer.compressor", sizes, shape.index_dim, ratio)
        found |= {f"layers.{layer}.{name}": size for name, size in own.items()}
    return found


def plain_next_token(shape: TargetShape) -> dict[str, tuple[int, ...]]:
    """The next-token layer under ``mtp.0`` of a checkpoint without a DSpark drafter."""
    sizes = shape.layer
    hidden, streams = sizes.hidden, sizes.streams
    own = _layer(sizes) | {
        "e_proj.weight": (hidden, hidden),
        "h_proj.weight": (hidden, hidden),
        "enorm.weight": (hidden,),
        "hnorm.weight": (hidden,),
        "norm.weight": (hidden,),
        "hc_head_fn": (streams, streams * hidden),
        "hc_head_base": (streams,),
        "hc_head_scale": (1,),
    }
    return {f"mtp.0.{name}": size for name, size in own.items()}


def plain_bundle(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, unquantised: target, and drafter or next-token layer.

    Raises:
        CheckpointError: the configuration is not one of V4's.
    """
    target = TargetShape.from_config(config)
    found = plain_target(target)
    if has_drafter(config):
        return found | v4_tensors(V4Shape.from_config(config))
    return found | (plain_next_token(target) if config.get("num_nextn_predict_layers") else {})


def published_bundle(config: Config) -> dict[str, Stored]:
    """Every tensor of a checkpoint as published: names, dtypes, shapes, scales included.

    Raises:
        CheckpointError: the configuration is not one of V4's.
    """
    fp8_experts = config.get("expert_dtype") == "fp8"
    found: dict[str, Stored] = {}
    for name, size in plain_bundle(config).items():
        found |= published(name, size, fp8_experts=fp8_experts)
    return found


def published(name: str, size: tuple[int, ...], *, fp8_experts: bool = False) -> dict[str, Stored]:
    """The stored tensors of one plain tensor: itself, or quantised with its scale.

    Args:
        name: published name.
        size: plain shape.
        fp8_experts: routed experts are stored in fp8 blocks, not in fp4.
    """
    scale = scale_of(name)
    kind = quantisation(name, fp8_experts=fp8_experts)
    if kind == "fp4":
        rows, columns = size
        return {
            name: Stored("I8", (rows, -(-columns // 2))),
            scale: Stored("F8_E8M0", (rows, -(-columns // FP4_RUN))),
        }
    if kind == "fp8":
        rows, columns = size
        blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        return {name: Stored("F8_E4M3", size), scale: Stored("F8_E8M0", blocks)}
    return {name: Stored(plain_dtype(name), size)}


def quantisation(name: str, *, fp8_experts: bool = False) -> str | None:
    """``fp8``, ``fp4`` or None: how a plain tensor of this name is published."""
    if ".ffn.experts." in name:
        return "fp8" if fp8_experts else "fp4"
    stem = name.removesuffix(".weight")
    return "fp8" if stem != name and stem.endswith(tuple(f".{end}" for end in _FP8)) else None


def plain_dtype(name: str) -> str:
    """The published dtype of a tensor that is not quantised."""
    if name.endswith("tid2eid"):
        return "I64"
    if "hc_" in name or name.endswith(_FLOAT32):
        return "F32"
    return "BF16"


def usual(name: str) -> str:
    """A stored name as published checkpoints have it."""
    for alias, meant in _ALIASES.items():
        name = name.replace(alias, meant)
    if name.endswith(_SCALE_ALIAS):
        return name.removesuffix(_SCALE_ALIAS) + ".scale"
    return name


def expected(
    stored: Mapping[str, Tensor], plain: Mapping[str, tuple[int, ...]], config: Config
) -> dict[str, Stored]:
    """What a checkpoint of these plain tensors stores, where each may be plain or quantised.

    Args:
        stored: headers by usual name, which say what is quantised.
        plain: names and shapes.
        config: says how experts are.
    """
    fp8_experts = config.get("expert_dtype") == "fp8"
    found: dict[str, Stored] = {}
    for name, size in plain.items():
        header = stored.get(name)
        is_plain = header is None or header.dtype in (*FLOATS, "I64", "I32")
        if is_plain and scale_of(name) not in stored:
            found[name] = Stored(plain_dtype(name), size)
        else:
            found |= published(name, size, fp8_experts=fp8_experts)
    return found


def scale_of(name: str) -> str:
    """The name of a weight's scale."""
    return name.removesuffix("weight") + "scale"


def _layer(sizes: V4Shape) -> dict[str, tuple[int, ...]]:
    """What every layer has, by the name in it: a middle draft layer has nothing else."""
    found: dict[str, tuple[int, ...]] = {}
    for name, size in v4_tensors(sizes).items():
        local = name.split(".", 2)[2]
        if local.startswith(("attn", "ffn", "hc_attn", "hc_ffn")):
            found[local] = size
    return found


def _compressor(prefix: str, sizes: V4Shape, dim: int, ratio: int) -> dict[str, tuple[int, ...]]:
    """Twice as wide where blocks overlap (ratio 4)."""
    width = dim * (2 if ratio == 4 else 1)
    return {
        f"{prefix}.ape": (ratio, width),
        f"{prefix}.wkv.weight": (width, sizes.hidden),
        f"{prefix}.wgate.weight": (width, sizes.hidden),
        f"{prefix}.norm.weight": (dim,),
    }
