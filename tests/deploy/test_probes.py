"""Probes and grace of the rendered manifests, by a kubelet's rules, against a stub that behaves like SGLang's server.

Time is a number here, so minutes cost nothing. What the stub does was read in SGLang 0.5.23
(``entrypoints/http_server.py``: ``health_generate``, ``ready``; ``managers/tokenizer_manager.py``:
``sigterm_watchdog``) and is measured on the real CPU server by ``make drill``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

RENDERED = Path(__file__).resolve().parents[2] / "deploy" / "rendered"
#: ``SGLANG_HEALTH_CHECK_TIMEOUT``, how often SIGTERM and the end of a drain are noticed, and what schedulers get.
HEALTH_S, POLL_S, SCHEDULERS_S = 20.0, 5.0, 15.0
#: Most seconds until load balancers have heard that a pod leaves.
ENDPOINTS_S = 8.0
READY, HEALTH = "/ready", "/health"


@dataclass
class Stub:
    """A server that loads for ``load`` seconds and whose step takes ``step`` seconds from ``busy_from`` on."""

    load: float = 30.0
    step: float = 0.1
    busy_from: float = 0.0
    busy_to: float = float("inf")
    hung_from: float = float("inf")
    healthy: bool = True

    def health(self, at: float) -> tuple[float, bool]:
        """Seconds an answer takes, and whether it is 200: a token is generated, after a second of sleep."""
        if at < self.load:
            return 0.0, False
        step = self.step if self.busy_from <= at < self.busy_to else 0.1
        taken = HEALTH_S + 1 if at >= self.hung_from else 1.0 + step
        self.healthy = taken <= HEALTH_S
        return min(taken, HEALTH_S), self.healthy

    def ready(self, at: float) -> tuple[float, bool]:
        """Instant; 503 while it loads, and after a failed health check until one succeeds."""
        return 0.0, at >= self.load and self.healthy

    def answer(self, path: str, at: float) -> tuple[float, bool]:
        return self.health(at) if path == HEALTH else self.ready(at)

    def exits(self, sigterm: float, last_answer: float) -> float:
        """When the process is gone: SIGTERM is noticed, then the drain's end, then schedulers stop."""
        return max(sigterm + POLL_S, last_answer) + POLL_S + SCHEDULERS_S


def passes(stub: Stub, probe: dict[str, Any], at: float) -> bool:
    """One probe as a kubelet makes it."""
    # The start-up command asks /ready, then /server_info.
    path = probe["httpGet"]["path"] if "httpGet" in probe else READY
    taken, good = stub.answer(path, at)
    return good and taken < probe.get("timeoutSeconds", 1)


def killed_at(stub: Stub, container: dict[str, Any], until: float) -> float | None:
    """When a kubelet restarts the container within ``until`` seconds; None: not."""
    startup, liveness = container["startupProbe"], container["livenessProbe"]
    at = 0.0
    for tries in range(startup.get("failureThreshold", 3) + 1):
        if tries == startup.get("failureThreshold", 3):
            return at
        if passes(stub, startup, at):
            break
        at += startup.get("periodSeconds", 10)
    failed = 0
    while at < until:
        failed = 0 if passes(stub, liveness, at) else failed + 1
        if failed == liveness.get("failureThreshold", 3):
            return at
        at += liveness.get("periodSeconds", 10)
    return None


def out_of_service(stub: Stub, container: dict[str, Any], since: float, until: float) -> float:
    """Seconds without traffic between two times, once the pod had started."""
    readiness, liveness = container["readinessProbe"], container["livenessProbe"]
    failed, out, period = 0, 0.0, readiness.get("periodSeconds", 10)
    at = next_liveness = since
    while at < until:
        if at >= next_liveness:
            passes(stub, liveness, at)
            next_liveness += liveness.get("periodSeconds", 10)
        failed = 0 if passes(stub, readiness, at) else failed + 1
        out += period if failed >= readiness.get("failureThreshold", 3) else 0
        at += period
    return out


def workloads() -> list[Any]:
    found = []
    for path in sorted(RENDERED.glob("*.yaml")):
        for doc in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            kind = (doc or {}).get("kind")
            if kind not in ("Deployment", "StatefulSet"):
                continue
            pod = doc["spec"]["template"]
            server = pod["spec"]["containers"][0]
            if server.get("readinessProbe", {}).get("httpGet", {}).get("path") != READY:
                continue  # the router, and ranks above 0
            if "livenessProbe" in server and server["livenessProbe"]["httpGet"]["path"] == HEALTH:
                found.append(pytest.param(pod, id=f"{path.stem}-{doc['metadata']['name']}"))
    return found


@pytest.fixture(params=workloads())
def pod(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


def test_every_serving_overlay_is_here() -> None:
    assert {param.id.split("-")[0] for param in workloads()} >= {
        "cpu",
        "qwen3",
        "h100",
        "h200",
        "h800",
    }


def test_a_server_that_loads_or_is_only_busy_is_left_alone(pod: dict[str, Any]) -> None:
    server = pod["spec"]["containers"][0]
    budget = server["startupProbe"]["periodSeconds"] * server["startupProbe"]["failureThreshold"]
    assert killed_at(Stub(load=0.95 * budget), server, budget + 3600) is None
    assert killed_at(Stub(step=15.0), server, 3600) is None


def test_a_server_that_hangs_is_restarted_soon(pod: dict[str, Any]) -> None:
    server = pod["spec"]["containers"][0]
    found = killed_at(Stub(hung_from=600.0), server, 3600)
    assert found is not None and 600.0 <= found <= 720.0
    assert killed_at(Stub(load=float("inf")), server, 36_000) is not None


@pytest.mark.parametrize("seconds", [1, 15])
def test_shorter_timeouts_would_kill_a_busy_server(pod: dict[str, Any], seconds: int) -> None:
    """Kubernetes' default of 1 s even an idle one: the check itself sleeps for a second."""
    server = {**pod["spec"]["containers"][0]}
    server["livenessProbe"] = {**server["livenessProbe"], "timeoutSeconds": seconds}
    assert killed_at(Stub(step=15.0), server, 3600) is not None
    assert (killed_at(Stub(), server, 3600) is not None) == (seconds == 1)


def test_a_failed_health_check_takes_the_pod_out_until_one_succeeds(pod: dict[str, Any]) -> None:
    server = pod["spec"]["containers"][0]
    stub = Stub(step=60.0, busy_from=300.0, busy_to=340.0)
    out = out_of_service(stub, server, 100.0, 900.0)
    period = server["livenessProbe"]["periodSeconds"]
    assert 0 < out <= 40 + period + 10
    assert out_of_service(Stub(step=15.0), server, 100.0, 900.0) == 0


def test_the_grace_period_holds_the_longest_answer(pod: dict[str, Any]) -> None:
    spec, server = pod["spec"], pod["spec"]["containers"][0]
    before = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    longest = float(pod["metadata"]["annotations"]["dspark-sglang/drain-seconds"])
    assert before >= ENDPOINTS_S, "requests would arrive at a server that drains"
    # The last request arrives as SIGTERM does; its answer takes as long as is promised.
    gone = Stub().exits(float(before), before + POLL_S + longest)
    assert gone <= spec["terminationGracePeriodSeconds"]
    assert Stub().exits(float(before), before + longest) > 30, "Kubernetes' default would cut it"
