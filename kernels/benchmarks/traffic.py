"""Bytes a call moves, counted lane by lane while its kernels run in Triton's interpreter.

What counts is what the kernels ask for: every unmasked lane of every load, store and atomic, times
the element size. A value that two programs read is counted twice, although on a GPU the second
read may come from cache: the count is an upper bound on memory traffic, and exact for what is read
once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton.runtime import interpreter

from dspark_kernels.support.backend import interpreting


class Traffic(NamedTuple):
    """What one call moved."""

    #: Bytes loaded by ``kernel.parameter``.
    loaded: dict[str, int]
    #: Bytes stored by ``kernel.parameter``; an atomic counts as a load and a store.
    stored: dict[str, int]
    #: Bytes loaded or stored outside every tensor of the launch. Anything but 0 is a bug.
    outside: int
    #: Kernel launches.
    launches: int

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.loaded.values()) + sum(self.stored.values()) + self.outside


class _Range(NamedTuple):
    name: str
    start: int
    #: One byte past the last element.
    stop: int


class _Recorder:
    """Attributes the lanes of each access to a tensor of the launch under way."""

    def __init__(self) -> None:
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        self.outside = 0
        self.launches = 0
        self.reached: list[_Range] = []
        self.ranges: list[_Range] = []

    def access(self, pointers: Any, mask: Any, width: int, *into: Counter[str]) -> None:
        """Record one load or store.

        Args:
            pointers: numpy uint64 addresses, one a lane.
            mask: numpy booleans of the same shape; None: every lane.
            width: bytes an element.
            into: the counters it belongs to.
        """
        addresses = pointers.reshape(-1) if mask is None else pointers[mask.astype(bool)]
        if not addresses.size:
            return
        lowest, highest = int(addresses.min()), int(addresses.max())
        holding = [r for r in self.ranges if r.start <= lowest and highest + width <= r.stop]
        size = int(addresses.size) * width
        if not holding:
            self.outside += size * len(into)
            return
        # Views of one storage may overlap: the one that starts last is the one a row offset of 0
        # would have come from. The total does not depend on the choice.
        chosen = max(holding, key=lambda r: r.start).name
        for counter in into:
            counter[chosen] += size


def count(fn: Callable[[], object], reached: Mapping[str, torch.Tensor] | None = None) -> Traffic:
    """Run ``fn`` in the interpreter and count what its kernels load and store, by tensor.

    Args:
        fn: calls an op with ``backend="triton"`` on CPU tensors.
        reached: tensors that kernels reach through a table of addresses, by the name to count under.

    Raises:
        RuntimeError: outside the interpreter.
    """
    if not interpreting():
        raise RuntimeError(
            "TRITON_INTERPRET is not set: loads and stores cannot be seen. Expected: Triton's "
            "interpreter. Start the process with TRITON_INTERPRET=1."
        )
    recorder = _Recorder()
    recorder.reached = [_range(name, tensor) for name, tensor in (reached or {}).items()]
    with _hooked(recorder):
        fn()
    return Traffic(
        dict(recorder.loaded), dict(recorder.stored), recorder.outside, recorder.launches
    )


@contextmanager
def _hooked(recorder: _Recorder) -> Iterator[None]:
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    kept = {
        name: getattr(builder, name)
        for name in (
            "create_masked_load",
            "create_masked_store",
            "create_atomic_rmw",
            "create_atomic_cas",
        )
    }
    call = executor.__call__

    # Plain loads and stores go through the masked ones.
    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        recorder.access(pointers.data, mask.data, _width(pointers), recorder.loaded)
        return kept["create_masked_load"](self, pointers, mask, *rest, **named)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        recorder.access(pointers.data, mask.data, _width(pointers), recorder.stored)
        return kept["create_masked_store"](self, pointers, value, mask, *rest, **named)

    def update(self: Any, kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        both = (recorder.loaded, recorder.stored)
        recorder.access(pointers.data, mask.data, _width(pointers), *both)
        return kept["create_atomic_rmw"](self, kind, pointers, value, mask, *rest)

    def exchange(self: Any, pointers: Any, *rest: Any) -> Any:
        recorder.access(pointers.data, None, _width(pointers), recorder.loaded, recorder.stored)
        return kept["create_atomic_cas"](self, pointers, *rest)

    def launch(self: Any, *arguments: Any, **named: Any) -> Any:
        recorder.launches += 1
        given = dict(zip(self.arg_names, arguments, strict=False)) | named
        recorder.ranges = recorder.reached + [
            _range(f"{self.fn.__name__}.{name}", value)
            for name, value in given.items()
            if isinstance(value, torch.Tensor) and value.numel()
        ]
        return call(self, *arguments, **named)

    builder.create_masked_load = load
    builder.create_masked_store = store
    builder.create_atomic_rmw = update
    builder.create_atomic_cas = exchange
    executor.__call__ = launch
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(builder, name, function)
        executor.__call__ = call


def _width(pointers: Any) -> int:
    """Bytes of what the pointers of a handle point to."""
    return max(1, int(pointers.get_element_ty().primitive_bitwidth) // 8)


def _range(name: str, tensor: torch.Tensor) -> _Range:
    if tensor.device.type != "cpu":
        raise RuntimeError(f"{name} is on {tensor.device}. Expected: the CPU. Move it there.")
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return _Range(name, start, start + (last + 1) * tensor.element_size())
