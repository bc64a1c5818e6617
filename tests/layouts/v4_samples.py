"""Configurations of DeepSeek-V4 drafters, published and tiny."""

from __future__ import annotations

from typing import Any

import torch

from dspark_sglang.layouts.v4.config import V4Shape
from dspark_sglang.layouts.v4.drafter import V4Drafter
from dspark_sglang.layouts.v4.tensors import v4_tensors

FLASH: dict[str, Any] = {
    "hidden_size": 4096,
    "vocab_size": 129280,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_lora_rank": 1024,
    "o_groups": 8,
    "sliding_window": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "scoring_func": "sqrtsoftplus",
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "dspark_block_size": 5,
    "dspark_markov_rank": 256,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
}


TINY = FLASH | {
    "hidden_size": 16,
    "vocab_size": 13,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "head_dim": 8,
    "qk_rope_head_dim": 4,
    "q_lora_rank": 6,
    "o_lora_rank": 5,
    "o_groups": 2,
    "sliding_window": 6,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7,
    "swiglu_limit": 0.5,
    "hc_mult": 3,
    "hc_sinkhorn_iters": 2,  # few enough that one more would show
    "dspark_block_size": 3,
    "dspark_markov_rank": 4,
    "dspark_noise_token_id": 11,
    "dspark_target_layer_ids": [3, 4, 5],
}


def random_tensors(shape: V4Shape, seed: int) -> dict[str, torch.Tensor]:
    """Random float32 weights under which every part of the drafter matters; for tiny shapes."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for name, size in v4_tensors(shape).items():
        value = torch.randn(size, generator=generator)
        if name.endswith("norm.weight"):
            value = 1.0 + 0.1 * value
        elif len(size) == 2 and "markov_w1" not in name:
            value = value / size[-1] ** 0.5
        made[name] = value
    return made


def make(seed: int = 0, **changes: Any) -> tuple[V4Shape, dict[str, torch.Tensor], V4Drafter]:
    """A tiny drafter with random weights and embedding."""
    shape = V4Shape.from_config(TINY | changes)
    tensors = random_tensors(shape, seed)
    return shape, tensors, V4Drafter.load(tensors, shape, torch.randn(shape.vocab, shape.hidden))
