"""Weights laid out once for oneDNN's matrix kernels, in bfloat16 and float32.

``F.linear`` hands oneDNN (bfloat16) or MKL (float32) a plain weight and lets it choose a plan for that layout
at every call. A weight reordered into oneDNN's own blocked layout runs 1.5 to 2 times faster at the row
counts of decoding, and a forward of six rows costs what a forward of one row does: verification becomes
almost free. The packed copy stays beside the original, which loading and tied embeddings read.

oneDNN compiles a kernel for every number of rows it meets (about 1 MB each) and keeps 1,024 of them.
Prefills and ragged verification meet a new number at almost every step, so rows are padded to a few
numbers.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.unquant import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

logger = logging.getLogger(__name__)

#: Rows the layout is planned for: a verified block or a small decode batch.
_PLANNED_ROWS = 8
#: Packed copies may take this share of free memory; above it the plain layout stays.
_MEMORY_SHARE = 0.25
#: Rows up to which nothing is padded; most rows that are padded to multiples of so many; multiples beyond those.
_EXACT, _STEPS, _COARSE = 16, ((256, 16), (1024, 64)), 256


def padded_rows(rows: int) -> int:
    """The number of rows that a matrix of so many is padded to."""
    if rows <= _EXACT:
        return rows
    step = next((step for most, step in _STEPS if rows <= most), _COARSE)
    return -(-rows // step) * step


@functools.cache
def row_counts(most: int) -> npt.NDArray[np.int64]:
    """The numbers that :func:`padded_rows` gives for 1 to ``most`` rows, ascending."""
    return np.unique([padded_rows(rows) for rows in range(1, most + 1)])


def pad_index(rows: torch.Tensor) -> torch.Tensor:
    """Rows to read ``[N]``, the last one again and again up to :func:`padded_rows`."""
    missing = padded_rows(len(rows)) - len(rows)
    return torch.cat([rows, rows[-1:].expand(missing)]) if missing else rows


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN has matrix kernels for ``weight`` on this machine."""
    if weight.dtype is torch.float32:
        return bool(torch._C._has_mkldnn)
    return weight.dtype is torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` ``[out, in]`` in oneDNN's layout."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PLANNED_ROWS)
    return packed


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias`` with a weight packed by this module."""
    flat = x.reshape(-1, x.shape[-1])
    rows = len(flat)
    missing = padded_rows(rows) - rows
    if missing:
        flat = torch.nn.functional.pad(flat, (0, 0, 0, missing))
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(flat, packed, bias, "none", [], "")
    return result[:rows].view(*x.shape[:-1], -1)


class _Packed:
    """Shared by the two methods below: pack on load, fall back on other input types."""

    packed: torch.Tensor

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack (again) after SGLang loaded weights into ``layer``."""
        self.packed = pack(layer.weight)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.dtype is not layer.weight.dtype:
            return torch.nn.functional.linear(x.to(layer.weight.dtype), layer.weight, bias)
        return packed_linear(x, self.packed, bias)


class PackedLinearMethod(_Packed, UnquantizedLinearMethod):
    """SGLang's unquantised linear method over a packed weight."""


class PackedEmbeddingMethod(_Packed, UnquantizedEmbeddingMethod):
    """SGLang's unquantised embedding method whose use as LM head is packed."""


def pack_model(model: torch.nn.Module) -> int:
    """Pack every plain projection of ``model``; returns how many were packed.

    The embedding is packed only where it serves as LM head.
    """
    chosen: list[tuple[Any, type[_Packed]]] = []
    for module in model.modules():
        method = type(getattr(module, "quant_method", None))
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2 or not can_pack(weight):
            continue
        if isinstance(module, LinearBase) and method is UnquantizedLinearMethod:
            chosen.append((module, PackedLinearMethod))
        elif (
            isinstance(module, VocabParallelEmbedding)
            and method is UnquantizedEmbeddingMethod
            and module is getattr(model, "lm_head", None)
        ):
            chosen.append((module, PackedEmbeddingMethod))
    needed = sum(module.weight.nbytes for module, _ in chosen)
    if needed > psutil.virtual_memory().available * _MEMORY_SHARE:
        logger.warning(
            "Weights stay unpacked: packing needs %.1f GiB, more than a quarter of free memory.",
            needed / 2**30,
        )
        return 0
    for module, kind in chosen:
        packed = kind()
        packed.process_weights_after_loading(module)
        module.quant_method = packed
    return len(chosen)


def is_packed(model: torch.nn.Module) -> bool:
    """Whether projections of ``model`` are packed: its forwards run with padded rows."""
    return any(isinstance(getattr(m, "quant_method", None), _Packed) for m in model.modules())
