"""Penalties inside a block, against plain decoding that takes one step at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_sglang.core.penalties import Penalties

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
