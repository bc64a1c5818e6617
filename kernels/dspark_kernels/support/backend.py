"""Which implementation runs, and a count of what ran."""

from __future__ import annotations

from collections import Counter
from typing import Literal, get_args

import torch
import triton

from dspark_kernels.support.errors import OperandError

Backend = Literal["auto", "triton", "torch"]

#: Kernel launches of this process by name. Replays of a captured CUDA graph do not pass through
#: Python: they are counted once, at capture.
LAUNCHES: Counter[str] = Counter()


def launched(name: str) -> None:
    """Count one kernel launch; called right beside the launch.

    Args:
        name: the op, and the kernel where an op has several: ``accept`` or ``accept.combine``.
    """
    LAUNCHES[name] += 1


def interpreting() -> bool:
    """Whether Triton kernels decorated now run in its interpreter (``TRITON_INTERPRET=1``).

    Triton decides this for each kernel when the module that holds it is imported: set the variable
    before triton is imported.
    """
    return bool(triton.knobs.runtime.interpret)


def resolve(backend: Backend, tensor: torch.Tensor) -> Literal["triton", "torch"]:
    """The implementation to run on a tensor. Nothing falls back: what cannot run raises.

    Args:
        backend: ``auto`` is ``triton`` for CUDA tensors and ``torch`` (the reference) for CPU ones.
        tensor: an operand; only its device is looked at.

    Raises:
        OperandError: an unknown backend, a device no backend runs on, or ``triton`` for a CPU tensor
            outside Triton's interpreter.
    """
    if backend not in get_args(Backend):
        raise OperandError(
            f"The backend is {backend!r}.",
            expected="'auto', 'triton' or 'torch'",
            fix="Pass one of these.",
        )
    kind = tensor.device.type
    if kind not in ("cuda", "cpu"):
        raise OperandError(
            f"The operands are on {tensor.device}.",
            expected="a CUDA device or the CPU",
            fix="Move them to one of these.",
        )
    if backend == "auto":
        return "triton" if kind == "cuda" else "torch"
    if backend == "triton" and kind == "cpu" and not interpreting():
        raise OperandError(
            "The backend is 'triton' and the operands are on the CPU.",
            expected="CUDA operands, or Triton's interpreter",
            fix="Move the operands to a GPU, pass backend='torch', or set TRITON_INTERPRET=1 before "
            "triton is imported.",
        )
    return backend
