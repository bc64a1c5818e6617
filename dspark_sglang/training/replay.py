"""Accepted length on text that the target wrote: serving replayed without a server.

Given what the target wrote, whether serving would have accepted a drafted token is known: at
temperature 0 the draft's most probable token is the next one or it is not; at temperature 1
rejection sampling emits ``x`` by acceptance with probability ``min(p(x), q(x))`` out of ``p(x)``,
so given ``x`` it was accepted with probability ``min(1, q(x) / p(x))``. Rounds follow each other
as in serving: after ``n`` accepted tokens the next anchor is ``n + 1`` further.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dspark_sglang.training.batches import Packed, pack, visible
from dspark_sglang.training.chat import TokenSequence
from dspark_sglang.training.loss import Vocabulary
from dspark_sglang.training.model import Drafter
from dspark_sglang.training.target import States, StateSource, Target

Float64 = npt.NDArray[np.float64]

_ANCHORS_AT_ONCE = 128
_LOGITS_AT_ONCE = 1 << 24


class Walk(NamedTuple):
    """Rounds of some sequences."""

    rounds: int
    #: Tokens produced, bonus tokens included.
    tokens: int
    #: ``[gamma]`` rounds that reached, and that accepted, each position.
    reached: npt.NDArray[np.int64]
    accepted: npt.NDArray[np.int64]

    @property
    def accept_length(self) -> float:
        """Tokens a round, bonus included; NaN without rounds."""
        return self.tokens / self.rounds if self.rounds else float("nan")

    @property
    def per_position(self) -> list[float]:
        """Chance to accept each position given that the round reached it."""
        return [
            float(a) / int(r) if r else 0.0
            for a, r in zip(self.accepted, self.reached, strict=True)
        ]

    def __add__(self, other: object) -> Walk:
        if not isinstance(other, Walk):
            return NotImplemented
        return Walk(
            self.rounds + other.rounds,
            self.tokens + other.tokens,
            self.reached + other.reached,
            self.accepted + other.accepted,
        )


def nothing(gamma: int) -> Walk:
    """No rounds."""
    zeros = np.zeros(gamma, dtype=np.int64)
    return Walk(0, 0, zeros, zeros.copy())


def walk(chance: Float64, uniforms: Float64, remaining: npt.NDArray[np.int64]) -> Walk:
    """Replay the rounds of one sequence.

    Args:
        chance: ``[A, gamma]`` chance to accept position ``k`` of the block at the ``a``-th anchor,
            given the token that follows; 0 beyond the end of the answer.
        uniforms: ``[A, gamma]`` in [0, 1).
        remaining: ``[A]`` tokens of the answer that follow each anchor, at least 1.
    """
    anchors, gamma = chance.shape
    accepted = np.logical_and.accumulate(uniforms < chance, axis=1)
    counts = accepted.sum(axis=1)
    result = nothing(gamma)
    rounds = tokens = place = 0
    while place < anchors:
        got = int(counts[place])
        left = int(remaining[place])
        rounds += 1
        tokens += min(got + 1, left)
        result.reached[: min(got + 1, gamma, left)] += 1
        result.accepted[: min(got, left)] += 1
        place += min(got + 1, left)
    return result._replace(rounds=rounds, tokens=tokens)


class Scores(NamedTuple):
    """Blocks of some anchors, scored against the text that follows; ``N`` blocks."""

    #: ``[N, gamma]`` float32: 1 where the most probable drafted token is the next token.
    match: torch.Tensor
    #: ``[N, gamma]`` float32: ``min(1, q(x) / p(x))`` of the next token.
    ratio: torch.Tensor


def block_hidden(drafter: Drafter, target: Target, packed: Packed, states: States) -> torch.Tensor:
    """Draft hidden states ``[B, A, gamma, d]`` of a packed batch."""
    anchor_tokens = packed.tokens.gather(1, packed.anchors)
    mask_token = torch.tensor([drafter.config.mask_token_id], device=packed.tokens.device)
    return torch.as_tensor(
        drafter(
            states.layers,
            packed.anchors,
            target.embed(anchor_tokens),
            target.embed(mask_token)[0],
            visible(packed.anchors, packed.tokens.shape[1], drafter.rows),
        )
    )


def gather_final(final: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Rows of ``[B, S, d]`` at ``[B, A, G]`` positions."""
    batch, count, gamma = place.shape
    index = place.view(batch, -1, 1).expand(-1, -1, final.shape[-1])
    return final.gather(1, index).view(batch, count, gamma, -1)


@torch.no_grad()
def score_blocks(
    drafter: Drafter, target: Target, packed: Packed, states: States, vocabulary: Vocabulary
) -> Scores:
    """Score every valid block position of a packed batch; ``[B * A, gamma]``, 0 where invalid."""
    gamma = drafter.config.gamma
    hidden = block_hidden(drafter, target, packed, states)
    latent = drafter.latents(hidden, packed.previous)
    valid = packed.valid
    rows = hidden[valid]
    wanted = gather_final(states.final, packed.place)[valid]
    labels = packed.labels[valid]
    head = vocabulary.head
    made = torch.zeros((2, len(rows)))
    step = max(1, _LOGITS_AT_ONCE // vocabulary.width)
    for begin in range(0, len(rows), step):
        part = slice(begin, begin + step)
        drafted = (rows[part].to(head.dtype) @ head.T).float()
        if latent is not None:
            assert drafter.markov_head is not None
            w2 = drafter.markov_head.markov_w2.weight
            w2 = w2 if vocabulary.tokens is None else w2[vocabulary.tokens]
            drafted += (latent[valid][part].to(head.dtype) @ w2.to(head.dtype).T).float()
        log_q = drafted.log_softmax(-1)
        log_p, _ = vocabulary.target_log_law(wanted[part])
        at = vocabulary.labels(labels[part])
        known, index = at >= 0, at.clamp(min=0)[:, None]
        gain = (log_q.gather(1, index) - log_p.gather(1, index)).squeeze(1)
        made[0, part] = (drafted.max(dim=-1).indices == at).float().cpu()
        made[1, part] = (gain.exp().clamp(max=1.0) * known).cpu()
    spread = torch.zeros((2, *valid.shape))
    spread[:, valid.cpu()] = made
    return Scores(*spread.view(2, -1, gamma))


def score_sequence(
    drafter: Drafter,
    target: Target,
    sequence: TokenSequence,
    states: States,
    vocabulary: Vocabulary,
    *,
    bf16: bool,
) -> Scores:
    """Score a block at every anchor of one sequence, ``[A, gamma]`` each.

    Args:
        states: of this sequence alone, on the target's device.
        bf16: whether matrix products are in bfloat16.
    """
    device = states.final.device
    anchors, parts = sequence.anchors(), []
    for begin in range(0, len(anchors), _ANCHORS_AT_ONCE):
        chosen = anchors[begin : begin + _ANCHORS_AT_ONCE]
        packed = pack([sequence], [chosen], [0], drafter.config.gamma).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            parts.append(score_blocks(drafter, target, packed, states, vocabulary))
    return Scores(*(torch.cat(field) for field in zip(*parts, strict=True)))


class Validator:
    """Scores a drafter on fixed conversations, greedy and sampled ones apart.

    ``sequences[i]`` is sequence ``first + i`` of ``source``.
    """

    def __init__(
        self,
        target: Target,
        source: StateSource,
        first: int,
        sequences: Sequence[TokenSequence],
        greedy: Sequence[bool],
        vocabulary: Vocabulary,
        *,
        bf16: bool,
        seed: int = 0,
    ) -> None:
        self._target, self._source, self._first = target, source, first
        self._sequences, self._greedy = sequences, greedy
        self._vocabulary, self._bf16, self._seed = vocabulary, bf16, seed

    def run(self, drafter: Drafter) -> dict[str, Walk]:
        """Rounds replayed at temperature 0 (``greedy``) and 1 (``sampled``)."""
        gamma = drafter.config.gamma
        walks = {"greedy": nothing(gamma), "sampled": nothing(gamma)}
        rng = np.random.default_rng(self._seed)
        was_training = drafter.training
        drafter.eval()
        for number, sequence in enumerate(self._sequences):
            scores = self._score(drafter, number, sequence)
            greedy = self._greedy[number]
            chance = (scores.match if greedy else scores.ratio).double().numpy()
            kind = "greedy" if greedy else "sampled"
            walks[kind] += walk(chance, rng.random(chance.shape), sequence.remaining())
        drafter.train(was_training)
        return walks

    def _score(self, drafter: Drafter, number: int, sequence: TokenSequence) -> Scores:
        device = self._target.head.device
        states = self._source.get([self._first + number])
        kind = torch.bfloat16 if self._bf16 else torch.float32
        states = States(states.layers.to(device, kind), states.final.to(device, kind))
        return score_sequence(
            drafter, self._target, sequence, states, self._vocabulary, bf16=self._bf16
        )
