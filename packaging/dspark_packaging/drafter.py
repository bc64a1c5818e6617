"""The weights of a folder by their headers, and a drafter in them: its tensors, sizes and identity.

Which file holds which tensor is read strictly, from index and headers; no weight is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dspark_packaging.errors import PackageError
from dspark_packaging.layout import INDEX_FILE, SINGLE_FILE, is_weight, require_inside
from dspark_sglang.checkpoint import read_config, weight_files, weights_digest
from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.dense.config import DrafterConfig, is_gemma4, parse_drafter_config
from dspark_sglang.layouts.dense.tensors import check_shapes, dense_tensors
from dspark_sglang.safetensors import Header, Tensor, read_header, unique_keys

#: Tensors of a drafter in DeepSeek-V4's layout.
V4_PREFIX = "mtp."
_V4_ALIASES = {
    ".markov_head.embed.": ".markov_head.markov_w1.",
    ".markov_head.head.": ".markov_head.markov_w2.",
}
#: Copies of the target's modules that a dense drafter may carry; servers use the target's own.
_COPIES = ("embed_tokens.weight", "lm_head.weight")
_FLOATS = {"F64", "F32", "F16", "BF16"}
#: Quantised storage: elements a stored one stands for along the last dimension.
_PACKED = {"F8_E4M3": 1, "F8_E5M2": 1, "F4": 1, "I8": 2, "U8": 2}
_PIECE = 4 << 20
_GROUPS = (
    ("layers.", "draft layers"),
    ("markov_head.", "Markov head"),
    ("confidence_head.", "confidence head"),
    ("embed_tokens.", "copy of the target's embedding"),
    ("lm_head.", "copy of the target's LM head"),
)
_REST = "context projection and norms"
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


def _group(name: str) -> str:
    if name.startswith(V4_PREFIX):
        # mtp.N.<part>: heads and the projection of the context lie in the last and first stage.
        rest = name.split(".", 2)[2]
        special = ("markov_head.", "confidence_head.", "main_", "norm.", "hc_head_")
        name = rest if rest.startswith(special) else "layers." + rest
    short = name.removeprefix("model.")
    return next((group for prefix, group in _GROUPS if short.startswith(prefix)), _REST)


def sizes_of(tensors: Mapping[str, Tensor]) -> Sizes:
    """Elements and bytes by part."""
    totals: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        count, size = totals.get(_group(name), (0, 0))
        totals[_group(name)] = (count + tensor.parameters, size + tensor.nbytes)
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
    config: DrafterConfig
    tensors: dict[str, Tensor]
    #: Its identity in records (:func:`dspark_sglang.checkpoint.weights_digest`).
    digest: str

    @property
    def architecture(self) -> str:
        """The class it names, or several, in words."""
        return ", ".join(self.raw.get("architectures") or []) or "not named"


#: Digests of this process, of a V4 drafter or not, by name, place, size and time of its files. 40 GB are asked for
#: several times, under several links.
_known: dict[tuple[bool, tuple[tuple[str | int, ...], ...]], str] = {}


def digest_of(directory: Path, names: Mapping[str, str], *, v4: bool) -> str:
    """:func:`~dspark_sglang.checkpoint.weights_digest` of files that may have been renamed.

    Computed once for files that did not change.

    Args:
        directory: where they lie.
        names: the name each had, and the one it has; a V4 drafter's identity does not depend on them.
        v4: the drafter lies under ``mtp.*``, alone or with its target.
    """
    files = []
    for original, here in sorted(names.items()):
        of = (directory / here).stat()
        files.append((original, of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns))
    key = (v4, tuple(files))
    if key not in _known and v4:
        _known[key] = weights_digest(directory)
    elif key not in _known:
        digest = hashlib.sha256()
        for original, here in sorted(names.items()):
            digest.update(original.encode())
            with (directory / here).open("rb", buffering=0) as stream:
                while piece := stream.read(_PIECE):
                    digest.update(piece)
        _known[key] = digest.hexdigest()
    return _known[key]


def read_drafter(directory: Path, shards: Shards | None = None) -> Drafter:
    """Read a stand-alone drafter.

    Raises:
        DSparkError: configuration or weights are missing or damaged.
    """
    raw = read_config(directory, role="drafter")
    weights = read_shards(directory) if shards is None else shards
    config = parse_drafter_config(raw)
    if config.bundled:
        require_alone(directory, weights)
    names = {path.name: path.name for path in weight_files(directory)}
    return Drafter(
        raw=raw,
        config=config,
        tensors={name: stored.tensor for name, stored in weights.tensors.items()},
        digest=digest_of(directory, names, v4=config.bundled),
    )


def require_alone(directory: Path, shards: Shards) -> None:
    """Raise where a V4 drafter lies in one folder with its target, and no record says so.

    Raises:
        CheckpointError: with the command that takes them apart.
    """
    inside = len(of_drafter(shards))
    if 0 < inside < len(shards.tensors):
        raise CheckpointError(
            f"{directory} holds a target with its drafter, and no record of that.",
            expected="a drafter alone, or a bundle that `dspark package --bundle` made",
            fix=f"Take it apart first: `dspark package {directory} OUT --split`.",
        )


def check_drafter(directory: Path, drafter: Drafter) -> None:
    """Compare names, shapes and dtypes of the tensors with what the configuration implies.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape or of a dtype that
            nothing loads.
    """
    if drafter.config.bundled:
        check_v4(drafter)
        return
    shapes = {name: tensor.shape for name, tensor in drafter.tensors.items()}
    check_shapes(shapes, drafter.config, where=directory.name)
    wanted = dense_tensors(drafter.config)
    copy = (drafter.config.vocab_size, drafter.config.hidden_size)
    for name, tensor in drafter.tensors.items():
        short = name.removeprefix("model.")
        if short not in wanted and short not in _COPIES:
            raise _left_over(name)
        if tensor.dtype not in _FLOATS:
            raise _wrong_dtype(name, tensor, "a float of 16 bits or more")
        if short in _COPIES and tensor.shape != copy and not is_gemma4(drafter.raw):
            raise _wrong_shape(short, tensor, copy)


def check_v4(drafter: Drafter) -> None:
    """The same for a drafter under ``mtp.*``, plain or quantised (fp8, or fp4 in bytes).

    Raises:
        CheckpointError: as :func:`check_drafter`.
    """
    # Torch is loaded for these two only: a card or a dense drafter does without.
    from dspark_sglang.layouts.v4.shape import V4Shape
    from dspark_sglang.layouts.v4.tensors import v4_tensors

    wanted = v4_tensors(V4Shape.from_config(drafter.raw))
    found: dict[str, Tensor] = {}
    for name, tensor in drafter.tensors.items():
        usual = name
        for alias, meant in _V4_ALIASES.items():
            usual = usual.replace(alias, meant)
        if usual in found:
            raise _left_over(name)
        found[usual] = tensor
    scales = {name for name in found if name not in wanted and _scaled(name) in wanted}
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointError(
                f"The drafter has no tensor {name}.",
                expected=f"{name} of shape {list(shape)}",
                fix="Download it again; it is incomplete or of another architecture.",
            )
        _check_v4_tensor(name, found[name], shape, scales)
    for name in sorted(found.keys() - wanted.keys()):
        if name not in scales:
            raise _left_over(name)
        weight, scale = found[_scaled(name)], found[name]
        if weight.dtype not in _PACKED:
            raise _left_over(name)
        if len(scale.shape) != 2 or not scale.shape[0] <= weight.shape[0]:
            raise _wrong_shape(name, scale, (weight.shape[0], -1))


def _scaled(name: str) -> str:
    """The weight that a tensor of this name would scale."""
    for suffix in (".scale", ".weight_scale_inv"):
        if name.endswith(suffix):
            return name.removesuffix(suffix) + ".weight"
    return ""


def _check_v4_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], scales: set[str]) -> None:
    if tensor.dtype in _FLOATS:
        if tensor.shape != shape:
            raise _wrong_shape(name, tensor, shape)
        return
    if tensor.dtype not in _PACKED or len(shape) != 2:
        raise _wrong_dtype(name, tensor, "a float of 16 bits or more")
    packed = (shape[0], -(-shape[1] // _PACKED[tensor.dtype]))
    if tensor.shape != packed:
        raise _wrong_shape(name, tensor, packed)
    stem = name.removesuffix(".weight")
    if not {f"{stem}.scale", f"{stem}.weight_scale_inv"} & scales:
        raise CheckpointError(
            f"{name} is {tensor.dtype} without a scale.",
            expected=f"{stem}.scale beside it",
            fix="Download the checkpoint again; it is incomplete.",
        )


def _left_over(name: str) -> CheckpointError:
    return CheckpointError(
        f"The drafter has a tensor {name} that its config.json does not imply.",
        expected="the drafter's tensors and nothing else",
        fix="Use the config.json of these weights, or save the weights without it.",
    )


def _wrong_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{name} is {tensor.dtype} {list(tensor.shape)}.",
        expected=f"{list(shape)} (from config.json)",
        fix="The weights and config.json belong to different drafters; download both.",
    )


def _wrong_dtype(name: str, tensor: Tensor, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{name} is stored as {tensor.dtype}.",
        expected=wanted,
        fix="Save the drafter in bfloat16.",
    )


def of_drafter(shards: Shards) -> dict[str, Stored]:
    """The tensors under ``mtp.*``."""
    return {n: stored for n, stored in shards.tensors.items() if n.startswith(V4_PREFIX)}
