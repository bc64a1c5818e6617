"""Our Prometheus metrics, in the scheduler process; SGLang serves them at ``/metrics``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dspark_sglang import __version__
from dspark_sglang.core.depth import WORKLOADS
from dspark_sglang.serving.faults import KINDS
from dspark_sglang.serving.rounds import Rounds

if TYPE_CHECKING:
    from prometheus_client import Gauge

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
