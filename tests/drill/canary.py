"""The canary against faults planted in a real server, and against a right one that it has to leave alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import torch
from safetensors.torch import load_file, save_file

from dspark_sglang.artifacts import STS_FILE
from dspark_sglang.canary import run as runs
from dspark_sglang.provenance import provenance
from dspark_sglang.server import Server
from tests.drill.section import Findings, Tell
from tests.drill.world import Pair, World, started

FAULTS = Path(__file__).parent / "faults"
TOKENS = 24
#: Most requests of a baseline.
BASELINE: dict[Pair, int] = {"tiny": 400, "real": 160}


class Planted(NamedTuple):
    """One fault, on which pair, and the requests in which it has to be found."""

    name: str
    pair: Pair
    within: int


PLANTED = (
    Planted("acceptance", "tiny", 200),
    Planted("position", "tiny", 200),
    Planted("stale", "real", 500),
    Planted("drafter", "real", 500),
)


def other_drafter(world: World) -> Path:
    """The real drafter with other weights, as of another revision."""
    folder = world.out / "models-other" / "drafter"
    folder.mkdir(parents=True, exist_ok=True)
    for path in world.drafter.iterdir():
        if (
            path.suffix == ".json" and path.name != STS_FILE
        ):  # it names the weights it was fitted to
            (folder / path.name).write_bytes(path.read_bytes())
    generator = torch.Generator().manual_seed(world.seed)
    weights = {}
    for name, tensor in load_file(world.drafter / "model.safetensors").items():
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        # A weight alone has no spread to be disturbed by.
        weights[name] = (
            tensor + tensor.float().std().to(tensor) * noise if tensor.numel() > 1 else tensor
        )
    save_file(weights, folder / "model.safetensors")
    return folder


def pin(server: Server) -> None:
    """Draft and verify everything: accepted lengths are to depend on the drafter, not on this machine's clock."""
    for key in ("dspark_speculation", "dspark_budget"):
        sent = {"server_args": {key: 1}}
        answer = httpx.post(f"{server.url}/set_internal_state", json=sent, timeout=60.0)
        answer.raise_for_status()
        assert answer.json() in (True, [True]), f"{key}: {answer.text}"


@contextlib.contextmanager
def served(world: World, pair: Pair, fault: str = "") -> Iterator[Server]:
    """A pinned server, with a fault planted where one is named."""
    environment, drafter = {}, None
    switch = (world.out / "canary" / "fault-is-on").resolve()
    switch.unlink(missing_ok=True)
    if fault == "drafter":
        drafter = other_drafter(world)
    elif fault:
        path = os.pathsep.join(filter(None, [str(FAULTS), os.environ.get("PYTHONPATH", "")]))
        environment = {"PYTHONPATH": path, "CANARY_FAULT": fault, "CANARY_SWITCH": str(switch)}
    name = f"canary-{pair}-{fault or 'right'}"
    server = world.server(name, pair=pair, environment=environment, drafter=drafter,
                          flags=("--served-model-name", pair))  # fmt: skip
    with started(server):
        pin(server)
        switch.parent.mkdir(parents=True, exist_ok=True)
        switch.touch()
        yield server


def _canary(server: Server, requests: int, seed: int, *, stop: bool, at_once: int) -> runs.Canary:
    return runs.Canary(
        runs.Options(url=server.url, requests=requests, concurrency=at_once, tokens=TOKENS,
                     seed=seed, stop=stop)
    )  # fmt: skip


def _right(
    world: World, pair: Pair, count: int, requests: int, tell: Tell, found: Findings
) -> tuple[Path, dict[str, Any]]:
    """A baseline of ``count`` requests of a right server, and a run of ``requests`` that may find nothing."""
    path = world.out / "canary" / f"baseline-{pair}.json"
    with served(world, pair) as server:
        watched = _canary(server, count, seed=1000, stop=True, at_once=8)
        told = lambda done, _: tell(f"baseline of {pair}: {done} of {count}")  # noqa: E731
        runs.record(watched, path, told, provenance(["make", "drill"]))
        if not requests:
            return path, {}
        watched = _canary(server, requests, seed=1, stop=False, at_once=16)

        def progress(done: int, faults: int) -> None:
            tell(f"right server, {done} of {requests}, {faults} false alarms")

        report = runs.run(watched, runs.read_baseline(path, watched), progress)
    alarms = len(report.faults) + (report.drifted_at is not None)
    found.expect(
        not alarms, f"{alarms} false alarms: {report.faults[:2]}, drift {report.drifted_at}"
    )
    return path, {
        "requests": report.requests, "false_alarms": alarms, "near_ties": report.near_ties,
        "seconds": report.seconds,
        "accepted": {kind: msgspec.to_builtins(level) for kind, level in report.accepted.items()},
    }  # fmt: skip


def _planted(
    world: World, fault: Planted, baseline: Path, tell: Tell, found: Findings
) -> dict[str, Any]:
    """Ask a server with a fault until it is found."""
    with served(world, fault.pair, fault.name) as server:
        watched = _canary(server, fault.within, seed=7, stop=True, at_once=8)

        def progress(done: int, faults: int) -> None:
            tell(f"{fault.name}: {done} of {fault.within}")

        report = runs.run(watched, runs.read_baseline(baseline, watched), progress)
        ran = fault.name == "drafter" or f"canary fault {fault.name} ran" in server.log.read_text()
    at = None if report.passed else report.requests
    by = (
        report.faults[0].check
        if report.faults
        else "drift"
        if report.drifted_at is not None
        else ""
    )
    found.expect(ran, f"the fault {fault.name} never ran")
    found.expect(at is not None, f"the fault {fault.name} was not found in {fault.within} requests")
    return {"pair": fault.pair, "within": fault.within, "found_at": at, "by": by,
            "accepted": {kind: round(level.mean, 3) for kind, level in report.accepted.items()}}  # fmt: skip


def canary(
    world: World, tell: Tell, *, requests: int = 5000, only: tuple[Pair, ...] = ("tiny", "real")
) -> Findings:
    """Every planted fault, and ``requests`` of a right server."""
    found = Findings()
    detail: dict[str, Any] = {}
    right: dict[str, Any] = {}
    for pair in only:
        count, long = min(BASELINE[pair], max(64, requests)), requests if pair == "tiny" else 0
        baseline, result = _right(world, pair, count, long, tell, found)
        right |= {pair: result} if result else {}
        for fault in (planted for planted in PLANTED if planted.pair == pair):
            tell(f"{fault.name}: starting")
            detail[fault.name] = _planted(world, fault, baseline, tell, found)
    seen = [entry["found_at"] for entry in detail.values() if entry["found_at"] is not None]
    found.figures = {
        "canary": {
            "faults": len(detail), "found": len(seen), "max_requests": max(seen, default=None),
            "false_alarms": right.get("tiny", {}).get("false_alarms"),
            "requests_without_fault": right.get("tiny", {}).get("requests"),
        },
        "planted": detail, "right": right,
        "setting": {"tokens": TOKENS, "temperature": 0, "dspark_speculation": 1, "dspark_budget": 1},
    }  # fmt: skip
    return found
