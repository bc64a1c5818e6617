"""Penalties inside a block, against plain decoding that takes one step at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_sglang.core.penalties import OutputCounts, Penalties, Terms

VOCAB = 7
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=6)


def plain_step(logits: list[float], output: list[int], p: Penalties) -> list[float]:
    """One step of plain decoding: SGLang's additive penalties, then its scaling."""
    result = list(logits)
    for token in range(VOCAB):
        times = output.count(token)
        result[token] -= p.frequency * times + (p.presence if times else 0.0)
        if times:
            scaled = result[token] / p.repetition
            result[token] = scaled if result[token] > 0 else result[token] * p.repetition
        if token in p.stop_tokens and len(output) < p.min_new_tokens:
            result[token] = float("-inf")
    return result


@given(
    output=tokens,
    drafted=tokens,
    frequency=st.sampled_from([0.0, 0.7, -0.4]),
    presence=st.sampled_from([0.0, 1.1]),
    repetition=st.sampled_from([1.0, 1.3, 0.8]),
    minimum=st.integers(0, 9),
)
def test_every_row_is_a_plain_step(
    output: list[int],
    drafted: list[int],
    frequency: float,
    presence: float,
    repetition: float,
    minimum: int,
) -> None:
    penalties = Penalties(frequency, presence, repetition, minimum, (2, 5))
    rows = torch.linspace(-3, 3, (len(drafted) + 1) * VOCAB).view(-1, VOCAB)
    expected = [
        plain_step(row, output + drafted[:position], penalties)
        for position, row in enumerate(rows.tolist())
    ]
    penalties.apply(rows, output, drafted)
    torch.testing.assert_close(rows, torch.tensor(expected))


@pytest.mark.parametrize(
    "penalties",
    [Penalties(), Penalties(stop_tokens=(1, 2))],
    ids=["default", "stop tokens alone"],
)
def test_nothing_to_do_is_said(penalties: Penalties) -> None:
    assert not penalties.active
    rows = torch.randn(3, VOCAB)
    before = rows.clone()
    penalties.apply(rows, [1, 1], [2, 3])
    assert torch.equal(rows, before)


@pytest.mark.parametrize(
    "penalties",
    [
        Penalties(frequency=0.1),
        Penalties(presence=-1.0),
        Penalties(repetition=1.01),
        Penalties(min_new_tokens=1),
    ],
)
def test_any_penalty_is_active(penalties: Penalties) -> None:
    assert penalties.active


def test_the_callers_output_is_not_changed() -> None:
    output = [1, 2]
    Penalties(frequency=1.0).apply(torch.zeros(3, VOCAB), output, [3, 4])
    assert output == [1, 2]


steps = st.lists(
    st.tuples(st.lists(st.integers(0, VOCAB - 1), min_size=4, max_size=4), st.integers(1, 4)),
    min_size=1,
    max_size=4,
)


@given(first=tokens, others=tokens, of_first=steps, of_others=steps)
def test_counts_grow_by_what_each_step_keeps(
    first: list[int],
    others: list[int],
    of_first: list[tuple[list[int], int]],
    of_others: list[tuple[list[int], int]],
) -> None:
    """Two penalised requests and one without penalties between them, step after step, in rows that were used before."""
    device = torch.device("cpu")
    mine, theirs = Penalties(0.7, 1.1, 1.3, 9, (2, 5)), Penalties(repetition=0.8)
    counts = OutputCounts(VOCAB, device)
    for slot, output in ((1, [3, 3, 4]), (0, others), (1, first)):
        counts.begin({slot: output})
    terms = Terms.of([theirs, Penalties(stop_tokens=(1,)), mine], [0, 0, 1], device)
    outputs = {0: list(others), 2: list(first)}
    owner, place = torch.arange(3).repeat_interleave(5), torch.arange(5).repeat(3)
    for (a, kept_a), (b, kept_b) in zip(of_others, of_first, strict=False):
        block, kept = torch.tensor([a, [6, 6, 6, 6], b]), torch.tensor([kept_a, 4, kept_b])
        rows = torch.linspace(-3, 3, 15 * VOCAB).view(15, VOCAB)
        untouched = rows[5:10].clone()
        expected = {
            index: [plain_step(row, outputs[index] + own[:j], p) for j, row in enumerate(rows[5 * index :][:5].tolist())]
            for index, own, p in ((0, a, theirs), (2, b, mine))
        }  # fmt: skip
        counts.penalise(rows, terms, owner, place, block)
        for index, wanted in expected.items():
            torch.testing.assert_close(rows[5 * index :][:5], torch.tensor(wanted))
        assert torch.equal(rows[5:10], untouched)
        counts.extend(terms, block, kept)
        outputs[0] += a[:kept_a]
        outputs[2] += b[:kept_b]
