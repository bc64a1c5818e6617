"""Recording a trace from a real server of tiny models."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from dspark_sglang.server import Server, free_port, serve_command
from tests.golden import adapter, recorder, scenario
from tests.golden.scenario import Case

#: Numbers as every x86 machine with AVX2 computes them: newer ones add up in another order.
PINNED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "OPENBLAS_CORETYPE": "Haswell",
}
#: One thread: the tiny models' operations are too small to share, and sums of several would differ.
_ENVIRONMENT = PINNED | {
    "DSPARK_CPU_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "DSPARK_COST": "online",
}
_FLAGS = (
    "--max-running-requests", "8", "--max-total-tokens", "16384", "--context-length", "512",
)  # fmt: skip
#: Seconds until a server is ready, until it has answered, and until the trace of answered requests is whole: a
#: machine may be busy, and nothing of it is in a trace.
_READY_S, _ANSWERED_S, _WRITTEN_S = 800.0, 600.0, 60.0


def launch(case: Case, folder: Path) -> tuple[Server, Path]:
    """Start a server that records ``case``, without waiting for it.

    Returns:
        The server, and the file that will hold its trace.
    """
    place = folder / case.family
    command = [sys.executable, "-m", "tests.golden.make", str(place), case.family]
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, env={**os.environ, **PINNED, **threads}, check=True)
    target, drafter = adapter.models(place, case.family)
    trace, port = folder / f"{case.name}.jsonl", free_port()
    flags = list(_FLAGS)
    if drafter is None:
        flags += ["--speculative-algorithm", "DSPARK", "--swa-full-tokens-ratio", "1.0"]
    if case.seeded:
        flags += ["--enable-deterministic-inference"]
    command = serve_command(target, port, dtype="float32", drafter=drafter, extra=flags)
    environment = _ENVIRONMENT | recorder.environment(folder / f"{case.name}-plugin", trace, case)
    if case.overlapped:
        environment["DSPARK_CPU_OVERLAP"] = "1"
    log = folder / f"{case.name}.log"
    return Server(command, port=port, log=log, environment=environment).start(), trace


def ask(server: Server, case: Case, trace: Path) -> str:
    """Send the scenario to a server that is ready.

    Returns:
        The trace.

    Raises:
        RuntimeError: there is none, or a request was not answered.
        ServerError: the server has stopped.
    """
    asked = scenario.requests(case)
    body = {
        "rid": [scenario.PREFIX + request.name for request in asked],
        "input_ids": [request.prompt for request in asked],
        "sampling_params": [request.params for request in asked],
    }
    try:
        answer = server.http.post("/generate", json=body, timeout=_ANSWERED_S)
    except httpx.HTTPError as error:
        raise server.gone(error) from error
    if answer.status_code != 200:
        raise RuntimeError(f"{case.name}: {answer.status_code} {answer.text[:400]}")
    aborted = [r for r in answer.json() if r["meta_info"]["finish_reason"]["type"] == "abort"]
    if aborted:
        raise RuntimeError(f"{case.name}: {aborted[0]['meta_info']['finish_reason']}")
    deadline = time.monotonic() + _WRITTEN_S
    while not trace.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{case.name}: no trace was written: {server.reason()}")
        time.sleep(0.1)
    return trace.read_text(encoding="utf-8")


def record(cases: list[Case], *, folder: Path | None = None) -> dict[str, str]:
    """Record from servers that start at the same time and are asked in turn.

    Args:
        cases: what to record.
        folder: for models, logs and traces; None: a temporary one.

    Returns:
        Traces by the names of their cases.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="golden-") as made:
            return record(cases, folder=Path(made))
    launched: list[tuple[Case, Server, Path]] = []
    found = {}
    try:
        for case in cases:
            launched.append((case, *launch(case, folder)))
        for case, server, trace in launched:
            server.wait_ready(_READY_S)
            found[case.name] = ask(server, case, trace)
            server.stop()
    finally:
        for _, server, _ in launched:
            server.stop()
    return found
