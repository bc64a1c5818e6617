"""The weights of a folder by their headers, and a drafter in them: its tensors, sizes and identity.

Which file holds which tensor is read strictly, from index and headers; no weight is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from dspark_packaging.errors import PackageError
from dspark_packaging.layout import SINGLE_FILE, is_weight, require_inside
from dspark_sglang import checkpoint
from dspark_sglang.checkpoint import INDEX_FILE, Shards, Stored, Tensor, read_config, weight_files
from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.base import DrafterConfig, Layout, layout_of

_GROUPS = (
    ("layers.", "draft layers"),
    ("markov_head.", "Markov head"),
    ("confidence_head.", "confidence head"),
    ("embed_tokens.", "copy of the target's embedding"),
    ("lm_head.", "copy of the target's LM head"),
)
_REST = "context projection and norms"
_FIX = "Save the weights again with huggingface_hub.save_torch_model, or download them again."


def read_shards(directory: Path) -> Shards:
    """Every header of a folder, compared with its index; nothing may lie outside the folder.

    Raises:
        CheckpointError: weights are missing or damaged, or the index says something else than the files.
        PackageError: a file outside the folder.
    """
    for path in (*weight_files(directory), directory / INDEX_FILE):
        if path.exists():
            require_inside(path, directory)
    return checkpoint.read_shards(directory)


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
        """Stored elements (two 4-bit weights packed in a byte count as one)."""
        return sum(group.parameters for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors (headers excluded)."""
        return sum(group.nbytes for group in self.groups)

    @property
    def element_bytes(self) -> float:
        """Bytes an element, on average."""
        return self.nbytes / self.parameters


def sizes_of(drafter: Drafter) -> Sizes:
    """Elements and bytes by part."""
    tensors = drafter.tensors
    totals: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        part = drafter.layout.part(name)
        group = next((group for prefix, group in _GROUPS if part.startswith(prefix)), _REST)
        count, size = totals.get(group, (0, 0))
        totals[group] = (count + tensor.parameters, size + tensor.nbytes)
    groups = [
        Group(name=name, parameters=totals[name][0], nbytes=totals[name][1])
        for name in [*(group for _, group in _GROUPS), _REST]
        if name in totals
    ]
    return Sizes(groups=groups, dtypes=sorted({tensor.dtype for tensor in tensors.values()}))


def shared_bytes(tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Bytes of copies of the target's own modules, which a server need not hold twice."""
    return sum(
        tensor.nbytes
        for name, tensor in tensors
        if name.removeprefix("model.").startswith(("embed_tokens.", "lm_head."))
    )


class Drafter(msgspec.Struct, frozen=True, kw_only=True):
    """A drafter, wherever its files lie."""

    raw: dict[str, Any]
    layout: Layout
    config: DrafterConfig
    tensors: dict[str, Tensor]
    #: Its identity in records (:func:`dspark_sglang.layouts.base.weights_digest`).
    digest: str

    @property
    def architecture(self) -> str:
        """The class it names, or several, in words."""
        return ", ".join(self.raw.get("architectures") or []) or "not named"


#: Digests of this process, by layout and name, place, size and time of the files. 40 GB are asked for several times,
#: under several links.
_known: dict[tuple[str, tuple[tuple[str | int, ...], ...]], str] = {}


def digest_of(directory: Path, names: Mapping[str, str], layout: Layout) -> str:
    """:func:`~dspark_sglang.layouts.base.weights_digest` of files that may have been renamed.

    Computed once for files that did not change.

    Args:
        directory: where they lie.
        names: the name each had, and the one it has.
        layout: of the drafter, alone or with its target.
    """
    files = []
    for original, here in sorted(names.items()):
        of = (directory / here).stat()
        files.append((original, of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns))
    key = (layout.name, tuple(files))
    if key not in _known:
        _known[key] = layout.digest(directory, names)
    return _known[key]


def read_drafter(directory: Path, shards: Shards | None = None) -> Drafter:
    """Read a stand-alone drafter.

    Raises:
        DSparkError: configuration or weights are missing or damaged.
    """
    raw = read_config(directory, role="drafter")
    weights = read_shards(directory) if shards is None else shards
    layout = layout_of(raw)
    config = layout.read(raw)
    require_alone(directory, weights, layout)
    names = {path.name: path.name for path in weight_files(directory)}
    return Drafter(
        raw=raw,
        layout=layout,
        config=config,
        tensors=weights.headers,
        digest=digest_of(directory, names, layout),
    )


def require_alone(directory: Path, shards: Shards, layout: Layout) -> None:
    """Raise where a drafter lies in one folder with its target, and no record says so.

    Raises:
        CheckpointError: with the command that takes them apart.
    """
    inside = len(layout.own(shards.tensors))
    if 0 < inside < len(shards.tensors):
        raise CheckpointError(
            f"{directory} holds a target with its drafter, and no record of that.",
            expected="a drafter alone, or a bundle that `dspark package --bundle` made",
            fix=f"Take it apart first: `dspark package {directory} OUT --split`.",
        )
