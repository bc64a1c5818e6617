"""What ``/metrics`` says, through prometheus_client as SGLang serves it: from several processes' files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

#: Imports what all need once, then runs each line of its input, code and a folder, in a fork of its own.
#: prometheus_client looks for the folder when it is imported.
FORKS = """
import json, os, sys, traceback
from pathlib import Path
import numpy as np
from dspark_sglang.core.schedule.scheduler import Synchronous
from dspark_sglang.serving.faults import Faults
from dspark_sglang.serving.rounds import SynchronousRounds
from dspark_sglang.serving.telemetry import Metrics, Telemetry

def run(code, folder):
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
    telemetry, scheduler = Telemetry(gamma=3), Synchronous(gamma=3)
    rounds = SynchronousRounds(
        scheduler, faults=Faults(), telemetry=telemetry, ops=None, ranks=None, device=None, buckets=None
    )
    metrics = Metrics({"schedule": "adaptive", "gamma": "3"})
    exec(code, globals() | locals())
    from prometheus_client import CollectorRegistry, generate_latest, multiprocess
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    Path(folder, "exposed").write_text(generate_latest(registry).decode())

assert "prometheus_client" not in sys.modules
for line in sys.stdin:
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    try:
        run(*json.loads(line))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
"""
Exposed = Callable[[str], dict[str, float]]


@pytest.fixture(scope="module")
def forks() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", FORKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        yield process


@pytest.fixture
def exposed(forks: subprocess.Popen[str], tmp_path: Path) -> Exposed:
    """Runs code in a process of its own, which has ``metrics``, ``telemetry``, ``scheduler`` and ``rounds``.

    Returns what prometheus_client then exposes of it, by name and labels.
    """

    def run(code: str) -> dict[str, float]:
        assert forks.stdin is not None and forks.stdout is not None
        forks.stdin.write(json.dumps([textwrap.dedent(code), str(tmp_path)]) + "\n")
        forks.stdin.flush()
        assert forks.stdout.readline() == "0\n"
        lines = (tmp_path / "exposed").read_text().splitlines()
        values = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in values}

    return run


def test_everything_counted_is_exposed(exposed: Exposed) -> None:
    found = exposed(
        """
        telemetry.observe_round(np.array([3, 2]), np.array([1, 2]), depth=3)
        telemetry.observe_round(np.zeros(4, dtype=int), np.zeros(4, dtype=int), depth=0)
        scheduler.expected_tokens, scheduler.committed_tokens = 4.5, 5
        scheduler.depths.learn("code", np.array([2]))
        scheduler.fix_budget(0.5)
        metrics.update(10.0, rounds)
        """
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


def test_counters_never_fall_when_records_are_cleared(exposed: Exposed) -> None:
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
        """
    )
    assert found["dspark_rounds_total"] == 8
    assert found["dspark_verified_tokens_total"] == 24


def test_metrics_are_written_once_a_second(exposed: Exposed) -> None:
    found = exposed(
        """
        lens = np.array([1])
        for now in (1.0, 1.2, 1.9):
            telemetry.observe_round(lens, lens, depth=3)
            metrics.update(now, rounds)
        """
    )
    assert found["dspark_rounds_total"] == 1


@pytest.mark.parametrize("choice", ["on", "off"])
def test_what_is_unknown_yet_is_left_at_0(exposed: Exposed, choice: str) -> None:
    found = exposed(
        f"""
        scheduler.choose({choice!r})
        metrics.update(1.0, rounds)
        """
    )
    assert found["dspark_drafting"] == (choice == "on")
    assert found["dspark_forced_budget"] == -1
    assert found.get("dspark_step_error", 0.0) == 0.0


def test_workloads_that_clients_name_do_not_grow_the_metric(exposed: Exposed) -> None:
    found = exposed(
        """
        from dspark_sglang.core.schedule.depth import WORKLOADS
        for turn in range(3 * WORKLOADS):
            scheduler.depths.learn(f"w{turn}", np.array([2]))
            metrics.update(10.0 * turn, rounds)
        """
    )
    series = {name: value for name, value in found.items() if "depth_cap{" in name}
    from dspark_sglang.core.schedule.depth import WORKLOADS

    assert len(series) == WORKLOADS + 1
    # The first ones have been forgotten, and the last ones share a series.
    assert {value for name, value in series.items() if "(others)" not in name} == {0.0}
    assert series['dspark_depth_cap{workload="(others)"}'] == 3.0
