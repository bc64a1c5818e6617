"""What a DeepSeek-V4 ``config.json`` says: which release it is, and the sizes of target and drafter.

The draft layers share the target's sizes; the ``dspark_*`` keys say the rest. There are as many draft layers as target
layers read. Only target layers have compression of keys, the indexer, hashed routing and YaRN. Source: SGLang 0.5.23,
``models/deepseek_v4.py`` and ``models/deepseek_v4_dspark.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.base import BUNDLED_KEYS
from dspark_sglang.layouts.reading import flag, integer, number, wrong

#: Weights that share a scale in the published files: a side of a block of fp8, and a run of fp4.
FP8_BLOCK, FP4_RUN = 128, 32

Config = Mapping[str, Any]

ARCHITECTURE = "DeepseekV4ForCausalLM"
#: Depth and width to the releases that have them.
_RELEASES = {
    (43, 4096): "DeepSeek-V4-Flash (DSpark, 0731)",
    (61, 7168): "DeepSeek-V4-Pro (DSpark, 0813)",
}

#: Required integers: field, configuration key, smallest value.
_INTEGERS = (
    ("gamma", "dspark_block_size", 1),
    ("rank", "dspark_markov_rank", 1),
    ("mask_token", "dspark_noise_token_id", 0),
    ("hidden", "hidden_size", 1),
    ("vocab", "vocab_size", 1),
    ("target_depth", "num_hidden_layers", 1),
    ("heads", "num_attention_heads", 1),
    ("head_dim", "head_dim", 1),
    ("rope_dim", "qk_rope_head_dim", 2),
    ("q_rank", "q_lora_rank", 1),
    ("o_rank", "o_lora_rank", 1),
    ("o_groups", "o_groups", 1),
    ("experts", "n_routed_experts", 1),
    ("active", "num_experts_per_tok", 1),
    ("shared", "n_shared_experts", 1),
    ("expert_width", "moe_intermediate_size", 1),
    ("streams", "hc_mult", 1),
)
#: What this code implements, where a configuration may say otherwise; absent means the same.
_FIXED = (
    ("scoring_func", "sqrtsoftplus"),
    ("topk_method", "noaux_tc"),
    ("hidden_act", "silu"),
    ("num_key_value_heads", 1),
    ("dspark_markov_head_type", "vanilla"),
    ("enable_confidence_head", True),
    # These two are V4.1.
    ("hc_pre_from_prev_sublayer", False),
    ("q_head_norm", True),
)


def release(config: Config) -> str:
    """The releases that a configuration may be of, in words; drafter or not.

    Raises:
        CheckpointError: it is not a V4, or a V4.1.
    """
    text = config.get("text_config")
    text = {**config, **text} if isinstance(text, Mapping) else config
    names = [str(name) for name in config.get("architectures") or ()]
    engram = text.get("engram_layer_ids")
    if (
        engram
        or text.get("hc_pre_from_prev_sublayer")
        or "v41" in str(config.get("model_type", "")).lower()
        or any("V41" in name for name in names)
    ):
        says = f"Engram at layers {engram}" if engram else "other hyper-connections"
        reads = text.get("dspark_target_layer_ids")
        block = text.get("dspark_block_size")
        raise CheckpointError(
            f"config.json is that of a DeepSeek-V4.1 ({says}; drafter of block {block} at layers {reads}).",
            expected="a DeepSeek-V4: compress ratios 0, 4 and 128, drafter states read after a layer",
            fix="Serve it with SGLang's builtin (DSPARK_PLUGIN=off); this layout has no Engram, and "
            "V4.1's drafter reads what enters a layer.",
        )
    if ARCHITECTURE not in names:
        raise CheckpointError(
            f"config.json names {', '.join(names) or 'no architecture'}.",
            expected=ARCHITECTURE,
            fix="Use a DeepSeek-V4 checkpoint; drafters of other targets have directories of their own.",
        )
    depth, hidden = config.get("num_hidden_layers"), config.get("hidden_size")
    other = f"DeepSeek-V4 of {depth} layers"
    if isinstance(depth, int) and isinstance(hidden, int):
        return _RELEASES.get((depth, hidden), other)
    return other


def has_drafter(config: Config) -> bool:
    """Whether a configuration has ``dspark_*`` keys.

    Raises:
        CheckpointError: it has some of them only.
    """
    given = [key for key in BUNDLED_KEYS if config.get(key) is not None]
    if given and len(given) < len(BUNDLED_KEYS):
        lacking = next(key for key in BUNDLED_KEYS if key not in given)
        raise CheckpointError(
            f"config.json has {given[0]} and no {lacking}.",
            expected="all four dspark_* keys (block size, rank, noise token, target layers), or none",
            fix="Download config.json again.",
        )
    return bool(given)


@dataclass(frozen=True, slots=True, kw_only=True)
class V4Shape:
    """Sizes of a V4 drafter."""

    #: Drafted tokens a round.
    gamma: int
    #: Rank of the Markov head.
    rank: int
    mask_token: int
    #: Target layers read; also the number of draft layers.
    target_layers: tuple[int, ...]
    #: Layers of the target.
    target_depth: int
    hidden: int
    vocab: int
    heads: int
    head_dim: int
    #: Last dimensions of a head that RoPE turns.
    rope_dim: int
    q_rank: int
    #: Output projection: heads are split in ``o_groups``, each projected to ``o_rank``.
    o_rank: int
    o_groups: int
    #: Context positions a block sees.
    window: int
    rope_theta: float
    experts: int
    active: int
    shared: int
    expert_width: int
    route_scale: float
    #: Whether the weights of the active experts are made to sum to one.
    normalise: bool
    #: Clamp of the experts' gate and up projections; None: no clamp.
    swiglu_limit: float | None
    #: Residual streams.
    streams: int
    sinkhorn_iters: int
    hc_eps: float
    eps: float
    confidence_with_markov: bool
    sample_from_anchor: bool = True

    @property
    def layers(self) -> int:
        """Draft layers."""
        return len(self.target_layers)

    @property
    def rows(self) -> int:
        """Input rows a block."""
        return self.gamma + (0 if self.sample_from_anchor else 1)

    @classmethod
    def from_config(cls, config: Config) -> V4Shape:
        """Read a checkpoint's configuration.

        Raises:
            CheckpointError: a field is missing, of the wrong type or out of range, or asks for
                what is not implemented (V4.1, another router or Markov head).
        """
        config = {key: value for key, value in config.items() if value is not None}
        for key, value in _FIXED:
            if config.get(key, value) != value:
                raise wrong(key, config[key], repr(value))
        # The drafter may have fewer experts than the target.
        named = dict(config)
        for key in ("n_routed_experts", "num_experts_per_tok"):
            named[key] = config.get(f"dspark_{key}") or config.get(key)
        if "head_dim" not in named and "qk_nope_head_dim" in named:
            nope, rope = (integer(config, f"qk_{part}_head_dim") for part in ("nope", "rope"))
            named["head_dim"] = nope + rope
        window = "sliding_window" if "sliding_window" in config else "window_size"
        shape = cls(
            **{field: integer(named, key, low) for field, key, low in _INTEGERS},
            target_layers=_layer_ids(config),
            window=integer(config, window, 1, default=128),
            rope_theta=number(_rope(config), "rope_theta", 10000.0),
            route_scale=number(config, "routed_scaling_factor"),
            normalise=flag(config, "norm_topk_prob"),
            swiglu_limit=number(config, "swiglu_limit") if "swiglu_limit" in config else None,
            sinkhorn_iters=integer(config, "hc_sinkhorn_iters", 1, default=20),
            hc_eps=number(config, "hc_eps", 1e-6),
            eps=number(config, "rms_norm_eps", 1e-6),
            confidence_with_markov=flag(config, "confidence_head_with_markov"),
            sample_from_anchor=flag(config, "sample_from_anchor"),
        )
        _check(shape)
        return shape


def _rope(config: Config) -> Config:
    """Where ``rope_theta`` is: at the top, or in ``rope_parameters`` (its ``main`` part)."""
    nested = config.get("rope_parameters")
    if config.get("rope_theta") is not None or not isinstance(nested, Mapping):
        return config
    main = nested.get("main", nested)
    return main if isinstance(main, Mapping) else config


def _layer_ids(config: Config) -> tuple[int, ...]:
    key = "dspark_target_layer_ids"
    value = config.get(key)
    depth = integer(config, "num_hidden_layers")
    given = value if isinstance(value, (list, tuple)) else ()
    if not given or not all(type(i) is int and 0 <= i < depth for i in given):
        raise wrong(key, value, f"a list of layers in 0..{depth - 1}")
    return tuple(given)


def _check(shape: V4Shape) -> None:
    """Bounds that involve two fields."""
    if shape.mask_token >= shape.vocab:
        raise wrong("dspark_noise_token_id", shape.mask_token, f"a token below {shape.vocab}")
    if shape.rope_dim % 2 or shape.rope_dim > shape.head_dim:
        raise wrong(
            "qk_rope_head_dim", shape.rope_dim, f"an even number up to head_dim {shape.head_dim}"
        )
    if shape.heads % shape.o_groups:
        raise wrong("o_groups", shape.o_groups, f"a divisor of {shape.heads} attention heads")
    if shape.active > shape.experts:
        raise wrong("num_experts_per_tok", shape.active, f"at most {shape.experts} experts")


@dataclass(frozen=True, slots=True)
class Yarn:
    """``rope_scaling`` of a configuration."""

    factor: float
    beta_fast: float
    beta_slow: float
    #: Positions of the context before it was stretched.
    original: int

    @classmethod
    def from_config(cls, scaling: Mapping[str, Any] | None) -> Yarn | None:
        """None without scaling, or for a factor of one."""
        if not scaling or float(scaling.get("factor", 1)) == 1.0:
            return None
        return cls(
            factor=float(scaling["factor"]),
            beta_fast=float(scaling.get("beta_fast", 32)),
            beta_slow=float(scaling.get("beta_slow", 1)),
            original=int(scaling["original_max_position_embeddings"]),
        )


#: Keys are compressed by these; 0: a layer that sees its window only.
RATIOS = (0, 4, 128)
#: So that a checkpoint without a drafter has a V4Shape too; no size of a target layer depends on it.
_NO_DRAFTER = {
    "dspark_block_size": 1,
    "dspark_markov_rank": 1,
    "dspark_noise_token_id": 0,
    "dspark_target_layer_ids": [0],
    "dspark_n_routed_experts": None,
    "dspark_num_experts_per_tok": None,
}
_FIX = "Use the config.json of a published DeepSeek-V4 checkpoint."


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetShape:
    """Sizes of a V4 target."""

    #: What target layers share with the drafter's; its ``dspark_*`` fields say nothing.
    layer: V4Shape
    #: Compression of each layer's keys.
    ratios: tuple[int, ...]
    #: First layers, whose experts a table chooses by token.
    hashed: int
    index_heads: int
    index_dim: int
    #: Compressed blocks that the indexer chooses (layers of ratio 4).
    index_topk: int
    #: Base of the frequencies of layers with compressed keys.
    compress_theta: float
    #: Of layers with compressed keys; the others are never stretched.
    yarn: Yarn | None

    @property
    def depth(self) -> int:
        """Layers."""
        return len(self.ratios)

    @classmethod
    def from_config(cls, config: Config) -> TargetShape:
        """Read a checkpoint's configuration; ``dspark_*`` keys are not needed.

        Raises:
            CheckpointError: a field is missing, of the wrong type or out of range, or asks for
                what is not implemented (V4.1, another router, an unknown compress ratio).
        """
        config = {key: value for key, value in config.items() if value is not None}
        shape = V4Shape.from_config({**config, **_NO_DRAFTER})
        ratios = _ratios(config, shape.target_depth)
        indexed = 4 in ratios
        hashed = integer(config, "num_hash_layers", 0, default=0)
        if hashed > shape.target_depth:
            raise wrong("num_hash_layers", hashed, f"at most {shape.target_depth} layers")
        yarn = config.get("rope_scaling")
        try:
            stretched = Yarn.from_config(yarn)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            expected = "null, or factor, beta_fast, beta_slow, original_max_position_embeddings"
            raise wrong("rope_scaling", yarn, expected) from error
        return cls(
            layer=shape,
            ratios=ratios,
            hashed=hashed,
            index_heads=integer(config, "index_n_heads", 1, default=None if indexed else 1),
            index_dim=integer(config, "index_head_dim", 1, default=None if indexed else 1),
            index_topk=integer(config, "index_topk", 1, default=None if indexed else 1),
            compress_theta=number(config, "compress_rope_theta", shape.rope_theta),
            yarn=stretched,
        )


def _ratios(config: Config, depth: int) -> tuple[int, ...]:
    """One for each target layer; the list goes on with those of ``mtp.*``, which are 0."""
    ratios = config.get("compress_ratios")
    if not isinstance(ratios, (list, tuple)) or len(ratios) < depth:
        found = "no list" if not isinstance(ratios, (list, tuple)) else f"{len(ratios)} entries"
        raise CheckpointError(
            f"compress_ratios has {found}.", expected=f"one for each of {depth} layers", fix=_FIX
        )
    unknown = [ratio for ratio in ratios if ratio not in RATIOS or isinstance(ratio, bool)]
    if unknown:
        raise CheckpointError(
            f"compress_ratios holds {unknown[0]!r} (layer {list(ratios).index(unknown[0])}).",
            expected="0 (window only), 4 (with indexer) or 128",
            fix=f"{_FIX} Ratios of 1 and 2 are V4.1's, which this layout does not have.",
        )
    if any(ratios[depth:]):
        raise CheckpointError(
            f"compress_ratios ends in {list(ratios[depth:])}.",
            expected=f"zeros after the {depth} target layers: draft layers see a window only",
            fix=_FIX,
        )
    return tuple(ratios[:depth])
