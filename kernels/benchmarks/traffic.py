"""Bytes a call moves: by its Triton kernels and by its torch operations.

Kernels run in Triton's interpreter. What counts is what they ask for: every unmasked lane of every load, store
and atomic, times the element size. A value that two programs read is counted twice, although on a GPU the second
read may come from cache: the count is an upper bound on memory traffic, and exact for what is read once.

A torch operation counts the bytes of its tensor inputs and outputs: an elementwise operation, a reduction or a
matrix product on a GPU reads the ones and writes the others once. Views and allocations are free; operations
that pick rows or elements count those and not the whole table.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from dspark_kernels.support.backend import interpreting

#: Accesses of the interpreter: places of the pointers and of the mask among a call's arguments, and whether it
#: loads and stores. Plain loads and stores go through the masked ones.
_ACCESSES: dict[str, tuple[int, int | None, bool, bool]] = {
    "create_masked_load": (0, 1, True, False),
    "create_masked_store": (0, 2, False, True),
    "create_atomic_rmw": (1, 3, True, True),
    "create_atomic_cas": (0, None, True, True),
}
#: Return memory, write none of it; or return their input.
_FREE = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
)
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


class Traffic(NamedTuple):
    """What one call moved."""

    #: Bytes loaded and stored by ``kernel.parameter``; an atomic counts as a load and a store.
    loaded: dict[str, int]
    stored: dict[str, int]
    #: Bytes loaded or stored outside every tensor of the launch. Anything but 0 is a bug.
    outside: int
    #: Launches of Triton kernels.
    launches: int
    #: Bytes read and written by torch operations.
    torch: int
    #: Torch operations that moved anything, by name: at least one launch each on a GPU.
    operations: dict[str, int]

    @property
    def kernels(self) -> int:
        """Bytes of all kernels."""
        return sum(self.loaded.values()) + sum(self.stored.values()) + self.outside


def count(fn: Callable[[], object], reached: Mapping[str, torch.Tensor] | None = None) -> Traffic:
    """Run ``fn`` and count what it moves.

    Args:
        fn: calls an op with ``backend="triton"`` on CPU tensors, made before.
        reached: tensors that kernels reach through a table of addresses, by the name to count under.

    Raises:
        RuntimeError: outside the interpreter.
    """
    if not interpreting():
        raise RuntimeError(
            "TRITON_INTERPRET is not set: loads and stores cannot be seen. Expected: Triton's "
            "interpreter. Start the process with TRITON_INTERPRET=1."
        )
    seen = _Counter(reached or {})
    with seen.watching(), seen:
        fn()
    return Traffic(
        *(dict(seen.loaded), dict(seen.stored), seen.outside, seen.launches),
        *(seen.bytes, dict(seen.operations)),
    )


class _Range(NamedTuple):
    name: str
    start: int
    #: One byte past the last element.
    stop: int


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Attributes the lanes of each access to a tensor of the launch under way; counts torch operations between."""

    def __init__(self, reached: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        self.outside = self.launches = self.bytes = 0
        self.operations: Counter[str] = Counter()
        self._reached = [_range(name, tensor) for name, tensor in reached.items()]
        #: Of the launch under way.
        self._ranges: list[_Range] = []
        self._launching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        name = func.overloadpacket.__name__
        if self._launching:  # the interpreter's own
            return result
        if name in _UNIFORM:
            result.fill_(UNIFORM)
        size = _moved(name, func, args, given, result)
        if size:
            self.bytes += size
            self.operations[name] += 1
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While kernels are interpreted."""
        call = GridExecutor.__call__

        def launch(executor: Any, *arguments: Any, **named: Any) -> Any:
            self.launches += 1
            given = dict(zip(executor.arg_names, arguments, strict=False)) | named
            self._ranges = self._reached + [
                _range(f"{executor.fn.__name__}.{name}", value)
                for name, value in given.items()
                if isinstance(value, torch.Tensor) and value.numel()
            ]
            self._launching = True
            try:
                return call(executor, *arguments, **named)
            finally:
                self._launching = False

        with ExitStack() as hooks:
            hooks.enter_context(patch.object(GridExecutor, "__call__", launch))
            for name, where in _ACCESSES.items():
                watched = self._watched(name, *where)
                hooks.enter_context(patch.object(InterpreterBuilder, name, watched))
            yield

    def _watched(
        self, name: str, pointers: int, mask: int | None, loads: bool, stores: bool
    ) -> Callable[..., Any]:
        original = getattr(InterpreterBuilder, name)
        counters = [self.loaded] * loads + [self.stored] * stores

        @functools.wraps(original)
        def access(builder: Any, *arguments: Any, **named: Any) -> Any:
            handle = arguments[pointers]
            addresses = handle.data.reshape(-1)
            if mask is not None:
                addresses = handle.data[arguments[mask].data.astype(bool)]
            width = max(1, int(handle.get_element_ty().primitive_bitwidth) // 8)
            self._access(addresses, width, counters)
            return original(builder, *arguments, **named)

        return access

    def _access(self, addresses: Any, width: int, counters: list[Counter[str]]) -> None:
        """Count numpy uint64 ``addresses`` of elements of ``width`` bytes."""
        if not addresses.size:
            return
        lowest, highest = int(addresses.min()), int(addresses.max())
        holding = [r for r in self._ranges if r.start <= lowest and highest + width <= r.stop]
        size = int(addresses.size) * width
        if not holding:
            self.outside += size * len(counters)
            return
        # Views of one storage may overlap: the one that starts last is the one a row offset of 0
        # would have come from. The total does not depend on the choice.
        chosen = max(holding, key=lambda r: r.start).name
        for counter in counters:
            counter[chosen] += size


def _range(name: str, tensor: torch.Tensor) -> _Range:
    if tensor.device.type != "cpu":
        raise RuntimeError(f"{name} is on {tensor.device}. Expected: the CPU. Move it there.")
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return _Range(name, start, start + (last + 1) * tensor.element_size())


def _moved(name: str, func: Any, args: tuple[Any, ...], given: dict[str, Any], result: Any) -> int:
    """Bytes that one operation reads and writes."""
    if func.is_view or name in _FREE:
        return 0
    changed: list[torch.Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed += _tensors(given.get(argument.name, args[place : place + 1]))
    written = _tensors(result)
    inputs = [t for t in _tensors((args, given)) if not any(t is out for out in changed)]
    if name.endswith("_like") or name.startswith("new_"):  # only a shape is taken from the input
        return _bytes(written)
    if name in _PICK:
        return 2 * _bytes(written) + _bytes(inputs[1:])
    if name in _PUT:
        return changed[0].element_size() * inputs[-1].numel() + _bytes(inputs)
    if not changed:
        return _bytes(inputs) + _bytes(written)
    in_place = name.endswith("_") and name not in _OVERWRITE
    return _bytes(inputs) + _bytes(changed) * (2 if in_place else 1)


def _tensors(values: Any) -> list[torch.Tensor]:
    """The distinct tensors among nested values."""
    found = {id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}
    return list(found.values())


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of memory behind some tensors; what a dimension repeats is one."""
    return sum(
        t.element_size() * math.prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s)
        for t in tensors
        if t.numel()
    )
