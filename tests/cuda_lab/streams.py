"""Order between streams and the host, by vector clocks: what is used before it is ready, or reused too early.

Each stream and the host has a clock: how much of every stream it knows to be over. Work on a stream comes after
what the host knew when it launched it, and after what the stream has waited for. Memory carries its last writer and
its readers since. Reported are

- *early*: work that reads what another stream writes, with nothing between them;
- *overwritten*: work that writes what another stream may still read or write;
- *host*: the host reads, or writes, what the device may still write, or read;
- *stale*: a view of a graph's output that is read after the graph has been replayed;
- *freed*: memory that goes back to its stream's allocator while another stream may use it, without ``record_stream``.

:func:`observe` attaches the clocks to a :class:`FakeDevice`, and :func:`overlapped` runs steps in the order of
SGLang's ``event_loop_overlap``. It cannot see: work inside graphs and C++ extensions, which element of a buffer is
meant, and ordering by means other than streams and events. A Triton kernel reads and writes all its operands.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor

from tests.cuda_lab.fake_device import FakeDevice, caller, is_view
from tests.cuda_lab.fake_torch import Event, Stream

HOST = "host"
Clock = dict[Any, int]


class Fault(NamedTuple):
    """An order that nothing guarantees."""

    kind: str
    #: Where it was found, and the access that it collides with.
    where: str
    other: str

    def __str__(self) -> str:
        return f"{self.kind} {self.where} against {self.other}"


class Use(NamedTuple):
    """An access of a stream: its ``tick``-th piece of work."""

    stream: Any
    tick: int
    where: str


class Memory:
    """What is known of one allocation."""

    def __init__(self, home: Any) -> None:
        #: Stream whose allocator it came from; None: host memory.
        self.home = home
        self.writer: Use | None = None
        self.readers: dict[Any, Use] = {}
        #: Streams that the allocator waits for.
        self.recorded: set[Any] = set()


class Order:
    """Clocks of all streams and of the host, and the faults so far."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.clocks: dict[Any, Clock] = {HOST: {}}

    def clock(self, stream: Any) -> Clock:
        """What a stream, or the host, knows to be over."""
        return self.clocks.setdefault(stream, {})

    def knows(self, who: Any, use: Use) -> bool:
        """Whether a use is over whenever ``who`` does its next piece of work."""
        return who == use.stream or self.clock(who).get(use.stream, 0) >= use.tick

    def merge(self, who: Any, known: Clock) -> None:
        """``who`` has waited for a moment."""
        own = self.clock(who)
        for stream, tick in known.items():
            own[stream] = max(own.get(stream, 0), tick)

    def moment(self, stream: Any) -> Clock:
        """What is over when a stream has come as far as it was told to go."""
        return dict(self.clock(stream))

    def launch(self, stream: Any, reads: list[Memory], writes: list[Memory], where: str) -> None:
        """The host launches a piece of work."""
        self.merge(stream, self.clock(HOST))
        clock = self.clock(stream)
        clock[stream] = clock.get(stream, 0) + 1
        use = Use(stream, clock[stream], where)
        for memory in reads:
            if memory.writer is not None and not self.knows(stream, memory.writer):
                self.faults.append(Fault("early", where, memory.writer.where))
            memory.readers[stream] = use
        for memory in writes:
            for other in (*memory.readers.values(), *filter(None, [memory.writer])):
                if not self.knows(stream, other):
                    self.faults.append(Fault("overwritten", where, other.where))
            memory.writer, memory.readers = use, {}

    def host(self, memory: Memory, where: str, *, writes: bool = False) -> None:
        """The host reads or writes memory that the device may use."""
        uses = [*filter(None, [memory.writer])]
        uses += memory.readers.values() if writes else ()
        for use in uses:
            if not self.knows(HOST, use):
                self.faults.append(Fault("host", where, use.where))

    def freed(self, memory: Memory) -> None:
        """Nobody refers to device memory any more."""
        for use in (*memory.readers.values(), *filter(None, [memory.writer])):
            if use.stream in (memory.home, *memory.recorded):
                continue
            if not self.knows(memory.home, use) and not self.knows(HOST, use):
                self.faults.append(Fault("freed", use.where, "its stream's allocator"))


# --- on a fake device ---------------------------------------------------------------------------------


class Observer:
    """Tells an :class:`Order` what a :class:`FakeDevice` is asked for."""

    def __init__(self, device: FakeDevice) -> None:
        self.device, self.order = device, Order()
        self._memory: dict[int, Memory] = {}
        self._views: Counter[int] = Counter()
        #: Replays of graphs by the memory they write.
        self._generation: dict[int, int] = {}

    @property
    def faults(self) -> list[Fault]:
        """What was found."""
        return self.order.faults

    def memory(self, tensor: torch.Tensor) -> Memory:
        """The allocation a tensor is in."""
        name = tensor.untyped_storage()._cdata
        if name not in self._memory:
            on_device = isinstance(tensor, FakeTensor)
            self._memory[name] = Memory(self.device.stream.number if on_device else None)
        if not getattr(tensor, "_lab_seen", False):
            tensor._lab_seen = True  # type: ignore[attr-defined]
            self._views[name] += 1
            weakref.finalize(tensor, self._dropped, name)
        return self._memory[name]

    def _dropped(self, name: int) -> None:
        self._views[name] -= 1
        if not self._views[name]:
            memory = self._memory.pop(name, None)
            self._generation.pop(name, None)
            if memory is not None and memory.home is not None:
                self.order.freed(memory)

    def operation(self, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        """An operation was launched on the current stream."""
        leaves = torch.utils._pytree.tree_leaves
        if is_view(func) or func.namespace == "prim":
            for view in leaves(made):
                if isinstance(view, torch.Tensor) and args and isinstance(args[0], torch.Tensor):
                    self.memory(view)
                    view._lab_generation = getattr(args[0], "_lab_generation", None)  # type: ignore[attr-defined]
            return
        written = {
            id(value)
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        given = [x for x in leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        results = [x for x in leaves(made) if isinstance(x, torch.Tensor)]
        reads = [x for x in given if id(x) not in written]
        self.work(reads, [x for x in given if id(x) in written] + results)

    def work(self, reads: list[Any], writes: list[Any], where: str | None = None) -> None:
        """Work on the current stream reads and writes some tensors."""
        where = where or caller(3)
        for tensor in reads:
            known = getattr(tensor, "_lab_generation", None)
            name = tensor.untyped_storage()._cdata
            if known is not None and known != self._generation.get(name):
                self.order.faults.append(Fault("stale", where, "a replay since"))
        self.order.launch(
            self.device.stream.number,
            [self.memory(x) for x in reads],
            [self.memory(x) for x in writes],
            where,
        )

    def replayed(self, *outputs: torch.Tensor) -> None:
        """A graph was replayed: its outputs are written, earlier views of them are of another step."""
        for tensor in outputs:
            name = tensor.untyped_storage()._cdata
            self._generation[name] = self._generation.get(name, 0) + 1
            tensor._lab_generation = self._generation[name]  # type: ignore[attr-defined]
        self.work([], list(outputs))

    def host(self, tensor: torch.Tensor, *, writes: bool = False) -> None:
        """The host reads or writes a host tensor."""
        memory = self._memory.get(tensor.untyped_storage()._cdata)
        if memory is not None:
            self.order.host(memory, caller(3), writes=writes)


@contextlib.contextmanager
def observe(device: FakeDevice) -> Iterator[Observer]:
    """Attach clocks to a device, inside whose mode this is entered."""
    seen = Observer(device)
    order = seen.order
    launched, copied, moved = device._launched, device._copied, device._moved

    def wait_stream(stream: Stream, other: Stream) -> None:
        order.merge(stream.number, order.moment(other.number))

    def record(event: Event, stream: Stream | None = None) -> None:
        event.recorded, event.step = True, device.step
        event.moment = order.moment((stream or device.stream).number)  # type: ignore[attr-defined]

    def wait_event(stream: Stream, event: Event) -> None:
        order.merge(stream.number, getattr(event, "moment", {}))

    def event_wait(event: Event, stream: Stream | None = None) -> None:
        wait_event(stream or device.stream, event)

    def query(event: Event) -> bool:
        over = not event.recorded or device.step - event.step >= 2
        if over:
            order.merge(HOST, getattr(event, "moment", {}))
        return over

    def synchronize(event: Event) -> None:
        order.merge(HOST, getattr(event, "moment", {}))

    def drain(stream: Stream) -> None:
        order.merge(HOST, order.moment(stream.number))

    def record_stream(tensor: torch.Tensor, stream: Stream) -> None:
        seen.memory(tensor).recorded.add(stream.number)

    def on_launch(func: Any, name: str, args: Any, kwargs: Any) -> Any:
        made = launched(func, name, args, kwargs)
        seen.operation(func, args, kwargs, made)
        return made

    def on_copy(into: torch.Tensor, source: torch.Tensor, free: bool) -> torch.Tensor:
        if not isinstance(into, FakeTensor):
            seen.host(into, writes=True)
        made = copied(into, source, free)
        seen.work([source], [into])
        if not free:
            order.merge(HOST, order.moment(device.stream.number))
        return made

    def on_move(func: Any, source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        if source.device.type == torch.device(kwargs["device"]).type:
            return moved(func, source, kwargs)
        made = moved(func, source, kwargs)
        seen.work([source], [made])
        if not kwargs.get("non_blocking"):
            order.merge(HOST, order.moment(device.stream.number))
        return made

    read = {name: getattr(torch.Tensor, name) for name in ("numpy", "tolist", "item")}

    def reading(name: str) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(tensor, FakeTensor):
                seen.host(tensor)
            return read[name](tensor, *args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for owner, name, made in (
            (Stream, "wait_stream", wait_stream), (Stream, "wait_event", wait_event),
            (Stream, "synchronize", drain), (Event, "record", record), (Event, "wait", event_wait),
            (Event, "query", query), (Event, "synchronize", synchronize),
            (device, "_launched", on_launch), (device, "_copied", on_copy),
            (device, "_moved", on_move), (device, "replayed", seen.replayed),
            (device, "operands", lambda given: seen.work(given, given)), (torch.Tensor, "record_stream", record_stream),
            *((torch.Tensor, name, reading(name)) for name in read),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, made))
        yield seen


def overlapped(world: Any, seen: Observer, *, kind: Any, requests: int, steps: int) -> None:
    """Run steps as ``event_loop_overlap`` does: a step is launched while the one before it still runs.

    The scheduler's stream makes a batch, the forward stream waits for it and runs the step; results of the step
    before are read when its copy is done. Batches are kept for two steps, as SGLang keeps them.
    """
    from tests.cuda_lab import steps as stepping

    device = world.device
    forward = torch.cuda.Stream()
    kept: list[Any] = []
    last: tuple[Any, Any] | None = None
    for _ in range(steps):
        given = stepping.batch(world, kind, requests)
        forward.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(forward):
            result = stepping.run(world, given)
            tokens = torch.empty(result.next_token_ids.shape, dtype=torch.int64, pin_memory=True)
            tokens.copy_(result.next_token_ids, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        kept = [*kept[-1:], (given, result)]
        if last is not None:
            last[1].synchronize()
            last[0].tolist()
        last = (tokens, done)
    if last is not None:
        last[1].synchronize()  # before the last batches are dropped
    assert device is seen.device
