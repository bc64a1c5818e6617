"""Times on a CUDA device. Runs in a child process of :mod:`benchmarks.kernels`.

An op is timed only after its result was compared with its reference on the same operands.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from benchmarks import report
from benchmarks import round as rounds

#: Repeats of each; the median is reported.
WARMUP, REPEATS = 10, 50
#: Largest error of a result in bfloat16, of magnitude up to 8, that is timed.
MAX_ERROR = 0.1
#: Written between repeats, so that nothing is found in the 50 MB of an H100's cache.
_FLUSH_BYTES = 256 << 20


class _Made(TorchFunctionMode):
    """Moves what is made on the CPU to a device.

    Examples draw their operands from a CPU generator, so that they are the same everywhere.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = isinstance(result, torch.Tensor) and result.device.type == "cpu"
        # Asked for: ``.cpu()``, ``.to("cpu")`` of something on the device stays where it was put.
        asked = any(isinstance(a, torch.Tensor) and a.device == self._device for a in args)
        return result.to(self._device) if made and not asked else result


def times(*keys: str) -> Iterator[dict[str, Any]]:
    """Median microseconds of a call at batch 64.

    Args:
        keys: ``op/configuration``, or the name of a part of a round.

    Raises:
        RuntimeError: a result is not the reference's.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    for key in keys:
        op, _, name = key.partition("/")
        run = _case(op, name, device) if name else _part(key, device)
        yield {"key": key, "us": round(median_us(run), 2)}


def _case(op: str, name: str, device: torch.device) -> Callable[[], Any]:
    bench = report.bench(op)
    case = next(case for case in bench.cases() if case.name == name)
    with _Made(device):
        example = bench.example(case, rounds.BATCH)
        # Raises where decisions differ.
        error = example.max_error(example.run())
    if not error <= MAX_ERROR:
        raise RuntimeError(
            f"{op}, {name}: largest error {error} against the reference. Expected: at most "
            f"{MAX_ERROR}. Run pytest tests/kernels/test_{op}.py on this machine."
        )
    return example.run


def _part(name: str, device: torch.device) -> Callable[[], Any]:
    call = rounds.PARTS[name].make(rounds.Sizes(), rounds.BATCH, rounds.VOCABULARY, device)
    call.check(call.run())
    return call.run


def median_us(run: Callable[[], Any]) -> float:
    """Median of :data:`REPEATS` calls between CUDA events, caches flushed before each."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(WARMUP):
        run()
    spent: list[float] = []
    for _ in range(REPEATS):
        flush.zero_()
        began: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        ended: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        began.record()
        run()
        ended.record()
        torch.cuda.synchronize()
        spent.append(began.elapsed_time(ended) * 1e3)
    return statistics.median(spent)
