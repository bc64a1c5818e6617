"""What is compiled at start: every kernel of a step is launched, and nothing is drawn differently for it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.served import _operations
from dspark_kernels.support.backend import LAUNCHES
from dspark_sglang.serving.ops import rehearsal

COLUMNS, HIDDEN, GAMMA = 600, 32, 5


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_every_kernel_of_a_step_is_launched(seeded: bool, listed: bool) -> None:
    ops = _operations(torch.Generator().manual_seed(1))
    sizes = rehearsal.Sizes(
        GAMMA, HIDDEN, torch.bfloat16, COLUMNS, COLUMNS, 3, seeded, torch.device("cpu")
    )
    tokens = torch.arange(0, COLUMNS, 2) if listed else None
    width = COLUMNS if tokens is None else len(tokens)
    before = dict(LAUNCHES)
    rehearsal.rehearse(
        ops, sizes, lambda hidden: torch.zeros(len(hidden), width).bfloat16(), tokens
    )
    launched = {name for name, n in LAUNCHES.items() if n > before.get(name, 0)}
    assert launched >= {
        "markov_step.select", "markov_step.merge", "markov_step.chain", "confidence", "survival",
        "admit", "window", "accept.scan", "accept.cut", "accept", "finish", "kept", "penalise",
        "extend",
    }  # fmt: skip
