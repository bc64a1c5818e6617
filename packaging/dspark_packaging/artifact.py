"""Turn a drafter's weights and records into the folder that is published."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from dspark_packaging import layout
from dspark_packaging.card import calibration_plot, card_of
from dspark_packaging.drafter import check_weight_names, read_drafter, read_shards, require_alone
from dspark_packaging.errors import PackageError
from dspark_packaging.hub_rules import write_results
from dspark_packaging.manifest import check_entry, read_manifest, write_manifest
from dspark_packaging.records import (
    MEASURE_AGAIN,
    Package,
    Speed,
    ThroughputArtifact,
    open_package,
    read_provenance,
)
from dspark_packaging.transfer import Job, Method, Progress, place, silent
from dspark_packaging.verify import Verified, check_revision, fingerprint, verify_opened
from dspark_sglang.artifacts import SCHEMA_VERSION, Provenance, write_bytes, write_json
from dspark_sglang.checkpoint import read_config, read_json, weight_files
from dspark_sglang.errors import ArtifactError
from dspark_sglang.layouts.base import check_fits, layout_of


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What to add to the records that the source holds."""

    #: The target, to record its fingerprint as ``target.json``.
    target: Path | None = None
    #: A result of ``make bench-load``, to record as ``throughput.json``.
    throughput: Path | None = None
    #: How weights are brought; ``copy`` keeps source and package apart.
    method: Method = "copy"


def build(
    source: Path,
    out: Path,
    options: Options = Options(),  # noqa: B008 - immutable
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
    layout.require_directory(source)
    if source != out:
        layout.require_apart(out, source)
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
        package = open_package(fresh)
        _write_generated(package)
        write_manifest(fresh, progress=progress)
        layout.check_names(fresh)
        verified = verify_opened(package)
        _swap(fresh, out, Path(scratch) / "old")
    return verified


def _carried(source: Path) -> list[str]:
    """Names to copy from the source."""
    shards = read_shards(source)
    require_alone(source, shards, layout_of(read_config(source, role="drafter")))
    check_weight_names(shards)
    names = [
        layout.CONFIG_FILE,
        layout.PROVENANCE_FILE,
        *(path.name for path in weight_files(source)),
    ]
    if not (source / layout.PROVENANCE_FILE).is_file():
        raise PackageError(
            f"{source} has no {layout.PROVENANCE_FILE}.",
            expected="a record of where the weights came from",
            fix="Write one (fields: dspark_packaging.records.DrafterProvenance).",
        )
    names += [
        n
        for n in (layout.INDEX_FILE, *layout.RECORDS, layout.LICENSE_FILE)
        if (source / n).is_file()
    ]
    return names + sorted(path.name for path in source.iterdir() if layout.is_tokenizer(path.name))


def _add_records(folder: Path, options: Options) -> None:
    """Write the records that the options ask for."""
    if options.target is None and options.throughput is None:
        return
    drafter = read_drafter(folder)
    if options.target is not None:
        target = options.target
        check_fits(drafter.config, read_config(target, role="target"), name=target.name)
        provenance = read_provenance(
            folder / layout.PROVENANCE_FILE,
            gamma=drafter.config.gamma,
            drafter_sha256=drafter.digest,
        )
        check_revision(target, provenance.target.revision)
        write_json(folder / layout.TARGET_FILE, fingerprint(target, drafter_sha256=drafter.digest))
    if options.throughput is not None:
        write_throughput(
            options.throughput,
            folder / layout.THROUGHPUT_FILE,
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
    layout.refuse_foreign_card(out / layout.CARD_FILE)
    # In place the source's own files are kept, listed and unchanged or not.
    entries = read_manifest(out).files if in_place is None else {}
    ours = {*layout.GENERATED, layout.LICENSE_FILE, *(in_place or entries)}
    for path in sorted(out.iterdir()):
        if path.name == layout.EVAL_RESULTS and path.is_dir() and not path.is_symlink():
            continue
        if path.is_dir() or path.name not in ours:
            raise PackageError(
                f"{path} was not written by `dspark package`.",
                expected="an empty folder, or one that holds an earlier package only",
                fix=f"Move {path.name} away, or choose another output folder.",
            )
        if path.name in entries:
            check_entry(out, path.name, entries[path.name])


def _write_generated(package: Package) -> None:
    """Write what is made from weights and records: licence, figure, card, results for the Hub."""
    folder = package.directory
    if not (folder / layout.LICENSE_FILE).exists():
        write_bytes(folder / layout.LICENSE_FILE, _license(package.records.provenance.license))
    measured = package.records.eval
    picture = calibration_plot(measured.calibration) if measured else None
    if picture is not None:
        write_bytes(folder / layout.PLOT_FILE, picture)
    write_bytes(folder / layout.CARD_FILE, card_of(package).encode())
    write_results(package)


def _license(identifier: str) -> bytes:
    """The text of the one licence that ships with us, where a source has no ``LICENSE``."""
    text = resources.files("dspark_packaging") / "templates" / f"{layout.LICENSE_FILE}.{identifier}"
    if not text.is_file():
        raise PackageError(
            f"The source has no {layout.LICENSE_FILE} and its licence is {identifier}.",
            expected="the licence's text beside the weights",
            fix=f"Put the text of {identifier} into {layout.LICENSE_FILE} in the source folder.",
        )
    return text.read_bytes()


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


def _row(name: str, cell: Mapping[str, Any]) -> Speed | None:
    """One cell of a load summary (``T1-c8`` or ``T1-c8-float32``); None without both ways."""
    plain, ours, ratio = (cell.get(key) for key in ("none", "dspark", "ratio_none"))
    if not plain or not ours or not ratio:
        return None
    temperature, concurrency, *dtype = name.split("-")
    return Speed(
        temperature=float(temperature.removeprefix("T")),
        concurrency=int(concurrency.removeprefix("c")),
        dtype=dtype[0] if dtype else "bfloat16",
        baseline_tok_s=plain["tok_s"],
        baseline_spread=plain["tok_s_spread"],
        tok_s=ours["tok_s"],
        spread=ours["tok_s_spread"],
        ratio=tuple(ratio),
    )


def write_throughput(summary: Path, out: Path, *, gamma: int, drafter_sha256: str) -> None:
    """Write ``throughput.json`` from what ``make bench-load`` measured.

    Raises:
        ArtifactError: another drafter's result, or no cell with both ways of serving.
    """
    value = read_json(summary, what="the summary.json of `make bench-load`")
    if value.get("drafter_sha256") != drafter_sha256:
        raise ArtifactError(
            f"{summary} was measured with drafter {str(value.get('drafter_sha256'))[:12]}.",
            expected=f"{drafter_sha256[:12]}, the weights packaged here",
            fix=MEASURE_AGAIN,
        )
    try:
        rows = [_row(name, cell) for name, cell in value["cells"].items()]
        artifact = ThroughputArtifact(
            schema_version=SCHEMA_VERSION,
            gamma=gamma,
            drafter_sha256=drafter_sha256,
            hardware=value["machine"],
            blocks=value["blocks"],
            window_s=value["window_s"],
            provenance=Provenance(
                created=value.get("created", "not recorded"),
                command=value["command"],
                versions=value["versions"],
            ),
            rows=[row for row in rows if row is not None],
        )
        # The constructor does not validate; reading does.
        msgspec.json.decode(msgspec.json.encode(artifact), type=ThroughputArtifact)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{summary} is no result of `make bench-load`: {error}.",
            expected="cells with modes none and dspark",
            fix=MEASURE_AGAIN,
        ) from error
    write_json(out, artifact)
