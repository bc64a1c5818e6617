"""Write a file that holds some tensors of another, streamed."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from dspark_packaging.progress import Meter
from dspark_sglang.safetensors import Tensor, encode_header, read_header

_PIECE = 8 << 20


def subset_bytes(source: Path, names: Collection[str]) -> int:
    """Size of the data section that :func:`write_subset` writes."""
    tensors = read_header(source).tensors
    return sum(tensors[name].nbytes for name in names)


def write_subset(source: Path, out: Path, names: Collection[str], meter: Meter) -> None:
    """Write the named tensors of ``source`` to ``out``, in their order there, bytes unchanged.

    Complete or absent: the file is written beside its place and renamed.

    Args:
        source: a safetensors file.
        out: the new one.
        names: at least one tensor of ``source``.
        meter: told the bytes copied.

    Raises:
        CheckpointError: ``source`` is damaged.
        OSError: no space.
    """
    header = read_header(source)
    kept = sorted(
        ((name, header.tensors[name]) for name in names), key=lambda item: item[1].data_offsets
    )
    moved: dict[str, Tensor] = {}
    end = 0
    for name, tensor in kept:
        moved[name] = Tensor(tensor.dtype, tensor.shape, (end, end + tensor.nbytes))
        end += tensor.nbytes
    part = out.with_name(f".{out.name}.part")
    with source.open("rb", buffering=0) as reader, part.open("wb") as writer:
        writer.write(encode_header(moved, header.metadata))
        for _, tensor in kept:
            first, last = (header.start + offset for offset in tensor.data_offsets)
            while first < last:
                piece = os.pread(reader.fileno(), min(_PIECE, last - first), first)
                if not piece:
                    raise OSError(f"{source} became shorter while it was read")
                writer.write(piece)
                first += len(piece)
                meter(len(piece))
        writer.flush()
        os.fsync(writer.fileno())
    part.rename(out)
