"""Every configuration of every op compiles for Hopper and spills nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from benchmarks import ops
from benchmarks.aot import Resources, compile_sm90

CASES = [(op, case) for op in ops.names() for case in ops.cases(op)]


def kind(op: str, case: ops.Case) -> str:
    """A configuration without its vocabulary, batch and block length, which choose no other code."""
    return f"{op}-" + re.sub(r"(^|-)(V|R|gamma)\d+", "", case.name)


#: The last of each kind; the others are slow.
LAST = {kind(op, case): case.name for op, case in CASES}
#: The test that configurations are compiled for.
ASKING = "test_a_configuration_compiles_without_spills"

#: 32-bit registers of a multiprocessor, and the shared memory that one program may take of it.
REGISTERS = 64 * 1024
SHARED = 227 * 1024


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, compiling_python: Callable[[str], str]
) -> dict[str, dict[str, list[list[Any]]]]:
    """Resources by op and configuration that is asked for, from processes that compile, two at a time."""
    asked: dict[str, list[str]] = {op: [] for op in ops.names()}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.originalname == ASKING:
            asked[item.callspec.params["op"]].append(item.callspec.params["case"].name)

    def compile_op(op: str) -> Any:
        code = (
            "import json; from benchmarks import measure; "
            f"print(json.dumps(measure.compile_op({op!r}, {asked[op]!r})))"
        )
        return json.loads(compiling_python(code).splitlines()[-1])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ops.names(), pool.map(compile_op, ops.names()), strict=True))


def test_every_op_has_a_bench() -> None:
    assert {"accept", "admit", "confidence", "kv_inject", "markov_step", "penalise", "step"} <= set(
        ops.names()
    )


@pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(
            op, case, id=f"{op}-{case.name}",
            marks=[] if LAST[kind(op, case)] == case.name else [pytest.mark.slow],
        )
        for op, case in CASES
    ],
)  # fmt: skip
def test_a_configuration_compiles_without_spills(
    op: str, case: ops.Case, compiled: dict[str, dict[str, list[list[Any]]]]
) -> None:
    for found in compiled[op][case.name]:
        kernel = Resources(*found)
        assert (kernel.spills, kernel.stack) == (0, 0)
        # The program can start at all.
        assert 0 < kernel.registers * 32 * kernel.warps <= REGISTERS
        assert kernel.shared_bytes <= SHARED


def test_spills_are_seen(compiling_python: Callable[[str], str]) -> None:
    """The measurement itself: a kernel that needs more registers than a thread has."""
    code = """
import tempfile, pathlib, sys, importlib, torch
source = '''
import triton
import triton.language as tl

@triton.jit
def greedy(x, out, BLOCK: tl.constexpr):
    values = tl.load(x + tl.arange(0, BLOCK))
    tl.store(out + tl.arange(0, BLOCK), values / tl.sum(values))
'''
with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, "greedy_kernel.py").write_text(source)
    sys.path.insert(0, folder)
    kernel = importlib.import_module("greedy_kernel").greedy
    from benchmarks.aot import compile_sm90
    types = (torch.float32, torch.float32, 16384)
    (found,) = compile_sm90(lambda: kernel.warmup(*types, grid=(1,), num_warps=1))
    print(found.spills)
"""
    assert int(compiling_python(code)) > 0


def test_the_interpreter_cannot_compile() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        compile_sm90(lambda: None)
