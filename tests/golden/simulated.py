"""Recording a trace from the simulator: the same scheduling, with models that are numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.golden import adapter
from tests.golden.trace import FORMAT, Line, changes, encode

GAMMA = 5
_SEED, _REQUESTS, _SLOTS = 13, 48, 12


class Case(NamedTuple):
    """One recording from the simulator."""

    name: str
    about: str
    overlapped: bool


CASES = {
    case.name: case
    for case in (
        Case("simulated-synchronous", "the simulator's replica, synchronous", False),
        Case(
            "simulated-overlapped",
            "the simulator's replica, overlapped, with captured graphs",
            True,
        ),
    )
}


class Times:
    """The machine that is simulated. By what is known at the start, rounds last ``feared`` times as long."""

    gamma = GAMMA

    def __init__(self, feared: float = 1.0) -> None:
        self._feared = feared

    def plain(self, requests: int, context: int, sampled: int) -> float:
        """Seconds of a decode step."""
        return 0.010 + 0.0004 * requests + 1e-6 * context + 0.0001 * sampled

    def round(self, requests: int, drafted: int, context: int, sampled: int) -> float:
        """Seconds of a round; its cost rises in stairs."""
        more = 0.003 + 0.0003 * drafted + 0.002 * ((requests + drafted) // 16)
        return (self.plain(requests, context, sampled) + more) * self._feared

    def prefill(self, tokens: int, requests: int) -> float:
        """Seconds of a prefill."""
        return 0.002 + 0.00002 * tokens

    def between(self, requests: int) -> float:
        """Seconds between steps."""
        return 0.0005


def record(case: Case) -> str:
    """The trace of one run."""
    lines: list[str] = []
    known: dict[str, Any] = {}
    steps = 0

    def told(line: Line, after: dict[str, Any]) -> None:
        nonlocal known, steps
        line["learned"] = changes(known, after)
        lines.append(encode({"step": steps} | line))
        known, steps = after, steps + 1

    run = adapter.simulator(
        overlapped=case.overlapped,
        times=Times(),
        feared=Times(feared=2.5),
        requests=_REQUESTS,
        slots=_SLOTS,
        seed=_SEED,
        told=told,
    )
    known = run.learned()
    head = {"trace": case.name, "format": FORMAT, "about": case.about, "gamma": GAMMA}
    lines.append(encode(head | {"known": known}))
    end = run.run()
    lines.append(encode({"end": end, "learned": changes(known, run.learned())}))
    return "\n".join(lines) + "\n"
