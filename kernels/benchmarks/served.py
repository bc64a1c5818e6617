"""Launches of one served step, counted through the very operations that the server calls."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.traffic import Traffic, count
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.serving import telemetry
from dspark_sglang.serving.ops import SampledRows, Verified, triton_ops

_GAMMA, _VOCABULARY, _RANK, _HIDDEN, _REQUESTS = 5, 600, 16, 32, 3


def _operations(generator: torch.Generator) -> Any:
    """:class:`dspark_sglang.serving.ops.triton_ops.TritonOps` on a small random drafter."""
    width = _HIDDEN + _RANK
    table = torch.randn(_VOCABULARY, _RANK, generator=generator)
    return triton_ops.TritonOps(
        markov=MarkovHead(table.bfloat16(), table.bfloat16()),
        confidence=ConfidenceHead(
            torch.randn(width, generator=generator), torch.zeros(()), True, torch.ones(_GAMMA)
        ),
        generator=generator,
        verification="rejection",
        telemetry=telemetry.Telemetry(gamma=_GAMMA),
    )


def count_step() -> Traffic:
    """Everything between the forwards of a step of sampled requests, in Triton's interpreter.

    Writing KV, whose one kernel sits in the draft model's own step, is not in it.
    """
    random = torch.Generator().manual_seed(3)
    ops = _operations(random)
    sampled = SampledRows(torch.arange(_REQUESTS), torch.ones(_REQUESTS), None, None, None)
    hidden = torch.randn(_REQUESTS, _GAMMA, _HIDDEN, generator=random).bfloat16()
    base = torch.randn(_REQUESTS, _GAMMA, _VOCABULARY, generator=random).bfloat16()
    logits = torch.randn(_REQUESTS * (_GAMMA + 1), _VOCABULARY, generator=random)
    anchors, positions = torch.arange(_REQUESTS), torch.arange(_REQUESTS) + 50
    known = torch.tensor([[_GAMMA] * _REQUESTS, [1] * _REQUESTS, [0] * _REQUESTS])
    shift, whole = torch.zeros(2, _GAMMA, 10), torch.ones(_GAMMA, dtype=torch.float64)
    places = torch.arange(_REQUESTS * (_GAMMA + 1))

    def step() -> None:
        block = ops.draft(base, hidden, anchors, positions, sampled, None)
        scores = ops.confidence(hidden, block.previous)
        survival = ops.step.survival(scores[0], known, shift, whole)
        admitted = ops.admit_there(survival, survival.numel())
        ops.step.window(admitted.rows, anchors, block.tokens, places, places, rows=len(places))
        outcome = ops.accept(
            Verified(
                logits=logits,
                drafted=block.tokens,
                rows=sampled,
                probs=block.probs,
                support=block.support,
                lse=block.lse,
                lens=admitted.lens,
                first=admitted.first,
                anchors=positions,
            )
        )
        done = ops.step.finish(outcome, block.tokens, None, admitted.lens, positions)
        ops.step.kept(admitted.rows, done.committed, places, places)

    step()  # what is made once, and what is drawn for many steps at once
    return count(step)
