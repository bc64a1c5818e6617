"""Checks of operands on the host: they read shapes and dtypes, never values, so nothing syncs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dspark_kernels.support.errors import OperandError

#: Offsets inside one row are int32 in the kernels; rows are reached with int64 offsets.
MAX_ELEMENTS = 2**31 - 1


def operand(
    name: str,
    tensor: object,
    *,
    shape: Sequence[int | None],
    dtype: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device | None = None,
    contiguous: bool = True,
) -> None:
    """Refuse a tensor that the op would read wrongly.

    Args:
        name: the parameter's name, for the message.
        tensor: what was passed.
        shape: the expected sizes; None where any size is good.
        dtype: the expected dtype, or a tuple of the good ones.
        device: where the tensor must live; None: anywhere.
        contiguous: whether it must be contiguous.

    Raises:
        OperandError: not a tensor, or of the wrong dtype, shape, device or strides, or of more than
            2**31 - 1 elements.
    """
    if not isinstance(tensor, torch.Tensor):
        raise OperandError(
            f"{name} is a {type(tensor).__name__}.",
            expected="a torch.Tensor",
            fix=f"Pass {name} as a tensor on the device of the other operands.",
        )
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else dtype
    if tensor.dtype not in dtypes:
        raise OperandError(
            f"{name} has dtype {_bare(tensor.dtype)}.",
            expected=" or ".join(_bare(good) for good in dtypes),
            fix=f"Convert it once outside the loop: {name}.to(torch.{_bare(dtypes[0])}).",
        )
    fits = tensor.dim() == len(shape) and all(
        size in (None, found) for size, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise OperandError(
            f"{name} has shape {list(tensor.shape)}.",
            expected="[" + ", ".join("any" if s is None else str(s) for s in shape) + "]",
            fix=f"Check {name} against the sizes of the other operands.",
        )
    if device is not None and tensor.device != device:
        raise OperandError(
            f"{name} is on {tensor.device}.",
            expected=f"{device}, where the other operands are",
            fix=f"Move it once outside the loop: {name}.to({str(device)!r}).",
        )
    if tensor.numel() > MAX_ELEMENTS:
        raise OperandError(
            f"{name} has {tensor.numel()} elements.",
            expected=f"at most {MAX_ELEMENTS}",
            fix="Split the batch.",
        )
    if contiguous and not tensor.is_contiguous():
        raise OperandError(
            f"{name} has strides {list(tensor.stride())} for shape {list(tensor.shape)}.",
            expected="a contiguous tensor",
            fix=f"Call {name}.contiguous(), or allocate it contiguous to save the copy.",
        )


def _bare(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def in_units(strides: Sequence[int]) -> tuple[int, list[int]]:
    """Strides in units of 16 elements where all are multiples, else in elements; and the unit.

    A kernel is compiled for the unit, not for what the strides happen to be divisible by, and knows by it that rows
    are aligned. Strides of a contiguous tensor have one unit at every batch and depth.
    """
    unit = 1 if any(stride % 16 for stride in strides) else 16
    return unit, [stride // unit for stride in strides]
