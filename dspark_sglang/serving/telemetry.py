"""What the worker did, in numbers: read by ``/server_info``, metrics, ``doctor`` and the demo.

The worker calls this where SGLang's DSPARK calls its own step observers, so the method names
are SGLang's. Everything here is constant memory.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict, deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from dspark_sglang.core.schedule.scheduler import Scheduler


class Telemetry:
    """Counters of one scheduler process."""

    def __init__(self, *, gamma: int) -> None:
        self.gamma = gamma
        #: Which implementation of each part really ran: ``{"accept:torch-greedy": 12, ...}``.
        self.ran: Counter[str] = Counter()
        #: Seconds spent in each part, as the host saw it.
        self.seconds: defaultdict[str, float] = defaultdict(float)
        #: Collectives by purpose, and bytes that each left on this rank.
        self.collectives: Counter[str] = Counter()
        self.collective_bytes: Counter[str] = Counter()
        self.steps = 0
        #: One per request and step that drafted, and one per request and step that did not.
        self.rounds = 0
        self.plain_rounds = 0
        self.drafted_tokens = 0
        self.verified_tokens = 0
        self.committed_tokens = 0
        #: Steps whose numbers are still on their way from the device.
        self._pending: deque[tuple[Any, torch.Tensor, int]] = deque()
        self._sent = np.zeros(gamma, dtype=np.int64)
        self._kept = np.zeros(gamma, dtype=np.int64)
        self._reached = np.zeros(gamma, dtype=np.int64)

    def observe_round(self, lens: np.ndarray, counts: np.ndarray, depth: int) -> None:
        """Count one step.

        Args:
            lens: ``[R]`` drafted tokens verified of each request.
            counts: ``[R]`` drafted tokens kept.
            depth: tokens drafted for each request; 0 in a plain step.
        """
        self.steps += 1
        if not depth:
            self.plain_rounds += len(lens)
            return
        position = np.arange(self.gamma)
        sent = position < lens[:, None]
        self.rounds += len(lens)
        self.drafted_tokens += len(lens) * depth
        self.verified_tokens += int(lens.sum())
        self.committed_tokens += int(counts.sum()) + len(counts)
        self._sent += sent.sum(axis=0)
        self._kept += (position < counts[:, None]).sum(axis=0)
        self._reached += (sent & (position <= counts[:, None])).sum(axis=0)

    def observe_later(self, round_: torch.Tensor, depth: int) -> None:
        """Count one step without waiting for the device.

        Args:
            round_: ``[2, R]`` int64 drafted tokens verified and kept of each request.
            depth: tokens drafted for each request.
        """
        if round_.device.type == "cpu":
            lens, counts = round_.numpy()
            self.observe_round(lens, counts, depth)
            return
        host = torch.empty(round_.shape, dtype=round_.dtype, pin_memory=True)
        host.copy_(round_, non_blocking=True)
        arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        self._pending.append((arrived, host, depth))
        while self._pending and self._pending[0][0].query():
            _, found, drafted = self._pending.popleft()
            lens, counts = found.numpy()
            self.observe_round(lens, counts, drafted)

    def took(self, seconds: float, drafted: bool) -> None:
        """Count the seconds of a step."""
        self.seconds["step"] += seconds
        self.seconds["round" if drafted else "plain"] += seconds

    def exchanged(self, what: str, size: int) -> None:
        """Count a collective of ``size`` bytes."""
        self.collectives[what] += 1
        self.collective_bytes[what] += size

    @contextlib.contextmanager
    def timed(self, part: str) -> Any:
        """Add the host seconds of a ``with`` block to ``part``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def snapshot(self) -> dict[str, Any]:
        """A JSON-ready copy of every counter."""
        reached = np.maximum(self._reached, 1)
        spent = self.seconds.get("step", 0.0)
        return {
            "steps": self.steps,
            "rounds": self.rounds,
            "plain_rounds": self.plain_rounds,
            "drafted_tokens": self.drafted_tokens,
            "verified_tokens": self.verified_tokens,
            "committed_tokens": self.committed_tokens,
            "accept_length": self.committed_tokens / self.rounds if self.rounds else None,
            "mean_verified": self.verified_tokens / self.rounds if self.rounds else None,
            "position_sent": self._sent.tolist(),
            "position_kept": self._kept.tolist(),
            "position_reached": self._reached.tolist(),
            "position_acceptance": (self._kept / reached).round(4).tolist(),
            "planner_share": self.seconds.get("plan", 0.0) / spent if spent else None,
            "ran": dict(self.ran),
            "collectives": dict(self.collectives),
            "collective_bytes": dict(self.collective_bytes),
            "seconds": {part: round(value, 6) for part, value in self.seconds.items()},
        }

    def clear(self) -> None:
        """Start counting again."""
        self.__init__(gamma=self.gamma)  # type: ignore[misc]


class StepObservers:
    """SGLang's observer interface over :class:`Telemetry`."""

    def __init__(self, telemetry: Telemetry, scheduler: Scheduler) -> None:
        self._telemetry = telemetry
        self._scheduler = scheduler

    def begin_step(self) -> None:
        pass

    def segment(self, name: Any) -> Any:
        return self._telemetry.timed(str(getattr(name, "value", name)))

    def note_prefill_step(self) -> None:
        pass

    def note_idle_decode_step(self) -> None:
        pass

    def dump_info_records(self) -> dict[str, Any]:
        return self._telemetry.snapshot()

    def clear_info_records(self) -> None:
        self._telemetry.clear()
        self._scheduler.clear()

    def block_accept_estimate_log_suffix(self) -> str | None:
        return None

    def note_request_finished(self, *, rid: str, natural_stop: bool) -> None:
        pass

    def observe_verify_step(self, **step: Any) -> None:
        pass
