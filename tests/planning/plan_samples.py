"""Small models and machines for tests of plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from dspark_sglang.layouts.memory import Tensor
from dspark_sglang.layouts.v4 import memory as v4
from dspark_sglang.planning import published
from dspark_sglang.planning.hardware import Hardware

#: A Llama small enough to write out by hand.
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
#: A Gemma 4 of two windows and one full layer, wider heads in the latter.
GEMMA4: dict[str, Any] = LLAMA | {
    "architectures": ["Gemma4ForCausalLM"],
    "num_hidden_layers": 3,
    "global_head_dim": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 16,
    "tie_word_embeddings": True,
}
SMALL_GPU = Hardware(
    gpu="small", memory_mib=16384, runtime_mib=512, architecture="sm90", gpus=8, name="small"
)


def small_v4() -> dict[str, Any]:
    """DeepSeek-V4-Flash-DSpark with few layers and experts."""
    found = published.find("deepseek-v4-flash-dspark")
    assert found is not None
    return found.config | {
        "num_hidden_layers": 4,
        "n_routed_experts": 8,
        "compress_ratios": [0, 4, 128, 4, 0],
        "dspark_target_layer_ids": [1, 2],
        "num_hash_layers": 1,
        "max_position_embeddings": 4096,
    }


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_index(folder: Path, tensors: list[Tensor], *, total: int | None = None) -> None:
    """An index without shards, as ``hf download`` of two files leaves it."""
    stored = [tensor for tensor in tensors if not tensor.derived]
    size = sum(tensor.disk_bytes for tensor in stored) if total is None else total
    weights = {tensor.name: "model-00001-of-00001.safetensors" for tensor in stored}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": weights})
    )


def write_weights(folder: Path, tensors: list[Tensor]) -> None:
    """Zeros of the right shapes; plain tensors only."""
    save_file(
        {tensor.name: np.zeros(tensor.shape, np.float16) for tensor in tensors},
        folder / "model.safetensors",
    )


def v4_tensors(config: dict[str, Any]) -> list[Tensor]:
    """What a DSpark checkpoint of ``config`` stores."""
    kernels = v4.Kernels(fp8_wo_a=False)
    return [*v4.target(config, kernels), *v4.drafter(config, kernels)]
