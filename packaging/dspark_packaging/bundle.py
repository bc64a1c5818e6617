"""A target checkpoint with its drafter inside, and apart again.

Two layouts, because SGLang knows two:

- ``mtp``: the drafter's tensors under ``mtp.*`` beside the target's, its ``dspark_*`` keys in
  ``config.json``, as DeepSeek-V4-Pro-DSpark is published. SGLang reads it for DeepSeek-V4 only.
- ``folder``: a packaged drafter in ``dspark/``, which SGLang finds in any target's folder.

The target's files are linked; only the index, ``config.json`` and the records are written. What the
bundle had to change is kept beside it under ``target-`` and ``drafter-``, so that splitting gives
back the original bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec

from dspark_packaging.bundle_record import BundleRecord, Layout
from dspark_packaging.drafter import V4_PREFIX, Drafter, of_drafter
from dspark_packaging.errors import PackageError
from dspark_packaging.layout import (
    CONFIG_FILE,
    DRAFT_FOLDER,
    FROM_DRAFTER,
    FROM_TARGET,
    GENERATED,
    INDEX_FILE,
    is_target_data,
    package_files,
    require_inside,
    visible_entries,
)
from dspark_packaging.manifest import MANIFEST_FILE
from dspark_packaging.progress import Meter
from dspark_packaging.schemas import BUNDLE_FILE
from dspark_packaging.shards import Shards, Stored, index_bytes
from dspark_packaging.subset import subset_bytes, write_subset
from dspark_packaging.transfer import Job
from dspark_sglang.artifacts import SCHEMA_VERSION
from dspark_sglang.checkpoint import BUNDLED_KEYS

_V4 = "DeepseekV4ForCausalLM"


class Rewrite(msgspec.Struct, frozen=True):
    """A shard that cannot be linked because it holds tensors that are replaced."""

    source: Path
    name: str
    keep: list[str]

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return subset_bytes(self.source, self.keep)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that makes a bundle, before any byte moves."""

    record: BundleRecord
    jobs: list[Job]
    rewrites: list[Rewrite]
    #: Small files, whole.
    written: dict[str, bytes]

    @property
    def nbytes(self) -> int:
        """Bytes to bring or write."""
        placed = sum(job.source.stat().st_size for job in self.jobs)
        return placed + sum(rewrite.nbytes for rewrite in self.rewrites)


def choose_layout(target: dict[str, Any], drafter: Drafter, wanted: Layout | None) -> Layout:
    """The layout that SGLang can read for this target.

    Raises:
        PackageError: ``mtp`` for anything but DeepSeek-V4, or ``folder`` for a drafter that only
            exists under ``mtp.*``.
    """
    v4 = _V4 in (target.get("architectures") or ()) and drafter.config.bundled
    fits: Layout = "mtp" if v4 else "folder"
    if drafter.config.bundled and not v4:
        raise PackageError(
            f"The drafter's tensors lie under {V4_PREFIX}*; the target is a "
            f"{', '.join(target.get('architectures') or ['model of unknown class'])}.",
            expected=f"a {_V4}, whose drafters have that layout",
            fix="Choose the target that the drafter was made for.",
        )
    if wanted not in (None, fits):
        raise PackageError(
            f"--layout {wanted} was asked for.",
            expected=f"{fits}: SGLang reads mtp.* for {_V4} only, and {DRAFT_FOLDER}/ otherwise",
            fix=f"Leave --layout out, or use {fits}.",
        )
    return fits


def plan_target(target: Path, replaced: list[str], shards: Shards) -> tuple[Plan, dict[str, str]]:
    """What of the target is linked, and which of its shards have to be written anew.

    Returns:
        A plan without drafter and record, and the target's files by old and new name.

    Raises:
        PackageError: a file that links out of the folder.
    """
    gone = set(replaced)
    jobs: list[Job] = []
    rewrites: list[Rewrite] = []
    files: dict[str, str] = {}
    left_out: list[str] = []
    held = shards.by_file()
    for entry in visible_entries(target):
        name = entry.name
        if entry.suffix == ".safetensors":
            own = held[name]
            keep = [key for key in own if key not in gone]
            if len(keep) == len(own):
                jobs.append(Job(entry, name))
            elif keep:
                rewrites.append(Rewrite(entry, name, keep))
            files |= {name: name} if keep or not own else {}
            continue
        kept = name in (CONFIG_FILE, INDEX_FILE, BUNDLE_FILE, *GENERATED)
        if entry.is_dir() or not (kept or is_target_data(name)):
            left_out.append(name)
            continue
        require_inside(entry, target)
        files[name] = FROM_TARGET + name if kept else name
        jobs.append(Job(entry, files[name]))
    empty = BundleRecord(
        schema_version=SCHEMA_VERSION,
        layout="folder",
        gamma=1,
        drafter_sha256="",
        target_files=files,
    )
    record = msgspec.structs.replace(empty, left_out=left_out, replaced=replaced)
    return Plan(record=record, jobs=jobs, rewrites=rewrites, written={}), files


def plan_folder(target: Path, drafter_dir: Path, drafter: Drafter, shards: Shards) -> Plan:
    """A plan for the layout with a packaged drafter in ``dspark/``."""
    base, files = plan_target(target, [], shards)
    # Nothing of the target changes but its card.
    names = {name: CONFIG_FILE if name == CONFIG_FILE else here for name, here in files.items()}
    names |= {INDEX_FILE: INDEX_FILE} if INDEX_FILE in names else {}
    jobs = [Job(job.source, names.get(job.source.name, job.name)) for job in base.jobs]
    jobs += [
        Job(path, f"{DRAFT_FOLDER}/{path.relative_to(drafter_dir).as_posix()}")
        for path in package_files(drafter_dir)
    ]
    manifest = (drafter_dir / MANIFEST_FILE).read_bytes()
    record = msgspec.structs.replace(
        base.record,
        layout="folder",
        gamma=drafter.config.gamma,
        drafter_sha256=drafter.digest,
        target_files=names,
        drafter_manifest_sha256=hashlib.sha256(manifest).hexdigest(),
    )
    return Plan(record=record, jobs=jobs, rewrites=[], written={})


def plan_mtp(
    target: Path, drafter_dir: Path, drafter: Drafter, shards: Shards, *, replace_mtp: bool
) -> Plan:
    """A plan for the layout with the drafter's tensors under ``mtp.*``.

    Args:
        target: a DeepSeek-V4 checkpoint.
        drafter_dir: a packaged drafter of that layout.
        drafter: what was read from it.
        shards: of the target.
        replace_mtp: leave out the target's own ``mtp.*`` tensors (its next-token layer).

    Raises:
        PackageError: the target has ``mtp.*`` tensors and they may not be replaced, or a
            configuration that disagrees with the drafter's.
    """
    own = of_drafter(shards)
    if own and not replace_mtp:
        size = sum(stored.tensor.nbytes for stored in own.values())
        raise PackageError(
            f"{target} has {len(own)} tensors under {V4_PREFIX}* already ({size / 1e9:.2f} GB).",
            expected="a target without them: its loader would mix them with the drafter's",
            fix="Pass --replace-mtp to leave them out (the shards that hold them are written "
            "anew, and splitting cannot bring them back), or use the original target.",
        )
    base, files = plan_target(target, sorted(own), shards)
    tensors = {name: stored for name, stored in shards.tensors.items() if name not in own}
    theirs = [p for p in visible_entries(drafter_dir) if p.suffix == ".safetensors"]
    names = {
        path.name: f"dspark-{number:05d}-of-{len(theirs):05d}.safetensors"
        for number, path in enumerate(theirs, start=1)
    }
    drafter_files = dict(names)
    jobs = [*base.jobs, *(Job(path, names[path.name]) for path in theirs)]
    for path in visible_entries(drafter_dir):
        if path.name in names or path.is_dir():
            continue
        kept = path.name in (CONFIG_FILE, INDEX_FILE, *GENERATED) or path.name in files
        drafter_files[path.name] = FROM_DRAFTER + path.name if kept else path.name
        jobs.append(Job(path, drafter_files[path.name]))
    for name, stored in _placed(drafter_dir, names):
        tensors[name] = stored
    config = merged_config(target, drafter)
    record = msgspec.structs.replace(
        base.record,
        layout="mtp",
        gamma=drafter.config.gamma,
        drafter_sha256=drafter.digest,
        target_files=files,
        drafter_files=drafter_files,
        replaced_bytes=sum(stored.tensor.nbytes for stored in own.values()),
    )
    written = {CONFIG_FILE: config, INDEX_FILE: index_bytes(tensors)}
    return Plan(record=record, jobs=jobs, rewrites=base.rewrites, written=written)


def _placed(drafter_dir: Path, names: dict[str, str]) -> list[tuple[str, Stored]]:
    from dspark_sglang.safetensors import read_header

    return [
        (key, Stored(here, tensor))
        for name, here in names.items()
        for key, tensor in read_header(drafter_dir / name).tensors.items()
    ]


def merged_config(target: Path, drafter: Drafter) -> bytes:
    """The target's ``config.json`` with the drafter's ``dspark_*`` keys.

    Raises:
        PackageError: a size that both name and that differs, or keys that are there already.
    """
    config: dict[str, Any] = json.loads((target / CONFIG_FILE).read_bytes())
    present = [key for key in BUNDLED_KEYS if config.get(key) is not None]
    if present:
        raise PackageError(
            f"{target} says {', '.join(present)} already: it carries a drafter.",
            expected="a target without one",
            fix="Split it first with `dspark package BUNDLE OUT --split`.",
        )
    for key, value in drafter.raw.items():
        said = config.get(key, value)
        scalar = isinstance(value, (int, float, bool)) and not key.startswith("dspark_")
        if scalar and said != value:
            raise PackageError(
                f"The drafter's config.json says {key} {value}.",
                expected=f"{said}, as in {target / CONFIG_FILE}",
                fix="Use the target that the drafter was made for, at the same revision.",
            )
    extra = {k: v for k, v in drafter.raw.items() if _is_dspark(k)}
    return json.dumps(config | extra, indent=2, ensure_ascii=False).encode() + b"\n"


def _is_dspark(key: str) -> bool:
    return key.startswith("dspark_") or key in (
        "enable_confidence_head",
        "confidence_head_with_markov",
        "sample_from_anchor",
    )


def split_config(config: dict[str, Any]) -> bytes:
    """A bundle's ``config.json`` without what belongs to its drafter."""
    plain = {key: value for key, value in config.items() if not _is_dspark(key)}
    return json.dumps(plain, indent=2, ensure_ascii=False).encode() + b"\n"


def make_rewrites(plan: Plan, folder: Path, meter: Meter) -> None:
    """Write the shards that cannot be linked."""
    for rewrite in plan.rewrites:
        if (folder / rewrite.name).exists():
            meter(rewrite.nbytes)
        else:
            write_subset(rewrite.source, folder / rewrite.name, rewrite.keep, meter)
