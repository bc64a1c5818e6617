"""Split a bundle: the target and the drafter, each in a folder of its own.

With the record that ``dspark package`` left, both come back byte for byte. A bundle of another
origin gives back the bytes of every tensor: shards that mix both are written anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dspark_packaging.bundle import Rewrite, split_config
from dspark_packaging.bundle_record import BundleRecord, read_record
from dspark_packaging.drafter import V4_PREFIX, of_drafter
from dspark_packaging.errors import PackageError
from dspark_packaging.eval_results import write_eval_results
from dspark_packaging.layout import (
    CONFIG_FILE,
    DRAFT_FOLDER,
    INDEX_FILE,
    is_target_data,
    package_files,
    require_apart,
    require_directory,
    visible_entries,
)
from dspark_packaging.manifest import MANIFEST_FILE, SIGNATURE_FILE
from dspark_packaging.progress import Meter, Progress, silent
from dspark_packaging.schemas import BUNDLE_FILE
from dspark_packaging.shards import Stored, index_bytes, read_shards
from dspark_packaging.subset import write_subset
from dspark_packaging.transfer import Job, Method, place
from dspark_packaging.workspace import workspace
from dspark_sglang.artifacts import write_bytes
from dspark_sglang.checkpoint import read_config

TARGET, DRAFTER = "target", "drafter"


class Split(NamedTuple):
    """What came apart."""

    target: Path
    drafter: Path
    #: Whether both are the originals, byte for byte.
    original: bool
    #: Tensors of the original target that the bundle had replaced, and files it had left out.
    lost: int
    resumed: bool


class _Parts(NamedTuple):
    jobs: list[Job]
    rewrites: list[tuple[Rewrite, str]]
    written: dict[str, bytes]


def split_bundle(
    bundle: Path, out: Path, *, method: Method = "auto", progress: Progress = silent
) -> Split:
    """Split ``bundle`` into ``out/target`` and ``out/drafter``.

    The bundle is only read. An interrupted split is continued by the same call.

    Raises:
        DSparkError: no bundle, damaged, ``out`` is taken, or no space is left.
    """
    bundle, out = bundle.absolute(), out.absolute()
    require_directory(bundle, "the folder of a bundle")
    require_apart(out, bundle)
    recorded = (bundle / BUNDLE_FILE).is_file()
    record = read_record(bundle) if recorded else None
    parts = _by_record(bundle, record) if record else _by_names(bundle)
    sources = [job.source for job in parts.jobs] + [r.source for r, _ in parts.rewrites]
    total = sum(path.stat().st_size for path in sources)
    with workspace(out, sources) as space:
        with progress("files", total) as meter:
            for job in parts.jobs:
                (space.folder / job.name).parent.mkdir(parents=True, exist_ok=True)
                place(job, space.folder, method, meter)
            _rewrite(parts, space.folder, meter)
        for name, content in parts.written.items():
            write_bytes(space.folder / name, content)
        if record and record.layout == "mtp":
            write_eval_results(space.folder / DRAFTER)
        resumed = space.resumed
    lost = len(record.replaced) + len(record.left_out) if record else 0
    return Split(
        target=out / TARGET,
        drafter=out / DRAFTER,
        original=record is not None and not record.replaced,
        lost=lost,
        resumed=resumed,
    )


def _by_record(bundle: Path, record: BundleRecord) -> _Parts:
    jobs = [Job(bundle / here, f"{TARGET}/{name}") for name, here in record.target_files.items()]
    jobs += [Job(bundle / here, f"{DRAFTER}/{name}") for name, here in record.drafter_files.items()]
    if record.layout == "folder":
        inside = bundle / DRAFT_FOLDER
        jobs += [
            Job(path, f"{DRAFTER}/{path.relative_to(inside).as_posix()}")
            for path in package_files(inside)
        ]
    for job in jobs:
        if not job.source.is_file():
            raise PackageError(
                f"{job.source} is missing.",
                expected=f"every file that {BUNDLE_FILE} names",
                fix="Download the bundle again.",
            )
    return _Parts(jobs=jobs, rewrites=[], written=_shorter_index(bundle, record))


def _shorter_index(bundle: Path, record: BundleRecord) -> dict[str, bytes]:
    """A new index where the target lost tensors: its own would name them still."""
    if not record.replaced:
        return {}
    shards = read_shards(bundle)
    kept = {k: stored for k, stored in shards.tensors.items() if not k.startswith(V4_PREFIX)}
    return {f"{TARGET}/{INDEX_FILE}": index_bytes(kept)}


def _by_names(bundle: Path) -> _Parts:
    """The parts of a bundle without a record: by the names of its tensors."""
    config = read_config(bundle, role="target")
    shards = read_shards(bundle)
    theirs = of_drafter(shards)
    if not theirs:
        raise PackageError(
            f"{bundle} has no {BUNDLE_FILE} and no tensor under {V4_PREFIX}*.",
            expected="a bundle of target and drafter",
            fix="Check the path; a stand-alone drafter needs no splitting.",
        )
    jobs: list[Job] = []
    rewrites: list[tuple[Rewrite, str]] = []
    where: dict[str, dict[str, Stored]] = {TARGET: {}, DRAFTER: {}}
    for file, own in shards.by_file().items():
        sides = _sides(own)
        for part, keep in sides.items():
            where[part] |= {name: shards.tensors[name] for name in keep}
            if len(sides) == 1:
                jobs.append(Job(bundle / file, f"{part}/{file}"))
            else:
                rewrites.append((Rewrite(bundle / file, file, keep), part))
    skipped = (CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, SIGNATURE_FILE)
    jobs += [
        Job(path, f"{TARGET}/{path.name}")
        for path in visible_entries(bundle)
        if path.is_file() and is_target_data(path.name) and path.name not in skipped
    ]
    written = {f"{part}/{INDEX_FILE}": index_bytes(tensors) for part, tensors in where.items()}
    written[f"{TARGET}/{CONFIG_FILE}"] = split_config(config)
    written[f"{DRAFTER}/{CONFIG_FILE}"] = (bundle / CONFIG_FILE).read_bytes()
    return _Parts(jobs=jobs, rewrites=rewrites, written=written)


def _sides(own: list[str]) -> dict[str, list[str]]:
    sides = {
        TARGET: [name for name in own if not name.startswith(V4_PREFIX)],
        DRAFTER: [name for name in own if name.startswith(V4_PREFIX)],
    }
    return {part: names for part, names in sides.items() if names}


def _rewrite(parts: _Parts, folder: Path, meter: Meter) -> None:
    for rewrite, part in parts.rewrites:
        out = folder / part / rewrite.name
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.exists():
            write_subset(rewrite.source, out, rewrite.keep, meter)
