"""A tiny random target with a tokenizer and chat template, and conversations about nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer, models, pre_tokenizers

from dspark_sglang.training.conversations import Conversation, Message, prompt_id

WORDS = [f"w{i}" for i in range(90)]
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<mask>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer with a ChatML template."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        word: i for i, word in enumerate([*SPECIAL, "system", "user", "assistant", *WORDS])
    }
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<mask>"],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def write_target(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """A random causal language model of a family, four layers, width 32."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

    sizes: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + 3 + len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": kind != "qwen3",
    }
    config = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma": Gemma3TextConfig}[kind](**sizes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # sharper laws than the default initialisation gives
        if parameter.ndim == 2:
            parameter.data.mul_(4.0)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def conversations(count: int, *, words: int = 24, seed: int = 0) -> list[Conversation]:
    """Conversations whose answers walk through the vocabulary in a pattern one can learn."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        start, stride = rng.randrange(90), rng.choice([1, 2, 3])
        question = Message("user", " ".join(rng.choices(WORDS, k=6)))
        answer = " ".join(WORDS[(start + stride * i) % 90] for i in range(words))
        messages = [question, Message("assistant", answer)]
        made.append(
            Conversation(
                id=prompt_id(messages),
                messages=messages,
                temperature=float(number % 2),
                completion_tokens=words + 1,
            )
        )
    return made


def write_conversations(path: Path, count: int, *, words: int = 24, seed: int = 0) -> Path:
    """The same as a file."""
    made = conversations(count, words=words, seed=seed)
    path.write_bytes(b"".join(msgspec.json.encode(entry) + b"\n" for entry in made))
    return path


def write_config(folder: Path, target: Path, data: Path, **changes: Any) -> Path:
    """A run of a few small steps; ``changes`` replace whole sections or fields."""
    plain: dict[str, Any] = {
        "target": str(target),
        "out": str(folder / "run"),
        "data": {
            "files": [str(data)],
            "validation_per_mille": 200,
            "validation_conversations": 6,
            "max_length": 64,
        },
        "drafter": {"gamma": 3, "layers": 1, "markov_rank": 8},
        "batch": {"sequences": 4, "anchors": 6},
        "loss": {"frequent_tokens": 48, "blend": 0.5, "full_from": 0.5},
        "optim": {"steps": 6, "lr": 3e-3, "warmup": 2},
        "validate_every": 3,
        "checkpoint_every": 2,
        "bf16": False,
        **changes,
    }
    path = folder / "run.json"
    path.write_bytes(msgspec.json.encode(plain))
    return path
