"""Sizes and constants of a V4 target, from ``config.json``.

Its layers share the drafter's sizes (:class:`~dspark_sglang.layouts.v4.shape.V4Shape`); here is
what only target layers have: compression of keys, the indexer, hashed routing and YaRN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.v4.shape import V4Shape

Config = Mapping[str, Any]


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
        shape = V4Shape.from_config({**config, **_NO_DRAFTER})
        ratios = _ratios(config, shape.target_depth)
        indexed = 4 in ratios
        hashed = _integer(config, "num_hash_layers", 0, default=0)
        if hashed > shape.target_depth:
            raise _wrong("num_hash_layers", hashed, f"at most {shape.target_depth} layers")
        yarn = config.get("rope_scaling")
        try:
            stretched = Yarn.from_config(yarn)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            expected = "null, or factor, beta_fast, beta_slow, original_max_position_embeddings"
            raise _wrong("rope_scaling", yarn, expected) from error
        theta = config.get("compress_rope_theta", shape.rope_theta)
        if not isinstance(theta, (int, float)) or isinstance(theta, bool) or theta <= 1:
            raise _wrong("compress_rope_theta", theta, "a number above 1")
        return cls(
            layer=shape,
            ratios=ratios,
            hashed=hashed,
            index_heads=_integer(config, "index_n_heads", 1, default=None if indexed else 1),
            index_dim=_integer(config, "index_head_dim", 1, default=None if indexed else 1),
            index_topk=_integer(config, "index_topk", 1, default=None if indexed else 1),
            compress_theta=float(theta),
            yarn=stretched,
        )


def _wrong(key: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(f"The configuration says {key} {value!r}.", expected=expected, fix=_FIX)


def _integer(config: Config, key: str, low: int, *, default: int | None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(
            f"The configuration has no {key}.", expected=f"an integer of at least {low}", fix=_FIX
        )
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise _wrong(key, value, f"an integer of at least {low}")
    return value


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
