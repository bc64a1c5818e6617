"""The generator's own health: how late its event loop is, and clocks that do not do what clocks should."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from dspark_loadtests.stream import Clock

PROBE_S = 0.01
#: A probe that is later than this says that the whole process stood still.
STALL_S = 1.0
#: Wall and monotonic clock part by no more in a run unless someone set the time.
JUMP_S = 0.5


class Watch:
    """Probes the event loop it runs on.

    Args:
        clock: monotonic seconds, the one that stamps the records.
        wall: seconds since the epoch.
        note: told of what a reader of the results must know.
    """

    def __init__(
        self, note: Callable[[str], None], *, clock: Clock = time.perf_counter, wall: Clock = time.time
    ) -> None:  # fmt: skip
        self._note = note
        self._clock = clock
        self._wall = wall
        self._offset = wall() - clock()
        #: ``(when, seconds late)`` of every probe.
        self.lags: list[tuple[float, float]] = []

    async def run(self) -> None:
        """Probe until cancelled."""
        due = self._clock() + PROBE_S
        while True:
            await asyncio.sleep(max(0.0, due - self._clock()))
            due = self.look(due) + PROBE_S

    def look(self, due: float) -> float:
        """Take one probe that was due then; returns the present time."""
        now = self._clock()
        late = max(0.0, now - due)
        self.lags.append((now, late))
        if late > STALL_S:
            self._note(
                f"the generator stood still for {late:.1f} s (the process or the machine was stopped): "
                "latencies of that time are not the server's"
            )
        offset = self._wall() - now
        jump = offset - self._offset
        # The wall clock runs on while a suspended machine's monotonic one does not: reported as a jump, which it is.
        if abs(jump) > JUMP_S:
            self._note(
                f"the wall clock jumped by {jump:+.1f} s; times are taken from a monotonic clock and are not affected"
            )
            self._offset = offset
        return now
