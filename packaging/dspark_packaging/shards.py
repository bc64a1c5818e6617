"""Which file holds which tensor: shards and their index, read strictly and without the data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from dspark_packaging.errors import PackageError
from dspark_packaging.layout import INDEX_FILE, SINGLE_FILE, is_weight, require_inside
from dspark_sglang.checkpoint import weight_files
from dspark_sglang.errors import CheckpointError
from dspark_sglang.safetensors import Header, Tensor, read_header, unique_keys

_FIX = "Save the weights again with huggingface_hub.save_torch_model, or download them again."


class Stored(NamedTuple):
    """Where a tensor lies and what it is."""

    file: str
    tensor: Tensor


class Shards(msgspec.Struct, frozen=True, kw_only=True):
    """All weights of a folder, by their headers."""

    directory: Path
    #: Weight files in name order.
    files: tuple[str, ...]
    tensors: dict[str, Stored]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors (headers excluded)."""
        return sum(stored.tensor.nbytes for stored in self.tensors.values())

    def by_file(self) -> dict[str, list[str]]:
        """The tensors of every file."""
        held: dict[str, list[str]] = {file: [] for file in self.files}
        for name, stored in self.tensors.items():
            held[stored.file].append(name)
        return held

    def header(self, file: str) -> Header:
        """The header of one of the files, read again."""
        return read_header(self.directory / file)


def read_shards(directory: Path) -> Shards:
    """Read every header of a folder and check it against the index.

    Raises:
        CheckpointError: no weights, or a damaged file.
        PackageError: a file outside the folder, a key stored twice, several files without an index, or an index that says something else than the files.
    """
    files = weight_files(directory)
    if not files:
        raise CheckpointError(
            f"{directory} holds no .safetensors file.",
            expected="safetensors weights (pickled .bin or .pt files are not read)",
            fix="Download the model again with `hf download`.",
        )
    mapped = read_index(directory)
    if mapped is None and len(files) > 1:
        raise PackageError(
            f"{directory} has {len(files)} weight files and no {INDEX_FILE}.",
            expected="an index beside sharded weights",
            fix=_FIX,
        )
    tensors: dict[str, Stored] = {}
    for path in files:
        require_inside(path, directory)
        for name, tensor in read_header(path).tensors.items():
            if name in tensors:
                raise PackageError(
                    f"{name} is stored twice, in {tensors[name].file} and {path.name}.",
                    expected="every tensor in one file",
                    fix=_FIX,
                )
            tensors[name] = Stored(path.name, tensor)
    if mapped is not None:
        _compare(directory / INDEX_FILE, mapped, tensors)
    return Shards(directory=directory, files=tuple(path.name for path in files), tensors=tensors)


def read_index(directory: Path) -> dict[str, str] | None:
    """The weight map of a folder; None without an index.

    Raises:
        PackageError: unreadable, a key given twice, or a file that is no plain name of an
            existing safetensors file in the folder.
    """
    path = directory / INDEX_FILE
    if not path.exists():
        return None
    require_inside(path, directory)
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
        mapped = msgspec.convert(value["weight_map"], dict[str, str])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PackageError(
            f"{path} cannot be read: {error}.", expected="an index with a weight_map", fix=_FIX
        ) from error
    for file in sorted(set(mapped.values())):
        plain = file == Path(file).name and "\\" not in file and file not in {"", ".", ".."}
        if not plain or not file.endswith(".safetensors"):
            raise PackageError(
                f"{path} names {file!r}.",
                expected="plain names of safetensors files beside it",
                fix=_FIX,
            )
        if not (directory / file).is_file():
            raise PackageError(
                f"{path} names {file}, which is not there.",
                expected="every file that the index names",
                fix="Download the missing file again.",
            )
    return mapped


def _compare(path: Path, mapped: Mapping[str, str], tensors: Mapping[str, Stored]) -> None:
    wrong = sorted(
        name
        for name in mapped.keys() | tensors.keys()
        if name not in mapped or name not in tensors or mapped[name] != tensors[name].file
    )
    if not wrong:
        return
    first = wrong[0]
    if first not in tensors:
        found = f"maps {first} to {mapped[first]}, which does not hold it"
    elif first not in mapped:
        found = f"leaves out {first}, which {tensors[first].file} holds"
    else:
        found = f"maps {first} to {mapped[first]}, but {tensors[first].file} holds it"
    raise PackageError(
        f"{path} is wrong about {len(wrong)} tensors: it {found}.",
        expected="every stored tensor mapped to the file that holds it",
        fix=_FIX,
    )


def index_bytes(tensors: Mapping[str, Stored]) -> bytes:
    """An index of these tensors, as ``huggingface_hub`` writes it."""
    total = sum(stored.tensor.nbytes for stored in tensors.values())
    value = {
        "metadata": {"total_size": total},
        "weight_map": {name: stored.file for name, stored in sorted(tensors.items())},
    }
    return json.dumps(value, indent=2).encode() + b"\n"


def check_weight_names(shards: Shards) -> None:
    """Check that the files of a drafter are called what the Hub's loaders look for.

    Raises:
        PackageError: another name.
    """
    odd = [name for name in shards.files if not is_weight(name)]
    if odd:
        raise PackageError(
            f"{shards.directory} has weights in {', '.join(odd)}.",
            expected=f"{SINGLE_FILE}, or shards model-00001-of-0000N.safetensors",
            fix=_FIX,
        )
