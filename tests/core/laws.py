"""Comparing samples with the law they should follow."""

from __future__ import annotations

import torch

#: A correct sampler fails a check at this level once in ten thousand seeds; the seed is fixed.
THRESHOLD = 1e-4


def p_value(counts: torch.Tensor, law: torch.Tensor) -> float:
    """Pearson's chi-square test of one sample.

    Args:
        counts: ``[V]`` occurrences of each token.
        law: ``[V]`` expected probabilities (need not be normalised).

    Returns:
        The chance of a deviation at least this large; 0 when an impossible token occurred.
    """
    counts, law = counts.double(), law.double() / law.double().sum()
    possible = law > 0
    if counts[~possible].sum() > 0:
        return 0.0
    expected = law[possible] * counts.sum()
    assert expected.min() >= 5, "too few samples for a chi-square test"
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = int(possible.sum()) - 1
    if freedom == 0:
        return 1.0
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), statistic / 2))


def grouped_p_values(given: torch.Tensor, tokens: torch.Tensor, laws: torch.Tensor) -> list[float]:
    """One p-value per condition: ``tokens[given == g]`` against ``laws[g]`` for every ``g``."""
    width = laws.shape[1]
    return [
        p_value(torch.bincount(tokens[given == g], minlength=width), laws[g])
        for g in given.unique().tolist()
    ]


def draw(laws: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token a row of ``[N, V]`` laws, by torch's own sampler."""
    return torch.multinomial(laws, 1, generator=generator).squeeze(1)


def uniforms(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Float64 uniforms in [0, 1)."""
    return torch.rand(shape, dtype=torch.float64, generator=generator)
