"""A target and its drafter as a plan sees them: tensors, pools and a few sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from dspark_sglang.artifacts import DRAFT_VOCAB_FILE
from dspark_sglang.checkpoint import (
    INDEX_FILE,
    read_config,
    read_index,
    read_json,
    read_shards,
    revision_of,
    weight_files,
)
from dspark_sglang.checkpoint import Tensor as Header
from dspark_sglang.errors import CheckpointError, ConfigError
from dspark_sglang.layouts import reading
from dspark_sglang.layouts.base import (
    MIXED,
    Stored,
    check_fits,
    compare,
    drafter_at,
    is_bundle,
    layout_of,
    resolve,
)
from dspark_sglang.layouts.dense.tensors import COPIES
from dspark_sglang.layouts.memory import (
    CompressedKv,
    DrafterMemory,
    DraftKv,
    Kv,
    Loading,
    TargetMemory,
    Tensor,
    disk_bytes,
)
from dspark_sglang.planning import published
from dspark_sglang.planning.kv import COMPRESSED_PAGE, DEFAULT_PAGE

#: Tensors that a checkpoint may have besides: SGLang skips them when it loads.
_LEFT = (*COPIES, "rotary_emb.inv_freq")
_PROVENANCE = "provenance.json"


class Source(msgspec.Struct, frozen=True):
    """Where a model's configuration comes from."""

    #: What to write after a flag of SGLang's.
    name: str
    config: dict[str, Any]
    #: None for a published configuration.
    directory: Path | None


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A target with its drafter (none for serving without speculation)."""

    architecture: str
    tensors: list[Tensor]
    draft_tensors: list[Tensor]
    #: What a DSpark drafter replaces in the checkpoint.
    mtp_tensors: list[Tensor]
    kv: Kv
    draft_kv: DraftKv
    #: Most tokens of a request.
    context: int
    #: Drafted tokens a round; 0 without a drafter.
    gamma: int
    #: Bytes of rotary tables on one rank.
    rope_bytes: int
    #: Heads of the target's attention and of the drafter's, where it has some of its own.
    heads: tuple[int, ...]
    target: Source
    drafter: Source | None
    bundled: bool = False

    @property
    def page_size(self) -> int:
        """Tokens a page of the pool has unless told otherwise."""
        return COMPRESSED_PAGE if isinstance(self.kv, CompressedKv) else DEFAULT_PAGE


def find(value: str, *, role: str) -> Source:
    """A model directory, or the name of a published configuration.

    Raises:
        CheckpointError: neither.
    """
    path = Path(value).expanduser()
    known = published.find(value) if not path.is_dir() else None
    if known is not None:
        return Source(known.checkpoint, known.config, None)
    if not path.is_dir():
        raise CheckpointError(
            f"{role} {value} is no directory.",
            expected=f"a model directory, or one of {', '.join(published.names())}",
            fix="Check the path, or download config.json and the index first with `hf download`.",
        )
    return Source(str(path), read_config(path, role=role), path)


def load(target: str, drafter: str | None, loading: Loading) -> Model:
    """Read a target and its drafter.

    Args:
        target: directory or published name.
        drafter: the same; None: the one bundled in the target, if any.
        loading: how weights will be kept.

    Raises:
        CheckpointError: unknown architecture, missing or contradictory files, or a drafter of
            another target or revision.
    """
    source = find(target, role="target")
    layout = layout_of(source.config)
    own = find(drafter, role="drafter") if drafter is not None else _inside(source)
    if own is not None and layout.bundled:
        _same_bundle(source, own)
    elif own is not None:
        _check(own, source)
    bundled = layout.bundled and is_bundle(source.config)
    drafting = own if bundled or not layout.bundled else None
    memory: TargetMemory = resolve(f"{layout.memory}:describe_target")(source.config, loading)
    drafted, gamma = DrafterMemory(tensors=[], kv=DraftKv()), 0
    if drafting is not None:
        theirs = layout_of(drafting.config)
        drafted = resolve(f"{theirs.memory}:describe_drafter")(drafting.config, loading)
        gamma = theirs.read(drafting.config).gamma
    model = Model(
        architecture=reading.architecture(source.config),
        tensors=memory.tensors,
        draft_tensors=drafted.tensors,
        mtp_tensors=memory.mtp_tensors,
        kv=memory.kv,
        draft_kv=drafted.kv,
        context=memory.context,
        gamma=gamma,
        rope_bytes=memory.rope_bytes,
        heads=(memory.heads, *([drafted.heads] if drafted.heads else [])),
        target=source,
        drafter=drafting,
        bundled=bundled,
    )
    if not loading.config_only:
        inside = model.draft_tensors if bundled else model.mtp_tensors
        _check_stored(source, [*model.tensors, *inside])
        if drafting is not None and not bundled:
            _check_stored(drafting, model.draft_tensors, "model.")
    return model


def _inside(target: Source) -> Source | None:
    """The drafter that SGLang finds in a target's directory, or one that its published configuration names."""
    if is_bundle(target.config):
        return target
    nested = None if target.directory is None else drafter_at(target.directory)
    return None if nested is None else find(str(nested), role="drafter")


def _check_stored(source: Source, computed: Sequence[Tensor], prefix: str = "") -> None:
    """Compare what a directory says of its tensors, without their shards too, with what its configuration implies."""
    if source.directory is None:
        return
    stored, total = _stored(source.directory)
    stored = {name.removeprefix(prefix): header for name, header in stored.items()}
    wanted = {t.name: Stored(t.stored, t.shape) for t in computed if not t.derived}
    leave = {name for name in stored if name.endswith(_LEFT) and name not in wanted}
    compare(
        stored,
        wanted,
        where=source.directory,
        leave=leave,
        fix=f"{MIXED} If SGLang serves them all the same, pass --config-only.",
    )
    size = disk_bytes(t for t in computed if not t.derived)
    # Plain tensors may be stored wider than assumed; more than that is another checkpoint.
    if total and not leave and None in stored.values() and abs(total - size) > 0.01 * size:
        raise CheckpointError(
            f"The index in {source.directory} says {total / 1e9:.2f} GB.",
            expected=f"{size / 1e9:.2f} GB (from config.json)",
            fix=MIXED,
        )


def _stored(directory: Path) -> tuple[dict[str, Header | None], int | None]:
    """Headers by name where every shard is there, else names alone, and the index's sum of bytes."""
    index = read_index(directory)
    here = {path.name for path in weight_files(directory)}
    if index is None and not here:
        raise CheckpointError(
            f"{directory} has no {INDEX_FILE} and no .safetensors file.",
            expected="the index beside config.json (weights are not needed)",
            fix=f"`hf download NAME config.json {INDEX_FILE}`, or pass --config-only to trust the "
            "configuration alone.",
        )
    if index is None or index.files <= here:
        return {**read_shards(directory).headers}, None
    return dict.fromkeys(index.files_of), index.total


def has_draft_vocabulary(drafter: Source | None) -> bool:
    """Whether a draft vocabulary lies beside the drafter's weights."""
    directory = None if drafter is None else drafter.directory
    return directory is not None and (directory / DRAFT_VOCAB_FILE).is_file()


def _same_bundle(target: Source, drafter: Source) -> None:
    """Refuse a drafter bundled in another checkpoint, or in another revision of this one."""
    ours = {key: value for key, value in target.config.items() if not key.startswith("_")}
    theirs = {key: value for key, value in drafter.config.items() if not key.startswith("_")}
    different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))  # fmt: skip
    if different:
        raise CheckpointError(
            f"Target {target.name} and drafter {drafter.name} differ in {', '.join(different[:4])}.",
            expected="the drafter bundled in the target's own checkpoint",
            fix="Leave --drafter out.",
        )
    made_for = None if drafter.directory is None else revision_of(drafter.directory)
    _same_revision(made_for, target, drafter)


def _check(own: Source, target: Source) -> None:
    """Refuse a drafter of another target, and one that SGLang cannot run."""
    layout = layout_of(own.config)
    layout.check_served(own.config, target.config)
    check_fits(layout.read(own.config), target.config, name=target.name)
    pinned = None
    if own.directory is not None and (own.directory / _PROVENANCE).is_file():
        said = read_json(own.directory / _PROVENANCE, what="a drafter's provenance").get("target")
        pinned = said.get("revision") if isinstance(said, dict) else None
    _same_revision(pinned, target, own)


def _same_revision(theirs: str | None, target: Source, drafter: Source) -> None:
    ours = None if target.directory is None else revision_of(target.directory)
    if ours and theirs and ours != theirs:
        raise ConfigError(
            f"{target.name} is at revision {ours[:12]}, the drafter {drafter.name} belongs to "
            f"{theirs[:12]}.",
            expected="a drafter and its target of the same revision",
            fix=f"Download the target again with `hf download --revision {theirs}`.",
        )
