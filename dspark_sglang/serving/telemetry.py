"""What the worker did and what it costs, in numbers: for ``/server_info``, ``/metrics``, ``doctor`` and the demo.

The worker calls :class:`Telemetry` where SGLang's DSPARK calls its own step observers, so the method names are SGLang's.
Everything here is constant memory.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dspark_sglang import __version__
from dspark_sglang.core.device import to_host
from dspark_sglang.core.schedule.depth import WORKLOADS
from dspark_sglang.serving.faults import KINDS

if TYPE_CHECKING:
    from prometheus_client import Gauge

    from dspark_sglang.core.schedule.scheduler import Scheduler
    from dspark_sglang.serving.rounds import Rounds


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
            depth: tokens drafted for each request; 0 in a decode step.
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
        host = to_host(round_)
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

    def segment(self, name: object) -> Any:
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


#: Seconds between updates: writing a metric costs more than counting.
_EVERY_S = 1.0

#: Label of the workloads without a series of their own: the deepest of them.
OTHERS = "(others)"

_COUNTERS = {
    "rounds": "Requests times steps that drafted.",
    "plain_rounds": "Requests times steps that did not draft.",
    "drafted_tokens": "Tokens drafted.",
    "verified_tokens": "Drafted tokens verified.",
    "committed_tokens": "Tokens committed by rounds, the target's own included.",
    "expected_tokens": "Tokens that rounds were expected to commit.",
    "observed_tokens": "Tokens committed by the rounds that expected some.",
    "copied_rounds": "Requests times rounds that copied from the request's own text.",
    "copied_tokens": "Copied tokens that were right.",
    "switches": "Times that drafting was turned on or off.",
}
_GAUGES = {
    "drafting": "1 while steps of the present load draft.",
    "gain": "Expected throughput with drafting over without, at the present load.",
    "forced_budget": "Share of drafted tokens an operator set to verify; -1: what pays.",
    "accept_length": "Tokens a round since the start.",
    "step_error": "Median relative error of the predicted step time.",
    "slowdown": "How much slower steps are than when their cost was measured.",
    "calibration_error": "Expected calibration error of the confidences before correction.",
    "served_calibration_error": "The same of what the scheduler used.",
    "drift_alarm": "1 while some position's confidences are off beyond the threshold.",
}
_KINDS = "; ".join(f"{kind}: {text}" for kind, text in KINDS.items())


class Metrics:
    """What ``/metrics`` says about DSPARK.

    SGLang's server collects the metrics of all its processes from files. prometheus_client decides
    where they go when it is imported, and SGLang has set the place by then.

    Args:
        labels: what runs, by name.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        from prometheus_client import Counter, Gauge

        names = ("version", *labels)
        info = Gauge(
            "dspark_info",
            "1 while dspark-sglang serves DSPARK; the labels say what runs.",
            names,
            multiprocess_mode="mostrecent",
        )
        info.labels(version=__version__, **labels).set(1)
        self._counters = {name: Counter(f"dspark_{name}", text) for name, text in _COUNTERS.items()}
        self._counted = dict.fromkeys(_COUNTERS, 0.0)
        self._gauges = {
            name: Gauge(f"dspark_{name}", text, multiprocess_mode="mostrecent")
            for name, text in _GAUGES.items()
        }
        self._faults = Counter(
            "dspark_faults", f"What went wrong and was contained: {_KINDS}.", ["kind"]
        )
        for kind in KINDS:  # a series that begins with its first fault shows no increase
            self._faults.labels(kind=kind)
        self._faulty: dict[str, int] = {}
        self._depth = Gauge(
            "dspark_depth_cap",
            "Tokens drafted a request; 0: no request of the workload was seen lately.",
            ["workload"],
            multiprocess_mode="mostrecent",
        )
        #: Workloads with a series of their own. prometheus_client cannot drop one again where
        #: several processes write, and clients name workloads: the first few get one.
        self._workloads: set[str] = set()
        self._next = 0.0
        self._canary: tuple[Gauge, Gauge] | None = None

    def report_canary(self, passed: bool, now: float) -> None:
        """Show what the canary found.

        The series exist from the first report on: a server nobody watches has none.

        Args:
            now: seconds since 1970.
        """
        if self._canary is None:
            from prometheus_client import Gauge

            self._canary = (
                Gauge(
                    "dspark_canary_passed",
                    "1: the last canary run found no fault; 0: it found one.",
                    multiprocess_mode="mostrecent",
                ),
                Gauge(
                    "dspark_canary_seconds",
                    "When the canary reported last, in seconds since 1970.",
                    multiprocess_mode="mostrecent",
                ),
            )
        verdict, reported = self._canary
        verdict.set(float(passed))
        reported.set(now)

    def update(self, now: float, rounds: Rounds) -> None:
        """Bring the metrics up to date, at most once a second.

        Args:
            now: seconds of a monotonic clock.
        """
        if now < self._next:
            return
        self._next = now + _EVERY_S
        known: dict[str, Any] = rounds.telemetry.snapshot() | rounds.snapshot()
        for name, counter in self._counters.items():
            value = float(known[name])
            # Cleared counters start again from 0.
            counter.inc(value - self._counted[name] if value >= self._counted[name] else value)
            self._counted[name] = value
        values = {
            **{name: known[name] for name in ("drafting", "gain", "accept_length", "step_error",
                                              "slowdown", "drift_alarm")},
            "forced_budget": -1.0 if known["forced_budget"] is None else known["forced_budget"],
            "calibration_error": known["ece"],
            "served_calibration_error": known["ece_served"],
        }  # fmt: skip
        for name, found in values.items():
            if found is not None:
                self._gauges[name].set(float(found))
        for kind, count in known["faults"].items():
            self._faults.labels(kind=kind).inc(count - self._faulty.get(kind, 0))
        self._faulty = known["faults"]
        self._show_depths(known["depth_caps"])

    def _show_depths(self, caps: Mapping[str, int]) -> None:
        for workload in caps:
            if len(self._workloads) < WORKLOADS:
                self._workloads.add(workload)
        others = [cap for workload, cap in caps.items() if workload not in self._workloads]
        if others:
            self._workloads.add(OTHERS)
        for workload in self._workloads:
            self._depth.labels(workload=workload).set(caps.get(workload, 0))
        if OTHERS in self._workloads:
            self._depth.labels(workload=OTHERS).set(max(others, default=0))
