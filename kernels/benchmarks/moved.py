"""Bytes that a call moves: by its Triton kernels and by its torch operations, nothing else.

Kernels are counted lane by lane in Triton's interpreter (:mod:`benchmarks.traffic`).
A torch operation counts the bytes of its tensor inputs and outputs: an elementwise operation,
a reduction or a matrix product on a GPU reads the ones and writes the others once. Views and
allocations are free; operations that pick rows or elements count those and not the whole table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from benchmarks import traffic
from dspark_kernels.support.backend import interpreting

#: Return memory, write none of it.
_ALLOCATE = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
#: Take a shape from their input and read nothing of it.
_LIKE = ("_like", "new_")
#: Read as much of their first input as they return.
_PICK = frozenset({"embedding", "gather", "index", "index_select", "take", "take_along_dim"})
#: Write as much of their first input as they are given, and read none of it.
_PUT = frozenset({"scatter_", "index_put_", "index_copy_", "index_fill_"})
#: Overwrite their first input without reading it.
_OVERWRITE = frozenset(
    {"copy_", "fill_", "zero_", "uniform_", "normal_", "random_", "exponential_"}
)
_UNIFORM = frozenset({"rand", "rand_like", "uniform_"})
#: Uniform numbers drawn inside a counted call all have this value: where a draw decides how much is
#: read, it is the median of it, and counts can be repeated.
UNIFORM = 0.5


class Moved(NamedTuple):
    """What one call moved."""

    #: Bytes loaded and stored by its Triton kernels; accesses outside every operand apart.
    kernels: int
    outside: int
    #: Bytes read and written by its torch operations.
    torch: int
    #: Launches of Triton kernels.
    launches: int
    #: Torch operations that moved anything, by name: at least one launch each on a GPU.
    operations: dict[str, int]

    @property
    def total(self) -> int:
        """All bytes."""
        return self.kernels + self.torch


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts torch operations, except while a kernel is interpreted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.names: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        result = func(*args, **given)
        if self.paused:
            return result
        name = func.overloadpacket.__name__
        if name in _UNIFORM:
            result.fill_(UNIFORM)
        moved = _moved(name, func, args, given, result)
        if moved:
            self.bytes += moved
            self.names[name] += 1
        return result


def count(fn: Callable[[], object], reached: Mapping[str, torch.Tensor] | None = None) -> Moved:
    """Run ``fn`` and count what it moves.

    Outside the interpreter a Triton launch on CPU tensors fails, so only torch operations are counted.

    Args:
        fn: the call; its operands are made before it.
        reached: tensors that kernels reach through a table of addresses, by name.
    """
    operations = _Operations()

    def run() -> None:
        with _apart(operations), operations:
            fn()

    if not interpreting():
        run()
        return Moved(0, 0, operations.bytes, 0, dict(operations.names))
    seen = traffic.count(run, reached)
    return Moved(seen.total, seen.outside, operations.bytes, seen.launches, dict(operations.names))


@contextmanager
def _apart(operations: _Operations) -> Iterator[None]:
    """Keep the interpreter's own torch operations out of the count."""
    executor: Any = interpreter.GridExecutor
    call = executor.__call__

    def launch(self: Any, *arguments: Any, **named: Any) -> Any:
        operations.paused = True
        try:
            return call(self, *arguments, **named)
        finally:
            operations.paused = False

    executor.__call__ = launch
    try:
        yield
    finally:
        executor.__call__ = call


def _moved(name: str, func: Any, args: tuple[Any, ...], given: dict[str, Any], result: Any) -> int:
    """Bytes that one operation reads and writes."""
    if name in _ALLOCATE:
        return 0
    written = _tensors(result)
    changed = _changed(func, args, given)
    inputs = [t for t in _tensors((args, given)) if not any(t is out for out in changed)]
    if not changed and _is_view(written, inputs):
        return 0
    if name.endswith(_LIKE[0]) or name.startswith(_LIKE[1]):
        return _bytes(written)
    if name in _PICK:
        return 2 * _bytes(written) + _bytes(inputs[1:])
    if name in _PUT:
        value = inputs[-1] if len(inputs) > 1 else None
        size = changed[0].element_size() * (value if value is not None else inputs[0]).numel()
        return size + _bytes(inputs)
    if not changed:
        return _bytes(inputs) + _bytes(written)
    in_place = name.endswith("_") and name not in _OVERWRITE
    return _bytes(inputs) + _bytes(changed) * (2 if in_place else 1)


def _tensors(values: Any) -> list[torch.Tensor]:
    """The distinct tensors among nested values."""
    found = {id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}
    return list(found.values())


def _changed(func: Any, args: tuple[Any, ...], given: dict[str, Any]) -> list[torch.Tensor]:
    """The inputs that an operation writes to: its own, or ``out``."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = given.get(argument.name, args[place] if place < len(args) else None)
            found += _tensors(value)
    return found


def _is_view(written: list[torch.Tensor], inputs: list[torch.Tensor]) -> bool:
    held = {t.untyped_storage().data_ptr() for t in inputs}
    return bool(written) and all(t.untyped_storage().data_ptr() in held for t in written)


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of memory behind some tensors; what a dimension repeats is one."""
    return sum(
        t.element_size() * _product(n for n, s in zip(t.shape, t.stride(), strict=True) if s)
        if t.numel()
        else 0
        for t in tensors
    )


def _product(sizes: Iterator[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
