"""A tiny random DeepSeek-V4 bundle, plain or in the exact published form, with a tokenizer.

Six target layers hold every kind there is: compress ratios 0, 0, 4, 128, 4, 128 (window only;
compressed with an indexer; heavily compressed), two of them routed by token. Three draft layers lie
under ``mtp.*``. What SGLang's code fixes is kept: head 512 = 448 + 64, index head 128, window 128,
four streams. Both forms hold the same values: weights that are published quantised lie on the
grid of their quantised form, and the others are bfloat16's, so either form is the same model.

The drafter guesses part of what the target says: the target's layers add little to the embedding,
and the Markov head approximates ``head . embedding``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file

from dspark_sglang.artifacts import write_bytes
from dspark_sglang.layouts.v4.storage import (
    dequantise_fp4,
    dequantise_fp8,
    quantise_fp4,
    quantise_fp8,
)
from dspark_sglang.layouts.v4.tensors import plain_bundle, plain_dtype, quantisation

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
#: What SGLang's renderer of V4's prompts (deepseek-recipe 0.2) wants to find in a tokenizer.
SPECIALS = (
    *(
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜System｜>",
        "<｜latest_reminder｜>",
        "<think>",
        "</think>",
    ),
    *("<｜deepseek_image｜>", "<｜ref｜>", "<｜/ref｜>", "<｜box｜>", "<｜/box｜>", "<｜point｜>"),
    *("<｜/point｜>", "<｜polygon｜>", "<｜/polygon｜>"),
)
#: Token ids: the first, the last of a text, and what a block's masked rows hold.
BOS, EOS, NOISE, VOCAB = 0, 1, 511, 512
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    # As published, the list goes on with the draft layers'.
    "compress_ratios": [0, 0, 4, 128, 4, 128, 0, 0, 0],
    "compress_rope_theta": 160000,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 448,
    "v_head_dim": 512,
    "kv_lora_rank": 512,
    "q_lora_rank": 64,
    "o_lora_rank": 32,
    "o_groups": 2,
    "sliding_window": 128,
    "window_size": 128,
    "index_n_heads": 4,
    "index_head_dim": 128,
    "index_topk": 512,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "intermediate_size": 64,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "num_hash_layers": 2,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    # Published: 10, which weights as small as these would never reach.
    "swiglu_limit": 1.5,
    "hidden_act": "silu",
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 4,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 1024,
    },
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "use_cache": True,
    "num_nextn_predict_layers": 3,
    "dspark_block_size": 5,
    "dspark_markov_rank": 96,
    "dspark_noise_token_id": NOISE,
    "dspark_target_layer_ids": [3, 4, 5],
}
#: What the published configuration says of storage.
PUBLISHED: dict[str, Any] = {
    "expert_dtype": "fp4",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}
#: Target layers in one published shard.
_LAYERS_A_SHARD = 2
#: Strings that pairs of letters make, frequent ones first.
_LETTERS = "etaoinshrdlucmfw"


def tensors(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Random float32 weights under which every part matters, by their published names.

    Args:
        config: of a checkpoint small enough to be held.
        seed: of the values.

    Raises:
        CheckpointError: the configuration is not one of V4's.
    """
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for name, size in plain_bundle(config).items():
        if name.endswith("tid2eid"):
            experts = config["n_routed_experts"]
            rows = [torch.randperm(experts, generator=generator)[: size[1]] for _ in range(size[0])]
            made[name] = torch.stack(rows)
            continue
        value = torch.randn(size, generator=generator)
        made[name] = value * _spread(name, size)
        if name.endswith("norm.weight"):
            made[name] = 1.0 + made[name]
        elif "hc_" in name and name.endswith("scale"):
            made[name] = 0.5 + made[name]
    if "dspark_markov_rank" in config:
        made = _agreeing(made, config)
    return {name: _on_grid(name, value) for name, value in made.items()}


def _spread(name: str, size: tuple[int, ...]) -> float:
    """Standard deviation of a tensor's values."""
    if name.endswith("norm.weight") or ("hc_" in name and name.endswith("scale")):
        return 0.1
    if "hc_" in name and name.endswith("base"):
        return 0.5
    if name.endswith(("ape", "gate.bias")):
        return 0.3
    if name.endswith("attn_sink") or name.startswith("embed"):
        return 1.0
    return (3.0 if name == "head.weight" else 1.0) / math.sqrt(size[-1])


def _agreeing(
    made: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Weights with which the drafter guesses some of the target's tokens: the last one says most."""
    last = f"mtp.{len(config['dspark_target_layer_ids']) - 1}."
    found = dict(made)
    for name, value in made.items():
        if name.startswith("layers.") and name.endswith(("wo_b.weight", "w2.weight")):
            found[name] = 0.25 * value
    # Rows of masked tokens say little, so that the Markov head decides.
    found[f"{last}norm.weight"] = 0.15 * made[f"{last}norm.weight"]
    embedding = made["embed.weight"]
    rows = embedding / embedding.square().mean(dim=-1, keepdim=True).sqrt()
    left, scale, right = torch.linalg.svd(rows @ made["head.weight"].T, full_matrices=False)
    rank = config["dspark_markov_rank"]
    root = scale[:rank].sqrt()
    found[f"{last}markov_head.markov_w1.weight"] = left[:, :rank] * root
    found[f"{last}markov_head.markov_w2.weight"] = right[:rank].T * root
    return found


def _on_grid(name: str, value: torch.Tensor) -> torch.Tensor:
    """The nearest value that the published form can hold, in float32."""
    kind = quantisation(name)
    if kind == "fp8":
        return dequantise_fp8(*quantise_fp8(value))
    if kind == "fp4":
        return dequantise_fp4(*quantise_fp4(value))
    return value.bfloat16().float() if plain_dtype(name) == "BF16" else value


def plain_form(made: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights in ``dtype``; what is published as float32 stays so, and integers stay."""
    return {
        name: value if plain_dtype(name) != "BF16" else value.to(dtype)
        for name, value in made.items()
    }


def published_form(made: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights as they are published: fp8 and fp4 with their scales, bfloat16, float32, int64."""
    found: dict[str, torch.Tensor] = {}
    for name, value in made.items():
        kind = quantisation(name)
        if kind is None:
            found[name] = value.bfloat16() if plain_dtype(name) == "BF16" else value
            continue
        scale = name.removesuffix("weight") + "scale"
        found[name], found[scale] = (quantise_fp8 if kind == "fp8" else quantise_fp4)(value)
    return found


def write(
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    published: bool = False,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write a bundle: configuration, weights and tokenizer.

    Args:
        directory: where to; made if it is not there.
        seed: of the weights.
        dtype: of plain weights; not used where ``published``.
        published: several shards with an index and the published types, instead of one file of
            plain weights.
        changes: of the configuration.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = CONFIG | dict(changes)
    made = tensors(config, seed)
    if published:
        config |= PUBLISHED | {"torch_dtype": "bfloat16"}
        write_shards(directory, published_form(made))
    else:
        config |= {"torch_dtype": str(dtype).removeprefix("torch.")}
        held = {name: value.contiguous() for name, value in plain_form(made, dtype).items()}
        save_file(held, directory / "model.safetensors", metadata={"format": "pt"})
    write_bytes(directory / "config.json", json.dumps(config, indent=2).encode())
    write_tokenizer(directory)


def write_shards(directory: Path, held: Mapping[str, torch.Tensor]) -> None:
    """Several files and their index; as published, ``mtp.*`` tensors have files of their own."""
    groups: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    depth = max(int(name.split(".")[1]) for name in held if name.startswith("layers."))
    for name, value in held.items():
        part, layer = name.split(".")[0], 0
        if part == "layers":
            layer = int(name.split(".")[1]) // _LAYERS_A_SHARD
        elif part not in ("mtp", "embed"):  # the head comes with the last layers
            layer = depth // _LAYERS_A_SHARD
        groups.setdefault((int(part == "mtp"), layer), {})[name] = value.contiguous()
    mapped: dict[str, str] = {}
    for number, (_, own) in enumerate(sorted(groups.items()), start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(own, directory / file, metadata={"format": "pt"})
        mapped |= dict.fromkeys(own, file)
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in held.values())},
        "weight_map": dict(sorted(mapped.items())),
    }
    write_bytes(directory / "model.safetensors.index.json", json.dumps(index, indent=2).encode())


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer of 512 tokens: 256 bytes, the specials that V4's prompts are written with, and pairs of letters."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    specials = {BEGIN: BOS, END: EOS, "<｜noise｜>": NOISE}
    vocab = {BEGIN: BOS, END: EOS}
    for text in _byte_letters():
        vocab[text] = len(vocab)
    for text in SPECIALS:
        specials[text] = vocab[text] = len(vocab)
    every = [(first, second) for first in _LETTERS for second in _LETTERS]
    pairs = every[: VOCAB - len(vocab) - 1]
    for first, second in pairs:
        vocab[first + second] = len(vocab)
    vocab["<｜noise｜>"] = NOISE
    made = Tokenizer(BPE(vocab=vocab, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": "{{ bos_token }}{% for message in messages %}"
        "{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    }
    write_bytes(directory / "tokenizer.json", made.to_str().encode())
    write_bytes(directory / "tokenizer_config.json", json.dumps(settings, indent=2).encode())


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level vocabularies, by byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in shown}
    hidden = (byte for byte in range(256) if byte not in letters)
    letters |= {byte: chr(256 + number) for number, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]
