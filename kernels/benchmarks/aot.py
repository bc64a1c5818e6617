"""Ahead-of-time compilation for Hopper, on any machine: what the kernels of a call would take on the GPU.

The call is made on CPU tensors. Triton specializes every launch by its arguments and compiles it as it would
on an H100; nothing runs. So what is compiled is what is launched.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dspark_kernels.support import backend

_run = JITFunction.run


class Resources(NamedTuple):
    """What one compiled kernel takes."""

    kernel: str
    warps: int
    #: Registers a thread.
    registers: int
    #: Bytes a thread spilled to local memory, stores and loads together.
    spills: int
    #: Bytes of stack a thread; local arrays and spills both land here.
    stack: int
    #: Bytes of shared memory a program.
    shared_bytes: int


class _Hopper:
    """As much of a driver as compiling needs."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_sm90(call: Callable[[], object]) -> list[Resources]:
    """What each kernel that ``call`` launches takes, in order of the launches.

    Args:
        call: calls an op with ``backend="triton"`` on CPU tensors, or warms a kernel up on types
            (``kernel.warmup``). Its outputs are left as they are.

    Raises:
        RuntimeError: called in the interpreter, where there is nothing to compile.
    """
    if backend.interpreting():
        raise RuntimeError(
            "TRITON_INTERPRET is set: kernels cannot be compiled in this process. Expected: the "
            "variable unset. Compile in a process started without it."
        )
    compiled = []

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(_run(kernel, *args, grid=grid, warmup=True, **options))

    with (
        patch.object(triton.runtime.driver, "_active", _Hopper()),
        patch.object(JITFunction, "run", compile_only),
        # An op refuses CPU tensors where kernels are not interpreted.
        patch.object(backend, "interpreting", lambda: True),
    ):
        call()
    known = {id(kernel): _resources(kernel) for kernel in compiled}
    return [known[id(kernel)] for kernel in compiled]


def _resources(compiled: Any) -> Resources:
    """From what ``ptxas -v`` says."""
    ptxas = triton.knobs.nvidia.ptxas.path
    said = subprocess.run(
        [ptxas, "-v", "--gpu-name=sm_90a", "-", "-o", "/dev/null"],
        input=compiled.asm["ptx"],
        check=True,
        capture_output=True,
        text=True,
    ).stderr

    def total(pattern: str) -> int:
        found = re.findall(pattern, said)
        if not found:
            raise RuntimeError(f"ptxas -v says nothing like {pattern!r}: {said.strip()}")
        return sum(map(int, found))

    return Resources(
        kernel=compiled.name,
        warps=compiled.metadata.num_warps,
        registers=total(r"Used (\d+) registers"),
        spills=total(r"(\d+) bytes spill (?:stores|loads)"),
        stack=total(r"(\d+) bytes stack frame"),
        shared_bytes=compiled.metadata.shared,
    )
