"""Penalties at every row of a block: the kernels against :mod:`dspark_sglang.core.penalties`, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch

from dspark_kernels import penalise as kernels
from dspark_kernels.support.errors import OperandError
from dspark_sglang.core.penalties import OutputCounts, Penalties, Terms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = [
    Penalties(),
    Penalties(frequency=0.3, presence=-0.2),
    Penalties(repetition=1.3),
    Penalties(repetition=0.7, min_new_tokens=9, stop_tokens=(4,)),
    Penalties(0.1, 0.2, 1.1, 30, (2, 5, 6)),
]


@pytest.mark.parametrize(
    ("requests", "gamma", "vocabulary"), [(1, 1, 40), (5, 3, 1100), (9, 7, 130)]
)
def test_rows_and_counts_are_those_of_pytorch(requests: int, gamma: int, vocabulary: int) -> None:
    random = torch.Generator().manual_seed(requests)
    own = [KINDS[(index + 1) % len(KINDS)] for index in range(requests)]
    slots = [index + 1 if penalty.active else 0 for index, penalty in enumerate(own)]
    counts = OutputCounts(vocabulary, DEVICE)
    for slot in range(requests + 1):
        some = torch.randint(vocabulary, (slot * 5,), generator=random)
        counts.begin({slot: [*some.tolist(), *[7] * slot]})
    terms = Terms.of(own, slots, DEVICE)
    logits = torch.randn(requests * (gamma + 1), vocabulary, generator=random) * 3
    ours, theirs = copy.deepcopy(counts), counts
    for turn in range(3):
        block = torch.randint(12, (requests, gamma + 1), generator=random).to(DEVICE)
        sent = torch.rand(requests * (gamma + 1), generator=random) < 0.7
        cells = sent.nonzero().view(-1).to(DEVICE)
        if not len(cells):
            continue
        kept = torch.randint(gamma + 1, (requests,), generator=random).to(DEVICE)
        found, wanted = (logits[: len(cells)].to(DEVICE).clone() for _ in range(2))
        owner = cells // (gamma + 1)
        theirs.penalise(wanted, terms, owner, cells - owner * (gamma + 1) + 1, block)
        theirs.extend(terms, block, kept + 1)
        given = kernels.Counts(*ours.tensors), kernels.Terms(*terms)
        kernels.penalise(found, cells, *given, block)
        kernels.extend(*given, block, kept)
        assert torch.equal(found, wanted), turn
        assert all(map(torch.equal, ours.tensors, theirs.tensors))
    assert not torch.equal(found, logits[: len(cells)].to(DEVICE)) or not any(slots)


def test_terms_of_different_strides_are_refused() -> None:
    zeros, ones = torch.zeros(2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.int64)
    terms = kernels.Terms(zeros, zeros.bool(), torch.zeros(3, 2).double(), zeros, ones)
    counts = kernels.Counts(torch.zeros(1, 9, dtype=torch.int32), zeros[:1])
    with pytest.raises(OperandError, match=r"terms.stops has stride 2"):
        kernels.penalise(torch.zeros(2, 9), zeros, counts, terms, ones)
