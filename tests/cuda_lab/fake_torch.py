"""``torch.cuda`` and Triton's launches as a machine with a device has them, for :mod:`tests.cuda_lab.fake_device`.

Streams and events order nothing here; :mod:`tests.cuda_lab.streams` gives them clocks. An event has passed
:data:`LAG` steps after it was recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from tests.cuda_lab.fake_device import FakeDevice

CUDA = torch.device("cuda", 0)
#: Steps after which work is over: SGLang's overlapped loop takes a step's results in before it launches the one
#: after the next.
LAG = 2


class Stream:
    """Stands for ``torch.cuda.Stream``."""

    device = CUDA
    device_index = 0

    def __init__(self, owner: FakeDevice, number: int) -> None:
        self.owner, self.number, self.cuda_stream = owner, number, number

    def wait_stream(self, other: Stream) -> None:
        """Ordered on the device: the host does not wait."""

    def wait_event(self, event: Event) -> None:
        """Ordered on the device: the host does not wait."""

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(owner=self.owner)
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.owner.wait("Stream.synchronize")


class Event:
    """Stands for ``torch.cuda.Event``: it has passed :data:`LAG` steps after it was recorded."""

    owner: FakeDevice

    def __init__(self, *_: Any, owner: FakeDevice | None = None, **__: Any) -> None:
        if owner is not None:
            self.owner = owner
        self.recorded, self.step = False, 0

    def record(self, stream: Stream | None = None) -> None:
        self.recorded, self.step = True, self.owner.step

    def wait(self, stream: Stream | None = None) -> None:
        """Ordered on the device: the host does not wait."""

    def query(self) -> bool:
        return not self.recorded or self.owner.step - self.step >= LAG

    def synchronize(self) -> None:
        if not self.query():
            self.owner.wait("Event.synchronize of a step that may run")

    def elapsed_time(self, other: Event) -> float:
        return 10.0


class Generator(torch.Generator):
    """A generator that says it is the device's; its draws are never made."""

    def __new__(cls, device: Any = None) -> Generator:
        made: Generator = super().__new__(cls)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA


def _address(tensor: torch.Tensor) -> int:
    """An address as the caching allocator gives one: a multiple of 512, and the offset of a view."""
    storage = tensor.untyped_storage()._cdata
    return (storage << 9) + tensor.storage_offset() * tensor.element_size()


def launcher(device: FakeDevice) -> Callable[..., None]:
    """In the place of a Triton kernel's ``run``."""

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        if not warmup:
            function = getattr(kernel, "fn", kernel)
            device.triton(getattr(function, "__name__", str(function)), grid)
            device.operands([x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)])

    return run


def autotuned(device: FakeDevice) -> Callable[..., None]:
    """In the place of an autotuner's ``run``: its choice is made."""

    def run(tuner: Any, *args: Any, **kwargs: Any) -> None:
        function = tuner.fn
        while hasattr(function, "fn"):
            function = function.fn
        device.triton(function.__name__, kwargs.get("grid"))

    return run


@contextlib.contextmanager
def patched(device: FakeDevice) -> Iterator[None]:
    """``torch.cuda`` and Triton's launches as a machine with a device has them."""
    from triton.runtime import autotuner, interpreter, jit

    class Recorded(Event):
        owner = device

    @contextlib.contextmanager
    def stream(chosen: Stream | None) -> Iterator[None]:
        before = device.stream
        device.stream = chosen or before
        try:
            yield
        finally:
            device.stream = before

    def new_stream(*_: Any, **__: Any) -> Stream:
        return Stream(device, next(device._streams))

    cuda = {
        "Event": Recorded,
        "Stream": new_stream,
        "stream": stream,
        "current_stream": lambda *_: device.stream,
        "is_current_stream_capturing": lambda: device.capturing,
        "synchronize": lambda *_: device.wait("torch.cuda.synchronize"),
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_name": lambda *_: "a fake H100",
        "get_device_capability": lambda *_: (9, 0),
        "mem_get_info": lambda *_: (60 << 30, 80 << 30),
        "empty_cache": lambda: None,
        "_lazy_init": lambda: None,
    }
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", _address, create=True))
        stack.enter_context(
            mock.patch.object(FakeTensor, "tolist", lambda given: given.cpu().tolist())
        )
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda *_: None))
        for kind in (jit.JITFunction, interpreter.InterpretedFunction):
            stack.enter_context(mock.patch.object(kind, "run", launcher(device)))
        stack.enter_context(mock.patch.object(autotuner.Autotuner, "run", autotuned(device)))
        yield
