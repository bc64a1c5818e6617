"""What a checkpoint directory says about its tensors, without reading any weight."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dspark_sglang.checkpoint import read_json, weight_files
from dspark_sglang.errors import CheckpointError
from dspark_sglang.planning.tensors import Tensor, disk_bytes
from dspark_sglang.safetensors import Tensor as Header
from dspark_sglang.safetensors import read_header

INDEX = "model.safetensors.index.json"
#: Names that SGLang skips when it loads, wherever they are.
_SKIPPED = ("rotary_emb.inv_freq",)
#: Copies of the target's that drafters and tied targets may carry; SGLang leaves them out.
COPIES = ("embed_tokens.weight", "lm_head.weight")
_BOTH = "Weights and config.json belong to different checkpoints or revisions: download both."


class Stored(NamedTuple):
    """What is known of a checkpoint's tensors: always names, sizes where shards are at hand."""

    names: frozenset[str]
    headers: dict[str, Header]
    #: Bytes of all tensors by the index; None without one.
    total: int | None


def read(directory: Path, prefix: str = "") -> Stored:
    """Names of all tensors, and their headers where every shard is there.

    Args:
        prefix: left out of names that begin with it.

    Raises:
        CheckpointError: neither index nor weights, or an index that names shards which lack a tensor.
    """
    index, files = directory / INDEX, weight_files(directory)
    total, weights = None, None
    if index.is_file():
        raw = read_json(index, what="an index of safetensors shards")
        weights, total = raw.get("weight_map"), (raw.get("metadata") or {}).get("total_size")
        if not isinstance(weights, dict) or not weights:
            raise CheckpointError(
                f"{index} has no weight_map.",
                expected="tensor names and their shards",
                fix="Download the index again.",
            )
    elif not files:
        raise CheckpointError(
            f"{directory} has no {INDEX} and no .safetensors file.",
            expected="the index beside config.json (weights are not needed)",
            fix=f"`hf download NAME config.json {INDEX}`, or pass --config-only to trust the "
            "configuration alone.",
        )
    shards = {directory / str(shard) for shard in weights.values()} if weights else set(files)
    headers: dict[str, Header] = {}
    if shards <= set(files):
        for path in sorted(shards):
            headers |= read_header(path).tensors
    if weights and headers and headers.keys() != weights.keys():
        odd = sorted(headers.keys() ^ weights.keys())
        raise CheckpointError(
            f"Index and shards in {directory} differ in {len(odd)} tensors, the first {odd[0]}.",
            expected="an index that lists what the shards hold",
            fix="They belong to different revisions: download both again.",
        )
    return Stored(
        frozenset(name.removeprefix(prefix) for name in weights or headers),
        {name.removeprefix(prefix): header for name, header in headers.items()},
        total if isinstance(total, int) else None,
    )


def check(stored: Stored, computed: Iterable[Tensor], *, where: Path) -> None:
    """Compare what is stored with what the configuration implies.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or type, or the sum differs.
    """
    wanted = {tensor.name: tensor for tensor in computed if not tensor.derived}
    found = {name for name in stored.names if not name.endswith(_SKIPPED)}
    copies = {name for name in found if name.endswith(COPIES) and name not in wanted}
    _same_names(found - copies, wanted, where)
    for name, tensor in wanted.items():
        header = stored.headers.get(name)
        plain = {"BF16", "F16", "F32"}
        if header is None or (
            header.shape == tensor.shape
            and (header.dtype == tensor.stored or {header.dtype, tensor.stored} <= plain)
        ):
            continue
        raise CheckpointError(
            f"{tensor.name} in {where} is {header.dtype} {list(header.shape)}.",
            expected=f"{tensor.stored} {list(tensor.shape)} (from config.json)",
            fix=_BOTH,
        )
    total = disk_bytes(wanted.values())
    # Plain tensors may be stored wider than assumed; more than that is another checkpoint.
    told = None if copies or stored.headers else stored.total
    if told is not None and abs(told - total) > 0.01 * total:
        raise CheckpointError(
            f"The index in {where} says {told / 1e9:.2f} GB.",
            expected=f"{total / 1e9:.2f} GB (from config.json)",
            fix=_BOTH,
        )


def _same_names(found: set[str], wanted: dict[str, Tensor], where: Path) -> None:
    missing, unknown = sorted(wanted.keys() - found), sorted(found - wanted.keys())
    what = [
        f"{len(names)} tensors {verb}, the first {names[0]}"
        for names, verb in ((missing, "are missing"), (unknown, "are unknown"))
        if names
    ]
    if what:
        raise CheckpointError(
            f"In {where} {' and '.join(what)}.",
            expected=f"the {len(wanted)} tensors that its config.json implies",
            fix=_BOTH + " If SGLang serves them all the same, pass --config-only.",
        )
