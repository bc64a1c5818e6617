"""Which compiled variants of our kernels a server asks Triton for, at start and under load.

Triton compiles a kernel for each combination of dtypes, of integers that are 1 or multiples of 16, of pointers that
are multiples of 16, and of constants. A combination that start-up has not seen stops the scheduler for seconds. Here
a driver that claims a Hopper GPU makes Triton compute its real cache keys on a CPU; nothing is compiled, and operands
are fake tensors with real shapes, strides and alignments.

The load: :func:`load` draws 100,000 steps of a server whose requests come and go. A key depends on an integer only
through the two properties above, so steps are reduced to representatives with the same properties before the
operations of a step are called for each (:func:`classes`).

It cannot see: kernels of SGLang, compile times, and operands that serving would lay out in another way than
:func:`step` does. Run in a process without Triton's interpreter: ``python -m tests.cuda_lab.specialisations``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from dspark_sglang.core.penalties import OutputCounts, Penalties, Terms
from dspark_sglang.core.sts import BINS
from dspark_sglang.serving.ops import rehearsal
from tests.cuda_lab.fake_device import FakeDevice
from tests.cuda_lab.fake_torch import CUDA

VOCABULARY, HIDDEN, RANK, GAMMA = 151_936, 4096, 256, 7
LAYERS, HEADS, HEAD = 5, 8, 128
MOST, STEPS = 64, 100_000
KINDS = ("greedy", "sampled", "filtered", "seeded")


class Hopper:
    """A driver that says there is an H100, for keys alone."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Key(NamedTuple):
    """One compiled variant."""

    kernel: str
    #: Triton's cache key.
    key: str


class Keys:
    """Variants in the order in which they were asked for."""

    def __init__(self) -> None:
        self.seen: dict[Key, int] = {}

    @contextlib.contextmanager
    def recorded(self) -> Iterator[Keys]:
        """Record what is launched, or compiled by ``warmup``; inside a :class:`FakeDevice`."""

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
            key = Key(kernel.fn.__name__, key_of(kernel, args, kwargs))
            self.seen[key] = self.seen.get(key, 0) + 1

        with (
            mock.patch.object(driver, "_active", Hopper()),
            mock.patch.object(jit.JITFunction, "run", run),
        ):
            yield self


def key_of(kernel: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> str:
    """The cache key of a launch, as ``JITFunction.run`` makes it."""
    options = dict(kwargs)
    options["debug"] = options.get("debug", kernel.debug) or triton.knobs.runtime.debug
    options["instrumentation_mode"] = triton.knobs.compilation.instrumentation_mode
    binder = kernel.create_binder()[-1] if not hasattr(kernel, "_lab") else kernel._lab
    kernel._lab = binder
    _, specialization, chosen = binder(*args, **options)
    return str(jit.compute_cache_key({}, specialization, chosen))


# --- a server's steps --------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What the arguments of a step's kernels depend on."""

    requests: int
    depth: int
    kind: str
    #: Rows verified.
    rows: int


def load(steps: int = STEPS, seed: int = 1) -> Iterator[Shape]:
    """Steps of a server whose requests come and go; one in ten does not draft."""
    rng = random.Random(seed)
    requests = 1
    mix = dict.fromkeys(KINDS, 0)
    for _ in range(steps):
        requests = min(MOST, max(1, requests + rng.choice((-3, -1, 0, 0, 0, 1, 3))))
        if rng.random() < 0.05:
            mix = {kind: rng.randrange(2) for kind in KINDS}
        kind = next((k for k in reversed(KINDS[:3]) if mix[k]), "greedy")
        if mix["seeded"] and not mix["filtered"]:
            kind = "seeded"
        depth = rng.randint(1, GAMMA) if rng.random() > 0.1 else 0
        yield Shape(requests, depth, kind, requests + rng.randint(0, requests * depth))


def alike(number: int) -> int:
    """The least number with the same remainder modulo 16 that is 1 exactly where ``number`` is."""
    if number == 1:
        return 1
    rest = number % 16
    return rest if rest > 1 else 16 + rest


def classes(shapes: Iterable[Shape]) -> list[Shape]:
    """One step for each combination that keys can tell apart.

    Products of requests and depth are multiples of 16 wherever those of the representatives are.
    """
    found: dict[tuple[int, int, str, bool], Shape] = {}
    for shape in shapes:
        requests = alike(shape.requests)
        # Odd numbers differ from each other in nothing, nor do the odd multiples of 2, 4 and 8.
        while requests not in (1, 2, 3, 4, 8, 16):
            requests = requests & -requests if requests % 2 == 0 else 3
        rows = 16 * requests if shape.rows % 16 == 0 else requests + 1
        key = (requests, shape.depth, shape.kind, rows % 16 == 0)
        found.setdefault(key, Shape(requests, shape.depth, shape.kind, rows))
    return list(found.values())


def operations(verification: Any = "rejection") -> Any:
    """The kernels' operations of a served drafter, inside a :class:`FakeDevice`."""
    from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
    from dspark_sglang.serving.ops import make, selfcheck
    from dspark_sglang.serving.telemetry import Telemetry

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=CUDA)

    # A kernel is compared with its reference at start. Values there are none, launches there are.
    with mock.patch.object(
        selfcheck, "_compare", lambda name, check, device: check(device, "triton")
    ):
        return make(
            "triton",
            device=CUDA,
            markov=MarkovHead(w1=empty(VOCABULARY, RANK), w2=empty(VOCABULARY, RANK)),
            confidence=ConfidenceHead(
                weight=empty(HIDDEN + RANK, dtype=torch.float32),
                bias=empty(1, dtype=torch.float32)[0],
                with_markov=True,
                temperatures=empty(GAMMA, dtype=torch.float32),
            ),
            generator=torch.Generator(device=CUDA),
            verification=verification,
            telemetry=Telemetry(gamma=GAMMA),
        )


def sampled(kind: str, requests: int, device: FakeDevice) -> Any:
    """``SampledRows`` of a batch, half of whose requests sample."""
    from dspark_sglang.serving.ops import SampledRows

    if kind == "greedy":
        return None
    count = max(1, requests // 2)
    filters = kind.endswith("filtered")
    return SampledRows(
        index=device.empty(count, dtype=torch.int64),
        temperatures=device.empty(count),
        top_k=device.empty(count, dtype=torch.int32) if filters else None,
        top_p=device.empty(count) if filters else None,
        min_p=device.empty(count) if kind == "min_p" else None,
        seeds=device.empty(count, dtype=torch.int64) if kind.startswith("seeded") else None,
    )


def step(ops: Any, write: Callable[..., None], device: FakeDevice, shape: Shape) -> None:
    """The operations of one step, on operands as serving lays them out."""
    from dspark_sglang.serving.ops import Verified

    requests, depth, kind, count = shape
    rows = sampled(kind, requests, device)
    width = GAMMA + 1
    anchors, lens = (device.empty(requests, dtype=torch.int64) for _ in range(2))
    places, slots = (device.empty(requests * width, dtype=torch.int64) for _ in range(2))
    if depth:
        hidden = device.empty(requests, GAMMA, HIDDEN, dtype=torch.bfloat16)[:, :depth]
        base = device.empty(requests, depth, VOCABULARY, dtype=torch.bfloat16)
        block = ops.draft(base, hidden, anchors, lens, rows, None)
        scores = ops.confidence(hidden, block.previous)
        known = device.empty(3, requests, dtype=torch.int64)
        shift, whole = device.empty(2, GAMMA, BINS), device.empty(GAMMA, dtype=torch.float64)
        confidence = torch.nn.functional.pad(scores, (0, GAMMA - depth))[0]
        survival = ops.step.survival(confidence, known, shift, whole)
        admitted = ops.admit_there(survival, count - requests)
    else:
        block, admitted = ops.nothing(rows, requests), ops.anchors(requests, CUDA)
    tokens = device.empty(requests, GAMMA, dtype=torch.int64)
    ids = device.empty(MOST, GAMMA, dtype=torch.int64)
    ops.step.window(admitted.rows, ids[:requests, 0], tokens, places, slots, rows=count + 3)
    outcome = ops.accept(
        Verified(
            logits=device.empty(count + 8, VOCABULARY)[:count],
            drafted=tokens[:, : max(1, depth)],
            rows=rows,
            probs=block.probs,
            support=block.support,
            lse=block.lse,
            lens=admitted.lens,
            first=admitted.first,
            anchors=lens,
        )
    )
    stops = device.empty(requests, 1 + count % 3, dtype=torch.int64) if count % 4 else None
    done = ops.step.finish(outcome, tokens, stops, admitted.lens, lens)
    ops.step.kept(admitted.rows, done.committed, slots, places)
    penalties = [Penalties(0.5, min_new_tokens=9, stop_tokens=(3, 4)[: count % 3])] * requests
    terms = Terms.of(penalties, range(requests), CUDA)
    counts = OutputCounts(VOCABULARY, CUDA)
    counts.begin({slot: [] for slot in range(requests)})
    block = device.empty(requests, width, dtype=torch.int64)
    rows_of = device.empty(count, dtype=torch.int64)
    ops.step.penalise(device.empty(count, VOCABULARY), counts, terms, rows_of, block)
    ops.step.extend(counts, terms, block, done.pair[1])
    write(device.empty(count, READ_WIDTH, dtype=torch.bfloat16))


READ_WIDTH = LAYERS * 2 * HEADS * HEAD


def writer(device: FakeDevice) -> Callable[..., None]:
    """Writes the draft's KV of projected rows, as ``KvWriter`` does after its two products."""
    from dspark_kernels.kv_inject import kv_inject, pools

    shape = (1024, HEADS, HEAD)
    made = [device.empty(*shape, dtype=torch.bfloat16) for _ in range(2 * LAYERS)]
    into = pools(made[:LAYERS], made[LAYERS:])
    gain, table = device.empty(LAYERS, HEAD), device.empty(4096, HEAD)

    def write(projected: torch.Tensor) -> None:
        both = projected.view(-1, LAYERS, 2, HEADS * HEAD)
        places, slots = (device.empty(len(both), dtype=torch.int64) for _ in range(2))
        kv_inject(
            both[:, :, 0], both[:, :, 1], places, slots, gain, table, into, eps=1e-6,
            backend="triton",
        )  # fmt: skip

    return write


SIZES = rehearsal.Sizes(
    gamma=GAMMA, hidden=HIDDEN, dtype=torch.bfloat16, columns=VOCABULARY, whole=VOCABULARY, requests=MOST, seeded=False, device=CUDA,
)  # fmt: skip


def base_of(device: FakeDevice) -> rehearsal.Base:
    """Base logits as the LM head gives them."""
    return lambda hidden: device.empty(len(hidden), VOCABULARY, dtype=torch.bfloat16)


class Found(NamedTuple):
    """Variants that start-up has asked for, and those that serving asked for after it."""

    started: list[Key]
    late: list[Key]


def enumerate_keys(shapes: Iterable[Shape]) -> Found:
    """Start the operations, then run the steps."""
    with torch.no_grad(), FakeDevice() as device:
        started, served = Keys(), Keys()
        with started.recorded():
            ops = operations()
            write = writer(device)
            for seeded in (False, True):  # a server has one of them
                rehearsal.rehearse(ops, SIZES._replace(seeded=seeded), base_of(device), None)
            write(device.empty(3, READ_WIDTH, dtype=torch.bfloat16))
        with served.recorded():
            for shape in shapes:
                step(ops, write, device, shape)
    return Found(list(started.seen), [key for key in served.seen if key not in started.seen])


#: A few steps of each kind, for every test run.
FEW = [
    Shape(requests, depth, kind, requests + 1)
    for requests in (1, 3, 16)
    for depth in (1, 7)
    for kind in ("greedy", "filtered")
]


def late_of_ranks(*, seeded: bool) -> list[str]:
    """Kernels that one of two ranks asks for after start."""
    from dspark_sglang.serving import worker
    from dspark_sglang.serving.ops import Verified
    from tests.cuda_lab.world import World

    chosen = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=seeded))
    started, served = Keys(), Keys()
    with torch.no_grad(), World(FakeDevice(), ours=True, ranks=2) as world:
        device, ops = world.device, world.worker._ops
        with mock.patch.object(worker, "get_exec", lambda: chosen), started.recorded():
            world.worker._compile_kernels()
        kinds = (
            ("seeded", "seeded-filtered") if seeded else ("greedy", "sampled", "filtered", "min_p")
        )
        with served.recorded():
            for kind, requests, depth in itertools.product(kinds, (1, 3, 16), (0, 3, GAMMA)):
                rows, lens = (
                    sampled(kind, requests, device),
                    device.empty(requests, dtype=torch.int64),
                )
                block, admitted = ops.nothing(rows, requests), ops.anchors(requests, CUDA)
                if depth:
                    hidden = device.empty(requests, GAMMA, HIDDEN, dtype=torch.bfloat16)[:, :depth]
                    base = device.empty(requests, depth, VOCABULARY // 2, dtype=torch.bfloat16)
                    block = ops.draft(base, hidden, lens, lens, rows, None)
                columns = VOCABULARY // (1 if kind == "seeded-filtered" else 2)
                drafted = device.empty(requests, GAMMA, dtype=torch.int64)[:, : max(1, depth)]
                ops.accept(
                    Verified(
                        device.empty(requests, columns), drafted, rows, block.probs, block.support,
                        block.lse, admitted.lens, admitted.first, lens,
                    )
                )  # fmt: skip
    return sorted(key.kernel for key in served.seen if key not in started.seen)


def report(found: Found) -> dict[str, Any]:
    """Counts by kernel, ready for JSON."""
    return {
        "started": dict(Counter(key.kernel for key in found.started)),
        "late": dict(Counter(key.kernel for key in found.late)),
        "late_specialisations": len(found.late),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", action="store_true")
    few = parser.parse_args().few
    print(json.dumps(report(enumerate_keys(FEW if few else classes(load())))))


if __name__ == "__main__":
    main()
