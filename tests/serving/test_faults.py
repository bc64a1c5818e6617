"""Faults under load on the real server: no crash, no wrong text, and soon as fast as before.

Two equal servers run the same load in turns; one of them has faults. ``make bench-faults`` runs this alone
and keeps the figures.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from dspark_loadtests.client import RequestSettings
from dspark_loadtests.closed_loop import run_block
from dspark_loadtests.compare import ratio
from dspark_loadtests.generator import Load
from dspark_loadtests.prompts import load_prompts
from dspark_loadtests.schema import Estimate
from dspark_sglang.demo.measure import NEAR_TIE, running, stream_text, tie_gap
from dspark_sglang.provenance import machine, versions
from dspark_sglang.server import Server, free_ports, serve_command

pytestmark = [pytest.mark.server, pytest.mark.slow]

PROMPTS = list(load_prompts())
FAULTS = ("stall", "clock", "confident", "doubtful")
USERS, TOKENS = 4, 48
#: Seconds of a fault, of the recovery after it, and of one turn of the comparison.
FAULT_S, RECOVERY_S, WARM_S, WINDOW_S, TURNS = 8.0, 30.0, 2.0, 7.0, 3
RESULTS = Path("runs/faults/summary.json")


@pytest.fixture(scope="module")
def servers(
    target: Path, drafter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Server, Path]]:
    """One that will have faults, its twin, and the file that says which fault is on."""
    folder = tmp_path_factory.mktemp("faults")
    switch = folder / "fault"
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent / "faults"),
                                         os.environ.get("PYTHONPATH", "")]))  # fmt: skip
    extra = ["--max-running-requests", str(USERS)]
    own: list[dict[str, str]] = [{"PYTHONPATH": path, "FAULT_FILE": str(switch)}, {}]
    with contextlib.ExitStack() as stack:
        made = []
        for number, (port, environment) in enumerate(zip(free_ports(2), own, strict=True)):
            command = serve_command(target, port, dtype="float32", drafter=drafter, extra=extra)
            log = folder / f"{number}.log"
            given = {"DSPARK_CACHE_DIR": str(folder / str(number)), **environment}
            server = Server(command, port=port, log=log, environment=given).start()
            stack.callback(server.stop)
            server.wait_ready(600.0)
            server.pause()
            made.append(server)
        yield made[0], made[1], switch


@pytest.fixture(scope="module")
def kept() -> Iterator[dict[str, Any]]:
    """Figures of every fault, written at the end."""
    found: dict[str, Any] = {}
    yield found
    about = {
        "command": "make bench-faults",
        "machine": machine(),
        "versions": versions(),
        "setting": {"users": USERS, "max_tokens": TOKENS, "temperature": 0.0, "dtype": "float32",
                    "fault_s": FAULT_S, "recovery_s": RECOVERY_S, "turns": TURNS,
                    "window_s": WINDOW_S},
    }  # fmt: skip
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"faults": found, **about}, indent=1) + "\n")


def load(server: Server, seconds: float, *, temperature: float = 0.0, seed: int = 0) -> float:
    """Tokens a second; fails where requests do."""
    return run_block(
        server.url, PROMPTS, Load(
            settings=RequestSettings(model="default", temperature=temperature, max_tokens=TOKENS),
            users=USERS, warm_s=WARM_S, window_s=seconds, seed=seed,
        ),
    ).tok_s  # fmt: skip


def compared(ours: Server, twin: Server) -> Estimate:
    """Throughput after a fault over that of the server that had none."""
    rates: dict[Server, list[float]] = {ours: [], twin: []}
    for turn in range(TURNS):
        for server in (ours, twin) if turn % 2 else (twin, ours):
            with running(server):
                rates[server].append(load(server, WINDOW_S, seed=turn))
    return ratio(np.array(rates[ours]), np.array(rates[twin]))


def texts(server: Server) -> list[str]:
    with running(server), httpx.Client(timeout=300.0) as client:
        return [
            stream_text(client, server, prompt, max_tokens=TOKENS)[1] for prompt in PROMPTS[::9]
        ]


def alike(server: Server, ours: list[str], theirs: list[str]) -> bool:
    with running(server):
        return all(
            one == other or tie_gap(server, PROMPTS[::9][i], other, max_tokens=TOKENS) < NEAR_TIE
            for i, (one, other) in enumerate(zip(ours, theirs, strict=True))
        )


def learned(server: Server) -> dict[str, Any]:
    with running(server):
        found = server.dspark()
    assert found is not None
    return {name: found[name] for name in ("switches", "slowdown", "step_error", "gain")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_nothing_and_is_got_over(
    servers: tuple[Server, Server, Path], kept: dict[str, Any], fault: str
) -> None:
    ours, twin, switch = servers
    with running(twin):
        load(twin, FAULT_S)
    expected = texts(twin)
    switch.write_text(fault)
    try:
        with running(ours):
            during = load(ours, FAULT_S)
        found = texts(ours)
    finally:
        switch.write_text("")
    with running(ours):
        load(ours, RECOVERY_S - WARM_S, seed=1)
    with running(twin):
        load(twin, FAULT_S, seed=1)
    after = compared(ours, twin)
    kept[fault] = {"tok_s_during": during, "after_over_twin": after.rounded(), **learned(ours)}
    assert alike(twin, found, expected)
    assert after.high >= 0.95, kept[fault]


def test_a_workload_that_changes_and_changes_back(
    servers: tuple[Server, Server, Path], kept: dict[str, Any]
) -> None:
    """Text at a high temperature is hardly ever drafted right."""
    ours, twin, _ = servers
    with running(ours):
        during = load(ours, FAULT_S, temperature=1.5)
        load(ours, RECOVERY_S - WARM_S, seed=1)
    with running(twin):
        load(twin, FAULT_S, seed=1)
    after = compared(ours, twin)
    kept["workload"] = {"tok_s_during": during, "after_over_twin": after.rounded(), **learned(ours)}
    assert after.high >= 0.95, kept["workload"]
