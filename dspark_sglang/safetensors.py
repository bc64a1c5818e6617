"""The header of a safetensors file, read strictly: the one reader of this project.

A header is eight bytes of length (little-endian), then JSON that maps each tensor to its dtype,
shape and byte range, then the data (https://huggingface.co/docs/safetensors). Loaders trust it:
two tensors that share bytes, a key given twice or a range outside the file all load, or load
differently in different loaders. Each is an error here. The data itself is never read.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec

from dspark_sglang.errors import CheckpointError

#: Bits of one element.
_WIDTHS = (
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BF16": 16, "F16": 16, "I16": 16, "U16": 16}
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8)
    | dict.fromkeys(("F32", "I32", "U32"), 32)
    | dict.fromkeys(("F64", "I64", "U64", "C64"), 64)
)
LENGTH_BYTES = 8
#: The limit of the reference implementation.
_MAX_HEADER = 100_000_000
_METADATA = "__metadata__"


class Tensor(msgspec.Struct, frozen=True):
    """One tensor: dtype, shape, and its range in the data section."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return self.data_offsets[1] - self.data_offsets[0]

    @property
    def parameters(self) -> int:
        """Elements it holds."""
        return math.prod(self.shape)


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What one file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    #: Where the data section begins.
    start: int


def damaged(path: Path, what: object) -> CheckpointError:
    """The error for a file that holds no whole safetensors file; ``what`` says why."""
    return CheckpointError(
        f"{path} is damaged: {what}.",
        expected="a complete safetensors file",
        fix="Download it again with `hf download`, or save it again with safetensors.",
    )


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for ``object_pairs_hook``; a key given twice is a ValueError."""
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {twice} twice")
    return value


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        path: the file; its data is not read, and may be holes.

    Raises:
        CheckpointError: unreadable, not a safetensors file, truncated, or ranges that overlap, leave
            gaps or do not fit their dtype and shape.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            # A pickle read as a header claims an absurd length: do not try to read that much.
            if not 2 <= length <= min(_MAX_HEADER, size - LENGTH_BYTES):
                raise damaged(path, f"its header would have {length} bytes, the file has {size}")
            raw = stream.read(length)
    except OSError as error:
        raise damaged(path, error) from error
    try:
        fields = json.loads(raw, object_pairs_hook=unique_keys)
        metadata = msgspec.convert(fields.pop(_METADATA, {}), dict[str, str])
        tensors = msgspec.convert(fields, dict[str, Tensor])
    except (ValueError, AttributeError, RecursionError) as error:
        raise damaged(path, str(error)) from error
    start = LENGTH_BYTES + length
    _check_ranges(path, tensors, size - start)
    return Header(tensors=tensors, metadata=metadata, start=start)


def _check_ranges(path: Path, tensors: dict[str, Tensor], available: int) -> None:
    end, before = 0, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        first, last = tensor.data_offsets
        if first < end:
            raise damaged(path, f"{name} overlaps {before}")
        if first > end:
            raise damaged(path, f"nothing owns the bytes between {before} and {name}")
        width = _WIDTHS.get(tensor.dtype)
        if width is None or min(tensor.shape, default=0) < 0:
            raise damaged(path, f"{name} is {tensor.dtype} {list(tensor.shape)}")
        if (last - first) * 8 != tensor.parameters * width:
            raise damaged(
                path, f"{name} is {tensor.dtype} {list(tensor.shape)} in {last - first} bytes"
            )
        end, before = last, name
    if end > available:
        raise damaged(path, f"it is truncated, {end - available} bytes short")
    if end < available:
        raise damaged(path, f"{available - end} bytes follow the last tensor")


def encode_header(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The bytes before the data section, padded to eight as safetensors writes them."""
    fields: dict[str, object] = {_METADATA: metadata} if metadata else {}
    raw = msgspec.json.encode(fields | tensors)
    raw += b" " * (-len(raw) % LENGTH_BYTES)
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw
