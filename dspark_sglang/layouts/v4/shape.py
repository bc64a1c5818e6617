"""Sizes and constants of a V4 drafter, from the ``config.json`` of the checkpoint that holds it.

The draft layers share the target's sizes; the ``dspark_*`` keys say the rest. There are as many
draft layers as target layers read. Source: SGLang 0.5.23, ``models/deepseek_v4_dspark.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspark_sglang.errors import CheckpointError

#: Weights that share a scale in the published files: a side of a block of fp8, and a run of fp4.
FP8_BLOCK, FP4_RUN = 128, 32

Config = Mapping[str, Any]

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
        for key, value in _FIXED:
            if config.get(key, value) != value:
                raise _wrong(key, config[key], repr(value))
        # The drafter may have fewer experts than the target.
        named = dict(config)
        for key in ("n_routed_experts", "num_experts_per_tok"):
            named[key] = config.get(f"dspark_{key}") or config.get(key)
        if "head_dim" not in named and "qk_nope_head_dim" in named:
            nope, rope = (_integer(config, f"qk_{part}_head_dim") for part in ("nope", "rope"))
            named["head_dim"] = nope + rope
        window = "sliding_window" if config.get("sliding_window") is not None else "window_size"
        limit = config.get("swiglu_limit")
        shape = cls(
            **{field: _integer(named, key, low) for field, key, low in _INTEGERS},
            target_layers=_layer_ids(config),
            window=_integer(config, window, 1, default=128),
            rope_theta=_number(_rope(config), "rope_theta", 10000.0),
            route_scale=_number(config, "routed_scaling_factor"),
            normalise=_flag(config, "norm_topk_prob"),
            swiglu_limit=None if limit is None else _number(config, "swiglu_limit"),
            sinkhorn_iters=_integer(config, "hc_sinkhorn_iters", 1, default=20),
            hc_eps=_number(config, "hc_eps", 1e-6),
            eps=_number(config, "rms_norm_eps", 1e-6),
            confidence_with_markov=_flag(config, "confidence_head_with_markov"),
            sample_from_anchor=_flag(config, "sample_from_anchor"),
        )
        _check(shape)
        return shape


def _wrong(key: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"The configuration says {key} {value!r}.",
        expected=expected,
        fix="Use the config.json of a DeepSeek-V4 checkpoint with a DSpark drafter.",
    )


def _missing(key: str) -> CheckpointError:
    return CheckpointError(
        f"The configuration has no {key}.",
        expected="a DeepSeek-V4 checkpoint with a DSpark drafter (dspark_* keys, mtp.* tensors)",
        fix="Use its config.json; the dense layouts are read by dspark_sglang.checkpoint.",
    )


def _integer(config: Config, key: str, low: int = 1, *, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise _missing(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise _wrong(key, value, f"an integer of at least {low}")
    return value


def _number(config: Config, key: str, default: float | None = None) -> float:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise _missing(key)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 < value < float("inf"):
        raise _wrong(key, value, "a positive number")
    return float(value)


def _flag(config: Config, key: str) -> bool:
    value = config.get(key)
    value = True if value is None else value
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false")
    return value


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
    if value is None:
        raise _missing(key)
    depth = _integer(config, "num_hidden_layers")
    good = isinstance(value, (list, tuple)) and len(value) > 0
    if not good or not all(type(i) is int and 0 <= i < depth for i in value):
        raise _wrong(key, value, f"a list of layers in 0..{depth - 1}")
    return tuple(value)


def _check(shape: V4Shape) -> None:
    """Bounds that involve two fields."""
    if shape.mask_token >= shape.vocab:
        raise _wrong("dspark_noise_token_id", shape.mask_token, f"a token below {shape.vocab}")
    if shape.rope_dim % 2 or shape.rope_dim > shape.head_dim:
        raise _wrong(
            "qk_rope_head_dim", shape.rope_dim, f"an even number up to head_dim {shape.head_dim}"
        )
    if shape.heads % shape.o_groups:
        raise _wrong("o_groups", shape.o_groups, f"a divisor of {shape.heads} attention heads")
    if shape.active > shape.experts:
        raise _wrong("num_experts_per_tok", shape.active, f"at most {shape.experts} experts")
