"""A tiny drafter and its target: configuration, tensors and files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from dspark_sglang.errors import DSparkError

FLAT: dict[str, Any] = {
    "block_size": 3,
    "markov_rank": 2,
    "markov_head_type": "vanilla",
    "mask_token_id": 15,
    "target_layer_ids": [1, 3],
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "hidden_size": 8,
    "vocab_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 5,
    "intermediate_size": 12,
    "num_target_layers": 5,
}
DSPARK_KEYS = ("block_size", "markov_rank", "markov_head_type", "mask_token_id", "target_layer_ids")
TARGET = {"hidden_size": 8, "vocab_size": 16, "num_hidden_layers": 5}

#: The tensors of FLAT, written out by hand.
SHAPES: dict[str, tuple[int, ...]] = {
    "fc.weight": (8, 16),
    "hidden_norm.weight": (8,),
    "norm.weight": (8,),
    "markov_head.markov_w1.weight": (16, 2),
    "markov_head.markov_w2.weight": (16, 2),
    "confidence_head.proj.weight": (1, 10),
    "confidence_head.proj.bias": (1,),
    "layers.0.self_attn.q_proj.weight": (10, 8),
    "layers.0.self_attn.k_proj.weight": (5, 8),
    "layers.0.self_attn.v_proj.weight": (5, 8),
    "layers.0.self_attn.o_proj.weight": (8, 10),
    "layers.0.self_attn.q_norm.weight": (5,),
    "layers.0.self_attn.k_norm.weight": (5,),
    "layers.0.mlp.gate_proj.weight": (12, 8),
    "layers.0.mlp.up_proj.weight": (12, 8),
    "layers.0.mlp.down_proj.weight": (8, 12),
    "layers.0.input_layernorm.weight": (8,),
    "layers.0.post_attention_layernorm.weight": (8,),
}


def write(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A model folder of zeros; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: np.zeros(shape, np.float16) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    return folder


def actionable(error: DSparkError, *, found: str, expected: str) -> None:
    """The message says what was found, what was expected and what to do."""
    assert found in error.found
    assert expected in error.expected
    assert error.fix
    assert str(error) == f"{error.found} Expected {error.expected}. {error.fix}"
