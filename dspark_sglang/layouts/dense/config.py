"""What a dense drafter's ``config.json`` says.

Keys are at the top level or nested under ``dflash_config`` / ``dspark_config``. Layers are Qwen 3's
(``Qwen3DSparkModel`` and its siblings) or Gemma 4's (``Gemma4DSparkModel``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.base import DrafterConfig, Obstacle, text_config

MARKOV_HEADS = ("vanilla", "gated", "rnn")
GEMMA4 = "Gemma4DSparkModel"
#: Architectures that SGLang has and this plugin reads.
SERVED = ("Qwen3DSparkModel", "LingDSparkModel", "DSparkDraftModel")
_BUILTIN = "Serve it with SGLang's builtin: DSPARK_PLUGIN=off."
MarkovKind = Literal["vanilla", "gated", "rnn", "none"]


class DenseConfig(DrafterConfig, frozen=True, kw_only=True):
    """What a dense drafter's ``config.json`` says."""

    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    #: Layers as Gemma 4's: sandwich norms, normed values, tanh-GELU, attention scale 1.
    gemma4: bool = False
    #: Gemma 4: values are the key projection, normed; there is no ``v_proj``.
    shared_kv: bool = False
    #: Gemma 4: share of each head that RoPE turns (its "proportional" type).
    rope_share: float = 1.0
    #: Stored norm gains are one less than what multiplies (``use_gemma_norm``).
    gain_minus_one: bool = False


class DrafterSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The drafter to make. Widths, heads and RoPE are the target's."""

    #: Drafted tokens a round.
    gamma: int = 5
    #: Draft layers.
    layers: int = 2
    #: Key and value heads. 0: as the target. More let a block row read more of the features of the
    #: position before it, which is what its first prediction lives on.
    kv_heads: int = 0
    #: ``qwen3``: what SGLang runs, for any target. ``gemma4``: DeepSpec's Gemma 4 layers, for a
    #: Gemma 4 target served elsewhere (SGLang 0.5.23 has no class for them).
    layout: Literal["qwen3", "gemma4"] = "qwen3"
    #: Whether the anchor's row predicts the first token, so that gamma rows do. False is DFlash's
    #: convention: gamma + 1 rows, each mask row predicts its own position. Unset: as ``start``
    #: has it, else true except with ``markov_head: none``.
    sample_from_anchor: bool | None = None
    #: ``none`` trains the parallel backbone alone (DFlash).
    markov_head: MarkovKind = "vanilla"
    #: Rank of the Markov head.
    markov_rank: int = 64
    #: Target layers read (outputs of those decoder layers). Empty: as ``start`` reads, else five,
    #: spread from the third layer to the last but one.
    target_layer_ids: tuple[int, ...] = ()
    #: Token whose embedding fills rows 2..gamma. Negative: as in ``start``, else an unused special
    #: token is looked up.
    mask_token_id: int = -1
    #: Draft only so many tokens, the most frequent ones the target wrote; 0: the whole vocabulary.
    #: Unset: the tokens ``start`` drafts.
    draft_vocabulary: int | None = None


def _lookup(config: Mapping[str, Any], key: str) -> Any:
    for section in ("dspark_config", "dflash_config"):
        nested = config.get(section)
        if isinstance(nested, Mapping) and nested.get(key) is not None:
            return nested[key]
    return config.get(key)


def _require(config: Mapping[str, Any], key: str) -> Any:
    value = _lookup(config, key)
    if value is None:
        raise CheckpointError(
            f"The drafter's config.json has no {key}.",
            expected="a DSpark drafter (block_size, markov_rank, mask_token_id, target_layer_ids)",
            fix="Use a DSpark checkpoint; DFlash or EAGLE drafters need their own algorithm.",
        )
    return value


def parse_drafter_config(config: Mapping[str, Any]) -> DenseConfig:
    """Read the DSpark fields of a configuration in any published layout.

    Raises:
        CheckpointError: a field is missing, of the wrong type or out of range.
    """
    try:
        return _parse(config)
    except (TypeError, ValueError, KeyError, ZeroDivisionError, AttributeError) as error:
        raise CheckpointError(
            f"The drafter's config.json holds a value of the wrong type: {error}.",
            expected="integers for sizes and a list of integers for target_layer_ids",
            fix="Download the drafter's config.json again.",
        ) from error


def _parse(config: Mapping[str, Any]) -> DenseConfig:
    rank = int(_require(config, "markov_rank"))
    head = str(_lookup(config, "markov_head_type") or "vanilla").lower()
    if head not in MARKOV_HEADS:
        raise CheckpointError(
            f"markov_head_type is {head!r}.",
            expected=" or ".join(MARKOV_HEADS),
            fix="Use a drafter with one of these heads.",
        )
    hidden = int(_require(config, "hidden_size"))
    parsed = DenseConfig(
        gamma=int(_require(config, "block_size")),
        markov_rank=rank,
        markov_head=head,
        mask_token_id=int(_require(config, "mask_token_id")),
        target_layer_ids=tuple(int(i) for i in _require(config, "target_layer_ids")),
        confidence_head=bool(config.get("enable_confidence_head", True)),
        confidence_with_markov=bool(config.get("confidence_head_with_markov", rank > 0)),
        hidden_size=hidden,
        vocab_size=int(_require(config, "vocab_size")),
        num_layers=int(_require(config, "num_hidden_layers")),
        intermediate_size=int(config.get("intermediate_size", 0)),
        num_target_layers=config.get("num_target_layers"),
        sample_from_anchor=bool(config.get("sample_from_anchor", True)),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        gain_minus_one=bool(config.get("use_gemma_norm", False)),
        **attention_shape(config),
    )
    if parsed.gamma < 1 or parsed.markov_rank < 1 or not parsed.target_layer_ids:
        raise CheckpointError(
            f"The drafter says block_size {parsed.gamma}, markov_rank {parsed.markov_rank}, "
            f"target_layer_ids {list(parsed.target_layer_ids)}.",
            expected="a block size and rank of at least 1 and at least one target layer",
            fix="Use a DSpark checkpoint.",
        )
    return parsed


def is_gemma4(config: Mapping[str, Any]) -> bool:
    """Whether a drafter's configuration says its layers are Gemma 4's."""
    return GEMMA4 in (config.get("architectures") or ())


def attention_shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """Heads and RoPE as fields of :class:`DenseConfig`, from a drafter's configuration."""
    heads = int(_require(config, "num_attention_heads"))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if not is_gemma4(config):
        return {
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": int(config.get("head_dim") or int(config["hidden_size"]) // heads),
            "rope_theta": float(theta),
        }
    shared = bool(config.get("attention_k_eq_v", False))
    proportional = rope.get("rope_type", "proportional") == "proportional"
    return {
        "num_heads": heads,
        "num_kv_heads": int(config["num_global_key_value_heads"]) if shared else kv_heads,
        "head_dim": int(config["global_head_dim"]),
        "rope_theta": float(theta if rope else 1e6),
        "rope_share": float(rope.get("partial_rotary_factor", 0.25)) if proportional else 1.0,
        "gemma4": True,
        "shared_kv": shared,
    }


def is_nemotron(config: Mapping[str, Any]) -> bool:
    """Whether a drafter is Nemotron 3.5's, whose Markov head is quantised, as SGLang recognises it by its fields."""
    quantised = config.get("quantization_config")
    return (
        isinstance(quantised, Mapping)
        and quantised.get("quant_algo") == "W4A16_NVFP4"
        and bool(config.get("has_embed_tokens"))
        and not config.get("has_lm_head")
    )


def unserved(config: Mapping[str, Any], target: Mapping[str, Any] | None = None) -> list[Obstacle]:
    """Every reason why SGLang 0.5.23 or this plugin cannot serve a stand-alone drafter.

    The target's last layer is never captured: the first request would end the server.

    Args:
        config: the drafter's ``config.json``.
        target: the target's, where it is known.

    Raises:
        CheckpointError: ``config`` is no DSpark drafter's.
    """
    found = []
    architectures = list(config.get("architectures") or ())
    if architectures and not set(architectures) & set(SERVED):
        builtin = "DSparkMiniMaxDraftModel" in architectures
        found.append(
            Obstacle(
                f"The drafter is a {' or '.join(architectures)}.",
                f"an architecture that this plugin serves ({', '.join(SERVED)})",
                _BUILTIN
                if builtin
                else "Train one for this target with drafter.layout qwen3, or serve this one with vLLM.",
            )
        )
    if is_nemotron(config):
        found.append(
            Obstacle(
                "The drafter's Markov head is quantised (Nemotron 3.5).", "plain floats", _BUILTIN
            )
        )
    if not config.get("enable_confidence_head", True):
        found.append(
            Obstacle("The drafter has no confidence head.", "one: it says what to verify", _BUILTIN)
        )
    read = parse_drafter_config(config).target_layer_ids
    layers = None if target is None else text_config(target).get("num_hidden_layers")
    other = "Train one with other drafter.target_layer_ids."
    if layers is not None and max(read) == int(layers) - 1:
        most = f"layers up to {int(layers) - 2}: SGLang does not capture the last one"
        found.append(Obstacle(f"The drafter reads target layers {list(read)}.", most, other))
    if min(read) < 0:
        least = "outputs of decoder layers (0 and up): SGLang cannot capture the embedding"
        found.append(Obstacle(f"The drafter reads target layers {list(read)}.", least, other))
    return found
