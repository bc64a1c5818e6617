"""What ops are measured on: a module for each, whose ``CASES`` are the configurations served.

What a call launches is seen where it is compiled (:mod:`benchmarks.aot`) and counted
(:mod:`benchmarks.traffic`). A case says only what cannot be seen: operands, the right result, the floor.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils._pytree import tree_map_only

T = TypeVar("T")
CPU = torch.device("cpu")
#: Tokens of a listed law, and successors of a token, as serving has them.
LISTED = 128
FLOATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Example(NamedTuple):
    """One call on fixed operands."""

    #: Calls the public function with ``backend="triton"`` and does nothing else: loads and stores are counted.
    run: Callable[[], Any]
    #: Largest absolute error of a result against the reference in float64; 0 for decisions, which must be
    #: equal: raises where they are not.
    max_error: Callable[[Any], float]
    #: Tensors that kernels reach through a table of addresses, by the name to count them under.
    reached: Mapping[str, torch.Tensor] = {}


class Case(ABC):
    """One configuration: every size apart from the batch."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Readable id."""

    @abstractmethod
    def floor_bytes(self, batch: int) -> int:
        """Each needed input read once, each output written once."""

    @abstractmethod
    def example(self, batch: int, device: torch.device = CPU) -> Example:
        """Operands from a fixed seed. What moves is linear in the batch."""

    @property
    def compiled_batch(self) -> int:
        """Requests of the call that is compiled: no multiple of 16, which Triton would specialize for."""
        return 63


def names() -> list[str]:
    """The ops: the modules of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def cases(op: str) -> tuple[Case, ...]:
    """The configurations of an op."""
    found: tuple[Case, ...] = importlib.import_module(f"{__name__}.{op}").CASES
    return found


def on(device: torch.device, operands: T) -> T:
    """Operands, nested in any way, moved: they are drawn on the CPU, so that they are the same everywhere."""
    moved: T = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), operands)
    return moved


def check_equal(found: tuple[Any, ...], wanted: tuple[Any, ...], what: str) -> None:
    """Raise ArithmeticError where decisions of a batch are not the reference's, of which one row does for all."""
    for mine, theirs in zip(found, wanted, strict=True):
        if not torch.equal(mine, theirs.to(mine.dtype).expand_as(mine)):
            raise ArithmeticError(f"{what}: {found} where the reference has {wanted}.")
