"""The shortlist in the standalone engine, and what accepted length it costs.

On a CPU serving lets only the ``M`` tokens of largest base logit be drafted at a position
(:func:`dspark_sglang.core.draft.draft_block`). The drafted law is then ``softmax`` of their logits,
Markov bias included, and 0 elsewhere. Our kernels draft from those and from the tokens of largest bias
(``following`` of them); greedy requests from these candidates alone, sampled ones from the whole
vocabulary, with the bias at the candidates only. Everything else is as in
:mod:`dspark_sglang.training.replay`, in the same arithmetic, so a difference is the shortlist's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from dspark_sglang.artifacts import SCHEMA_VERSION, Provenance, write_json
from dspark_sglang.training.batches import pack
from dspark_sglang.training.chat import TokenSequence
from dspark_sglang.training.replay import Scores, block_hidden, gather_final
from dspark_sglang.training.states import States

if TYPE_CHECKING:
    from dspark_sglang.evaluation.standalone import Answer, Pair

_ANCHORS_AT_ONCE = 128
_LOGITS_AT_ONCE = 1 << 24


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """Accepted length at one temperature, over the whole vocabulary and with the shortlist."""

    temperature: float
    #: Best base logits that are candidates at a position, and tokens of largest bias beside them.
    candidates: int
    following: int
    #: Tokens over the expected rounds.
    whole: float
    shortlist: float
    #: Of ``whole``, and its 95% interval over prompts (bootstrap).
    loss_pct: float
    ci95: tuple[float, float] | None


class ShortlistLoss(msgspec.Struct, frozen=True, kw_only=True):
    """What ``dspark eval --shortlist-loss`` writes."""

    schema_version: int
    #: The larger loss of both temperatures.
    tau_loss_pct: float
    by_temperature: list[Loss]
    drafter_sha256: str
    target: str
    prompts: str
    max_tokens: int
    dtype: str
    provenance: Provenance


def score_shortlist(
    pair: Pair, sequence: TokenSequence, states: States, size: int, following: int = 0
) -> Scores:
    """Score a block at every anchor of one sequence, ``[A, gamma]`` each, with a shortlist.

    Args:
        states: of this sequence alone, on the target's device.
        size: candidates a position, fewer than the drafted law has.
        following: tokens of largest bias beside them, as our kernels draft; 0: none, as on a CPU.
    """
    device = states.final.device
    anchors, parts = sequence.anchors(), []
    for begin in range(0, len(anchors), _ANCHORS_AT_ONCE):
        chosen = anchors[begin : begin + _ANCHORS_AT_ONCE]
        packed = pack([sequence], [chosen], [0], pair.drafter.config.gamma).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=pair.bf16):
            hidden = block_hidden(pair.drafter, pair.target, packed, states)
            latent = pair.drafter.latents(hidden, packed.previous)
            valid = packed.valid
            wanted = gather_final(states.final, packed.place)[valid]
            kept = None if latent is None else latent[valid]
            scored = _score_rows(
                pair, hidden[valid], kept, wanted, packed.labels[valid], (size, following)
            )
            confidence = pair.drafter.confidence_logits(hidden, packed.previous)
        spread = torch.zeros((3, *valid.shape))
        spread[:2, valid.cpu()] = scored
        spread[2] = confidence.float().cpu()
        parts.append(spread.view(3, -1, valid.shape[-1]))
    return Scores(*torch.cat(parts, dim=1))


def _score_rows(
    pair: Pair,
    hidden: torch.Tensor,
    latent: torch.Tensor | None,
    wanted: torch.Tensor,
    labels: torch.Tensor,
    sizes: tuple[int, int],
) -> torch.Tensor:
    """``[2, N]`` match and ratio of some positions; ``[N, d]`` states and ``[N, r]`` latents."""
    vocabulary, found = pair.vocabulary, torch.zeros((2, len(hidden)))
    step = max(1, _LOGITS_AT_ONCE // vocabulary.width)
    for begin in range(0, len(hidden), step):
        part = slice(begin, begin + step)
        own = None if latent is None else latent[part]
        logits, inside = _drafted(pair, hidden[part], own, *sizes)
        log_p, _ = vocabulary.target_log_law(wanted[part])
        at = vocabulary.labels(labels[part])[:, None]
        drafted = logits.masked_fill(~inside, -torch.inf).max(dim=-1, keepdim=True).indices
        if not sizes[1]:
            logits = logits.masked_fill(~inside, -torch.inf)
        index = at.clamp(min=0)
        q = logits.softmax(-1).gather(1, index).squeeze(1) * (at >= 0).squeeze(1)
        p = log_p.gather(1, index).squeeze(1).exp()
        found[0, part] = (drafted == at).squeeze(1).float().cpu()
        # 0 / 0 where the text holds a token to which the target gives nothing: not drafted either.
        found[1, part] = (q / p.clamp(min=1e-38)).clamp(max=1.0).cpu()
    return found


def _drafted(
    pair: Pair, hidden: torch.Tensor, latent: torch.Tensor | None, size: int, following: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n, M]`` logits with the bias at the candidates only, and where those are."""
    vocabulary = pair.vocabulary
    kind = vocabulary.head.dtype
    base = (hidden.to(kind) @ vocabulary.head.T).float()
    inside = torch.zeros_like(base, dtype=torch.bool)
    inside.scatter_(1, base.topk(size, dim=-1).indices, True)
    if latent is None:
        return base, inside
    assert pair.drafter.markov_head is not None
    w2 = pair.drafter.markov_head.markov_w2.weight
    w2 = w2 if vocabulary.tokens is None else w2[vocabulary.tokens]
    bias = (latent.to(kind) @ w2.to(kind).T).float()
    if following:
        inside.scatter_(1, bias.topk(min(following, bias.shape[-1]), dim=-1).indices, True)
    return torch.where(inside, base + bias, base), inside


def expected_rounds(answer: Answer, *, greedy: bool) -> float:
    """Rounds an answer takes on average over the draws that test its blocks.

    :func:`dspark_sglang.training.replay.walk` draws them once; a small difference between two drafted
    laws would drown in that. At temperature 0 nothing is drawn and both are the same.
    """
    chance = answer.match if greedy else answer.ratio
    kept = np.cumprod(chance, axis=1)
    # [A, gamma + 1]: exactly k drafts kept.
    ends = np.concatenate([np.ones((len(kept), 1)), kept], axis=1)
    ends[:, :-1] -= kept
    visited = np.zeros(len(kept))
    visited[0] = 1.0
    for place, left in enumerate(answer.remaining):
        for count, share in enumerate(ends[place]):
            after = place + min(count + 1, int(left))
            if after < len(visited):
                visited[after] += visited[place] * share
    return float(visited.sum())


def loss(
    temperature: float,
    candidates: int,
    whole: Sequence[Answer],
    short: Sequence[Answer],
    *,
    following: int = 0,
    seed: int = 0,
) -> Loss:
    """Compare the same answers under both drafted laws, in the same order.

    Args:
        temperature: of the answers.
        candidates: a position, of the shortlist.
        whole, short: scored without and with the shortlist.
        following: tokens of largest bias beside them.
        seed: of the bootstrap.
    """
    greedy = temperature == 0
    counts = np.array(
        [
            (len(a.remaining), expected_rounds(a, greedy=greedy), expected_rounds(b, greedy=greedy))
            for a, b in zip(whole, short, strict=True)
        ]
    )

    def lost(sums: npt.NDArray[np.float64]) -> float:
        # Tokens are those of the text, whatever drafts them.
        return float(100 * (1 - sums[1] / sums[2]))

    total = counts.sum(axis=0)
    interval = None
    if len(counts) > 1:
        rng = np.random.default_rng(seed)
        drawn = counts[rng.integers(0, len(counts), (2000, len(counts)))].sum(axis=1)
        low, high = np.percentile([lost(row) for row in drawn], [2.5, 97.5])
        interval = (round(float(low), 3), round(float(high), 3))
    return Loss(
        temperature=temperature,
        candidates=candidates,
        following=following,
        whole=round(float(total[0] / total[1]), 4),
        shortlist=round(float(total[0] / total[2]), 4),
        loss_pct=round(lost(total), 3),
        ci95=interval,
    )


def write_loss(path: Path, losses: list[Loss], **about: object) -> ShortlistLoss:
    """Write what was lost; ``about`` are the other fields of :class:`ShortlistLoss`."""
    found = msgspec.convert(
        {
            "schema_version": SCHEMA_VERSION,
            "tau_loss_pct": max(entry.loss_pct for entry in losses),
            "by_temperature": losses,
            **about,
        },
        ShortlistLoss,
        from_attributes=True,
    )
    write_json(path, found)
    return found
