"""Every tensor of a published V4 checkpoint: name, dtype and shape, computed from ``config.json``.

Storage as published: fp8 e4m3 with one ue8m0 scale for 128 by 128 (``.scale`` beside ``.weight``),
routed experts as fp4 in bytes with one ue8m0 scale for 32 columns, float32 for hyper-connections,
sinks, position biases and routing biases, int64 tables of hashed layers, bfloat16 for the rest.

What the list rests on. The published indexes themselves could not be read here. It follows SGLang
0.5.23's loader (``models/deepseek_v4.py``, ``models/deepseek_v4_dspark.py``) and was compared with what
others published of the files' headers: a listing of V4-Pro's by pattern, with dtype and shape of
every tensor, 145,116 in all; and of V4-Flash-DSpark's 72,317 names, 4,705 under ``mtp.*``, the
latter counted by dtype. ``tests/unit/test_v4_names.py`` holds those facts. V4-Flash-0731 has the
names, dtypes and shapes of V4-Flash-DSpark. Of V4-Pro-DSpark no listing was found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.v4.shape import FP4_RUN, FP8_BLOCK, V4Shape
from dspark_sglang.layouts.v4.target import TargetShape
from dspark_sglang.layouts.v4.tensors import ALIASES, v4_tensors

Config = Mapping[str, Any]


class Stored(NamedTuple):
    """One stored tensor: dtype as safetensors calls it, and shape."""

    dtype: str
    shape: tuple[int, ...]


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
_SCALES = (".scale", ".weight_scale_inv")


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
    scale = name.removesuffix("weight") + "scale"
    kind = quantisation(name, fp8_experts=fp8_experts)
    if kind == "fp4":
        rows, columns = size
        return {
            name: Stored("I8", (rows, columns // 2)),
            scale: Stored("F8_E8M0", (rows, columns // FP4_RUN)),
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


class Mapped(NamedTuple):
    """Names of a checkpoint, sorted out."""

    #: Stored name to the plain tensor that it is (part of); a scale maps to its weight.
    mapped: dict[str, str]
    #: Stored names that nothing of the layout is called.
    unknown: list[str]
    #: Plain tensors without a stored one.
    missing: list[str]


def map_names(names: Iterable[str], config: Config) -> Mapped:
    """Sort out the names of a checkpoint, plain or as published, aliases of the Markov head included.

    Raises:
        CheckpointError: the configuration is not one of V4's.
    """
    wanted = plain_bundle(config)
    mapped: dict[str, str] = {}
    unknown: list[str] = []
    for name in names:
        plain = plain_name(name)
        if plain in wanted and (plain == usual(name) or quantisation(plain) is not None):
            mapped[name] = plain
        else:
            unknown.append(name)
    held = {plain for name, plain in mapped.items() if usual(name) == plain}
    return Mapped(mapped, sorted(unknown), [name for name in wanted if name not in held])


def usual(name: str) -> str:
    """A stored name as V4 checkpoints usually have it (V4.1 calls the Markov head's otherwise)."""
    for alias, meant in ALIASES.items():
        name = name.replace(alias, meant)
    return name


def plain_name(name: str) -> str:
    """The plain tensor that a stored one is part of: a scale's weight, or the tensor itself."""
    for suffix in _SCALES:
        if name.endswith(suffix) and not name.startswith("hc_"):
            return usual(name.removesuffix(suffix) + ".weight")
    return usual(name)


def has_drafter(config: Config) -> bool:
    """Whether a configuration has ``dspark_*`` keys.

    Raises:
        CheckpointError: it has some of them only.
    """
    keys = (
        "dspark_block_size",
        "dspark_markov_rank",
        "dspark_noise_token_id",
        "dspark_target_layer_ids",
    )
    given = [key for key in keys if config.get(key) is not None]
    if given and len(given) < len(keys):
        lacking = next(key for key in keys if key not in given)
        raise CheckpointError(
            f"config.json has {given[0]} and no {lacking}.",
            expected="all four dspark_* keys (block size, rank, noise token, target layers), or none",
            fix="Download config.json again.",
        )
    return bool(given)


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
