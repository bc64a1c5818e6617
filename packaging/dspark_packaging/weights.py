"""Sizes of a drafter's tensors, from the safetensors headers (the weights are not loaded)."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from dspark_packaging.errors import PackageError
from dspark_packaging.layout import INDEX_FILE, is_weight
from dspark_sglang.checkpoint import read_shapes, weight_files
from dspark_sglang.errors import CheckpointError

_GROUPS = (
    ("layers.", "draft layers"),
    ("markov_head.", "Markov head"),
    ("confidence_head.", "confidence head"),
    ("embed_tokens.", "copy of the target's embedding"),
    ("lm_head.", "copy of the target's LM head"),
)
_REST = "context projection and norms"
_LENGTH = 8  # bytes of the header's own length, little-endian (safetensors format)


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Tensors of one part of the drafter."""

    name: str
    parameters: int
    nbytes: int


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """What the weights hold."""

    groups: list[Group]
    dtypes: list[str]

    @property
    def parameters(self) -> int:
        """Stored parameters."""
        return sum(group.parameters for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors (headers excluded)."""
        return sum(group.nbytes for group in self.groups)

    @property
    def element_bytes(self) -> float:
        """Bytes a parameter, on average."""
        return self.nbytes / self.parameters


def _header(path: Path) -> dict[str, _Tensor]:
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH), "little")
            # A pickle read as a header claims an absurd length: do not try to read that much.
            raw = stream.read(length) if length < path.stat().st_size else b""
        fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        fields.pop("__metadata__", None)
        return {name: msgspec.json.decode(field, type=_Tensor) for name, field in fields.items()}
    except msgspec.DecodeError as error:
        raise CheckpointError(
            f"{path} is damaged: {error}.",
            expected="a complete safetensors file",
            fix="Download it again with `hf download`.",
        ) from error


def read_sizes(directory: Path) -> Sizes:
    """Parameters and bytes of a drafter by part.

    Raises:
        CheckpointError: no weights, or a damaged header.
    """
    files = weight_files(directory)
    if not files:
        read_shapes(directory)  # raises the error that says what is missing
    totals: dict[str, tuple[int, int]] = {}
    dtypes: set[str] = set()
    for path in files:
        for name, tensor in _header(path).items():
            short = name.removeprefix("model.")
            group = next((g for prefix, g in _GROUPS if short.startswith(prefix)), _REST)
            count, size = totals.get(group, (0, 0))
            first, last = tensor.data_offsets
            totals[group] = (count + math.prod(tensor.shape), size + last - first)
            dtypes.add(tensor.dtype)
    groups = [
        Group(name=name, parameters=totals[name][0], nbytes=totals[name][1])
        for name in [*(g for _, g in _GROUPS), _REST]
        if name in totals
    ]
    return Sizes(groups=groups, dtypes=sorted(dtypes))


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def check_shards(directory: Path) -> None:
    """Check the names of the weight files and, for several, the index that maps tensors to them.

    Raises:
        PackageError: a name the Hub's loaders do not look for, or an index that does not match.
    """
    files = weight_files(directory)
    fix = "Save the weights again with huggingface_hub.save_torch_model."
    odd = [path.name for path in files if not is_weight(path.name)]
    if odd:
        raise PackageError(
            f"{directory} has weights in {', '.join(odd)}.",
            expected="model.safetensors, or shards model-00001-of-0000N.safetensors",
            fix=fix,
        )
    index = directory / INDEX_FILE
    if not index.is_file():
        if len(files) > 1:
            raise PackageError(
                f"{directory} has {len(files)} weight files and no {INDEX_FILE}.",
                expected="an index beside sharded weights",
                fix=fix,
            )
        return
    try:
        mapped = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except msgspec.DecodeError as error:
        raise PackageError(
            f"{index} cannot be read: {error}.", expected="an index with a weight_map", fix=fix
        ) from error
    stored = {name: path.name for path in files for name in _header(path)}
    if mapped != stored:
        wrong = sorted(k for k in mapped.keys() | stored.keys() if mapped.get(k) != stored.get(k))
        raise PackageError(
            f"{index} is wrong about {len(wrong)} tensors, {wrong[0]} first.",
            expected="every stored tensor mapped to the file that holds it",
            fix=fix,
        )
