"""What ``/metrics`` says, through prometheus_client as SGLang serves it: from several processes' files."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


def exposed(code: str, folder: Path) -> dict[str, float]:
    """Run ``code`` in a process of its own, which has ``metrics``, ``telemetry``, ``scheduler`` and ``rounds``.

    Returns:
        What prometheus_client then exposes of it, by name and labels.
    """
    script = f"""
import numpy as np
from dspark_sglang.core.schedule.scheduler import Synchronous
from dspark_sglang.serving.faults import Faults
from dspark_sglang.serving.rounds import SynchronousRounds
from dspark_sglang.serving.telemetry import Metrics
from dspark_sglang.serving.telemetry import Telemetry

telemetry, scheduler = Telemetry(gamma=3), Synchronous(gamma=3)
rounds = SynchronousRounds(
    scheduler, faults=Faults(), telemetry=telemetry, ops=None, ranks=None, device=None, buckets=None
)
metrics = Metrics({{"schedule": "adaptive", "gamma": "3"}})
{textwrap.dedent(code)}
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_everything_counted_is_exposed(tmp_path: Path) -> None:
    found = exposed(
        """
        telemetry.observe_round(np.array([3, 2]), np.array([1, 2]), depth=3)
        telemetry.observe_round(np.zeros(4, dtype=int), np.zeros(4, dtype=int), depth=0)
        scheduler.expected_tokens, scheduler.committed_tokens = 4.5, 5
        scheduler.depths.learn("code", np.array([2]))
        scheduler.fix_budget(0.5)
        metrics.update(10.0, rounds)
        """,
        tmp_path,
    )
    labels = next(name for name in found if name.startswith("dspark_info{"))
    assert 'schedule="adaptive"' in labels and 'gamma="3"' in labels and 'version="' in labels
    wanted = {
        "rounds_total": 2, "plain_rounds_total": 4, "drafted_tokens_total": 6,
        "verified_tokens_total": 5, "committed_tokens_total": 5, "expected_tokens_total": 4.5,
        "observed_tokens_total": 5, "switches_total": 0, "drafting": 1, "gain": 1,
        "forced_budget": 0.5, "accept_length": 2.5, "slowdown": 1, "drift_alarm": 0,
        'depth_cap{workload="code"}': 3,
    }  # fmt: skip
    assert {name: found[f"dspark_{name}"] for name in wanted} == wanted


def test_counters_never_fall_when_records_are_cleared(tmp_path: Path) -> None:
    found = exposed(
        """
        lens = np.array([3, 3])
        for now in (1.0, 3.0, 5.0):
            telemetry.observe_round(lens, lens, depth=3)
            metrics.update(now, rounds)
        telemetry.clear()
        scheduler.clear()
        metrics.update(7.0, rounds)
        telemetry.observe_round(lens, lens, depth=3)
        metrics.update(9.0, rounds)
        """,
        tmp_path,
    )
    assert found["dspark_rounds_total"] == 8
    assert found["dspark_verified_tokens_total"] == 24


def test_metrics_are_written_once_a_second(tmp_path: Path) -> None:
    found = exposed(
        """
        lens = np.array([1])
        for now in (1.0, 1.2, 1.9):
            telemetry.observe_round(lens, lens, depth=3)
            metrics.update(now, rounds)
        """,
        tmp_path,
    )
    assert found["dspark_rounds_total"] == 1


@pytest.mark.parametrize("choice", ["on", "off"])
def test_what_is_unknown_yet_is_left_at_0(tmp_path: Path, choice: str) -> None:
    found = exposed(
        f"""
        scheduler.choose({choice!r})
        metrics.update(1.0, rounds)
        """,
        tmp_path,
    )
    assert found["dspark_drafting"] == (choice == "on")
    assert found["dspark_forced_budget"] == -1
    assert found.get("dspark_step_error", 0.0) == 0.0


def test_workloads_that_clients_name_do_not_grow_the_metric(tmp_path: Path) -> None:
    found = exposed(
        """
        from dspark_sglang.core.schedule.depth import WORKLOADS
        for turn in range(3 * WORKLOADS):
            scheduler.depths.learn(f"w{turn}", np.array([2]))
            metrics.update(10.0 * turn, rounds)
        """,
        tmp_path,
    )
    series = {name: value for name, value in found.items() if "depth_cap{" in name}
    from dspark_sglang.core.schedule.depth import WORKLOADS

    assert len(series) == WORKLOADS + 1
    # The first ones have been forgotten, and the last ones share a series.
    assert {value for name, value in series.items() if "(others)" not in name} == {0.0}
    assert series['dspark_depth_cap{workload="(others)"}'] == 3.0
