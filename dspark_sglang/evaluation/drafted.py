"""Blocks as serving drafts them, to judge confidences by: drafted tokens before each position.

Replaying the target's own text gives accepted lengths exactly, but its blocks follow that text; the
confidence head in service sees the tokens it drafted. Here a block is drafted at every anchor and the
target is run behind it once, all blocks of a sequence packed behind one mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dspark_sglang.core.draft import SHORTLIST, draft_block
from dspark_sglang.core.heads import MarkovHead
from dspark_sglang.evaluation.standalone import Pair
from dspark_sglang.training.batches import pack
from dspark_sglang.training.chat import TokenSequence
from dspark_sglang.training.replay import block_hidden
from dspark_sglang.training.states import States

Float64 = npt.NDArray[np.float64]

_ANCHORS_AT_ONCE = 64


class Blocks(NamedTuple):
    """Drafted blocks of some prompts, ``N`` in all."""

    #: ``[N, gamma]`` uncalibrated confidence logits.
    confidence: Float64
    #: ``[N, gamma]`` chance ``min(1, p(x) / q(x))`` that each drafted token is accepted, the ones
    #: before it having been.
    acceptance: Float64
    #: ``[N]`` number of the prompt (:attr:`TokenSequence.source`).
    owner: npt.NDArray[np.int64]


@torch.inference_mode()
def draft_blocks(
    pair: Pair,
    answers: Sequence[TokenSequence],
    *,
    seed: int,
    shortlist: int = SHORTLIST,
    progress: Callable[[int], None] = lambda done: None,
) -> Blocks:
    """Draft a block at temperature 1 at every anchor of every answer.

    Args:
        answers: the target's, sampled at temperature 1.
        seed: of the drafted tokens.
        shortlist: candidates a position; 0: every token can be drafted.
        progress: told how many answers are done.
    """
    generator = torch.Generator().manual_seed(seed)
    gamma = pair.drafter.config.gamma
    confidence, acceptance, owner = [np.empty((0, gamma))], [np.empty((0, gamma))], []
    for number, sequence in enumerate(answers):
        anchors = sequence.anchors()
        if len(anchors):
            tokens = torch.from_numpy(sequence.tokens[None].astype(np.int64))
            tokens = tokens.to(pair.target.head.device)
            states = pair.target.states(tokens, pair.drafter.config.target_layer_ids)
        for begin in range(0, len(anchors), _ANCHORS_AT_ONCE):
            part = anchors[begin : begin + _ANCHORS_AT_ONCE]
            uniforms = torch.rand((len(part), gamma), dtype=torch.float64, generator=generator)
            scores, chance = _draft(pair, sequence, part, states, uniforms, shortlist)
            confidence.append(scores.double().cpu().numpy())
            acceptance.append(chance.double().cpu().numpy())
            owner += [sequence.source] * len(part)
        progress(number + 1)
    return Blocks(np.concatenate(confidence), np.concatenate(acceptance), np.array(owner, int))


def _draft(
    pair: Pair,
    sequence: TokenSequence,
    anchors: npt.NDArray[np.int64],
    states: States,
    uniforms: torch.Tensor,
    shortlist: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidence logits and acceptance ``[A, gamma]`` of the blocks at some anchors."""
    drafter, target, vocabulary = pair.drafter, pair.target, pair.vocabulary
    device, kind = states.final.device, vocabulary.head.dtype
    packed = pack([sequence], [anchors], [0], drafter.config.gamma).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=pair.bf16):
        hidden = block_hidden(drafter, target, packed, states)[0]
    block = draft_block(
        hidden.to(kind) @ vocabulary.head.T,
        packed.tokens[0, packed.anchors[0]],
        hidden,
        MarkovHead.from_module(drafter.markov_head),
        temperatures=torch.ones(len(anchors), device=device),
        sampled=torch.arange(len(anchors), device=device),
        uniforms=uniforms.to(device),
        shortlist=shortlist or None,
        vocabulary=vocabulary.tokens,
    )
    assert block.probs is not None
    drawn = block.tokens[..., None]
    if block.support is None:
        q = block.probs.gather(-1, drawn).squeeze(-1)
    else:
        q = (block.probs * (block.support == drawn)).sum(-1)
    final = target.after_blocks(packed.tokens[0], packed.anchors[0], block.tokens[:, :-1])
    log_p, _ = vocabulary.target_log_law(final.flatten(0, 1))
    at = vocabulary.labels(block.tokens).view(-1, 1)
    p = log_p.gather(1, at).view(q.shape).exp()
    return drafter.confidence_logits(hidden, block.previous), (p / q).clamp(max=1.0)
