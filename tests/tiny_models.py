"""A tiny random target and a drafter for it, small enough that its output distribution can be enumerated.

The target is a random Llama that likes to repeat its last token, its LM head scaled until a next-token
distribution spreads over about :data:`SPREAD` tokens. The drafter's Markov head is fitted to the target's mean
logits after each token, so that it is right often and wrong often; its confidence head is random, so that
scheduling depends on drafted values as it would with a real one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dspark_sglang.artifacts import write_bytes
from dspark_sglang.layouts.dense.config import DrafterSpec, parse_drafter_config
from dspark_sglang.layouts.dense.write import drafter_config, write_drafter
from dspark_sglang.layouts.v4 import tiny
from dspark_sglang.training.model import Drafter
from dspark_sglang.training.start import initialise

SPECIAL = ("<pad>", "<s>", "</s>", "<mask>")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
SINGLES = (*LETTERS, *DIGITS, *LETTERS.upper())
PAIRS = tuple(letter + digit for letter in LETTERS[:13] for digit in DIGITS)[:126]
#: Tokens of the dense model, by text. More than serving's draft shortlist.
VOCABULARY = (*SPECIAL, *SINGLES, *PAIRS)
#: Tokens of the V4 model, by text: the same, and what V4's prompts are written with.
V4_VOCABULARY = (*VOCABULARY, tiny.BEGIN, tiny.END, *tiny.SPECIALS)
EOS = 2
GAMMA = 3
PROMPT = (1, 9, 40, 77, 130, 23, 68, 101, 55, 180)
#: Wanted mean of exp(entropy) of a next-token distribution at temperature 1.
SPREAD = 5.0
#: Scale of what attention and MLPs add: how much a distribution depends on more than the last token.
_CONTEXT = 0.35
#: Logit of repeating the last token, in standard deviations of the others: penalties need repeats.
REPEAT = 2.0
_RANK = 64
#: Gain of the drafter's last norm: how much its parallel stage disturbs the Markov fit.
_GAIN = 0.25
_DONE = "complete"


def write_tokenizer(folder: Path, texts: Sequence[str] = VOCABULARY) -> None:
    """A tokenizer whose tokens are one letter, one digit or a letter and a digit; the others are special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {text: token for token, text in enumerate(texts)}
    special = (*SPECIAL, *texts[len(VOCABULARY) :])
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True) for name in special])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.save_pretrained(folder)


class Heads(NamedTuple):
    """Attention heads of the tiny models: queries and keys of the target, then of the drafter."""

    target: tuple[int, int] = (4, 2)
    drafter: tuple[int, int] = (4, 2)


HEADS = Heads()


def _random_target(seed: int, heads: tuple[int, int]) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= _CONTEXT
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
    model.lm_head.weight.data += REPEAT / 64 * model.get_input_embeddings().weight.data
    return model.eval()


@torch.inference_mode()
def _contexts(model: Any, seed: int, count: int) -> torch.Tensor:
    """``[count, V, V]`` logits after each token behind ``count`` random prefixes."""
    size = len(VOCABULARY)
    generator = torch.Generator().manual_seed(seed + 1)
    found = []
    for _ in range(count):
        prefix = torch.randint(len(SPECIAL), size, (len(PROMPT),), generator=generator)
        tokens = torch.cat([prefix.expand(size, -1), torch.arange(size)[:, None]], dim=1)
        found.append(model(input_ids=tokens, use_cache=False).logits[:, -1].float())
    return torch.stack(found)


def spread(logits: torch.Tensor) -> float:
    """Mean of exp(entropy) of the rows of ``[..., V]`` logits."""
    distribution = torch.log_softmax(logits.double(), dim=-1)
    return float((-(distribution.exp() * distribution).sum(-1)).exp().mean())


def scale(logits: torch.Tensor) -> float:
    """The factor at which the distributions of ``logits`` have the wanted spread (bisection)."""
    low, high = 0.05, 50.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if spread(logits * middle) > SPREAD else (low, middle)
    return low


def write_target(folder: Path, seed: int, heads: tuple[int, int] = HEADS.target) -> torch.Tensor:
    """Write the target in float32; returns mean logits after each token, ``[V, V]``."""
    model = _random_target(seed, heads)
    logits = _contexts(model, seed, 8)
    factor = scale(logits)
    model.lm_head.weight.data.mul_(factor)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return (logits.mean(0) * factor).clone()


@torch.no_grad()
def write_random_drafter(
    folder: Path,
    target: Path,
    bigrams: torch.Tensor,
    seed: int,
    heads: tuple[int, int] = HEADS.drafter,
) -> None:
    """Write the drafter; ``bigrams`` ``[V, V]`` are the logits its Markov head should give."""
    from transformers import AutoConfig, AutoTokenizer

    spec = DrafterSpec(gamma=GAMMA, layers=1, markov_rank=_RANK, target_layer_ids=(0, 1))
    config = drafter_config(
        spec, AutoConfig.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    )
    config |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    drafter = Drafter(parse_drafter_config(config))
    initialise(drafter, seed + 2)
    drafter.norm.weight.fill_(_GAIN)
    assert drafter.markov_head is not None
    left, values, right = torch.linalg.svd(bigrams - bigrams.mean(-1, keepdim=True))
    root = values[:_RANK].sqrt()
    drafter.markov_head.markov_w1.weight.copy_(left[:, :_RANK] * root)
    drafter.markov_head.markov_w2.weight.copy_(right[:_RANK].T * root)
    probe = drafter.confidence_head.proj
    generator = torch.Generator().manual_seed(seed + 3)
    features = torch.cat([torch.full((64,), _GAIN), drafter.markov_head.markov_w1.weight.std(0)])
    noise = torch.randn(probe.weight.shape, generator=generator)
    probe.weight.copy_(noise * 1.5 / features / features.numel() ** 0.5)
    probe.bias.fill_(0.5)
    write_drafter(folder, config, drafter.state_dict())


def ensure_models(folder: Path, seed: int, heads: Heads = HEADS) -> tuple[Path, Path]:
    """The target's and the drafter's folders below ``folder``, made unless already there."""
    target, drafter, done = folder / "target", folder / "drafter", folder / _DONE
    if not (done.is_file() and done.read_text() == str(seed)):
        done.unlink(missing_ok=True)
        bigrams = write_target(target, seed, heads.target)
        write_random_drafter(drafter, target, bigrams, seed, heads.drafter)
        write_bytes(done, str(seed).encode())
    return target, drafter
