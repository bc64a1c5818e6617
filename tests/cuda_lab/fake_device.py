"""A CUDA device that computes nothing: tensors with shapes and no values, and a record of what is asked of it.

Tensors on ``cuda`` are PyTorch's fake tensors; tensors on the host are real. A dispatch mode above sees each
operation and records

- *launches*: operations that start work on the device, Triton kernels and copies among them. An operation counts
  once, or as :data:`KERNELS` says where PyTorch's own implementation is known to start several kernels. Views
  and allocations count nothing;
- *waits*: where the host stands still until the device has come so far, with the line that asked for it: reading
  a value, shapes that depend on values, copies that are not ``non_blocking``, ``synchronize``;
- *pageable*: copies that are ``non_blocking`` from or to memory that is not pinned. They are staged by the
  driver, and to the host they wait;
- *escaped*: tensors made inside a capture that are alive after it.

It cannot see: what an operation costs, what it computes, allocator behaviour, or kernels that C++ extensions
start by themselves. A Triton kernel writes nothing: what is read from its outputs is a constant. Values that reach
the host are zeros, true, or :attr:`FakeDevice.value` for floating point. So one path through data-dependent code is
seen, not all of them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda_lab.fake_torch import CUDA, Stream, patched

#: Kernels that PyTorch starts for one operation, where that is not one.
KERNELS = {
    "constant_pad_nd": 2,  # fills, copies
    "scatter": 2,  # copies, scatters; the same of the next two
    "index_copy": 2,
    "index_put": 2,
    "sort": 4,  # segmented radix sort: indices, histogram, scan, scatter
    "argsort": 4,
    "topk": 2,  # selects, sorts
    "multinomial": 3,
    "nonzero": 3,
    "repeat_interleave": 2,  # scan, expand
    "new_zeros": 1,
}
#: Operations that make memory and start nothing.
_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
#: Operations that start nothing although their results are new tensors.
_FREE = {
    "detach",
    "detach_",
    "lift_fresh",
    "lift",
    "alias",
    "record_stream",
    "is_pinned",
    "set_",
    "resize_",
    "_unsafe_view",
}
#: Operations whose result's shape or value the host has to know.
_WAITS = {
    "_local_scalar_dense": "reads a value",
    "nonzero": "its size depends on values",
    "masked_select": "its size depends on values",
    "_unique2": "its size depends on values",
    "unique_dim": "its size depends on values",
    "unique_consecutive": "its size depends on values",
    "equal": "reads a value",
    "is_nonzero": "reads a value",
}
#: Files that are on the way to every operation.
_OWN = ("fake_device.py", "fake_torch.py", "streams.py")
_PROJECT = ("dspark_sglang", "dspark_kernels", "sglang", "cuda_lab")


class Seen(NamedTuple):
    """One thing that was asked of the device."""

    #: ``aten``, ``triton``, ``copy`` or ``collective`` of a launch; ``wait``, ``pageable`` or ``escaped``.
    kind: str
    #: The operation's or the kernel's name.
    name: str
    #: ``file:line`` of the innermost frame of this project or of SGLang.
    where: str
    #: Kernels it starts.
    count: int = 1
    #: The part of a step that it belongs to, see :meth:`FakeDevice.part`.
    part: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.name}"


def _short(file: str) -> str:
    parts = Path(file).parts
    for name in _PROJECT:
        if name in parts:
            return "/".join(parts[len(parts) - 1 - parts[::-1].index(name) :])
    return file


def caller(depth: int = 1) -> str:
    """``file:line`` of the innermost frame of the project or of SGLang, the instruments' own left out."""
    frame: Any = sys._getframe(depth)
    while frame is not None:
        file = frame.f_code.co_filename
        inside = any(f"/{name}/" in file for name in _PROJECT)
        if inside and Path(file).name not in _OWN and not frame.f_code.co_name.startswith("_lab_"):
            return f"{_short(file)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def is_view(func: Any) -> bool:
    """Whether an operation's result is a view of an operand that it does not write."""
    schema = func._schema
    results = schema.returns
    if not results or any(
        a.alias_info is not None and a.alias_info.is_write for a in schema.arguments
    ):
        return False
    return all(r.alias_info is not None for r in results)


@functools.cache
def _composite(func: Any) -> bool:
    return func.namespace == "aten" and bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    )


class FakeDevice(TorchDispatchMode):
    """Records what code asks of a device while the mode is on.

    Args:
        value: what floating-point values read from the device are.
    """

    def __init__(self, *, value: float = 0.5) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.value = value
        #: Steps that were begun, see :data:`LAG`.
        self.step = 0
        self.seen: list[Seen] = []
        #: What was started while a graph was captured.
        self.captured: list[Seen] = []
        #: Pinned memory by address, kept alive: an address that is free may be given to other memory.
        self._pinned: dict[int, Any] = {}
        self._parts: list[str] = [""]
        self._capturing: list[weakref.ref[torch.Tensor]] | None = None
        self._ignoring = self._depth = 0
        #: Operations that were run, and the seconds that faking them took.
        self.operations, self.seconds = 0, 0.0
        self._stack = contextlib.ExitStack()
        self._streams = itertools.count(1)
        self.stream = Stream(self, 0)

    def clock(self) -> float:
        """Seconds that this thread has worked, without what faking operations has taken."""
        return time.thread_time() - self.seconds - self.operations * self.overhead

    @functools.cached_property
    def overhead(self) -> float:
        """Seconds that PyTorch spends around one faked operation."""
        with torch._C._DisableTorchDispatch():
            given = torch.zeros(1)
        before, start = self.seconds, time.thread_time()
        for _ in range(500):
            given.view(1)
        return (time.thread_time() - start - (self.seconds - before)) / 500

    # -- scopes ------------------------------------------------------------------------------

    def __enter__(self) -> FakeDevice:
        self._stack.enter_context(patched(self))
        self._stack.enter_context(self.fake)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Name the part of a step that runs."""
        self._parts.append(name)
        try:
            yield
        finally:
            self._parts.pop()

    @contextlib.contextmanager
    def ignored(self) -> Iterator[None]:
        """Record nothing: stands for the replay of a graph, or for what is not measured."""
        self._ignoring += 1
        try:
            yield
        finally:
            self._ignoring -= 1

    @contextlib.contextmanager
    def capture(self, *keeps: Any) -> Iterator[None]:
        """Capture a graph: launches go to :attr:`captured`, a wait is an error of the capture.

        Args:
            keeps: called afterwards, they return tensors that the graph may leave behind.
        """
        outer, self._capturing = self._capturing, []
        try:
            yield
        finally:
            made, self._capturing = self._capturing, outer
            allowed = {id(tensor) for keep in keeps for tensor in keep()}
            for reference in made or ():
                tensor = reference()
                if tensor is not None and id(tensor) not in allowed:
                    where = getattr(tensor, "_lab_where", "?")
                    self._note("escaped", f"{list(tensor.shape)} {tensor.dtype}", where)

    @property
    def capturing(self) -> bool:
        """Whether a graph is being captured."""
        return self._capturing is not None

    # -- the record --------------------------------------------------------------------------

    def _note(self, kind: str, name: str, where: str | None = None, count: int = 1) -> None:
        if self._ignoring:
            return
        seen = Seen(kind, name, where or caller(2), count, self._parts[-1])
        (self.captured if self.capturing and kind not in ("wait", "escaped") else self.seen).append(
            seen
        )

    def launches(
        self, kinds: tuple[str, ...] = ("aten", "triton", "copy", "collective")
    ) -> list[Seen]:
        """What started work on the device outside a capture."""
        return [seen for seen in self.seen if seen.kind in kinds]

    def count(self) -> int:
        """Kernels and copies started outside a capture."""
        return sum(seen.count for seen in self.launches())

    def of(self, kind: str) -> list[Seen]:
        """What was recorded of a kind."""
        return [seen for seen in self.seen if seen.kind == kind]

    def clear(self) -> None:
        """Forget what was recorded."""
        self.seen.clear()
        self.captured.clear()

    def table(self) -> Counter[str]:
        """Launches by line and operation."""
        found: Counter[str] = Counter()
        for seen in self.launches():
            found[f"{seen.where} {seen.name}"] += seen.count
        return found

    def triton(self, name: str, grid: Any) -> None:
        """A Triton kernel was launched."""
        self._note("triton", name)

    def operands(self, tensors: list[torch.Tensor]) -> None:
        """What a Triton kernel was given; clocks of streams listen here."""

    def replayed(self, *outputs: torch.Tensor) -> None:
        """A graph was replayed and has written ``outputs``; clocks of streams listen here."""

    def collective(self, name: str) -> None:
        """Ranks have exchanged something on the device."""
        self._note("collective", name)

    def wait(self, why: str) -> None:
        """The host waits for the device."""
        self._note("wait", why)

    # -- memory ------------------------------------------------------------------------------

    def pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a host tensor's memory is pinned."""
        return tensor.untyped_storage()._cdata in self._pinned

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take a host tensor's memory as pinned."""
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = storage
        return tensor

    def host(self, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What the host reads of a device tensor."""
        known = getattr(like, "_lab_value", None)
        with torch._C._DisableTorchDispatch():
            if known is not None:
                return known.reshape(like.shape).clone()
            kind = dtype or like.dtype
            value = self.value if kind.is_floating_point else kind == torch.bool
            return torch.full(tuple(like.shape), value, dtype=kind)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A device tensor that costs nothing to make."""
        with self.ignored():
            return torch.empty(shape, dtype=dtype, device=CUDA)

    # -- dispatch ----------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        start = time.thread_time()
        try:
            return self._dispatched(func, args, dict(kwargs or {}))
        finally:
            if self._depth == 0:
                self.operations += 1
                self.seconds += time.thread_time() - start

    def _dispatched(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        tensors = [
            x
            for x in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        ]
        fakes = [x for x in tensors if isinstance(x, FakeTensor)]
        device = kwargs.get("device")
        to_cuda = device is not None and torch.device(device).type == "cuda"
        if torch.is_inference_mode_enabled() and _composite(func) and name != "is_pinned":
            # In inference mode these arrive whole, otherwise as the operations they are made of.
            super().__enter__()
            self._depth += 1
            try:
                made = func.decompose(*args, **kwargs)
            finally:
                self._depth -= 1
                super().__exit__(None, None, None)
            if made is not NotImplemented:
                return made
        if name == "is_pinned":
            return self.pinned(args[0]) if not fakes else False
        if name in ("pin_memory", "_pin_memory"):
            with torch._C._DisableTorchDispatch():
                return self.pin(args[0].clone())
        if not fakes and not to_cuda:
            pin = kwargs.pop("pin_memory", None)
            with torch._C._DisableTorchDispatch():
                made = func(*args, **kwargs)
            return self.pin(made) if pin else made
        kwargs.pop("pin_memory", None)
        if name == "_to_copy" and (to_cuda or device is not None):
            return self._moved(func, args[0], kwargs)
        if name == "copy_" and args[0].device.type != args[1].device.type:
            return self._copied(
                args[0], args[1], bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            )
        if name in _WAITS or self._masks(name, args):
            return self._waited(func, name, args, kwargs)
        return self._launched(func, name, args, kwargs)

    def _launched(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        with self.fake:
            made = func(*args, **kwargs)
        results = [x for x in torch.utils._pytree.tree_leaves(made) if isinstance(x, torch.Tensor)]
        written = results or [
            x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)
        ]
        does = not (func.namespace == "prim" or is_view(func) or name in _ALLOCATES | _FREE)
        if does and any(x.numel() and x.device.type == "cuda" for x in written):
            self._note("aten", name, caller(3), KERNELS.get(name, 1))
        known = getattr(args[0], "_lab_value", None) if args and is_view(func) else None
        if known is not None and isinstance(made, torch.Tensor) and made.numel() == known.numel():
            made._lab_value = known  # type: ignore[attr-defined]
        if self._capturing is not None and not is_view(func):
            given = {id(x) for x in torch.utils._pytree.tree_leaves((args, kwargs))}
            for tensor in results:
                if id(tensor) not in given:
                    tensor._lab_where = caller(3)  # type: ignore[attr-defined]
                    self._capturing.append(weakref.ref(tensor))
        return made

    def _moved(self, func: Any, source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """``source.to(device)``, between host and device or on the device."""
        target = torch.device(kwargs["device"])
        dtype = kwargs.get("dtype") or source.dtype
        if source.device.type == target.type:
            return self._launched(func, "_to_copy", (source,), kwargs)
        if target.type == "cuda":
            self._crossed("to the device", bool(kwargs.get("non_blocking")), self.pinned(source))
            with self.fake, self.ignored():
                made = torch.empty(tuple(source.shape), dtype=dtype, device=target)
            if source.numel() == 1:  # a size that ranks tell each other
                made._lab_value = source  # type: ignore[attr-defined]
            return made
        self._crossed("to the host", bool(kwargs.get("non_blocking")), False)
        return self.host(source, dtype)

    def _copied(self, into: torch.Tensor, source: torch.Tensor, free: bool) -> torch.Tensor:
        """``into.copy_(source)`` between host and device."""
        if into.device.type == "cuda":
            self._crossed("to the device", free, self.pinned(source))
            return into
        self._crossed("to the host", free, self.pinned(into))
        with torch._C._DisableTorchDispatch():
            into.copy_(self.host(source).expand(into.shape))
        return into

    def _crossed(self, where_to: str, free: bool, pinned: bool) -> None:
        where = caller(4)
        self._note("copy", f"copy {where_to}", where)
        if not free:
            self._note("wait", f"copy {where_to} that blocks", where)
        elif not pinned:
            self._note("pageable", f"copy {where_to} of pageable memory", where)
            if where_to == "to the host":
                self._note("wait", f"copy {where_to} of pageable memory", where)

    @staticmethod
    def _masks(name: str, args: tuple[Any, ...]) -> bool:
        """Whether an index is a mask, whose size the host has to know."""
        if name == "repeat_interleave":
            return len(args) < 2
        if name not in ("index", "index_put", "index_put_"):
            return False
        masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        # One number written through a mask is a masked fill.
        return bool(masks) and not (name != "index" and args[2].numel() == 1)

    def _waited(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        where = caller(3)
        why = _WAITS.get(name, "its size depends on values")
        self._note("wait", f"{name} {why}", where)
        self._note("aten", name, where, KERNELS.get(name, 1))
        source = args[0]
        if name == "_local_scalar_dense":
            with torch._C._DisableTorchDispatch():
                return self.host(source).view(-1)[0].item()
        with self.ignored(), self.fake:
            if name in ("equal", "is_nonzero"):
                return True
            if name == "nonzero":  # as if all were
                return source.new_empty((source.numel(), source.dim()), dtype=torch.int64)
            if name == "index":
                first = next(x for x in args[1] if x is not None)
                rest = source.shape[args[1].index(first) + first.dim() :]
                return source.new_empty(
                    (*source.shape[: args[1].index(first)], first.numel(), *rest)
                )
            if name in ("index_put", "index_put_"):
                return source
            if name == "repeat_interleave":
                return source.new_empty(source.numel(), dtype=torch.int64)
            raise NotImplementedError(f"{where}: {name} has a shape that depends on values")
