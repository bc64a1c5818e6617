"""Model directories: their JSON, the headers of their weights, and what identifies them.

Nothing here loads weights. What a drafter's configuration and tensors mean is known in
:mod:`dspark_sglang.layouts`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark_sglang.errors import CheckpointError
from dspark_sglang.safetensors import Tensor, read_header

BUNDLED_KEYS = (
    "dspark_block_size",
    "dspark_markov_rank",
    "dspark_noise_token_id",
    "dspark_target_layer_ids",
)


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


def is_bundle(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds its own drafter."""
    return any(config.get(key) is not None for key in BUNDLED_KEYS)


def bundle_at(directory: Path) -> Path | None:
    """``directory`` where it is a model's and holds its own drafter; else None.

    Raises:
        CheckpointError: its ``config.json`` is damaged.
    """
    path = directory / "config.json"
    if path.is_file() and is_bundle(read_json(path, what="a model's config.json")):
        return directory
    return None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, in name order."""
    return sorted(directory.glob("*.safetensors"))


def read_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every stored tensor, from the files' headers.

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
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        shapes |= {name: tensor.shape for name, tensor in read_header(path).tensors.items()}
    return shapes


def text_config(target: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a ``config.json``, nested or not."""
    text = target.get("text_config")
    return text if isinstance(text, Mapping) else target


def weights_digest(directory: Path) -> str:
    """SHA-256 that is a drafter's identity in artifacts.

    Over its weight files in name order; of a bundle, whose files hold hundreds of gigabytes of target, over the
    names, types and shapes of all ``mtp.*`` tensors and the values of those that are not routed experts'.

    Raises:
        CheckpointError: a damaged file of a bundle.
    """
    if bundle_at(directory) is not None:
        return _bundle_digest(directory)
    digest = hashlib.sha256()
    for path in weight_files(directory):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _bundle_digest(directory: Path) -> str:
    found: dict[str, tuple[Path, int, Tensor]] = {}
    for path in weight_files(directory):
        header = read_header(path)
        own = ((name, t) for name, t in header.tensors.items() if name.startswith("mtp."))
        found |= {name: (path, header.start, tensor) for name, tensor in own}
    digest = hashlib.sha256()
    for name, (path, start, tensor) in sorted(found.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if ".experts." in name:
            continue
        with path.open("rb") as stream:
            stream.seek(start + tensor.data_offsets[0])
            digest.update(stream.read(tensor.nbytes))
    return digest.hexdigest()
