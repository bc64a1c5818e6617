"""Model directories: their JSON, the headers of their safetensors files, and the index of these. The only reader of any.

A header is eight bytes of length (little-endian), then JSON that maps each tensor to its dtype, shape and byte range,
then the data (https://huggingface.co/docs/safetensors). Loaders trust it: two tensors that share bytes, a key given
twice or a range outside the file all load, or load differently in different loaders. Each is an error here. Weights are
never read. What a drafter's configuration and tensors mean is known in
:mod:`dspark_sglang.layouts`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dspark_sglang.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SAVE = "Save the weights again with huggingface_hub.save_torch_model, or download them again."


def read_json(path: Path, *, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: missing, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist.",
            expected=f"{what}",
            fix="Check the path, or download the model first with `hf download`.",
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is not JSON: {error}.", expected=what, fix="Download the file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a {type(value).__name__}.",
            expected=f"a JSON object ({what})",
            fix="Download the file again.",
        )
    return value


def read_config(directory: Path, *, role: str) -> dict[str, Any]:
    """``config.json`` of a model directory; ``role`` ("drafter", "target") names it in errors."""
    if not directory.is_dir():
        raise CheckpointError(
            f"{role} path {directory} is not a directory.",
            expected="a model directory with config.json and safetensors weights",
            fix="Check the path, or download the model first with `hf download`.",
        )
    return read_json(directory / "config.json", what=f"the {role}'s config.json")


def revision_of(directory: Path) -> str | None:
    """The Hub commit that a directory was downloaded from, where its place or ``hf`` says so."""
    place = directory.resolve()
    if place.parent.name == "snapshots" and _COMMIT.fullmatch(place.name):
        return place.name
    # `hf download --local-dir` leaves the commit in the first line of these.
    for path in sorted((place / ".cache/huggingface/download").glob("*.metadata")):
        first = path.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0].strip()
        if _COMMIT.fullmatch(first):
            return first
    return None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, in name order."""
    return sorted(directory.glob("*.safetensors"))


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


class Stored(NamedTuple):
    """Where a tensor lies and what it is."""

    file: str
    tensor: Tensor


class Shards(msgspec.Struct, frozen=True, kw_only=True):
    """All weights of a directory, by their headers."""

    directory: Path
    #: Weight files in name order.
    files: tuple[str, ...]
    tensors: dict[str, Stored]
    #: Bytes of all tensors by the index; None where it says nothing.
    total: int | None = None

    @property
    def headers(self) -> dict[str, Tensor]:
        """What each tensor is, by name."""
        return {name: stored.tensor for name, stored in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors (headers excluded)."""
        return sum(stored.tensor.nbytes for stored in self.tensors.values())

    def by_file(self) -> dict[str, list[str]]:
        """Names of the tensors in each file."""
        found: dict[str, list[str]] = {file: [] for file in self.files}
        for name, stored in self.tensors.items():
            found[stored.file].append(name)
        return found

    def header(self, file: str) -> Header:
        """The header of one of the files, read again."""
        return read_header(self.directory / file)


def read_headers(directory: Path) -> dict[str, Tensor]:
    """Every stored tensor of all weight files, by name, whatever an index says.

    Raises:
        CheckpointError: no safetensors file, or a damaged one.
    """
    files = weight_files(directory)
    if not files:
        raise CheckpointError(
            f"{directory} holds no .safetensors file.",
            expected="safetensors weights (pickled .bin or .pt files are not read)",
            fix="Download the model again with `hf download`.",
        )
    return {name: tensor for path in files for name, tensor in read_header(path).tensors.items()}


def read_shards(directory: Path) -> Shards:
    """Read every header of a directory and compare them with its index.

    Raises:
        CheckpointError: no weights, a damaged or missing file, a key stored twice, several files without an index,
            or an index that says something else than the files.
    """
    files = weight_files(directory)
    if not files:
        read_headers(directory)
    index = read_index(directory)
    if index is None and len(files) > 1:
        raise CheckpointError(
            f"{directory} holds {len(files)} .safetensors files and has no {INDEX_FILE}.",
            expected=f"one file of weights, or several with {INDEX_FILE}",
            fix=_SAVE,
        )
    absent = sorted(index.files - {path.name for path in files}) if index else []
    if index and absent:
        lost = sum(file in absent for file in index.files_of.values())
        raise CheckpointError(
            f"{directory} lacks {len(absent)} files of its index, which names {absent[0]}, which is not there "
            f"({lost} tensors in all).",
            expected="every file that the index names",
            fix="Download the missing files again with `hf download`.",
        )
    tensors: dict[str, Stored] = {}
    for path in files:
        for name, tensor in read_header(path).tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{name} is stored twice, in {tensors[name].file} and {path.name}.",
                    expected="every tensor in one file",
                    fix=_SAVE,
                )
            tensors[name] = Stored(path.name, tensor)
    if index is not None:
        _compare(directory / INDEX_FILE, index.files_of, tensors)
    return Shards(
        directory=directory,
        files=tuple(path.name for path in files),
        tensors=tensors,
        total=index.total if index else None,
    )


class Index(NamedTuple):
    """What an index of shards says."""

    #: Tensor to file.
    files_of: dict[str, str]
    #: Bytes of all tensors; None where it says nothing.
    total: int | None

    @property
    def files(self) -> set[str]:
        """Every file that it names."""
        return set(self.files_of.values())


def read_index(directory: Path) -> Index | None:
    """The index of a directory; None without one.

    Raises:
        CheckpointError: unreadable, empty, a key given twice, or a file that is no plain name.
    """
    path = directory / INDEX_FILE
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
        mapped = msgspec.convert(value["weight_map"], dict[str, str])
        total = (value.get("metadata") or {}).get("total_size")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}.", expected="an index with a weight_map", fix=_SAVE
        ) from error
    for file in sorted(set(mapped.values())):
        plain = file == Path(file).name and "\\" not in file and file not in {"", ".", ".."}
        if not plain or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} names {file!r}.",
                expected="plain names of safetensors files beside it",
                fix=_SAVE,
            )
    return Index(mapped, total if isinstance(total, int) else None)


def _compare(path: Path, mapped: Mapping[str, str], tensors: Mapping[str, Stored]) -> None:
    where = {name: stored.file for name, stored in tensors.items()}
    wrong = sorted(n for n in mapped.keys() | where.keys() if mapped.get(n) != where.get(n))
    if not wrong:
        return
    first = wrong[0]
    if first not in where:
        found = f"maps {first} to {mapped[first]}, which does not hold it"
    elif first not in mapped:
        found = f"leaves out {first}, which {where[first]} holds"
    else:
        found = f"maps {first} to {mapped[first]}, but {where[first]} holds it"
    raise CheckpointError(
        f"{path} is wrong about {len(wrong)} tensors: it {found}.",
        expected="every stored tensor mapped to the file that holds it",
        fix="They may belong to different revisions: download both again.",
    )


def text_config(target: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a ``config.json``, nested or not."""
    text = target.get("text_config")
    return text if isinstance(text, Mapping) else target
