"""The fake device sees what it should, and a step asks no more of the device than the ledger says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang")
pytest.importorskip("triton")

import torch

from tests.cuda_lab import record
from tests.cuda_lab.fake_device import FakeDevice
from tests.cuda_lab.fake_torch import CUDA
from tests.cuda_lab.steps import measure
from tests.cuda_lab.world import World

#: Cases that are measured in every test run; ``make cuda-lab`` measures all of them.
FAST: tuple[record.Case, ...] = (
    (1, "greedy", 8),
    (1, "filtered", 8),
    (1, "penalised", 8),
    (1, "plain", 8),
)


def seen(code: Callable[[FakeDevice], object]) -> FakeDevice:
    """What a piece of code asks of a device."""
    with torch.no_grad(), FakeDevice() as device:
        code(device)
        return device


# --- planted faults, as they stood in serving when the laboratory was built -------------------------


def reads_parameters(device: FakeDevice) -> None:
    """A10: ``SampledRows.of`` at every change of the batch."""
    top_ks = device.empty(8, dtype=torch.int32)
    index = (top_ks.view(-1) > 1).nonzero().view(-1)
    device.empty(8)[index]


def uploads_stops(device: FakeDevice) -> None:
    """A10: ``batch_stops`` at every change of the batch."""
    torch.tensor([[2, 3], [2, -1]], device=CUDA)


def commits_by_mask(device: FakeDevice) -> None:
    """A11: ``Verifier._put`` of a draft whose KV SGLang writes."""
    chosen, hidden = device.empty(8, dtype=torch.bool), device.empty(8, 4)
    rows = chosen.nonzero().view(-1)
    hidden[rows]


def penalises_on_the_host(device: FakeDevice) -> None:
    """A12: ``Verifier._penalise``."""
    lens, drafted = device.empty(8, dtype=torch.int64), device.empty(8, 7, dtype=torch.int64)
    first = (lens + 1).cumsum(0) - (lens + 1)
    first.tolist(), (lens + 1).tolist(), drafted.tolist()


def verifies_blocks_over_shards(device: FakeDevice) -> None:
    """A16: ``core.accept`` of whole blocks, whose shapes depend on lengths."""
    lens = device.empty(8, dtype=torch.int64)
    (torch.arange(7, device=CUDA) < lens[:, None]).nonzero().unbind(1)


def copies_pageable(device: FakeDevice) -> None:
    """A17: ``DeviceSurvival.of``."""
    torch.zeros(3, 8, dtype=torch.int64).to(CUDA, non_blocking=True)


def gathers_by_mask(device: FakeDevice) -> None:
    """The states of a step whose rows are all kept, by a mask."""
    device.empty(8, 4)[device.empty(8, dtype=torch.bool)]


PLANTED = {
    "A10 nonzero": (reads_parameters, "wait", "nonzero"),
    "A10 upload": (uploads_stops, "wait", "copy to the device that blocks"),
    "A11 nonzero": (commits_by_mask, "wait", "nonzero"),
    "A12 tolist": (penalises_on_the_host, "wait", "copy to the host that blocks"),
    "A16 shapes": (verifies_blocks_over_shards, "wait", "nonzero"),
    "A17 pageable": (copies_pageable, "pageable", "copy to the device of pageable memory"),
    "mask": (gathers_by_mask, "wait", "index"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str) -> None:
    code, kind, operation = PLANTED[name]
    found = seen(code).of(kind)
    assert found and all(operation in one.name for one in found)
    assert all("test_fake_device.py" in one.where for one in found)


CLEAN: dict[str, Callable[[FakeDevice], object]] = {
    "pinned upload": lambda d: torch.zeros(4).pin_memory().to(CUDA, non_blocking=True),
    "pinned download": lambda d: torch.empty(4, pin_memory=True).copy_(
        d.empty(4), non_blocking=True
    ),
    "index": lambda d: d.empty(8)[torch.arange(3, device=CUDA)],
    "masked fill": lambda d: d.empty(8).masked_fill_(d.empty(8, dtype=torch.bool), 0.0),
    "one number through a mask": lambda d: d.empty(8).__setitem__(d.empty(8) > 0, 0.0),
    "host arithmetic": lambda d: torch.tensor([1, 2]).sum().item(),
    "known size": lambda d: d.empty(4).repeat_interleave(2),
}


@pytest.mark.parametrize("name", CLEAN)
def test_what_does_not_wait_is_not_blamed(name: str) -> None:
    device = seen(CLEAN[name])
    assert not device.of("wait") and not device.of("pageable")


def test_views_and_memory_are_no_launches() -> None:
    def views(device: FakeDevice) -> None:
        given = device.empty(4, 6)
        given[:, 1:].view(4, 5).expand(2, 4, 5).transpose(0, 1)
        torch.empty_like(given), given.new_empty(3), given.view(-1)[2:], given.unsqueeze(0)

    def work(device: FakeDevice) -> None:
        given = device.empty(4, 6)
        given + 1, given[:, 1:].contiguous(), torch.cat([given, given]), given @ given.T

    assert seen(views).count() == 0
    assert seen(work).count() == 4
    assert seen(lambda d: torch.zeros(0, 4, device=CUDA)).count() == 0


def test_an_event_has_passed_two_steps_later() -> None:
    def steps(device: FakeDevice) -> None:
        event: Any = torch.cuda.Event()
        device.step = 5
        event.record()
        device.step = 7
        assert event.query()
        event.synchronize()
        assert not device.of("wait")
        device.step = 6
        assert not event.query()
        event.synchronize()

    assert len(seen(steps).of("wait")) == 1


def test_what_outlives_a_capture_is_found() -> None:
    kept: list[torch.Tensor] = []

    def captures(device: FakeDevice) -> None:
        given, out = device.empty(4), device.empty(4)
        with device.capture():
            out.copy_(given * 2)
        assert not device.of("escaped")
        with device.capture():
            kept.append(given * 2)
        assert len(device.of("escaped")) == 1
        with device.capture(lambda: kept[1:]):
            kept.append(given * 3)
        assert len(device.of("escaped")) == 1
        with device.capture():
            given.sum().item()

    device = seen(captures)
    assert device.count() == 0 and len(device.captured) == 6
    assert len(device.of("wait")) == 1


# --- today's code ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(record.RESULT.read_text())
    return result


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, int]]:
    return record.ledger(FAST, ours=True)


@pytest.mark.costly
@pytest.mark.parametrize("case", FAST, ids=record.name)
def test_no_step_asks_more_than_the_ledger_says(
    case: record.Case, committed: dict[str, Any], measured: dict[str, dict[str, int]]
) -> None:
    known, found = committed["ledger"][record.name(case)]["ours"], measured[record.name(case)]
    more = {key: (known[key], value) for key, value in found.items() if value > known[key]}
    assert not more, (
        f"{more}: more than docs/results/cuda.json says. `make cuda-lab` shows the lines."
    )


@pytest.mark.costly
def test_nothing_waits_where_sglang_writes_the_draft_kv() -> None:
    """A11: a quantised drafter, scaled RoPE, an fp8 pool."""
    assert record.waits_without_the_kv_kernel() == 0


@pytest.mark.costly
@pytest.mark.parametrize("drafts", [True, False])
@pytest.mark.parametrize("kind", ["greedy", "filtered", "penalised"])
def test_whole_blocks_run_and_wait_for_nothing(kind: Any, drafts: bool) -> None:
    """A1 to A3: where SGLang verifies no others; a step that does not draft decodes without a graph."""
    with World(FakeDevice(), ours=True, mode="static", attention="flashinfer") as world:
        steady, first = measure(world, kind, 8, drafts=drafts)
        ran, graphs = world.worker.telemetry.ran, world.runner.decode_cuda_graph_runner
        assert graphs is not None
        assert (ran["step:decode"] > 0) == (not drafts and kind != "penalised")
    assert steady.waits == first.waits == steady.pageable == 0


@pytest.mark.costly
@pytest.mark.parametrize("ranks", [1, 8])
def test_whole_blocks_over_ranks_are_verified_always(ranks: int) -> None:
    with World(FakeDevice(), ours=True, mode="static", ranks=ranks) as world:
        assert world.worker.scheduler.name == ("lagged" if ranks == 1 else "all")
        assert measure(world, "greedy", 8)[0].waits == 0


@pytest.mark.costly
def test_the_builtin_is_counted_in_the_same_way(committed: dict[str, Any]) -> None:
    case: record.Case = (1, "greedy", 8)
    found = record.ledger([case], ours=False)[record.name(case)]
    assert found == committed["ledger"][record.name(case)]["builtin"]
    assert found["waits"] == found["waits_at_change"] == 0


def test_the_ledger_has_every_case(committed: dict[str, Any]) -> None:
    assert set(committed["ledger"]) == {record.name(case) for case in record.EVERY}
    assert committed["source"] == "computed" and Path(record.RESULT).name == "cuda.json"
