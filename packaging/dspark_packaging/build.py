"""Turn a drafter's weights and records into the folder that is published."""

from __future__ import annotations

import tempfile
from importlib import resources
from pathlib import Path

import msgspec

from dspark_packaging.card import refuse_foreign_card, write_card
from dspark_packaging.drafter import read_drafter, require_alone
from dspark_packaging.errors import PackageError
from dspark_packaging.eval_results import write_eval_results
from dspark_packaging.fingerprint import check_revision, fingerprint
from dspark_packaging.layout import (
    CARD_FILE,
    CONFIG_FILE,
    EVAL_RESULTS,
    GENERATED,
    INDEX_FILE,
    LICENSE_FILE,
    RECORDS,
    is_tokenizer,
    require_apart,
    require_directory,
)
from dspark_packaging.manifest import check_entry, read_manifest, write_manifest
from dspark_packaging.plot import write_plot
from dspark_packaging.progress import Progress, silent
from dspark_packaging.schemas import (
    PROVENANCE_FILE,
    TARGET_FILE,
    THROUGHPUT_FILE,
    read_provenance,
)
from dspark_packaging.shards import check_weight_names, read_shards
from dspark_packaging.throughput import write_throughput
from dspark_packaging.transfer import Job, Method, place
from dspark_packaging.verify import Verified, verify_artifact
from dspark_sglang.artifacts import write_bytes, write_json
from dspark_sglang.checkpoint import check_fits, read_config, weight_files


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to add to the records that the source holds."""

    #: The target, to record its fingerprint as ``target.json``.
    target: Path | None = None
    #: A result of ``dspark bench-load``, to record as ``throughput.json``.
    throughput: Path | None = None
    #: How weights are brought; ``copy`` keeps source and package apart.
    method: Method = "copy"


def build_artifact(
    source: Path,
    out: Path,
    options: BuildOptions = BuildOptions(),  # noqa: B008 - immutable
    *,
    progress: Progress = silent,
) -> Verified:
    """Package the drafter in ``source`` as ``out``; both may be the same folder.

    ``source`` holds ``config.json``, safetensors weights and ``provenance.json``, and may hold
    the records of ``layout.RECORDS``, an index of shards, the target's tokenizer and a ``LICENSE``;
    anything else there is left behind. ``out`` appears complete and verified, or is not touched.
    Building twice gives the same bytes.

    Raises:
        DSparkError: the source is incomplete or inconsistent, or ``out`` holds anything that
            this function did not write.
    """
    source, out = source.resolve(), out.resolve()
    require_directory(source)
    if source != out:
        require_apart(out, source)
    carried = _carried(source)
    _check_replaceable(out, carried if source == out else None)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the last step is a rename and not a copy.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        total = sum((source / name).stat().st_size for name in carried)
        with progress("files", total) as meter:
            for name in carried:
                weights = name.endswith(".safetensors")
                place(Job(source / name, name), fresh, options.method if weights else "copy", meter)
        _add_records(fresh, options)
        _write_license(fresh)
        write_plot(fresh)
        write_card(fresh)
        write_eval_results(fresh)
        write_manifest(fresh, progress=progress)
        verified = verify_artifact(fresh, checksums=False)
        _swap(fresh, out, Path(scratch) / "old")
    return verified


def _carried(source: Path) -> list[str]:
    """Names to copy from the source."""
    shards = read_shards(source)
    require_alone(source, shards)
    check_weight_names(shards)
    names = [CONFIG_FILE, PROVENANCE_FILE, *(path.name for path in weight_files(source))]
    read_config(source, role="drafter")
    if not (source / PROVENANCE_FILE).is_file():
        raise PackageError(
            f"{source} has no {PROVENANCE_FILE}.",
            expected="a record of where the weights came from",
            fix="Write one (fields: dspark_packaging.schemas.DrafterProvenance).",
        )
    names += [n for n in (INDEX_FILE, *RECORDS, LICENSE_FILE) if (source / n).is_file()]
    return names + sorted(path.name for path in source.iterdir() if is_tokenizer(path.name))


def _add_records(folder: Path, options: BuildOptions) -> None:
    """Write the records that the options ask for."""
    if options.target is None and options.throughput is None:
        return
    drafter = read_drafter(folder)
    if options.target is not None:
        target = options.target
        check_fits(drafter.config, read_config(target, role="target"), name=target.name)
        provenance = read_provenance(
            folder / PROVENANCE_FILE, gamma=drafter.config.gamma, drafter_sha256=drafter.digest
        )
        check_revision(target, provenance.target.revision)
        write_json(folder / TARGET_FILE, fingerprint(target, drafter_sha256=drafter.digest))
    if options.throughput is not None:
        write_throughput(
            options.throughput,
            folder / THROUGHPUT_FILE,
            gamma=drafter.config.gamma,
            drafter_sha256=drafter.digest,
        )


def _check_replaceable(out: Path, in_place: list[str] | None) -> None:
    """Refuse to lose anything: ``out`` may hold only what an earlier build wrote.

    Args:
        out: the folder to write.
        in_place: what is carried over when ``out`` is the source too, else None.
    """
    if out.exists() and not out.is_dir():
        raise PackageError(
            f"{out} is a file.", expected="a folder to write", fix="Choose another name."
        )
    if not out.exists() or not any(out.iterdir()):
        return
    refuse_foreign_card(out / CARD_FILE)
    # In place the source's own files are kept, listed and unchanged or not.
    entries = read_manifest(out).files if in_place is None else {}
    ours = {*GENERATED, LICENSE_FILE, *(in_place or entries)}
    for path in sorted(out.iterdir()):
        if path.name == EVAL_RESULTS and path.is_dir() and not path.is_symlink():
            continue
        if path.is_dir() or path.name not in ours:
            raise PackageError(
                f"{path} was not written by `dspark package`.",
                expected="an empty folder, or one that holds an earlier package only",
                fix=f"Move {path.name} away, or choose another output folder.",
            )
        if path.name in entries:
            check_entry(out, path.name, entries[path.name])


def _write_license(folder: Path) -> None:
    """Keep the source's ``LICENSE``, or write the text of the one licence that ships with us."""
    if (folder / LICENSE_FILE).exists():
        return
    drafter = read_drafter(folder)
    license_id = read_provenance(
        folder / PROVENANCE_FILE, gamma=drafter.config.gamma, drafter_sha256=drafter.digest
    ).license
    text = resources.files("dspark_packaging") / "templates" / f"{LICENSE_FILE}.{license_id}"
    if not text.is_file():
        raise PackageError(
            f"The source has no {LICENSE_FILE} and its licence is {license_id}.",
            expected="the licence's text beside the weights",
            fix=f"Put the text of {license_id} into {LICENSE_FILE} in the source folder.",
        )
    write_bytes(folder / LICENSE_FILE, text.read_bytes())


def _swap(fresh: Path, out: Path, old: Path) -> None:
    """Put ``fresh`` in the place of ``out``; on failure put the old one back."""
    if out.exists():
        out.rename(old)
    try:
        fresh.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    # mkdtemp made the scratch folder private; what is published is not.
    out.chmod(0o755)
