"""Conflicts between the lanes of one program, and results that depend on the order of programs.

Triton's interpreter runs a program as one thread, one instruction after the other, so a missing barrier changes
nothing there. Here each load and store of a program is logged with the epoch it falls in: the number of barriers
before it. Two accesses to one address in one epoch conflict where one of them is a store and they are not known to
be of the same thread: of the same element of tiles of the same shape. A scalar is loaded by every thread.

It cannot see: barriers that the compiler puts in by itself (a reduction has some), so an ordered pair may be
reported; shared memory; which thread holds an element where two tiles of one shape are laid out differently. Of
different programs it compares results: :func:`shuffled` runs them in another order.

``python -m tests.cuda_lab.races`` runs the operations' self-check under the log, in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np


class Conflict(NamedTuple):
    """Two accesses of one program that nothing orders."""

    #: ``file:line`` of the earlier and of the later one.
    first: str
    second: str
    #: ``store-load``, ``load-store`` or ``store-store``.
    kind: str

    def __str__(self) -> str:
        return f"{self.kind} {self.first} {self.second}"


class _Last(NamedTuple):
    """The last store to an address, or a load since then."""

    epoch: int
    lane: int
    shape: tuple[int, ...]
    where: str


class Log:
    """Accesses of the running program, and the conflicts so far."""

    def __init__(self) -> None:
        self.conflicts: set[Conflict] = set()
        self._epoch = 0
        self._stores: dict[int, _Last] = {}
        self._loads: dict[int, list[_Last]] = {}

    def program(self) -> None:
        """Another program begins."""
        self._epoch = 0
        self._stores.clear()
        self._loads.clear()

    def barrier(self) -> None:
        """The lanes wait for each other."""
        self._epoch += 1
        self._stores.clear()
        self._loads.clear()

    def accessed(self, addresses: Any, mask: Any, *, writes: bool) -> None:
        """The program loads or stores a tile of addresses where ``mask`` is true."""
        where = _kernel_line()
        flat = np.asarray(addresses).reshape(-1)
        allowed = np.broadcast_to(np.asarray(mask, dtype=bool), np.shape(addresses)).reshape(-1)
        shape = tuple(np.shape(addresses))
        for lane in np.flatnonzero(allowed):
            # A scalar's load is every lane's, a scalar's store is one lane's.
            number = -1 if flat.size == 1 and not writes else int(lane)
            now = _Last(self._epoch, number, shape, where)
            self._one(int(flat[lane]), now, writes=writes)

    def _one(self, address: int, now: _Last, *, writes: bool) -> None:
        stored = self._stores.get(address)
        if stored is not None and _apart(stored, now):
            kind = "store-store" if writes else "store-load"
            self.conflicts.add(Conflict(stored.where, now.where, kind))
        if writes:
            for loaded in self._loads.pop(address, ()):
                if _apart(loaded, now):
                    self.conflicts.add(Conflict(loaded.where, now.where, "load-store"))
            self._stores[address] = now
        else:
            seen = self._loads.setdefault(address, [])
            if all((one.lane, one.shape) != (now.lane, now.shape) for one in seen):
                seen.append(now)


def _apart(one: _Last, other: _Last) -> bool:
    """Whether two accesses may be of different threads."""
    return (one.lane, one.shape) != (other.lane, other.shape) or one.lane == -1


def _kernel_line() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/triton/" not in file and "/numpy/" not in file and file != __file__:
            return f"{file.rsplit('/', 2)[-2]}/{file.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


@contextlib.contextmanager
def logged(*, barriers: bool = True) -> Iterator[Log]:
    """Log what interpreted kernels access, with their barriers or as if they had none."""
    from triton.runtime import interpreter

    builder, log = interpreter.InterpreterBuilder, Log()
    load, store = builder.create_masked_load, builder.create_masked_store
    cas, rmw, place = builder.create_atomic_cas, builder.create_atomic_rmw, builder.set_grid_idx

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        log.accessed(ptrs.data, mask.data, writes=False)
        return load(self, ptrs, mask, *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        log.accessed(ptrs.data, mask.data, writes=True)
        return store(self, ptrs, value, mask, *rest)

    def barrier(self: Any, *_: Any) -> None:
        if barriers:
            log.barrier()

    def grid(self: Any, *index: Any) -> Any:
        log.program()
        return place(self, *index)

    with contextlib.ExitStack() as stack:
        for name, made in {
            "create_masked_load": masked_load,
            "create_masked_store": masked_store,
            "create_barrier": barrier,
            "set_grid_idx": grid,
        }.items():
            stack.enter_context(mock.patch.object(builder, name, made))
        assert cas and rmw  # atomic: they order themselves
        yield log


@contextlib.contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Run the programs of each launch in a random order along the grid's first dimension."""
    from triton.runtime import interpreter

    builder, rng = interpreter.InterpreterBuilder, random.Random(seed)
    place, size = builder.set_grid_idx, builder.set_grid_dim
    order: list[int] = []

    def dimension(self: Any, *grid: Any) -> Any:
        order[:] = rng.sample(range(int(grid[0])), int(grid[0]))
        return size(self, *grid)

    def index(self: Any, x: Any, *rest: Any) -> Any:
        return place(self, order[int(x)], *rest)

    with (
        mock.patch.object(builder, "set_grid_dim", dimension),
        mock.patch.object(builder, "set_grid_idx", index),
    ):
        yield


def same_in_any_order(run: Callable[[], Any], seeds: tuple[int, ...] = (1, 2, 3)) -> bool:
    """Whether ``run``, which launches and returns tensors, gives the same bits in every order of programs."""
    wanted = [value.clone() for value in run()]
    for seed in seeds:
        with shuffled(seed):
            found = run()
        if not all(bool((a == b).all()) for a, b in zip(wanted, found, strict=True)):
            return False
    return True


def drafting(kind: str) -> Callable[[Any, Any], Any]:
    """Drafts with a head whose latents one lane writes and all read, which the self-check does not."""
    import torch

    from dspark_kernels.markov_step import Head, draft_shortlist

    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    tokens, hidden, rank, times = 300, 32, 16, 3 if kind == "rnn" else 1
    width = hidden + (2 * rank if kind == "rnn" else rank)
    head = Head(
        normal(tokens, rank),
        normal(tokens, rank),
        normal(times * rank, width),
        normal(times * rank),
    )
    base, states = normal(3, 4, tokens), normal(3, 4, hidden)
    anchors = torch.tensor([1, 2, 3])

    def run(device: Any, backend: Any) -> Any:
        found = draft_shortlist(base, anchors, head, size=32, hidden=states, backend=backend)
        return (found.tokens,)

    return run


def check_ops(*, barriers: bool = True) -> dict[str, dict[str, Any]]:
    """Conflicts, and whether the order of programs matters, of each operation's self-check."""
    import torch

    from dspark_sglang.serving.ops import selfcheck

    device, found = torch.device("cpu"), {}
    checks = dict(selfcheck.CHECKS) | {kind: drafting(kind) for kind in ("gated", "rnn")}
    for name, check in checks.items():
        with logged(barriers=barriers) as log:
            check(device, "triton")
        found[name] = {
            "conflicts": sorted(map(str, log.conflicts)),
            "ordered": not barriers or same_in_any_order(lambda one=check: one(device, "triton")),  # type: ignore[misc]
        }
    return found


def main() -> None:
    print(json.dumps(check_ops(barriers="--without-barriers" not in sys.argv)))


if __name__ == "__main__":
    main()
