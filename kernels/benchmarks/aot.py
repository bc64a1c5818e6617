"""Ahead-of-time compilation for Hopper, on any machine: what a kernel would take on the GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dspark_kernels.support.backend import interpreting


class Resources(NamedTuple):
    """What one compiled kernel takes."""

    #: Registers a thread.
    registers: int
    #: Bytes a thread spilled to local memory, stores and loads together (``ptxas -v``).
    spills: int
    #: Bytes of stack a thread; local arrays and spills both land here.
    stack: int
    #: Bytes of shared memory a program: static and dynamic.
    shared_bytes: int


def compile_sm90(
    kernel: Any,
    *,
    signature: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int = 3,
    aligned: Collection[str] = (),
) -> Resources:
    """Compile one configuration of a kernel for sm_90 and read what it takes from the cubin.

    Pointers are compiled as multiples of 16 bytes, which is what Triton does at launch for tensors
    of torch's allocator.

    Args:
        kernel: the ``@triton.jit`` function, decorated outside the interpreter.
        signature: Triton type of every parameter that is no constant: ``*bf16``, ``i32``, ``fp32``.
        constants: value of every ``tl.constexpr`` parameter.
        num_warps: warps a program.
        num_stages: depth of software pipelining.
        aligned: integer parameters that are multiples of 16 in this configuration (row strides).

    Raises:
        RuntimeError: called in the interpreter, where there is nothing to compile.
    """
    if interpreting():
        raise RuntimeError(
            "TRITON_INTERPRET is set: kernels cannot be compiled in this process. Expected: the "
            "variable unset. Compile in a process started without it."
        )
    types = {
        name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names
    }
    hinted = [
        name for name, kind in types.items() if kind.startswith("*") or name in frozenset(aligned)
    ]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in hinted}
    source = ASTSource(kernel, types, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    usage = _resource_usage(compiled.asm["cubin"])
    return Resources(
        registers=usage["REG"],
        spills=_spilled(compiled.asm["ptx"]),
        stack=max(usage["STACK"], usage["LOCAL"]),
        shared_bytes=max(usage["SHARED"], int(compiled.metadata.shared)),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """``cuobjdump -res-usage`` of the one function of a cubin."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        shown = subprocess.run(
            [tool, "-res-usage", str(path)], check=True, capture_output=True, text=True
        ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", shown)}


def _spilled(ptx: str) -> int:
    """Bytes of spill stores and loads that ``ptxas -v`` reports."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        shown = subprocess.run(
            [
                triton.knobs.nvidia.ptxas.path,
                "-v",
                "--gpu-name=sm_90a",
                str(path),
                "-o",
                str(Path(folder) / "kernel.o"),
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stderr
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", shown)
    if not found:
        raise RuntimeError(f"ptxas -v reported no spill counts. It said: {shown.strip()}")
    return sum(int(value) for value in found)
