"""Reading and writing drafter checkpoints in the published layouts.

Dense drafters (``Qwen3DSparkModel``, ``Gemma4DSparkModel``) and DFlash ones, which have the backbone and
no heads. What is written loads in SGLang's builtin and in ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from dspark_sglang.artifacts import write_bytes
from dspark_sglang.checkpoint import (
    DrafterConfig,
    check_tensors,
    parse_drafter_config,
    read_config,
    weight_files,
)
from dspark_sglang.errors import CheckpointError
from dspark_sglang.training.config import DrafterSpec

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


def drafter_config(spec: DrafterSpec, target: Any, tokenizer: Any) -> dict[str, Any]:
    """``config.json`` of a new dense drafter for a target.

    Args:
        spec: what to make.
        target: the target's Hugging Face text configuration.
        tokenizer: the target's.

    Raises:
        CheckpointError: a target layer or the mask token is outside the target.
    """
    layers, vocab = int(target.num_hidden_layers), int(target.vocab_size)
    chosen = tuple(spec.target_layer_ids) or spread_layers(layers)
    mask = spec.mask_token_id
    if mask < 0:
        mask = find_mask_token(tokenizer, vocab)
    outside = [i for i in chosen if not -1 <= i < layers]
    if outside or not 0 <= mask < vocab:
        raise CheckpointError(
            f"target_layer_ids {list(chosen)}, mask_token_id {mask}.",
            expected=f"layers -1 to {layers - 1} and a token below {vocab}",
            fix="Correct drafter.target_layer_ids or drafter.mask_token_id in the config.",
        )
    heads = int(target.num_attention_heads)
    rope = getattr(target, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # Gemma keeps one set for each kind of layer
    theta = float(rope.get("rope_theta") or getattr(target, "rope_theta", None) or 10000.0)
    positions = int(getattr(target, "max_position_embeddings", 8192))
    return {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "hidden_size": int(target.hidden_size),
        "vocab_size": vocab,
        "intermediate_size": int(target.intermediate_size),
        "num_attention_heads": heads,
        "num_key_value_heads": int(getattr(target, "num_key_value_heads", None) or heads),
        "head_dim": int(getattr(target, "head_dim", None) or target.hidden_size // heads),
        "num_hidden_layers": spec.layers,
        "num_target_layers": layers,
        "block_size": spec.gamma,
        "target_layer_ids": list(chosen),
        "mask_token_id": mask,
        "enable_confidence_head": True,
        "confidence_head_with_markov": spec.markov_head != "none",
        "markov_rank": spec.markov_rank,
        "markov_head_type": "vanilla" if spec.markov_head == "none" else spec.markov_head,
        "rms_norm_eps": float(getattr(target, "rms_norm_eps", 1e-6)),
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,
        "max_position_embeddings": positions,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "layer_types": ["full_attention"] * spec.layers,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": spec.layers,
        "bos_token_id": target.bos_token_id,
        "eos_token_id": target.eos_token_id,
    }


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a drafter under its published name, in float32.

    Raises:
        CheckpointError: no weights, or damaged ones.
    """
    tensors: dict[str, torch.Tensor] = {}
    try:
        for path in weight_files(directory):
            for name, value in load_file(path).items():
                tensors[name.removeprefix("model.")] = value.float()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{directory} cannot be read: {error}.",
            expected="complete safetensors weights",
            fix="Download the drafter again with `hf download`.",
        ) from error
    if "fc.weight" not in tensors:
        raise CheckpointError(
            f"{directory} holds no fc.weight.",
            expected="a DSpark or DFlash drafter (fc, hidden_norm, norm, layers.N.*)",
            fix="Give a drafter's directory as start, or leave it empty.",
        )
    return tensors


def read_drafter(directory: Path) -> tuple[DrafterConfig, dict[str, torch.Tensor]]:
    """Configuration and float32 tensors of a complete DSpark drafter.

    Raises:
        CheckpointError: damaged, incomplete, or of another architecture.
    """
    config = parse_drafter_config(read_config(directory, role="drafter"))
    check_tensors(directory, config)
    return config, read_tensors(directory)


def write_drafter(
    directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Write a drafter in bfloat16, each file all or nothing, weights first.

    Raises:
        CheckpointError: the disk is full or the directory cannot be written.
    """
    stored = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in sorted(tensors.items())
    }
    metadata = {"format": "pt"}
    try:
        write_bytes(directory / WEIGHTS, save(stored, metadata))
        text = json.dumps(config, indent=1) + "\n"
        write_bytes(directory / "config.json", text.encode())
    except OSError as error:
        raise CheckpointError(
            f"{directory} cannot be written: {error.strerror}.",
            expected="space for the drafter",
            fix="Free some space and run the same command again.",
        ) from error
