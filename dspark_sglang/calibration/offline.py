"""Confidence logits and true acceptance of a drafter, without a server.

The target answers prompts by itself at temperature 1; at every position of its answers the
drafter drafts a block with the answer's own tokens as prefix. The label of position ``k`` is the
chance that rejection sampling accepts it, ``1 - ½‖p - q‖₁`` at temperature 1: an expectation over
what serving would decide, so it needs far fewer blocks than counting decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch.nn.functional import linear

from dspark_sglang.checkpoint import (
    DrafterConfig,
    check_fits,
    check_tensors,
    parse_drafter_config,
    read_config,
    weight_files,
)
from dspark_sglang.core.drafter import DenseDrafter, DenseShape

Float64 = npt.NDArray[np.float64]
Messages = list[dict[str, str]]


class Blocks(NamedTuple):
    """Scored blocks: ``[N, gamma]`` confidence logits, acceptance, and ``[N]`` prompt index."""

    logits: Float64
    acceptance: Float64
    prompt: npt.NDArray[np.int64]


class Pair(NamedTuple):
    """A target and its drafter, loaded for offline scoring."""

    target: Any
    tokenizer: Any
    drafter: DenseDrafter
    config: DrafterConfig


def load_pair(target: Path, drafter: Path) -> Pair:
    """Load both models in float32.

    Raises:
        CheckpointError: either is damaged, or they do not fit together.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = parse_drafter_config(read_config(drafter, role="drafter"))
    check_tensors(drafter, config)
    check_fits(config, read_config(target, role="target"), name=str(target))
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(drafter):
        tensors |= {name: value.float() for name, value in load_file(path).items()}
    shape = DenseShape(
        gamma=config.gamma,
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        layers=config.num_layers,
        mask_token=config.mask_token_id,
        eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
    )
    embedding = model.get_input_embeddings().weight.detach()
    return Pair(
        target=model,
        tokenizer=AutoTokenizer.from_pretrained(target),
        drafter=DenseDrafter.load(tensors, shape, embedding),
        config=config,
    )


@torch.inference_mode()
def score(
    pair: Pair,
    conversations: Sequence[Messages],
    *,
    max_tokens: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Blocks:
    """Answer every conversation with the target and score a block at each position.

    Args:
        max_tokens: longest answer.
        seed: of the target's sampling.
        progress: told how many conversations are done.
    """
    torch.manual_seed(seed)
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    owners: list[int] = []
    for index, messages in enumerate(conversations):
        encoded = pair.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        prompt = encoded["input_ids"]
        sequence = pair.target.generate(
            prompt, max_new_tokens=max_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
        )[0]
        scored = _score_sequence(pair, sequence, prompt.shape[1])
        if scored is not None:
            parts.append(scored)
            owners += [index] * len(scored[0])
        progress(index + 1)
    none = torch.empty(0, pair.config.gamma)
    logits = torch.cat([none, *(part[0] for part in parts)]).double().numpy()
    acceptance = torch.cat([none, *(part[1] for part in parts)]).double().numpy()
    return Blocks(logits=logits, acceptance=acceptance, prompt=np.array(owners, dtype=np.int64))


def _score_sequence(
    pair: Pair, sequence: torch.Tensor, prompt_tokens: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Confidence logits and acceptance of every whole block inside one answer."""
    gamma = pair.config.gamma
    anchors = torch.arange(prompt_tokens - 1, len(sequence) - gamma)
    if not len(anchors):
        return None
    out = pair.target.model(sequence[None], output_hidden_states=True)
    states = [out.hidden_states[i + 1][0] for i in pair.config.target_layer_ids]
    drafter, head = pair.drafter, pair.target.get_output_embeddings().weight
    context = drafter.context(torch.cat(states, dim=-1))
    embedding = pair.target.get_input_embeddings().weight[sequence[anchors]]
    hidden = drafter.hidden(context, anchors, embedding)
    # Row k of the block at anchor a predicts position a + k + 1 after the token at a + k.
    place = anchors[:, None] + torch.arange(gamma)
    previous = sequence[place]
    confidence = drafter.confidence.logits(hidden, previous, drafter.markov)
    acceptance = torch.empty(len(anchors), gamma)
    state = drafter.markov.start(len(anchors))
    last = out.last_hidden_state[0]
    for k in range(gamma):
        latent, state = drafter.markov.step(previous[:, k], hidden[:, k], state)
        drafted = linear(hidden[:, k], head) + linear(latent, drafter.markov.w2)
        wanted = linear(last[place[:, k]], head)
        overlap = torch.minimum(drafted.softmax(-1), wanted.softmax(-1)).sum(-1)
        acceptance[:, k] = overlap.clamp(0.0, 1.0)
    return confidence, acceptance
