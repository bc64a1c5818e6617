"""A new dense drafter for a target: its configuration, and writing it in the published layouts.

Written are ``Qwen3DSparkModel`` (for SGLang's builtin DSPARK and for ours), ``Gemma4DSparkModel``
(DeepSpec's layout; SGLang 0.5.23 has no class for it) and, for a drafter without heads,
``DFlashDraftModel`` (for SGLang's DFLASH). What can be read is in
:mod:`dspark_sglang.layouts.dense.read`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save

from dspark_sglang.artifacts import DRAFT_VOCAB_FILE, DraftVocabArtifact, write_bytes
from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.dense.config import (
    GEMMA4,
    DenseConfig,
    DrafterSpec,
    parse_drafter_config,
)
from dspark_sglang.layouts.dense.read import DFLASH, read_existing

WEIGHTS = "model.safetensors"


def spread_layers(count: int, wanted: int = 5) -> tuple[int, ...]:
    """``wanted`` layers of ``count``, from the third to the last but one."""
    low, high = min(2, count - 1), max(0, count - 2)
    if high <= low:
        return (high,)
    picks = [low + round(i * (high - low) / (wanted - 1)) for i in range(wanted)]
    return tuple(sorted(set(picks)))


def find_mask_token(tokenizer: Any, vocab_size: int) -> int:
    """A special token that no text contains: reserved or unused, else padding, else the last.

    The drafter reads its embedding in rows 2..gamma.
    """
    added = sorted(tokenizer.added_tokens_encoder.items(), key=lambda item: item[1])
    for wanted in ("mask", "reserved", "unused", "reponame", "pad", "fim"):
        for text, token in added:
            if wanted in text.lower() and token < vocab_size:
                return int(token)
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else vocab_size - 1)


def drafter_config(
    spec: DrafterSpec, target: Any, tokenizer: Any, start: str = ""
) -> dict[str, Any]:
    """``config.json`` of a new drafter for a target.

    Args:
        spec: what to make.
        target: the target's Hugging Face text configuration.
        tokenizer: the target's.
        start: a drafter's directory, which decides what ``spec`` leaves open and all widths.

    Raises:
        CheckpointError: a target layer or the mask token is outside the target, or ``start`` is of
            another layout.
    """
    given = read_existing(Path(start)).config if start else None
    if given is not None and given.gemma4 != (spec.layout == "gemma4"):
        layout = "gemma4" if given.gemma4 else "qwen3"
        raise CheckpointError(
            f"{start} has layers of layout {layout}.",
            expected=f"drafter.layout {spec.layout}",
            fix=f"Set drafter.layout to {layout}, or give another start.",
        )
    layers, vocab = int(target.num_hidden_layers), int(target.vocab_size)
    chosen = spec.target_layer_ids or (given.target_layer_ids if given else spread_layers(layers))
    mask = spec.mask_token_id
    if mask < 0:
        mask = given.mask_token_id if given else find_mask_token(tokenizer, vocab)
    outside = [i for i in chosen if not 0 <= i < layers]
    if outside or not 0 <= mask < vocab:
        raise CheckpointError(
            f"target_layer_ids {list(chosen)}, mask_token_id {mask}.",
            expected=f"layers 0 to {layers - 1} (SGLang cannot capture the embedding, -1) and a "
            f"token below {vocab}",
            fix="Correct drafter.target_layer_ids or drafter.mask_token_id in the config.",
        )
    heads = spec.markov_head != "none"
    from_anchor = spec.sample_from_anchor
    if from_anchor is None:
        from_anchor = heads and (given is None or given.sample_from_anchor)
    shape = _gemma4_shape if spec.layout == "gemma4" else _dense_shape
    return {
        **shape(spec, target, given),
        "hidden_size": int(target.hidden_size),
        "vocab_size": vocab,
        "num_hidden_layers": spec.layers,
        "num_target_layers": layers,
        "block_size": spec.gamma,
        "sample_from_anchor": from_anchor,
        "target_layer_ids": list(chosen),
        "mask_token_id": mask,
        "num_anchors": 512,  # DeepSpec's models want the key; nothing that serves reads it
        "enable_confidence_head": True,
        "confidence_head_with_markov": heads,
        "markov_rank": spec.markov_rank,
        "markov_head_type": spec.markov_head if heads else "vanilla",
        "rms_norm_eps": given.rms_norm_eps if given else float(_get(target, "rms_norm_eps", 1e-6)),
        "max_position_embeddings": int(_get(target, "max_position_embeddings", 8192)),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "layer_types": ["full_attention"] * spec.layers,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "bos_token_id": target.bos_token_id,
        "eos_token_id": target.eos_token_id,
    }


def _get(config: Any, name: str, default: Any) -> Any:
    """A value of a target's configuration; Gemma 4's raises for what differs between layers."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:
        value = config.to_dict().get(name)
    return default if value is None else value


def _rope(target: Any) -> dict[str, Any]:
    rope = _get(target, "rope_parameters", {})
    # Gemma keeps one set for each kind of layer.
    return dict(rope.get("full_attention") or rope)


def _kv_heads(spec: DrafterSpec, heads: int, usual: int) -> int:
    kv_heads = spec.kv_heads or usual
    if heads % kv_heads:
        raise CheckpointError(
            f"drafter.kv_heads is {kv_heads}.",
            expected=f"a divisor of the drafter's {heads} attention heads",
            fix="Correct it in the config.",
        )
    return kv_heads


def _dense_shape(spec: DrafterSpec, target: Any, given: DenseConfig | None) -> dict[str, Any]:
    heads = given.num_heads if given else int(target.num_attention_heads)
    theta = float(_rope(target).get("rope_theta") or _get(target, "rope_theta", 10000.0))
    theta = given.rope_theta if given else theta
    own = int(_get(target, "head_dim", int(target.hidden_size) // heads))
    usual = given.num_kv_heads if given else int(_get(target, "num_key_value_heads", heads))
    return {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "intermediate_size": given.intermediate_size if given else int(target.intermediate_size),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(spec, heads, usual),
        "head_dim": given.head_dim if given else own,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": spec.layers,
    }


def _gemma4_shape(spec: DrafterSpec, target: Any, given: DenseConfig | None) -> dict[str, Any]:
    if given is None:
        given = _gemma4_target(target)
    rope = {"rope_type": "default", "rope_theta": given.rope_theta}
    if given.rope_share < 1.0:
        rope |= {"rope_type": "proportional", "partial_rotary_factor": given.rope_share}
    kv_heads = _kv_heads(spec, given.num_heads, given.num_kv_heads)
    return {
        "architectures": [GEMMA4],
        "model_type": "gemma4_text",
        "intermediate_size": given.intermediate_size,
        "num_attention_heads": given.num_heads,
        "num_key_value_heads": kv_heads,
        "num_global_key_value_heads": kv_heads,
        "head_dim": given.head_dim,
        "global_head_dim": given.head_dim,
        "attention_k_eq_v": given.shared_kv,
        "rope_parameters": {"full_attention": rope},
        "hidden_activation": "gelu_pytorch_tanh",
        # The loss does not cap what is drafted, so nothing that serves this may.
        "final_logit_softcapping": None,
        "enable_moe_block": False,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
    }


def _gemma4_target(target: Any) -> DenseConfig:
    """The full-attention layers of a Gemma 4 target, as a drafter's configuration."""
    plain = target.to_dict()
    if not str(plain.get("model_type", "")).startswith("gemma4"):
        raise CheckpointError(
            f"The target's model_type is {plain.get('model_type')}.",
            expected="a Gemma 4 text model for drafter.layout gemma4",
            fix="Set drafter.layout to qwen3: SGLang runs those for every target.",
        )
    full = _get(target, "per_layer_config", {})
    kind = full["full_attention"] if full else target
    return parse_drafter_config(
        {
            **plain,
            "architectures": [GEMMA4],
            "global_head_dim": _get(kind, "head_dim", 0) or plain.get("global_head_dim"),
            "num_key_value_heads": kind.num_key_value_heads,
            "num_global_key_value_heads": kind.num_key_value_heads,
            **{"block_size": 1, "markov_rank": 1, "mask_token_id": 0, "target_layer_ids": [0]},
        }
    )


def dflash_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that SGLang's DFLASH wants for a drafter without heads.

    Raises:
        CheckpointError: the drafter predicts from the anchor's row, which DFLASH never reads.
    """
    if config.get("sample_from_anchor", True) or GEMMA4 in config["architectures"]:
        raise CheckpointError(
            "A drafter without heads predicts from the anchor, or has Gemma 4 layers.",
            expected="mask rows that predict their own positions, and Qwen 3 layers: SGLang's "
            "DFLASH runs nothing else",
            fix="Set drafter.sample_from_anchor to false and drafter.layout to qwen3.",
        )
    dropped = ("markov_", "enable_confidence", "confidence_head", "sample_from_anchor")
    kept = {key: value for key, value in config.items() if not key.startswith(dropped)}
    nested = {key: kept.pop(key) for key in ("target_layer_ids", "mask_token_id")}
    rows = int(config["block_size"]) + 1
    return kept | {"architectures": [DFLASH], "block_size": rows, "dflash_config": nested}


def write_drafter(
    directory: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    vocabulary: DraftVocabArtifact | None = None,
) -> None:
    """Write a drafter in bfloat16, each file all or nothing, weights first.

    ``vocabulary`` is written beside it; without one an earlier one there is removed. Without a Markov head it is written as a DFlash one, for SGLang's DFLASH algorithm.

    Raises:
        CheckpointError: the disk is full or the directory cannot be written.
    """
    if "markov_head.markov_w1.weight" not in tensors:
        config = dflash_config(config)
        tensors = {name: value for name, value in tensors.items() if "_head." not in name}
        vocabulary = None  # nothing that runs DFlash reads it
    stored = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in sorted(tensors.items())
    }
    metadata = {"format": "pt"}
    try:
        write_bytes(directory / WEIGHTS, save(stored, metadata))
        text = json.dumps(config, indent=1) + "\n"
        write_bytes(directory / "config.json", text.encode())
        if vocabulary is None:
            (directory / DRAFT_VOCAB_FILE).unlink(missing_ok=True)
        else:
            write_bytes(directory / DRAFT_VOCAB_FILE, msgspec.json.encode(vocabulary))
    except OSError as error:
        raise CheckpointError(
            f"{directory} cannot be written: {error.strerror}.",
            expected="space for the drafter",
            fix="Free some space and run the same command again.",
        ) from error
