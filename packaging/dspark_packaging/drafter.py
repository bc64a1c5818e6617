"""A drafter as packaging sees it: its configuration, its tensors by their headers, its identity."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dspark_packaging.shards import Shards, Stored, read_shards
from dspark_sglang.checkpoint import (
    DrafterConfig,
    check_tensors,
    dense_tensors,
    is_gemma4,
    parse_drafter_config,
    read_config,
    weight_files,
    weights_digest,
)
from dspark_sglang.errors import CheckpointError
from dspark_sglang.safetensors import Tensor

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


def is_v4(raw: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a drafter in DeepSeek-V4's layout (``dspark_*`` keys)."""
    return parse_drafter_config(raw).bundled


class _File(NamedTuple):
    """A weight file by its original name, and what tells whether it is still the same."""

    name: str
    device: int
    inode: int
    size: int
    modified_ns: int


#: Digests of this process, of a V4 drafter or not. 40 GB are asked for several times, under several links.
_known: dict[tuple[bool, tuple[_File, ...]], str] = {}


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
        files.append(_File(original, of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns))
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
    check_tensors(directory, drafter.config)
    wanted = dense_tensors(drafter.config)
    for name, tensor in drafter.tensors.items():
        short = name.removeprefix("model.")
        if short not in wanted and short not in _COPIES:
            raise _left_over(name)
        if tensor.dtype not in _FLOATS:
            raise _wrong_dtype(name, tensor, "a float of 16 bits or more")
    if is_gemma4(drafter.raw):
        return
    copies = {"embed_tokens.weight", "lm_head.weight"}
    for name in copies & {n.removeprefix("model.") for n in drafter.tensors}:
        tensor = drafter.tensors.get(name) or drafter.tensors["model." + name]
        shape = (drafter.config.vocab_size, drafter.config.hidden_size)
        if tensor.shape != shape:
            raise _wrong_shape(name, tensor, shape)


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
