"""Which implementation of the operations a server runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dspark_sglang.errors import CompatibilityError
from dspark_sglang.serving.ops import choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("kernels", "device", "wanted"),
    [
        ("auto", CPU, "torch"),
        ("auto", CUDA, "triton"),
        ("torch", CUDA, "torch"),
        ("torch", CPU, "torch"),
        ("triton", CUDA, "triton"),
    ],
)
def test_the_device_decides_unless_told(kernels: str, device: torch.device, wanted: str) -> None:
    assert choose.resolve(kernels, device) == wanted  # type: ignore[arg-type]


def test_kernels_on_a_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(CompatibilityError) as caught:
        choose.resolve("triton", CPU)
    assert "TRITON_INTERPRET=1" in caught.value.fix


def test_without_triton_the_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: None)
    assert choose.resolve("auto", CPU) == "torch"
    with pytest.raises(CompatibilityError, match="Triton is not installed"):
        choose.resolve("auto", CUDA)


def test_torch_operations_import_no_triton() -> None:
    code = (
        "import sys; import torch; before = 'triton' in sys.modules; "
        "from dspark_sglang.serving.ops import choose, torch_ops; "
        "assert 'dspark_kernels' not in sys.modules; "
        "assert before or 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
