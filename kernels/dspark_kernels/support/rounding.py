"""Triton's interpreter, made to round as a GPU does.

The interpreter of Triton 3.8 cuts float32 off when it becomes bfloat16; a GPU rounds to nearest,
ties to even. A result would differ by a unit in the last place, and a decision that hangs on a
rounded value could come out the other way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float


def round_as_a_gpu() -> None:
    """Make this process's interpreter round float32 to bfloat16 to nearest, ties to even.

    Lasting, and without effect on compiled kernels. Calling it again changes nothing.
    """
    interpreter._convert_float = _rounded


def _rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
    """What :func:`interpreter._convert_float` returns: the bits of ``values`` as ``target``."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert(values, source, target, mode)
    exact = torch.from_numpy(values.astype("float32", order="C", copy=True))
    return exact.bfloat16().view(torch.int16).numpy().view("uint16")
