"""Triton's keys are told apart where Triton tells them apart, and serving asks for no more than is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl

from dspark_sglang.errors import CompatibilityError
from tests.cuda_lab import specialisations
from tests.cuda_lab.fake_device import FakeDevice


@triton.jit
def counted(x, rows, GAMMA: tl.constexpr):
    tl.store(x + rows, GAMMA)


@triton.jit(do_not_specialize=["rows"])
def counted_once(x, rows, GAMMA: tl.constexpr):
    tl.store(x + rows, GAMMA)


def keys(launch: Callable[[FakeDevice], object]) -> int:
    """Variants that some launches need."""
    with torch.no_grad(), FakeDevice() as device, specialisations.Keys().recorded() as found:
        launch(device)
    return len(found.seen)


def by_rows(kernel: Any) -> Callable[[FakeDevice], object]:
    def launch(device: FakeDevice) -> None:
        for rows in (1, 2, 3, 16, 32, 33):
            kernel[(1,)](device.empty(64), rows, GAMMA=7)

    return launch


def by_depth(device: FakeDevice) -> None:
    """A7: the step's depth is a constant."""
    for depth in range(1, 8):
        counted_once[(1,)](device.empty(64), 3, GAMMA=depth)


def by_address(device: FakeDevice) -> None:
    """A view that begins inside 16 bytes."""
    values = device.empty(64)
    for begin in (0, 1, 4):
        counted_once[(1,)](values[begin:], 3, GAMMA=7)


def by_dtype(device: FakeDevice) -> None:
    for dtype in (torch.int32, torch.int64, torch.int32):
        counted_once[(1,)](device.empty(64, dtype=dtype), 3, GAMMA=7)


PLANTED: dict[str, tuple[Callable[[FakeDevice], object], int]] = {
    "A7 rows": (by_rows(counted), 3),
    "A7 depth": (by_depth, 7),
    "address": (by_address, 2),
    "dtype": (by_dtype, 2),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str) -> None:
    launch, variants = PLANTED[name]
    assert keys(launch) == variants


def test_a_mended_kernel_has_one_variant() -> None:
    assert keys(by_rows(counted_once)) == 1


def test_representatives_keep_what_keys_depend_on() -> None:
    for number in range(1, 65):
        other = specialisations.alike(number)
        assert (other == 1) == (number == 1) and (other % 16) == (number % 16)
    found = specialisations.classes(specialisations.load(5000))
    assert {shape.depth for shape in found} == set(range(8))
    assert {shape.kind for shape in found} == set(specialisations.KINDS)
    assert {shape.requests for shape in found} >= {1, 2, 3, 4, 8, 16}


@pytest.mark.costly
def test_no_variant_appears_after_start() -> None:
    from tests.cuda_lab import record

    found = record.in_a_process("specialisations", "--few")["late"]
    assert not found, f"compiled in service: {found}"


def test_a_kernel_that_cannot_be_compiled_ends_the_start() -> None:
    from dspark_sglang.serving import worker
    from tests.cuda_lab.world import World

    def fails(*_: object) -> None:
        raise RuntimeError("ptxas is not here")

    with (
        mock.patch.object(worker, "rehearse", fails),
        pytest.raises(CompatibilityError, match=r"could not be compiled.*ptxas is not here"),
        World(FakeDevice(), ours=True),
    ):
        pass


@pytest.mark.costly
@pytest.mark.parametrize("seeded", [False, True])
def test_ranks_ask_for_no_more_after_start(seeded: bool) -> None:
    """Two ranks: candidates and acceptance of shards, rows that are gathered whole, no drafted tokens."""
    found = specialisations.late_of_ranks(seeded=seeded)
    assert not found, f"compiled in service: {found}"
