"""The clocks find missing order, and the overlapped loop has none missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

import torch

from tests.cuda_lab.fake_device import FakeDevice
from tests.cuda_lab.fake_torch import CUDA
from tests.cuda_lab.streams import Observer, observe, overlapped

Code = Callable[[FakeDevice, Observer], object]


def faults(code: Code) -> list[str]:
    """Kinds of what is found in a piece of code."""
    with torch.no_grad(), FakeDevice() as device, observe(device) as seen:
        code(device, seen)
        return [fault.kind for fault in seen.faults]


def unready(device: FakeDevice, seen: Observer) -> None:
    """The forward stream reads what the scheduler's stream writes, without waiting for it."""
    side: Any = torch.cuda.Stream()
    given = torch.arange(8, device=CUDA)
    with torch.cuda.stream(side):
        given + 1
    given.record_stream(side)


def unready_host(device: FakeDevice, seen: Observer) -> None:
    """The host reads a copy without waiting for its event."""
    host = torch.empty(8, pin_memory=True)
    host.copy_(torch.zeros(8, device=CUDA), non_blocking=True)
    host.tolist()


def reused_upload(device: FakeDevice, seen: Observer) -> None:
    """The host fills a pinned buffer again whose copy may still run."""
    host = torch.empty(8, pin_memory=True)
    torch.empty(8, device=CUDA).copy_(host, non_blocking=True)
    seen.host(host, writes=True)


def overwritten(device: FakeDevice, seen: Observer) -> None:
    """A stream writes what another one still reads."""
    side: Any = torch.cuda.Stream()
    buffer = torch.zeros(8, device=CUDA)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        buffer + 1
    buffer.fill_(1.0)


def freed(device: FakeDevice, seen: Observer) -> None:
    """A tensor of one stream is dropped while another one reads it."""
    side: Any = torch.cuda.Stream()
    buffer = torch.zeros(8, device=CUDA)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        kept = buffer + 1
    del buffer
    assert kept is not None


def stale(device: FakeDevice, seen: Observer) -> None:
    """States of a step are kept as a view of the graph's output, and the graph runs again."""
    output = torch.zeros(8, device=CUDA)
    seen.replayed(output)
    kept = output[:4]
    seen.replayed(output)
    kept + 1


PLANTED = {
    "unready": (unready, "early"),
    "unready host": (unready_host, "host"),
    "reused upload": (reused_upload, "host"),
    "overwritten": (overwritten, "overwritten"),
    "freed": (freed, "freed"),
    "stale": (stale, "stale"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str) -> None:
    code, kind = PLANTED[name]
    assert set(faults(code)) == {kind}


def ordered(device: FakeDevice, seen: Observer) -> None:
    """The same with what orders it."""
    side: Any = torch.cuda.Stream()
    given = torch.arange(8, device=CUDA)
    side.wait_stream(torch.cuda.current_stream())
    host = torch.empty(8, dtype=torch.int64, pin_memory=True)
    with torch.cuda.stream(side):
        host.copy_(given + 1, non_blocking=True)
        done: Any = torch.cuda.Event()
        done.record()
    given.record_stream(side)
    del given
    done.synchronize()
    host.tolist()
    seen.host(host, writes=True)


def waited(device: FakeDevice, seen: Observer) -> None:
    """A stream that waits for an event may write what the other one has read."""
    side: Any = torch.cuda.Stream()
    buffer = torch.zeros(8, device=CUDA)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        buffer + 1
        done: Any = torch.cuda.Event()
        done.record()
    done.wait()
    buffer.fill_(1.0)
    output = torch.zeros(8, device=CUDA)
    seen.replayed(output)
    output[:4] + 1


@pytest.mark.parametrize("code", [ordered, waited])
def test_what_is_ordered_is_not_blamed(code: Code) -> None:
    assert faults(code) == []


@pytest.mark.costly
@pytest.mark.parametrize("drafts", [1.0, 0.0])
def test_the_overlapped_loop_is_ordered(drafts: float) -> None:
    pytest.importorskip("sglang")
    from tests.cuda_lab.world import World

    with World(FakeDevice(), ours=True) as world, observe(world.device) as seen:
        world.worker.commands.prepare("dspark_speculation", drafts)()
        overlapped(world, seen, kind="sampled", requests=4, steps=4)
        assert [str(fault) for fault in seen.faults] == []


@pytest.mark.costly
def test_a_planted_view_of_the_graphs_output_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What steps without a draft leave for the draft, if it were not copied."""
    pytest.importorskip("sglang")
    from dspark_sglang.serving.draft_kv import DeferredStates, States
    from tests.cuda_lab.world import World

    def keep(deferred: DeferredStates, states: States) -> None:
        deferred._kept.append(states)

    monkeypatch.setattr(DeferredStates, "keep", keep)
    with World(FakeDevice(), ours=True) as world, observe(world.device) as seen:
        world.worker.commands.prepare("dspark_speculation", 0.0)()
        overlapped(world, seen, kind="greedy", requests=4, steps=3)
        world.worker._verify_executor.deferred.flush()
        assert "stale" in {fault.kind for fault in seen.faults}
