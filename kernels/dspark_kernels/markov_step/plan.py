"""Launch configurations: they depend on shapes, dtypes and the device's size only."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton

from dspark_kernels.markov_step import operands
from dspark_kernels.support.backend import interpreting

#: Multiprocessors assumed where there is no device to ask: an H100's.
HOPPER = 132
#: Part of a step's floor that programs may spend on reading latents and chunk results again.
OVERHEAD = 0.11
#: Batch the overhead is held to; grids do not depend on the batch, so a row's chunks never do.
BATCH = 64
#: ``select``: columns a program, and how many of them share a group whose maximum is looked at.
SPAN, GROUP = operands.SPAN, 8
#: Warps a program of ``scan``, ``select``, ``merge`` and ``chain``, and of the small kernels.
WARPS, SMALL_WARPS = 8, 4
#: Pipeline depth of ``scan``: two tiles of W2 in flight keep a multiprocessor's share of HBM busy.
STAGES = 2
#: Outputs and rows a program of ``project``; outputs a program of ``latent``.
PROJECT, LATENT = 64, 32


class Plan(NamedTuple):
    """How ``scan`` cuts its columns."""

    block_v: int
    #: Tiles of ``block_v`` columns a chunk.
    tiles: int
    chunks: int


def plan(columns: int, rank: int, bytes_: int, processors: int = HOPPER) -> Plan:
    """Cut ``columns`` into one chunk a multiprocessor, fewer where that would cost too many bytes.

    Every chunk's program reads all latents (``r`` numbers a row) and the best score of every chunk
    of the step before; with few columns and 132 programs that would outweigh the logits.

    Args:
        columns: base logits a position.
        rank: r.
        bytes_: bytes of an element of W2.
        processors: multiprocessors of the device.
    """
    # Without tensor cores (float32) the product needs registers: narrower tiles.
    block_v = 32 if bytes_ == 4 else 64
    whole = triton.cdiv(columns, block_v)
    allowed = OVERHEAD * columns * (rank * bytes_ + BATCH * 2)
    chunks = min(processors, whole)
    while chunks > 1 and BATCH * chunks * (rank * bytes_ + 4 * chunks) > allowed:
        chunks -= 1
    tiles = triton.cdiv(whole, chunks)
    chunks = triton.cdiv(whole, tiles)
    if interpreting():
        # A tile costs the interpreter the same at any width. The programs, what each of them
        # covers and the bytes it moves stay as they are.
        wider = tiles & -tiles
        return Plan(block_v * wider, tiles // wider, chunks)
    return Plan(block_v, tiles, chunks)


def block_b(rows: int, rank: int, bytes_: int) -> int:
    """Rows a program of ``scan``: all of them, up to what latents in shared memory allow."""
    most = 32 if bytes_ == 4 and rank > 256 else 64
    return min(max(16, int(triton.next_power_of_2(rows))), most)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return HOPPER
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def precision(bytes_: int) -> str:
    """``PRECISION``: full float32 products for float32 heads, tensor cores for 16-bit ones."""
    if interpreting():
        return "interpreted"
    return "ieee" if bytes_ == 4 else "tf32"


def scan_constants(
    rank: int, bytes_: int, rows: int, *, gather: bool, record: int | None, mapped: bool
) -> dict[str, Any]:
    """Constants of ``scan``; ``record`` None: no row is sampled."""
    return {
        "RANK": rank,
        "RANK_PAD": max(16, triton.next_power_of_2(rank)),
        "BLOCK_B": block_b(rows, rank, bytes_),
        "BLOCK_V": 32 if bytes_ == 4 else 64,
        "STAGES": STAGES,
        "GATHER": gather,
        "SAMPLED": record is not None,
        "RECORD": record or 0,
        "MAPPED": mapped,
        "PRECISION": precision(bytes_),
    }


def finish_constants(rank: int, bytes_: int, rows: int, *, sampled: bool) -> dict[str, Any]:
    """Constants of ``finish``."""
    return {"BLOCK_B": block_b(rows, rank, bytes_), "SAMPLED": sampled}


def project_constants(bytes_: int) -> dict[str, Any]:
    """Constants of ``project``."""
    return {
        "BLOCK_N": PROJECT,
        "BLOCK_J": PROJECT,
        "BLOCK_D": 32 if bytes_ == 4 else 64,
        "PRECISION": precision(bytes_),
    }


def latent_constants(rank: int, bytes_: int, rows: int, *, recurrent: bool) -> dict[str, Any]:
    """Constants of ``latent``."""
    return {
        "RANK": rank,
        "BLOCK_B": min(block_b(rows, rank, bytes_), 32),
        "BLOCK_J": LATENT,
        "BLOCK_I": 32 if bytes_ == 4 else 64,
        "RECURRENT": recurrent,
        "PRECISION": precision(bytes_),
    }


def select_constants(
    size: int, base_bytes: int, span: int = SPAN, record: int = 0
) -> dict[str, Any]:
    """Constants of ``select``; ``size`` is M, ``record`` which rows draw from the base tail."""
    return {
        "M": size,
        "CAP": triton.next_power_of_2(2 * size),
        "SPAN": span,
        "SLOTS": span // GROUP,
        "BITS": 8 * base_bytes,
        "RECORD": record,
    }


def _spans_pad(columns: int, span: int) -> int:
    """Spans of a position, padded: kernels are compiled once for each power of two."""
    return int(triton.next_power_of_2(triton.cdiv(columns, span)))


def merge_constants(
    size: int,
    base_bytes: int,
    columns: int,
    *,
    mapped: bool,
    follow: int = 0,
    record: int = 0,
    span: int = SPAN,
) -> dict[str, Any]:
    """Constants of ``merge``; ``follow`` is K, ``record`` which rows draw from the base tail."""
    return {
        "M": size,
        "WIDTH": size + follow,
        "CAP": triton.next_power_of_2(2 * size),
        "SPAN": span,
        "SPANS_PAD": _spans_pad(columns, span),
        "BITS": 8 * base_bytes,
        "MAPPED": mapped,
        "RECORD": record,
    }


def chain_constants(
    rank: int,
    size: int,
    base_bytes: int,
    columns: int,
    *,
    kind: str,
    record: int | None,
    follow: int = 0,
    tail: bool = False,
    mapped: bool = False,
    span: int = SPAN,
) -> dict[str, Any]:
    """Constants of ``chain``; ``record`` None: no row is sampled; ``tail``: with ``out``."""
    lanes = int(triton.next_power_of_2(size + follow))
    extended = follow > 0 or tail
    return {
        "RANK": rank,
        "RANK_PAD": triton.next_power_of_2(rank),
        "M": size,
        "K": follow,
        "LANES": lanes,
        # The tile of W2 is in registers.
        "BLOCK_R": 64 if lanes <= 256 else 32,
        "BLOCK_I": 16 if rank > 256 else 32,
        # What the draft does not depend on is not compiled for.
        "SPAN": span if tail else 1,
        "SPANS_PAD": _spans_pad(columns, span) if tail else 1,
        "BITS": 8 * base_bytes if extended else 0,
        "KIND": ("vanilla", "gated", "rnn").index(kind),
        "SAMPLED": record is not None,
        "RECORD": record or 0,
        "TAIL": tail,
        "MAPPED": mapped and extended,
    }
