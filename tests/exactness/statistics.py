"""Tests of samples against an exact distribution, and of two samples against each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from tests.exactness.distribution import Distribution, Output

#: Smallest expected count of a cell.
EXPECTED = 8.0


class Cells(NamedTuple):
    """A partition of all outputs: everything below a prefix, or what its kept children leave.

    ``kept`` maps every prefix that was looked into to its children that have cells of their own.
    """

    kept: dict[Output, frozenset[int]]
    #: Cell to probability; the cell ``(prefix, True)`` is what the kept children of ``prefix`` leave.
    chance: dict[tuple[Output, bool], float]

    def of(self, output: Output) -> tuple[Output, bool]:
        """The cell that ``output`` falls in."""
        for length in range(len(output) + 1):
            children = self.kept.get(output[:length])
            if children is None:
                return output[:length], False
            if length == len(output) or output[length] not in children:
                return output[:length], True
        raise AssertionError("a finished output has no children")


class Test(NamedTuple):
    """The outcome of one test."""

    p_value: float
    statistic: float
    freedom: int
    #: Outputs that the distribution gives no probability.
    impossible: int = 0


def chi_square_tail(statistic: float, freedom: int) -> float:
    """The chance that a chi-square variable of ``freedom`` degrees exceeds ``statistic``."""
    if freedom < 1:
        return 1.0
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def partition(distribution: Distribution, samples: int, *, expected: float = EXPECTED) -> Cells:
    """Cells of at least ``expected`` samples each, as deep as the samples resolve.

    A prefix is looked into when one of its children is large enough. The probabilities are exact: what is not looked into stays one cell.
    """
    floor = expected / samples
    kept: dict[Output, frozenset[int]] = {}
    chance: dict[tuple[Output, bool], float] = {}
    level: list[tuple[Output, float]] = [((), 1.0)]
    while level:
        distribution.learn(prefix for prefix, _ in level if not distribution.ends(prefix))
        below: list[tuple[Output, float]] = []
        for prefix, mass in level:
            children: dict[int, float] = {}
            rest = mass
            if not distribution.ends(prefix) and not distribution.ambiguous(prefix):
                children, rest = _split(distribution.after(prefix) * mass, floor)
            if not children:
                chance[prefix, False] = mass
                continue
            kept[prefix] = frozenset(children)
            if rest > 0.0:
                chance[prefix, True] = rest
            below += [((*prefix, token), p) for token, p in children.items()]
        level = below
    return Cells(kept, chance)


def _split(masses: torch.Tensor, floor: float) -> tuple[dict[int, float], float]:
    """Children with a mass of at least ``floor``, and the rest: 0, or at least ``floor`` too."""
    large = (masses >= floor).nonzero().view(-1).tolist()
    children = {token: float(masses[token]) for token in large}
    rest = float(masses.sum()) - sum(children.values())
    if float(masses[[t for t in range(len(masses)) if t not in children]].sum()) == 0.0:
        return children, 0.0
    for token in sorted(children, key=lambda token: children[token]):
        if rest >= floor:
            break
        rest += children.pop(token)
    return children, rest


def goodness(
    distribution: Distribution, counts: Mapping[Output, int], *, expected: float = EXPECTED
) -> Test:
    """Pearson's chi-square test of sampled outputs against their distribution.

    Args:
        counts: how often each output was drawn.

    Returns:
        The test; p-value 0 when an output of probability zero was drawn.
    """
    samples = sum(counts.values())
    never = distribution.impossible(counts)
    cells = partition(distribution, samples, expected=expected)
    seen: Counter[tuple[Output, bool]] = Counter()
    for output, count in counts.items():
        seen[cells.of(output)] += count
    statistic = sum(
        (seen[cell] - samples * chance) ** 2 / (samples * chance)
        for cell, chance in cells.chance.items()
    )
    freedom = len(cells.chance) - 1
    p_value = 0.0 if never else chi_square_tail(statistic, freedom)
    return Test(p_value, statistic, freedom, sum(counts[output] for output in never))


def two_sample(
    first: Mapping[Output, int], second: Mapping[Output, int], *, expected: float = EXPECTED
) -> Test:
    """Chi-square test that two samples come from one distribution; cells by prefix from both together."""
    samples = (sum(first.values()), sum(second.values()))
    # A cell is large enough when its smaller expected count is.
    floor = expected * sum(samples) / max(1, min(samples))
    together = Counter(first)
    together.update(second)
    cells = _count_cells(together, floor)
    seen = tuple(Counter[tuple[Output, bool]]() for _ in samples)
    for counter, given in zip(seen, (first, second), strict=True):
        for output, count in given.items():
            counter[cells.of(output)] += count
    statistic = 0.0
    for cell, total in cells.chance.items():
        for counter, size in zip(seen, samples, strict=True):
            wanted = total * size / sum(samples)
            statistic += (counter[cell] - wanted) ** 2 / wanted
    freedom = len(cells.chance) - 1
    return Test(chi_square_tail(statistic, freedom), statistic, freedom)


def _count_cells(counts: Mapping[Output, int], floor: float) -> Cells:
    """The partition of observed outputs into cells of at least ``floor``; chances are counts."""
    kept: dict[Output, frozenset[int]] = {}
    chance: dict[tuple[Output, bool], float] = {}
    level: list[tuple[Output, dict[Output, int]]] = [((), dict(counts))]
    while level:
        below = []
        for prefix, members in level:
            groups: dict[int, dict[Output, int]] = {}
            for output, count in members.items():
                if len(output) > len(prefix):
                    groups.setdefault(output[len(prefix)], {})[output] = count
            mass = sum(members.values())
            sizes = {token: sum(group.values()) for token, group in groups.items()}
            children = {token for token, size in sizes.items() if size >= floor}
            rest = mass - sum(sizes[token] for token in children)
            for token in sorted(children, key=lambda token: sizes[token]):
                if rest == 0 or rest >= floor:
                    break
                children.discard(token)
                rest += sizes[token]
            if not children:
                chance[prefix, False] = mass
                continue
            kept[prefix] = frozenset(children)
            if rest:
                chance[prefix, True] = rest
            below += [((*prefix, token), groups[token]) for token in children]
        level = below
    return Cells(kept, chance)


def holm(p_values: Mapping[str, float], level: float) -> set[str]:
    """Names whose hypothesis is rejected with a family-wise error of at most ``level``.

    Source: Holm, "A simple sequentially rejective multiple test procedure" (1979).
    """
    rejected: set[str] = set()
    order: Sequence[str] = sorted(p_values, key=lambda name: p_values[name])
    for place, name in enumerate(order):
        if p_values[name] > level / (len(order) - place):
            break
        rejected.add(name)
    return rejected
