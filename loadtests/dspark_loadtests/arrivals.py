"""When an open loop sends: Poisson instants at a constant, rising or stepped rate, or those of a trace.

The instants are drawn before the run and never wait for an answer, so a slow server meets the same load as a fast one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dspark_sglang.errors import ConfigError


class Segment(NamedTuple):
    """``seconds`` in which the rate goes in a straight line from one value to another (requests a second)."""

    seconds: float
    begin: float
    end: float

    @property
    def mean(self) -> float:
        """The mean rate."""
        return (self.begin + self.end) / 2


def steps(rates: Sequence[float], seconds: float) -> list[Segment]:
    """One segment of constant rate after the other, sharing the time evenly."""
    return [Segment(seconds / len(rates), rate, rate) for rate in rates]


def ramp(begin: float, end: float, seconds: float) -> list[Segment]:
    """A rate that rises or falls in a straight line."""
    return [Segment(seconds, begin, end)]


def check(segments: Sequence[Segment]) -> None:
    """Refuse what is no load; a last segment may go on for ever.

    Raises:
        ConfigError: a rate or a time that is not a positive, finite number.
    """
    for segment in segments:
        rates = (segment.begin, segment.end)
        finite = all(math.isfinite(rate) for rate in rates)
        if not finite or not segment.seconds > 0 or min(rates) < 0 or max(rates) <= 0:
            raise ConfigError(
                f"A load of {segment.begin:g} to {segment.end:g} requests/s for {segment.seconds:g} s.",
                expected="rates of 0 or more, not both 0, and a time above 0",
                fix="Correct --rate or --duration.",
            )


def instants(segments: Sequence[Segment], rng: random.Random) -> Iterator[float]:
    """Seconds after the start at which to send, ascending.

    A unit-rate Poisson process, with each of its points carried back through the integral of the rate: exact for
    any rate that changes in straight lines.
    """
    check(segments)
    begin = passed = 0.0
    due = rng.expovariate(1.0)
    for segment in segments:
        total = segment.mean * segment.seconds
        while due < passed + total:
            yield begin + _inverse(segment, due - passed)
            due += rng.expovariate(1.0)
        passed += total
        begin += segment.seconds


def _inverse(segment: Segment, amount: float) -> float:
    """Seconds into a segment after which its rate has integrated to ``amount``."""
    slope = (segment.end - segment.begin) / segment.seconds
    # rate * t + slope * t² / 2 = amount, in the form that has no cancellation at slope 0
    return 2 * amount / (segment.begin + math.sqrt(segment.begin**2 + 2 * slope * amount))
