"""One part of a drill: what it found, kept on disk so that an interrupted drill goes on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from tests.drill.requests import End, Result

#: Told what goes on, in a line of text.
Tell = Callable[[str], None]
#: A line of progress is printed so often at most.
_EVERY_S = 10.0


def teller(name: str) -> Tell:
    """Prints the progress of a section, not every line of it."""
    said = -_EVERY_S

    def tell(what: str) -> None:
        nonlocal said
        if time.monotonic() - said >= _EVERY_S:
            said = time.monotonic()
            print(f"{name}: {what}", flush=True)

    return tell


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """What one section found."""

    key: str
    name: str
    seconds: float
    #: Why it was left out; empty: it ran.
    skipped: str = ""
    #: What is wrong, in words; empty: it passed.
    faults: list[str]
    #: How requests ended.
    ends: dict[str, int] = {}
    lost_tokens: int = 0
    hangs: int = 0
    figures: dict[str, Any] = {}


class Findings:
    """What a section collects while it runs."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.ends: Counter[str] = Counter()
        self.lost_tokens = 0
        self.figures: dict[str, Any] = {}
        self.skipped = ""
        self._began = time.monotonic()

    def take(self, what: str, results: Iterable[Result], *, allowed: Iterable[End]) -> int:
        """Count results; every end that is not allowed is a fault. Returns how many are not."""
        ends, bad = {End.EQUAL, *allowed}, list[Result]()
        for result in results:
            self.ends[result.end.value] += 1
            self.lost_tokens += result.lost
            if result.end not in ends:
                bad.append(result)
        for end, count in Counter(result.end for result in bad).items():
            first = next(result for result in bad if result.end is end)
            self.faults.append(f"{what}: {count} × {end.value}, first: {first.detail}")
        return len(bad)

    def expect(self, holds: bool, fault: str) -> None:
        """Note a fault unless something holds."""
        if not holds:
            self.faults.append(fault)

    def section(self, name: str, key: str) -> Section:
        """What was found, to be kept."""
        return Section(
            key=key,
            name=name,
            seconds=round(time.monotonic() - self._began, 1),
            skipped=self.skipped,
            faults=self.faults,
            ends=dict(self.ends),
            lost_tokens=self.lost_tokens,
            hangs=self.ends[End.HUNG.value],
            figures=self.figures,
        )
