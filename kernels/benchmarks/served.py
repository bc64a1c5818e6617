"""Launches of one served step, counted through the very operations that the server calls."""

from __future__ import annotations

from typing import Any

import numpy as np
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
    """Draft, confidence, admission and acceptance of sampled requests, in Triton's interpreter.

    Writing KV, whose one kernel sits in the draft model's own step, is not in it.
    """
    random = torch.Generator().manual_seed(3)
    ops = _operations(random)
    sampled = SampledRows(torch.arange(_REQUESTS), torch.ones(_REQUESTS), None, None, None)
    hidden = torch.randn(_REQUESTS, _GAMMA, _HIDDEN, generator=random).bfloat16()
    base = torch.randn(_REQUESTS, _GAMMA, _VOCABULARY, generator=random).bfloat16()
    logits = torch.randn(_REQUESTS * (_GAMMA + 1), _VOCABULARY, generator=random)
    anchors, positions = torch.arange(_REQUESTS), torch.arange(_REQUESTS) + 50
    survival = np.linspace(0.9, 0.1, _REQUESTS * _GAMMA).reshape(_REQUESTS, _GAMMA)
    order = np.arange(survival.size)
    first = torch.arange(_REQUESTS) * (_GAMMA + 1)
    lens = torch.full((_REQUESTS,), _GAMMA)

    def step() -> None:
        block = ops.draft(base, hidden, anchors, positions, sampled, None)
        ops.confidence(hidden, block.previous)
        ops.admit(survival, order, survival.size, base.device)
        ops.accept(
            Verified(
                logits=logits,
                drafted=block.tokens,
                rows=sampled,
                probs=block.probs,
                support=block.support,
                lse=block.lse,
                lens=lens,
                first=first,
                anchors=positions,
            )
        )

    step()  # what is made once, and what is drawn for many steps at once
    return count(step)
