"""Which implementation of the operations a server runs: decided once, at start."""

from __future__ import annotations

import importlib.util

import torch

from dspark_sglang.config import Kernels, Verification
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.errors import CompatibilityError
from dspark_sglang.serving.ops import Ops
from dspark_sglang.serving.ops.torch_ops import TorchOps
from dspark_sglang.serving.telemetry import Telemetry


def resolve(kernels: Kernels, device: torch.device) -> str:
    """``triton`` or ``torch``, for a device.

    Raises:
        CompatibilityError: the kernels were asked for where they cannot run.
    """
    if kernels == "torch" or (kernels == "auto" and device.type != "cuda"):
        return "torch"
    found = importlib.util.find_spec("triton") is not None
    if not found:
        raise CompatibilityError(
            "Triton is not installed.",
            expected="triton, which PyTorch for CUDA brings",
            fix="Install PyTorch for CUDA, or set DSPARK_KERNELS=torch.",
        )
    if device.type != "cuda":
        from dspark_kernels.support.backend import interpreting

        if not interpreting():
            raise CompatibilityError(
                f"DSPARK_KERNELS is triton and the device is {device}.",
                expected="CUDA, or Triton's interpreter",
                fix="Unset DSPARK_KERNELS, or set TRITON_INTERPRET=1 (slow, for tests).",
            )
        from dspark_kernels.support.rounding import round_as_a_gpu

        round_as_a_gpu()
    return "triton"


def make(
    kernels: Kernels,
    *,
    device: torch.device,
    markov: MarkovHead,
    confidence: ConfidenceHead,
    generator: torch.Generator,
    verification: Verification,
    telemetry: Telemetry,
) -> Ops:
    """The operations of a server; on CUDA the kernels are checked first.

    Raises:
        CompatibilityError: they cannot run here, or one disagrees with its reference.
    """
    given = {
        "markov": markov,
        "confidence": confidence,
        "generator": generator,
        "verification": verification,
        "telemetry": telemetry,
    }
    if resolve(kernels, device) == "torch":
        return TorchOps(**given)  # type: ignore[arg-type]
    from dspark_sglang.serving.ops.selfcheck import check_kernels
    from dspark_sglang.serving.ops.triton_ops import TritonOps

    check_kernels(device)
    return TritonOps(**given)  # type: ignore[arg-type]
