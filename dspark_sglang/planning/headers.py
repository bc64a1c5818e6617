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


class Stored(NamedTuple):
    """What is known of a checkpoint's tensors: always names, sizes where shards are at hand."""

    names: frozenset[str]
    headers: dict[str, Header]
    #: Bytes of all tensors by the index; None without one.
    total: int | None


def read(directory: Path) -> Stored:
    """Names of all tensors, and their headers where every shard is there.

    Raises:
        CheckpointError: neither index nor weights, or an index that names shards which lack a tensor.
    """
    index, files = directory / INDEX, weight_files(directory)
    if not index.is_file():
        if not files:
            raise CheckpointError(
                f"{directory} has no {INDEX} and no .safetensors file.",
                expected="the index beside config.json (weights are not needed)",
                fix=f"`hf download NAME config.json {INDEX}`, or pass --config-only to trust the "
                "configuration alone.",
            )
        headers = _merged(files)
        return Stored(frozenset(headers), headers, None)
    raw = read_json(index, what="an index of safetensors shards")
    weights, metadata = raw.get("weight_map"), raw.get("metadata") or {}
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(
            f"{index} has no weight_map.",
            expected="tensor names and their shards",
            fix="Download the index again.",
        )
    total = metadata.get("total_size")
    shards = {directory / str(shard) for shard in weights.values()}
    headers = _merged(sorted(shards)) if shards <= set(files) else {}
    if headers and headers.keys() != weights.keys():
        odd = sorted(headers.keys() ^ weights.keys())
        raise CheckpointError(
            f"Index and shards in {directory} differ in {len(odd)} tensors, the first {odd[0]}.",
            expected="an index that lists what the shards hold",
            fix="They belong to different revisions: download both again.",
        )
    return Stored(frozenset(weights), headers, int(total) if isinstance(total, int) else None)


def _merged(files: Iterable[Path]) -> dict[str, Header]:
    found: dict[str, Header] = {}
    for path in files:
        found |= read_header(path).tensors
    return found


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
        if header is not None:
            _same_tensor(header, tensor, where)
    total = disk_bytes(wanted.values())
    if stored.total is not None and not copies and not stored.headers:
        _same_total(stored.total, total, where)


def _same_names(found: set[str], wanted: dict[str, Tensor], where: Path) -> None:
    missing, unknown = sorted(wanted.keys() - found), sorted(found - wanted.keys())
    if missing or unknown:
        what = [
            f"{len(names)} tensors {verb}, the first {names[0]}"
            for names, verb in ((missing, "are missing"), (unknown, "are unknown"))
            if names
        ]
        raise CheckpointError(
            f"In {where} {' and '.join(what)}.",
            expected=f"the {len(wanted)} tensors that its config.json implies",
            fix="Weights and config.json belong to different checkpoints or revisions: download both. "
            "If SGLang serves them all the same, pass --config-only.",
        )


def _same_tensor(header: Header, tensor: Tensor, where: Path) -> None:
    plain = {"BF16", "F16", "F32"}
    same_kind = header.dtype == tensor.stored or {header.dtype, tensor.stored} <= plain
    if header.shape == tensor.shape and same_kind:
        return
    raise CheckpointError(
        f"{tensor.name} in {where} is {header.dtype} {list(header.shape)}.",
        expected=f"{tensor.stored} {list(tensor.shape)} (from config.json)",
        fix="Weights and config.json belong to different checkpoints or revisions: download both.",
    )


def _same_total(said: int, computed: int, where: Path) -> None:
    # Plain tensors may be stored wider than assumed; more than that is another checkpoint.
    if abs(said - computed) > 0.01 * computed:
        raise CheckpointError(
            f"The index in {where} says {said / 1e9:.2f} GB.",
            expected=f"{computed / 1e9:.2f} GB (from config.json)",
            fix="Index and config.json belong to different checkpoints or revisions: download both.",
        )
