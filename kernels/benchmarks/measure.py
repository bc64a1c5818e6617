"""Kernels compiled, counted and timed: one at a time, each function in a process made for it (:mod:`benchmarks.kernels`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import triton

from benchmarks import ops, traffic
from benchmarks.aot import Resources, compile_sm90
from benchmarks.ops import Example
from dspark_kernels.support.interpreter import patch_once
from dspark_kernels.support.rounding import round_as_a_gpu

#: Batches counted in the interpreter, and batches on the line through them.
COUNTED = (1, 2)
EXTRAPOLATED = (4, 16, 64, 256)
#: Batch of times.
BATCH = 64
#: Largest error of a result in bfloat16, of magnitude up to 8, that is timed.
MAX_ERROR = 0.1


class Counted(NamedTuple):
    """What a call moves. Bytes are by batch."""

    #: By its Triton kernels, and by torch operations.
    kernels: dict[int, int]
    torch: dict[int, int]
    floor: dict[int, int]
    launches: int
    #: Torch operations that move anything.
    operations: int
    max_error: float


def compile_op(op: str, names: Collection[str] | None = None) -> dict[str, list[Resources]]:
    """Resources of every configuration of an op, one entry for each of its launches in order.

    Args:
        names: of configurations; None: all of them.

    Raises:
        RuntimeError: called in the interpreter.
    """
    return {
        case.name: compile_sm90(case.example(case.compiled_batch).run)
        for case in ops.cases(op)
        if names is None or case.name in names
    }


def count_op(op: str) -> dict[str, Counted]:
    """What every configuration of an op moves, in the interpreter.

    Raises:
        RuntimeError: called outside the interpreter, or see :func:`count`.
    """
    return {
        case.name: count(case.example)._replace(
            floor={batch: case.floor_bytes(batch) for batch in (*COUNTED, *EXTRAPOLATED)}
        )
        for case in ops.cases(op)
    }


def count_builtin(part: str) -> Counted:
    """What one of SGLang's parts moves, in the interpreter.

    Raises:
        RuntimeError: see :func:`count`.
    """
    from benchmarks import builtin

    return count(builtin.PARTS[part])


def count(make: Callable[[int], Example]) -> Counted:
    """Run and check a call at the batches of ``COUNTED``, and count what it moves.

    Raises:
        RuntimeError: a kernel reached outside its tensors, or bytes are not linear in the batch.
    """
    round_as_a_gpu()
    patch_once()
    seen: dict[int, traffic.Traffic] = {}
    errors = []
    for batch in COUNTED:
        example, results = make(batch), list[Any]()
        seen[batch] = traffic.count(
            lambda run=example.run, into=results: into.append(run()),  # type: ignore[misc]
            example.reached,
        )
        if seen[batch].outside:
            raise RuntimeError(
                f"At batch {batch} {seen[batch].outside} bytes were read or written outside every "
                "operand. Expected: 0. Check the kernel's masks."
            )
        errors.append(example.max_error(results[0]))
    last = seen[COUNTED[-1]]
    return Counted(
        kernels=extrapolate({batch: each.kernels for batch, each in seen.items()}),
        torch=extrapolate({batch: each.torch for batch, each in seen.items()}),
        floor={},
        launches=last.launches,
        operations=sum(last.operations.values()),
        max_error=max(errors),
    )


def extrapolate(counted: Mapping[int, int]) -> dict[int, int]:
    """Counted bytes of the batches in ``COUNTED`` and, on a line through them, of the others.

    Raises:
        RuntimeError: the line has no whole number of bytes a request.
    """
    low, high = COUNTED
    slope, rest = divmod(counted[high] - counted[low], high - low)
    if rest:
        raise RuntimeError(
            f"Counted bytes {dict(counted)} are not linear in the batch. Expected: a whole number of "
            "bytes a row. Make the example's operands independent of the batch."
        )
    return {b: counted[low] + slope * (b - low) for b in (*COUNTED, *EXTRAPOLATED)}


def times(names: Iterable[str], parts: Iterable[str]) -> dict[str, float]:
    """Median microseconds at batch 64 of a call on the CUDA device, caches flushed before each.

    Args:
        names: ops; each of their configurations is timed, by ``op/configuration``.
        parts: SGLang's, by their name.

    Raises:
        RuntimeError: a result is not the reference's.
    """
    made: dict[str, Callable[..., Example]] = {
        f"{op}/{case.name}": case.example for op in names for case in ops.cases(op)
    }
    if parts:
        from benchmarks import builtin

        made |= {part: builtin.PARTS[part] for part in parts}
    device = torch.device("cuda", torch.cuda.current_device())
    found = {}
    for key, make in made.items():
        example = make(BATCH, device)
        error = example.max_error(example.run())
        if not error <= MAX_ERROR:
            raise RuntimeError(
                f"{key}: largest error {error} against the reference. Expected: at most "
                f"{MAX_ERROR}. Run pytest tests/kernels on this machine."
            )
        spent = triton.testing.do_bench(example.run, return_mode="median")
        found[key] = round(1e3 * float(spent), 2)
    return found
