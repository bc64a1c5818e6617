"""Build a bundle: link a target's files and a drafter's into one folder that is served as it is."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dspark_packaging.bundle import Plan, choose_layout, make_rewrites, plan_folder, plan_mtp
from dspark_packaging.bundle_record import Layout
from dspark_packaging.card import write_card
from dspark_packaging.drafter import Drafter, read_drafter
from dspark_packaging.errors import PackageError
from dspark_packaging.eval_results import write_eval_results
from dspark_packaging.fingerprint import check_revision, check_target, fingerprint, read_target
from dspark_packaging.layout import (
    CONFIG_FILE,
    DRAFT_FOLDER,
    LICENSE_FILE,
    is_tokenizer,
    require_apart,
    require_directory,
    visible_entries,
)
from dspark_packaging.manifest import write_manifest
from dspark_packaging.progress import Progress, silent
from dspark_packaging.schemas import BUNDLE_FILE, PROVENANCE_FILE, TARGET_FILE
from dspark_packaging.shards import Shards, read_shards
from dspark_packaging.transfer import Method, place
from dspark_packaging.verify import Verified, verify_artifact
from dspark_packaging.verify_bundle import verify_bundle
from dspark_packaging.workspace import Workspace, workspace
from dspark_sglang.artifacts import write_bytes, write_json
from dspark_sglang.checkpoint import check_fits, read_config


class JoinOptions(NamedTuple):
    """How to bring two folders together."""

    layout: Layout | None = None
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


def build_bundle(
    target: Path,
    drafter: Path,
    out: Path,
    options: JoinOptions = JoinOptions(),  # noqa: B008 - immutable
    *,
    progress: Progress = silent,
) -> Joined:
    """Join a target checkpoint and a packaged drafter in ``out``.

    The sources are only read. An interrupted build is continued by the same call.

    Args:
        target: a Hugging Face checkpoint in safetensors.
        drafter: a packaged drafter (:func:`dspark_packaging.build.build_artifact`).
        out: an absent or empty folder.
        options: layout, how files are brought, whether ``mtp.*`` may be replaced.
        progress: shows how far it is.

    Raises:
        DSparkError: either source is incomplete or inconsistent, they do not belong together,
            ``out`` is taken, or no space is left.
    """
    target, drafter, out = (path.absolute() for path in (target, drafter, out))
    require_directory(target, "the folder of a target checkpoint")
    require_directory(drafter)
    require_apart(out, target, drafter)
    verify_artifact(drafter)
    own = read_drafter(drafter)
    shards = read_shards(target)
    check_pair(target, drafter, own, shards)
    layout = choose_layout(read_config(target, role="target"), own, options.layout)
    plan = (
        plan_folder(target, drafter, own, shards)
        if layout == "folder"
        else plan_mtp(target, drafter, own, shards, replace_mtp=options.replace_mtp)
    )
    sources = [job.source for job in plan.jobs] + [rewrite.source for rewrite in plan.rewrites]
    with workspace(out, sources) as space:
        methods = _fill(space, plan, options.method, progress)
        _write_records(space, plan, drafter)
        write_manifest(space.folder, digests=space.digests, progress=progress, save=space.save)
        verified = verify_bundle(space.folder, checksums=False)
        resumed = space.resumed
    return Joined(
        verified=verified,
        methods=methods,
        written_bytes=sum(rewrite.nbytes for rewrite in plan.rewrites),
        resumed=resumed,
        left_out=plan.record.left_out,
    )


def check_pair(target: Path, drafter: Path, own: Drafter, shards: Shards) -> None:
    """Check that a packaged drafter and a target belong together.

    Raises:
        CheckpointError: sizes, layers or tokens do not fit.
        PackageError: another revision, other weights or a foreign tokenizer.
    """
    from dspark_packaging.schemas import read_provenance

    check_fits(own.config, read_config(target, role="target"), name=target.name)
    provenance = read_provenance(
        drafter / PROVENANCE_FILE, gamma=own.config.gamma, drafter_sha256=own.digest
    )
    check_revision(target, provenance.target.revision)
    if (drafter / TARGET_FILE).is_file():
        recorded = read_target(drafter / TARGET_FILE, drafter_sha256=own.digest)
        found = fingerprint(target, drafter_sha256=own.digest, shards=shards)
        check_target(recorded, found, str(target))
    check_tokenizer(target, drafter)


def check_tokenizer(target: Path, drafter: Path) -> None:
    """A drafter that carries a tokenizer carries the target's, byte for byte.

    Raises:
        PackageError: another one.
    """
    for path in visible_entries(drafter):
        if not is_tokenizer(path.name):
            continue
        theirs = target / path.name
        if not theirs.is_file() or theirs.read_bytes() != path.read_bytes():
            raise PackageError(
                f"{path} is not the target's {path.name}.",
                expected="the target's tokenizer, untouched",
                fix=f"Copy it from {target}, or leave the tokenizer out of the drafter.",
            )


def _fill(space: Workspace, plan: Plan, method: Method, progress: Progress) -> dict[str, int]:
    methods: dict[str, int] = {}
    with progress("files", plan.nbytes) as meter:
        for job in plan.jobs:
            (space.folder / job.name).parent.mkdir(parents=True, exist_ok=True)
            how = place(job, space.folder, method, meter)
            methods[how] = methods.get(how, 0) + 1
        make_rewrites(plan, space.folder, meter)
    return methods


def _write_records(space: Workspace, plan: Plan, drafter: Path) -> None:
    folder = space.folder
    for name, content in plan.written.items():
        write_bytes(folder / name, content)
    write_json(folder / BUNDLE_FILE, plan.record)
    if not (folder / LICENSE_FILE).exists():
        write_bytes(folder / LICENSE_FILE, (drafter / LICENSE_FILE).read_bytes())
    write_card(folder)
    write_eval_results(folder, folder / DRAFT_FOLDER if plan.record.layout == "folder" else None)
    # What an interrupted run hashed of these is old.
    for name in (*plan.written, BUNDLE_FILE, LICENSE_FILE, CONFIG_FILE):
        space.digests.known.pop(name, None)
