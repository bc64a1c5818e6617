"""What every op costs: resources of its compiled kernels, and bytes counted against formula and floor.

A module of :mod:`benchmarks.ops` for each op implements this protocol, module-level names all of them:

- ``cases() -> list[Case]``: the configurations served. ``Case.name`` is a readable id
  (``"gamma5-V129280-bf16"``), ``Case.sizes`` every size apart from the batch, ``Case.builds`` one
  :class:`Build` for each kernel that the configuration launches, in order: they are compiled
  ahead of time, and their number is the number of launches of one call.
- ``floor_bytes(case, batch) -> int``: each needed input read once, each output written once.
- ``formula_bytes(case, batch) -> int``: what the kernels move by their own design.
- ``example(case, batch) -> Example``: operands on the CPU from a fixed seed. ``Example.run()``
  calls the public function with ``backend="triton"`` and returns its result; nothing else happens
  in it, since its loads and stores are counted. ``Example.max_error(result)`` is the largest
  absolute error of that result against the reference in float64 (0.0 for decisions, which must
  be equal: raise if they are not).

Bytes are counted in Triton's interpreter and kernels are compiled outside it, so :func:`summarise`
starts one process for each (:mod:`benchmarks.children`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch

import benchmarks.ops
from benchmarks import aot, traffic
from benchmarks.children import results
from dspark_kernels.support.rounding import round_as_a_gpu

#: Batches counted in the interpreter, and batches that a straight line through them gives.
COUNTED = (1, 4)
EXTRAPOLATED = (16, 64, 256)


class Build(NamedTuple):
    """One kernel of a configuration, as it is launched."""

    kernel: Any
    #: Triton type of every parameter that is no constant: ``*bf16``, ``i32``, ``fp32``.
    signature: Mapping[str, str]
    #: Value of every ``tl.constexpr`` parameter.
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    #: Integer parameters that are multiples of 16 in this configuration (row strides).
    aligned: tuple[str, ...] = ()


class Case(NamedTuple):
    """One configuration of an op."""

    name: str
    #: Every size apart from the batch: ``{"gamma": 5, "V": 129280}``.
    sizes: Mapping[str, int]
    builds: tuple[Build, ...]


class Example(NamedTuple):
    """One call of an op on fixed operands."""

    run: Callable[[], Any]
    max_error: Callable[[Any], float]
    #: Tensors that kernels reach through a table of addresses, by the name to count them under.
    reached: Mapping[str, torch.Tensor] | None = None


class Bench(Protocol):
    """A module of :mod:`benchmarks.ops`."""

    def cases(self) -> list[Case]:
        """The configurations served."""

    def floor_bytes(self, case: Case, batch: int) -> int:
        """Each needed input once, each output once."""

    def formula_bytes(self, case: Case, batch: int) -> int:
        """What the kernels move by their own design."""

    def example(self, case: Case, batch: int) -> Example:
        """Operands on the CPU, and how to run and check the op on them."""


def ops() -> list[str]:
    """Names of the ops: the modules of :mod:`benchmarks.ops`."""
    return sorted(module.name for module in pkgutil.iter_modules(benchmarks.ops.__path__))


def bench(op: str) -> Bench:
    """The module of an op."""
    module: Any = importlib.import_module(f"benchmarks.ops.{op}")
    return module  # type: ignore[no-any-return]


def compile_op(op: str) -> Iterator[tuple[str, list[dict[str, int]]]]:
    """Resources of every configuration of an op, one entry for each of its kernels in order.

    Raises:
        RuntimeError: called in the interpreter.
    """
    for case in bench(op).cases():
        yield (
            case.name,
            [
                aot.compile_sm90(
                    build.kernel,
                    signature=dict(build.signature),
                    constants=dict(build.constants),
                    num_warps=build.num_warps,
                    num_stages=build.num_stages,
                    aligned=build.aligned,
                )._asdict()
                for build in case.builds
            ],
        )


def count_op(op: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Bytes, launches and error of every configuration of an op, run in the interpreter.

    Raises:
        RuntimeError: called outside the interpreter, or a kernel reached outside its tensors.
    """
    round_as_a_gpu()
    module = bench(op)
    for case in module.cases():
        totals, errors, launches = {}, [], set()
        for batch in COUNTED:
            example = module.example(case, batch)
            kept: list[Any] = []
            # The closure runs before the loop goes on.
            counted = traffic.count(lambda e=example, k=kept: k.append(e.run()), example.reached)  # type: ignore[misc]
            if counted.outside:
                raise RuntimeError(
                    f"{op}, {case.name}, batch {batch}: {counted.outside} bytes were read or "
                    "written outside every operand. Expected: 0. Check the kernel's masks."
                )
            totals[batch] = counted.total
            launches.add(counted.launches)
            errors.append(example.max_error(kept[0]))
        yield (
            case.name,
            {
                "counted": totals,
                "launches": sorted(launches),
                "max_error": max(errors),
                "floor": {b: module.floor_bytes(case, b) for b in (*COUNTED, *EXTRAPOLATED)},
                "formula": {b: module.formula_bytes(case, b) for b in (*COUNTED, *EXTRAPOLATED)},
            },
        )


def extrapolate(counted: Mapping[int, int]) -> dict[int, int]:
    """The counted bytes of the batches in ``COUNTED`` and, on a line through them, of the others."""
    low, high = COUNTED
    slope, rest = divmod(counted[high] - counted[low], high - low)
    if rest:
        raise RuntimeError(
            f"Counted bytes {dict(counted)} are not linear in the batch. Expected: a whole number of "
            "bytes a row. Make the example's operands independent of the batch."
        )
    return {b: counted[low] + slope * (b - low) for b in (*COUNTED, *EXTRAPOLATED)}


def summarise(op: str) -> dict[str, dict[str, Any]]:
    """Every configuration of an op: resources, bytes, launches, error.

    Bytes are keyed by batch, as text, in the form JSON keeps. ``registers``, ``spills`` and
    ``shared_bytes`` are the largest of the configuration's kernels.

    Returns:
        ``{configuration: {"registers", "spills", "shared_bytes", "counted_bytes", "formula_bytes",
        "floor_bytes", "launches", "max_error"}}``.

    Raises:
        MeasurementError: a kernel does not compile or run.
        RuntimeError: its bytes are not linear in the batch.
    """
    compiled = dict(results(f"{__name__}.compile_op", op, interpret=False))
    counted = dict(results(f"{__name__}.count_op", op, interpret=True))
    return {name: _entry(op, name, compiled[name], counted[name]) for name in compiled}


def _entry(
    op: str, name: str, compiled: list[dict[str, int]], counted: dict[str, Any]
) -> dict[str, Any]:
    if counted["launches"] != [len(compiled)]:
        raise RuntimeError(
            f"{op}, {name}: {counted['launches']} launches at batches {COUNTED}, and "
            f"{len(compiled)} kernels compiled. Expected: one build for each launch. Correct "
            f"benchmarks/ops/{op}.py."
        )
    bytes_ = extrapolate({int(batch): total for batch, total in counted["counted"].items()})
    return {
        **{key: max(r[key] for r in compiled) for key in ("registers", "spills", "shared_bytes")},
        "counted_bytes": {str(batch): total for batch, total in bytes_.items()},
        "formula_bytes": counted["formula"],
        "floor_bytes": counted["floor"],
        "launches": len(compiled),
        "max_error": counted["max_error"],
    }
