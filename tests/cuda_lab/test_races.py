"""Conflicts are found where a barrier is missing, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from tests.cuda_lab import races


def publish(x, out, ORDERED: tl.constexpr):
    """One lane writes what all lanes read."""
    tl.store(x, 7)
    if ORDERED:
        tl.debug_barrier()
    tl.store(out + tl.arange(0, 8), tl.load(x))


def reverse(x, out, ORDERED: tl.constexpr):
    """Lanes read what other lanes have written."""
    lane = tl.arange(0, 8)
    tl.store(x + lane, lane)
    if ORDERED:
        tl.debug_barrier()
    tl.store(out + lane, tl.load(x + 7 - lane))


def shift(x, out, ORDERED: tl.constexpr):
    """Lanes overwrite what other lanes have yet to read."""
    lane = tl.arange(0, 8)
    kept = tl.load(x + lane)
    if ORDERED:
        tl.debug_barrier()
    tl.store(x + (lane + 1) % 8, kept)


def collide(x, out, ORDERED: tl.constexpr):
    """Two lanes write one element."""
    lane = tl.arange(0, 8)
    tl.store(x + (lane if ORDERED else lane // 2), lane)


def own(x, out, ORDERED: tl.constexpr):
    """Each lane reads what it has written itself."""
    lane = tl.arange(0, 8)
    tl.store(x + lane, lane)
    tl.store(out + lane, tl.load(x + lane))


def claims(x, out):
    """The last program wins."""
    tl.store(out, tl.program_id(0))


PLANTED = {
    "publish": (publish, "store-load"),
    "reverse": (reverse, "store-load"),
    "shift": (shift, "load-store"),
    "collide": (collide, "store-store"),
}


def conflicts(kernel: Any, *, ordered: bool) -> set[races.Conflict]:
    x, out = (torch.zeros(8, dtype=torch.int32) for _ in range(2))
    with races.logged() as log:
        InterpretedFunction(kernel)[(2,)](x, out, ORDERED=ordered)
    return log.conflicts


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str) -> None:
    kernel, kind = PLANTED[name]
    found = conflicts(kernel, ordered=False)
    assert {one.kind for one in found} == {kind}
    assert all("cuda_lab/test_races.py" in one.first for one in found)
    assert not conflicts(kernel, ordered=True)


def test_a_lane_may_read_what_it_has_written() -> None:
    assert not conflicts(own, ordered=False)


def test_a_planted_dependence_on_the_order_of_programs_is_found() -> None:
    def run(kernel: Any) -> list[torch.Tensor]:
        x, out = (torch.zeros(8, dtype=torch.int32) for _ in range(2))
        InterpretedFunction(kernel)[(5,)](x, out)
        return [out]

    def alone(x, out):
        tl.store(out + tl.program_id(0), tl.program_id(0))

    assert not races.same_in_any_order(lambda: run(claims))
    assert races.same_in_any_order(lambda: run(alone))


@pytest.mark.slow
def test_a_planted_kernel_without_its_barriers_is_found() -> None:
    """Our kernels as they would be if barriers were left out."""
    from tests.cuda_lab import record

    found = record.in_a_process("races", "--without-barriers", interpreted=True)
    assert any(one["conflicts"] for one in found.values())


@pytest.mark.slow
def test_our_kernels_have_no_conflicts() -> None:
    from tests.cuda_lab import record

    for name, found in record.in_a_process("races", interpreted=True).items():
        assert found == {"conflicts": [], "ordered": True}, name
