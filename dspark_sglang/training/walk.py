"""Accepted length on text the target wrote: serving replayed without a server.

Given what the target wrote, whether serving would have accepted a drafted token is known: at
temperature 0 the draft's most probable token is the next one or it is not; at temperature 1
rejection sampling emits ``x`` by acceptance with probability ``min(p(x), q(x))`` out of ``p(x)``,
so given ``x`` it was accepted with probability ``min(1, q(x) / p(x))``. Rounds follow each other
as in serving: after ``n`` accepted tokens the next anchor is ``n + 1`` further.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


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
