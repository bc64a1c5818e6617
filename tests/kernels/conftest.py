"""Kernels run in Triton's interpreter where there is no CUDA device.

Triton decides whether a kernel is interpreted when the module that holds it is imported, by
``TRITON_INTERPRET``. The variable is set while a test module of this folder is imported and while
its tests run, and at no other time: other folders start servers, which inherit the environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
_VARIABLE = "TRITON_INTERPRET"
COSTLY = frozenset(
    f"test_{name}"
    for name in (
        "accept_lawless", "accept_laws", "aot", "markov_step", "selfcheck", "served", "sharded_served",
        "shortlist_tail", "shortlist_tail_law", "support", "vocab_parallel_accept",
    )
)  # fmt: skip


@contextmanager
def _interpreter() -> Iterator[None]:
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before


def _interpret_what_is_imported() -> None:
    """Make kernels interpreted that were decorated before this folder was reached.

    ``tl.sum`` and its like are kernels of Triton's own, decorated when triton is imported; ours may
    have been imported by another folder's tests.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    replaced: dict[int, InterpretedFunction] = {}
    places = [module for name, module in sys.modules.items() if _holds_kernels(name)]
    for place in [*places, tl.tensor]:
        for name, value in list(vars(place).items()):
            if isinstance(value, JITFunction):
                made = replaced.setdefault(id(value), InterpretedFunction(value.fn))
                # A method has to be a plain function to receive the tensor it is called on.
                setattr(place, name, _method(made) if place is tl.tensor else made)


def _holds_kernels(module: str) -> bool:
    """Whether a module is ours, or part of Triton's language, device libraries left out."""
    ours = module.split(".")[0] in ("dspark_kernels", "benchmarks")
    return ours or (
        module.startswith("triton.language") and not module.startswith("triton.language.extra")
    )


def _method(function: Callable[..., object]) -> Callable[..., object]:
    def call(*args: object, **kwargs: object) -> object:
        return function(*args, **kwargs)

    return call


if INTERPRETED:
    with _interpreter():
        _interpret_what_is_imported()
        from dspark_kernels.support.interpreter import patch_once
        from dspark_kernels.support.rounding import round_as_a_gpu

        round_as_a_gpu()
        patch_once()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Import this folder's test modules, and so the kernels, with the interpreter on."""
    if not INTERPRETED:
        return (yield)
    with _interpreter():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Interpreted kernels of these files, and compiling all, take seconds a test."""
    for item in items:
        if INTERPRETED and item.path.parent == Path(__file__).parent and item.path.stem in COSTLY:
            item.add_marker(pytest.mark.costly)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setenv(_VARIABLE, "1")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels under test run: the GPU if there is one, else the interpreter's CPU."""
    return DEVICE


@pytest.fixture(scope="session")
def compiling_python() -> Callable[[str], str]:
    """Runs code in a new Python without the interpreter, where kernels compile; returns stdout."""

    def run(code: str) -> str:
        environment = {key: value for key, value in os.environ.items() if key != _VARIABLE}
        environment["PYTHONPATH"] = str(ROOT / "kernels")
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


class _NoSync(TorchDispatchMode):
    """Refuses torch operations whose result the host waits for, or whose shape depends on data."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.overloadpacket.__name__
        assert name not in self.WAITING, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_host_sync() -> Callable[[], AbstractContextManager[object]]:
    """A context in which no torch operation may wait for the device: what a graph capture needs."""
    return _NoSync


@pytest.fixture
def captured() -> Callable[[Callable[[], object]], Callable[[], None]]:
    """Captures a call in a CUDA graph, after a warm-up outside it; returns its replay."""

    def capture(call: Callable[[], object]) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return replay

    return capture
