"""A target checkpoint with its drafter inside, and split again.

Two layouts, because SGLang knows two:

- ``mtp``: the drafter's tensors under ``mtp.*`` beside the target's, its ``dspark_*`` keys in
  ``config.json``, as DeepSeek-V4-Pro-DSpark is published. SGLang reads it for DeepSeek-V4 only.
- ``folder``: a packaged drafter in ``dspark/``, which SGLang finds in any target's folder.

The target's files are linked; only the index, ``config.json`` and the records are written. What the
bundle had to change is kept beside it under ``target-`` and ``drafter-``, so that splitting gives
back the original bytes. A bundle of another origin gives back the bytes of every tensor.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dspark_packaging import layout
from dspark_packaging.card import card_of
from dspark_packaging.drafter import Drafter, index_bytes, read_shards
from dspark_packaging.errors import PackageError
from dspark_packaging.hub_rules import results_yaml, write_results
from dspark_packaging.manifest import write_manifest
from dspark_packaging.records import (
    BundleRecord,
    EvalArtifact,
    Layout,
    open_package,
    read_bundle,
    read_record,
)
from dspark_packaging.transfer import (
    Job,
    Method,
    Plan,
    Progress,
    Rewrite,
    carry_out,
    silent,
    workspace,
)
from dspark_packaging.verify import (
    Verified,
    check_tokenizer,
    verify_artifact,
    verify_bundle,
    verify_pair,
)
from dspark_sglang.artifacts import SCHEMA_VERSION, write_bytes, write_json
from dspark_sglang.checkpoint import Shards, Stored, read_config, read_header
from dspark_sglang.layouts.base import BUNDLED_KEYS, layout_of
from dspark_sglang.layouts.v4.config import ARCHITECTURE

_AGAIN = "Download the bundle again."
#: Where splitting puts the two.
TARGET, DRAFTER = "target", "drafter"


def choose_layout(target: dict[str, Any], drafter: Drafter) -> Layout:
    """The layout that SGLang can read for this target: ``mtp.*`` for DeepSeek-V4 only.

    Raises:
        PackageError: a drafter that only exists under ``mtp.*``, for another target.
    """
    if not drafter.layout.fits(target):
        raise PackageError(
            f"The drafter's tensors lie under {drafter.layout.prefix}*; the target is a "
            f"{', '.join(target.get('architectures') or ['model of unknown class'])}.",
            expected=f"a {ARCHITECTURE}, whose drafters have that layout",
            fix="Choose the target that the drafter was made for.",
        )
    return "mtp" if drafter.layout.bundled else "folder"


def plan_target(target: Path, replaced: list[str], shards: Shards) -> tuple[Plan, BundleRecord]:
    """What of the target is linked, and which of its shards have to be written anew.

    Returns:
        A plan without the drafter, and a record without what belongs to the drafter.

    Raises:
        PackageError: a file that links out of the folder.
    """
    gone = set(replaced)
    jobs: list[Job] = []
    rewrites: list[Rewrite] = []
    files: dict[str, str] = {}
    left_out: list[str] = []
    held = shards.by_file()
    for entry in layout.visible_entries(target):
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
        kept = name in (
            layout.CONFIG_FILE,
            layout.INDEX_FILE,
            layout.BUNDLE_FILE,
            *layout.GENERATED,
        )
        if entry.is_dir() or not (kept or layout.is_target_data(name)):
            left_out.append(name)
            continue
        layout.require_inside(entry, target)
        files[name] = layout.FROM_TARGET + name if kept else name
        jobs.append(Job(entry, files[name]))
    record = BundleRecord(
        schema_version=SCHEMA_VERSION,
        layout="folder",
        gamma=1,
        drafter_sha256="",
        target_files=files,
        left_out=left_out,
        replaced=replaced,
    )
    return Plan(jobs=jobs, rewrites=rewrites, written={}), record


def plan_folder(
    target: Path, drafter_dir: Path, drafter: Drafter, shards: Shards
) -> tuple[Plan, BundleRecord]:
    """A plan for the layout with a packaged drafter in ``dspark/``."""
    base, record = plan_target(target, [], shards)
    files = record.target_files
    # Nothing of the target changes but its card.
    names = {
        name: layout.CONFIG_FILE if name == layout.CONFIG_FILE else here
        for name, here in files.items()
    }
    names |= {layout.INDEX_FILE: layout.INDEX_FILE} if layout.INDEX_FILE in names else {}
    jobs = [Job(job.source, names.get(job.source.name, job.name)) for job in base.jobs]
    jobs += [
        Job(path, f"{layout.DRAFT_FOLDER}/{path.relative_to(drafter_dir).as_posix()}")
        for path in layout.package_files(drafter_dir)
    ]
    manifest = (drafter_dir / layout.MANIFEST_FILE).read_bytes()
    record = msgspec.structs.replace(
        record,
        layout="folder",
        gamma=drafter.config.gamma,
        drafter_sha256=drafter.digest,
        target_files=names,
        drafter_manifest_sha256=hashlib.sha256(manifest).hexdigest(),
    )
    return Plan(jobs=jobs, rewrites=[], written={}), record


def plan_mtp(
    target: Path, drafter_dir: Path, drafter: Drafter, shards: Shards, *, replace_mtp: bool
) -> tuple[Plan, BundleRecord]:
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
    prefix = drafter.layout.prefix
    own = {name: shards.tensors[name] for name in drafter.layout.own(shards.tensors)}
    if own and not replace_mtp:
        size = sum(stored.tensor.nbytes for stored in own.values())
        raise PackageError(
            f"{target} has {len(own)} tensors under {prefix}* already ({size / 1e9:.2f} GB).",
            expected="a target without them: its loader would mix them with the drafter's",
            fix="Pass --replace-mtp to leave them out (the shards that hold them are written "
            "anew, and splitting cannot bring them back), or use the original target.",
        )
    base, record = plan_target(target, sorted(own), shards)
    files = record.target_files
    tensors = {name: stored for name, stored in shards.tensors.items() if name not in own}
    theirs = [p for p in layout.visible_entries(drafter_dir) if p.suffix == ".safetensors"]
    names = {
        path.name: f"dspark-{number:05d}-of-{len(theirs):05d}.safetensors"
        for number, path in enumerate(theirs, start=1)
    }
    drafter_files = dict(names)
    jobs = [*base.jobs, *(Job(path, names[path.name]) for path in theirs)]
    for path in layout.visible_entries(drafter_dir):
        if path.name in names or path.is_dir():
            continue
        kept = (
            path.name in (layout.CONFIG_FILE, layout.INDEX_FILE, *layout.GENERATED)
            or path.name in files
        )
        drafter_files[path.name] = layout.FROM_DRAFTER + path.name if kept else path.name
        jobs.append(Job(path, drafter_files[path.name]))
    for name, here in names.items():
        held = read_header(drafter_dir / name).tensors
        tensors |= {key: Stored(here, tensor) for key, tensor in held.items()}
    config = merged_config(target, drafter)
    record = msgspec.structs.replace(
        record,
        layout="mtp",
        gamma=drafter.config.gamma,
        drafter_sha256=drafter.digest,
        drafter_files=drafter_files,
        replaced_bytes=sum(stored.tensor.nbytes for stored in own.values()),
    )
    written = {layout.CONFIG_FILE: config, layout.INDEX_FILE: index_bytes(tensors)}
    return Plan(jobs=jobs, rewrites=base.rewrites, written=written), record


def merged_config(target: Path, drafter: Drafter) -> bytes:
    """The target's ``config.json`` with the drafter's ``dspark_*`` keys.

    Raises:
        PackageError: a size that both name and that differs, or keys that are there already.
    """
    config: dict[str, Any] = json.loads((target / layout.CONFIG_FILE).read_bytes())
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
                expected=f"{said}, as in {target / layout.CONFIG_FILE}",
                fix="Use the target that the drafter was made for, at the same revision.",
            )
    extra = {k: v for k, v in drafter.raw.items() if _is_dspark(k)}
    return _json(config | extra)


def _is_dspark(key: str) -> bool:
    return key.startswith("dspark_") or key in (
        "enable_confidence_head",
        "confidence_head_with_markov",
        "sample_from_anchor",
    )


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


class Options(NamedTuple):
    """How to bring two folders together."""

    method: Method = "auto"
    replace_mtp: bool = False


class Joined(NamedTuple):
    """A finished bundle."""

    verified: Verified
    #: Files by how they came: "link", "reflink", "copy", "there".
    methods: dict[str, int]
    written_bytes: int
    resumed: bool
    left_out: list[str]


def build(
    target: Path,
    drafter: Path,
    out: Path,
    options: Options = Options(),  # noqa: B008 - immutable
    *,
    progress: Progress = silent,
) -> Joined:
    """Join a target checkpoint and a packaged drafter in ``out``.

    The sources are only read. An interrupted build is continued by the same call.

    Args:
        target: a Hugging Face checkpoint in safetensors.
        drafter: a packaged drafter (:func:`dspark_packaging.artifact.build`).
        out: an absent or empty folder.
        options: how files are brought, whether ``mtp.*`` may be replaced.
        progress: shows how far it is.

    Raises:
        DSparkError: either source is incomplete or inconsistent, they do not belong together,
            ``out`` is taken, or no space is left.
    """
    target, drafter, out = (path.absolute() for path in (target, drafter, out))
    layout.require_directory(target, "the folder of a target checkpoint")
    layout.require_directory(drafter)
    layout.require_apart(out, target, drafter)
    verify_artifact(drafter)
    package, shards = open_package(drafter), read_shards(target)
    own = package.drafter
    verify_pair(package, target, shards)
    check_tokenizer(target, drafter)
    chosen = choose_layout(read_config(target, role="target"), own)
    plan, record = (
        plan_folder(target, drafter, own, shards)
        if chosen == "folder"
        else plan_mtp(target, drafter, own, shards, replace_mtp=options.replace_mtp)
    )
    with workspace(out, plan.sources) as space:
        methods = carry_out(plan, space.folder, options.method, progress)
        _write_records(space.folder, record, drafter)
        # What an interrupted run hashed of these is old.
        for name in (*plan.written, layout.BUNDLE_FILE, layout.LICENSE_FILE, layout.CONFIG_FILE):
            space.digests.pop(name, None)
        write_manifest(space.folder, digests=space.digests, progress=progress, save=space.save)
        verified = verify_bundle(space.folder, checksums=False)
        resumed = space.resumed
    return Joined(
        verified=verified,
        methods=methods,
        written_bytes=plan.rewritten_bytes(),
        resumed=resumed,
        left_out=record.left_out,
    )


def _write_records(folder: Path, record: BundleRecord, drafter: Path) -> None:
    write_json(folder / layout.BUNDLE_FILE, record)
    if not (folder / layout.LICENSE_FILE).exists():
        write_bytes(folder / layout.LICENSE_FILE, (drafter / layout.LICENSE_FILE).read_bytes())
    package = open_package(folder)
    write_bytes(folder / layout.CARD_FILE, card_of(package).encode())
    write_results(package)


class Split(NamedTuple):
    """What came apart."""

    target: Path
    drafter: Path
    #: Whether both are the originals, byte for byte.
    original: bool
    #: Tensors of the original target that the bundle had replaced, and files it had left out.
    lost: int
    resumed: bool


def split(
    bundle: Path, out: Path, *, method: Method = "auto", progress: Progress = silent
) -> Split:
    """Split ``bundle`` into ``out/target`` and ``out/drafter``.

    The bundle is only read. An interrupted split is continued by the same call.

    Raises:
        DSparkError: no bundle, damaged, ``out`` is taken, or no space is left.
    """
    bundle, out = bundle.absolute(), out.absolute()
    layout.require_directory(bundle, "the folder of a bundle")
    layout.require_apart(out, bundle)
    record = read_bundle(bundle) if (bundle / layout.BUNDLE_FILE).is_file() else None
    plan = _by_record(bundle, record) if record else _by_names(bundle)
    with workspace(out, plan.sources) as space:
        carry_out(plan, space.folder, method, progress)
        measured = space.folder / DRAFTER / layout.EVAL_FILE
        if record and record.layout == "mtp" and measured.is_file():
            results = results_yaml(read_record(measured, EvalArtifact, what="results", fix=_AGAIN))
            write_bytes(
                measured.parent / layout.EVAL_RESULTS / layout.RESULTS_FILE, results.encode()
            )
        resumed = space.resumed
    lost = len(record.replaced) + len(record.left_out) if record else 0
    return Split(
        target=out / TARGET,
        drafter=out / DRAFTER,
        original=record is not None and not record.replaced,
        lost=lost,
        resumed=resumed,
    )


def _by_record(bundle: Path, record: BundleRecord) -> Plan:
    jobs = [Job(bundle / here, f"{TARGET}/{name}") for name, here in record.target_files.items()]
    jobs += [Job(bundle / here, f"{DRAFTER}/{name}") for name, here in record.drafter_files.items()]
    if record.layout == "folder":
        inside = bundle / layout.DRAFT_FOLDER
        jobs += [
            Job(path, f"{DRAFTER}/{path.relative_to(inside).as_posix()}")
            for path in layout.package_files(inside)
        ]
    for job in jobs:
        if not job.source.is_file():
            raise PackageError(
                f"{job.source} is missing.",
                expected=f"every file that {layout.BUNDLE_FILE} names",
                fix=_AGAIN,
            )
    if not record.replaced:
        return Plan(jobs=jobs, rewrites=[], written={})
    # The target lost tensors, which its own index would name still.
    stored = read_shards(bundle).tensors.items()
    theirs = layout_of(bundle).own(name for name, _ in stored)
    kept = {name: held for name, held in stored if name not in theirs}
    written = {f"{TARGET}/{layout.INDEX_FILE}": index_bytes(kept)}
    return Plan(jobs=jobs, rewrites=[], written=written)


def _by_names(bundle: Path) -> Plan:
    """The parts of a bundle without a record: by the names of its tensors."""
    config = read_config(bundle, role="target")
    shards = read_shards(bundle)
    drafters = layout_of(config)
    theirs = drafters.own(shards.tensors) if drafters.bundled else set()
    if not theirs:
        raise PackageError(
            f"{bundle} has no {layout.BUNDLE_FILE} and no tensor of a drafter's.",
            expected="a bundle of target and drafter",
            fix="Check the path; a stand-alone drafter needs no splitting.",
        )
    jobs: list[Job] = []
    rewrites: list[Rewrite] = []
    where: dict[str, dict[str, Stored]] = {TARGET: {}, DRAFTER: {}}
    for file, own in shards.by_file().items():
        for part in (TARGET, DRAFTER):
            keep = [name for name in own if (name in theirs) == (part == DRAFTER)]
            where[part] |= {name: shards.tensors[name] for name in keep}
            if keep and len(keep) == len(own):
                jobs.append(Job(bundle / file, f"{part}/{file}"))
            elif keep:
                rewrites.append(Rewrite(bundle / file, f"{part}/{file}", keep))
    plain = {key: value for key, value in config.items() if not _is_dspark(key)}
    skipped = (layout.CONFIG_FILE, layout.INDEX_FILE, layout.MANIFEST_FILE, layout.SIGNATURE_FILE)
    jobs += [
        Job(path, f"{TARGET}/{path.name}")
        for path in layout.visible_entries(bundle)
        if path.is_file() and layout.is_target_data(path.name) and path.name not in skipped
    ]
    written = {
        f"{part}/{layout.INDEX_FILE}": index_bytes(tensors) for part, tensors in where.items()
    }
    written[f"{TARGET}/{layout.CONFIG_FILE}"] = _json(plain)
    written[f"{DRAFTER}/{layout.CONFIG_FILE}"] = (bundle / layout.CONFIG_FILE).read_bytes()
    return Plan(jobs=jobs, rewrites=rewrites, written=written)
