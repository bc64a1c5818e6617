"""Published V4 weights as this platform serves them: dequantised one by one while they are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.v4.quantised import dequantise_fp4, dequantise_fp8

_SCALE, _WEIGHT = ".scale", ".weight"


def dequantised(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a checkpoint, bfloat16 where they were fp8 or fp4 (exact), without scales.

    Raises:
        CheckpointError: a quantised weight without its scale, or a scale without its weight.
    """
    waiting: dict[str, torch.Tensor] = {}
    for name, value in weights:
        stem, kind = name.rpartition(".")[0], name[name.rfind(".") :]
        if kind not in (_SCALE, _WEIGHT) or (kind == _WEIGHT and value.element_size() > 1):
            yield name, value
            continue
        other = stem + (_SCALE if kind == _WEIGHT else _WEIGHT)
        if other not in waiting:
            waiting[name] = value
            continue
        found = waiting.pop(other)
        weight, scale = (value, found) if kind == _WEIGHT else (found, value)
        form = dequantise_fp8 if weight.dtype == torch.float8_e4m3fn else dequantise_fp4
        yield stem + _WEIGHT, form(weight, scale, torch.bfloat16)
    if waiting:
        name = min(waiting)
        lacks = "weight" if name.endswith(_SCALE) else "scale"
        raise CheckpointError(
            f"{name} has no {lacks}.",
            expected="a weight and a scale of everything that is quantised",
            fix="Download the checkpoint again; it is incomplete.",
        )
