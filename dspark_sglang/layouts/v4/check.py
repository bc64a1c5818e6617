"""Whether a directory is a DeepSeek-V4 bundle that this layout can serve, from headers alone.

No weight is read: configuration, index and the headers of the safetensors files say it all. Each
way to be wrong is one error. V4-Flash-DSpark and V4-Flash-0731 hold the same tensors; V4-Pro-0813 is taken
where it holds those of V4-Pro-DSpark. V4.1 is another layout and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from dspark_sglang.checkpoint import read_config, read_json, weight_files
from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.v4.names import (
    Mapped,
    has_drafter,
    map_names,
    plain_bundle,
    published,
    usual,
)
from dspark_sglang.layouts.v4.shape import V4Shape
from dspark_sglang.layouts.v4.target import TargetShape
from dspark_sglang.safetensors import Tensor, read_header

Config = Mapping[str, Any]

INDEX = "model.safetensors.index.json"
_ARCHITECTURE = "DeepseekV4ForCausalLM"
_FLOATS = ("BF16", "F16", "F32")
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2}
_AGAIN = "Download the checkpoint again with `hf download`; it is incomplete."
_MIXED = "Weights and config.json belong to different checkpoints or revisions: download both."
#: Depth and width to the releases that have them.
_RELEASES = {
    (43, 4096): "DeepSeek-V4-Flash (DSpark, 0731)",
    (61, 7168): "DeepSeek-V4-Pro (DSpark, 0813)",
}
#: What is missing, told from the name of a tensor that is.
_PARTS = (
    (".hc_", "hyper-connection"),
    ("hc_head", "hyper-connection"),
    (".indexer.", "indexer"),
    (".compressor.", "compressor"),
)


class Bundle(NamedTuple):
    """A bundle that can be served."""

    #: In words: the releases that have this size.
    release: str
    target: TargetShape
    drafter: V4Shape
    #: Whether weights are stored as published, in fp8 and fp4.
    quantised: bool
    #: Files that hold ``mtp.*`` tensors, in name order; of a published checkpoint nothing else.
    drafter_files: tuple[str, ...]


def check_bundle(directory: Path) -> Bundle:
    """Check a bundle before any weight is read.

    Raises:
        CheckpointError: no V4, a V4.1, no drafter or half of one, a drafter of another target, files or
            tensors that are missing, left over, of another shape or type, or an unknown compress ratio.
    """
    config = read_config(directory, role="target")
    release = recognise(config)
    if not has_drafter(config):
        raise CheckpointError(
            f"{directory} is a {release} whose config.json has no dspark_* keys.",
            expected="a checkpoint with its DSpark drafter inside",
            fix="Use the -DSpark checkpoint of this model, or a later release (V4-Flash-0731).",
        )
    target, drafter = TargetShape.from_config(config), V4Shape.from_config(config)
    if drafter.gamma > drafter.window:
        raise CheckpointError(
            f"config.json says dspark_block_size {drafter.gamma}.",
            expected=f"at most the window, {drafter.window}",
            fix="Use the config.json of the same checkpoint; published drafters have 5.",
        )
    held = _files(directory)
    stored = {name: header for own in held.values() for name, header in own.items()}
    found = map_names(stored, config)
    _check_names(found, stored)
    quantised = _check_tensors(config, found, stored)
    files = sorted(f for f, own in held.items() if any(n.startswith("mtp.") for n in own))
    return Bundle(release, target, drafter, quantised, tuple(files))


def recognise(config: Config) -> str:
    """The releases that a configuration may be of, in words; drafter or not.

    Raises:
        CheckpointError: it is not a V4, or a V4.1.
    """
    text = config.get("text_config")
    text = {**config, **text} if isinstance(text, Mapping) else config
    names = [str(name) for name in config.get("architectures") or ()]
    engram = text.get("engram_layer_ids")
    if (
        engram
        or text.get("hc_pre_from_prev_sublayer")
        or "v41" in str(config.get("model_type", "")).lower()
        or any("V41" in name for name in names)
    ):
        says = f"Engram at layers {engram}" if engram else "other hyper-connections"
        reads = text.get("dspark_target_layer_ids")
        block = text.get("dspark_block_size")
        raise CheckpointError(
            f"config.json is that of a DeepSeek-V4.1 ({says}; drafter of block {block} at layers {reads}).",
            expected="a DeepSeek-V4: compress ratios 0, 4 and 128, drafter states read after a layer",
            fix="Serve it with SGLang's builtin (DSPARK_PLUGIN=off); this layout has no Engram, and "
            "V4.1's drafter reads what enters a layer.",
        )
    if _ARCHITECTURE not in names:
        raise CheckpointError(
            f"config.json names {', '.join(names) or 'no architecture'}.",
            expected=_ARCHITECTURE,
            fix="Use a DeepSeek-V4 checkpoint; drafters of other targets have directories of their own.",
        )
    depth, hidden = config.get("num_hidden_layers"), config.get("hidden_size")
    other = f"DeepSeek-V4 of {depth} layers"
    if isinstance(depth, int) and isinstance(hidden, int):
        return _RELEASES.get((depth, hidden), other)
    return other


def _files(directory: Path) -> dict[str, dict[str, Tensor]]:
    """Headers of every weight file, which the index, if there is one, has to name."""
    files = weight_files(directory)
    if not (directory / INDEX).is_file():
        if len(files) != 1:
            raise CheckpointError(
                f"{directory} holds {len(files)} .safetensors files and no {INDEX}.",
                expected=f"one file of weights, or several with {INDEX}",
                fix=_AGAIN,
            )
        return {files[0].name: read_header(files[0]).tensors}
    raw = read_json(directory / INDEX, what="an index of safetensors files")
    mapped = raw.get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise CheckpointError(
            f"{directory / INDEX} has no weight_map.",
            expected="tensors and their files",
            fix=_AGAIN,
        )
    absent = sorted({str(f) for f in mapped.values()} - {path.name for path in files})
    if absent:
        lost = sum(file in absent for file in mapped.values())
        raise CheckpointError(
            f"{directory} lacks {len(absent)} files of its index, the first {absent[0]} ({lost} tensors in all).",
            expected="every file that the index names",
            fix=_AGAIN,
        )
    held = {path.name: read_header(path).tensors for path in files}
    where = {name: file for file, own in held.items() for name in own}
    odd = sorted(n for n in where.keys() | mapped.keys() if where.get(n) != mapped.get(n))
    if odd:
        raise CheckpointError(
            f"Index and files in {directory} differ in {len(odd)} tensors, the first {odd[0]}.",
            expected="an index that says what each file holds",
            fix="They belong to different revisions: download both again.",
        )
    _check_total(directory, raw.get("metadata"), held)
    return held


def _check_total(
    directory: Path, metadata: object, held: Mapping[str, Mapping[str, Tensor]]
) -> None:
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(
        _BYTES.get(header.dtype, 1) * math.prod(header.shape)
        for own in held.values()
        for header in own.values()
    )
    # Left out, or 0, by some; and how the published ones count is not known to the byte.
    if isinstance(said, int) and said > 0 and abs(said - total) > 0.01 * total:
        raise CheckpointError(
            f"The index in {directory} says {said} bytes; its files hold {total}.",
            expected="the sum of all tensors",
            fix="They belong to different revisions: download both again.",
        )


def _check_names(found: Mapped, stored: Mapping[str, Tensor]) -> None:
    """Nothing is missing and nothing left over."""
    held = [name for name in stored if name.startswith("mtp.")]
    if not held:
        raise CheckpointError(
            "The checkpoint holds half a bundle: config.json has dspark_* keys, and there is no mtp.* tensor.",
            expected="target and drafter in one checkpoint",
            fix=_AGAIN,
        )
    if "mtp.0.e_proj.weight" in stored:
        raise CheckpointError(
            "mtp.0 is a next-token layer (mtp.0.e_proj.weight), not a DSpark drafter.",
            expected="mtp.0.main_proj.weight and draft layers",
            fix="Use the weights of the -DSpark checkpoint, whose config.json this is.",
        )
    engram = next((name for name in found.unknown if ".engram." in name), None)
    if engram is not None:
        raise CheckpointError(
            f"The checkpoint has Engram tensors ({engram}).",
            expected="a DeepSeek-V4; Engram is V4.1's",
            fix="Serve it with SGLang's builtin (DSPARK_PLUGIN=off).",
        )
    if found.missing:
        first = found.missing[0]
        kind = next((what for part, what in _PARTS if part in first), None)
        mtp = all(name.startswith("mtp.") for name in found.missing)
        kind = kind or ("drafter" if mtp else "target")
        raise CheckpointError(
            f"The checkpoint lacks {len(found.missing)} tensors, the first {first} ({kind}).",
            expected="every tensor that config.json implies",
            fix=_AGAIN if not found.unknown else _MIXED,
        )
    if found.unknown:
        raise CheckpointError(
            f"The checkpoint has {len(found.unknown)} tensors more, the first {found.unknown[0]}.",
            expected="the tensors that config.json implies, and no others",
            fix=_MIXED,
        )


def _check_tensors(config: Config, found: Mapped, stored: Mapping[str, Tensor]) -> bool:
    """Shapes and types of all tensors; True where some are quantised."""
    quantised = False
    fp8_experts = config.get("expert_dtype") == "fp8"
    by_usual = {usual(name): header for name, header in stored.items()}
    for name, size in plain_bundle(config).items():
        header = by_usual[name]
        scale = name.removesuffix("weight") + "scale"
        scaled = by_usual.get(scale) or by_usual.get(name + "_scale_inv")
        if scaled is None and _is_plain(name, header):
            if header.shape != size:
                _refuse(name, header, list(size))
            continue
        wanted = published(name, size, fp8_experts=fp8_experts)
        if scaled is None and len(wanted) == 2 and _kind(header) == tuple(wanted[name]):
            raise CheckpointError(
                f"{name} is {header.dtype} and has no {scale}.",
                expected="a scale beside every quantised weight",
                fix=_AGAIN,
            )
        if _kind(header) != tuple(wanted[name]):
            _refuse(name, header, [wanted[name].dtype, *wanted[name].shape])
        if len(wanted) == 2 and scaled is not None:
            quantised = True
            if scaled.shape != wanted[scale].shape:
                _refuse(scale, scaled, list(wanted[scale].shape))
    return quantised


def _kind(header: Tensor) -> tuple[str, tuple[int, ...]]:
    return header.dtype, header.shape


def _is_plain(name: str, header: Tensor) -> bool:
    if name.endswith("tid2eid"):
        return header.dtype in ("I64", "I32")
    return header.dtype in _FLOATS


def _refuse(name: str, header: Tensor, wanted: list[Any]) -> NoReturn:
    """A tensor of another shape or type, told by what it belongs to."""
    said = f"{name} is {header.dtype} {list(header.shape)}."
    expected = f"{wanted} (from config.json)"
    if "markov_head" in name or "confidence_head" in name:
        raise CheckpointError(
            f"The drafter's heads do not fit config.json: {said}",
            expected=f"{expected}: dspark_markov_rank, hidden_size and vocab_size",
            fix=_MIXED,
        )
    if name.startswith("mtp."):
        raise CheckpointError(
            f"The drafter belongs to another target: {said}",
            expected=f"{expected}: the target's sizes, and dspark_target_layer_ids layers read",
            fix=_MIXED,
        )
    raise CheckpointError(said, expected=expected, fix=_MIXED)
