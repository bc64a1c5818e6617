"""``dspark package`` and ``dspark verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dspark_packaging.errors import PackageError
from dspark_packaging.layout import CARD_FILE
from dspark_sglang.artifacts import require_writable
from dspark_sglang.errors import ConfigError

if TYPE_CHECKING:
    from dspark_packaging.verify import Verified

Method = Literal["auto", "reflink", "link", "copy"]


def summary(done: str, path: Path, result: Verified) -> str:
    """One line that says what was checked."""
    calibration = "calibrated" if result.calibrated else "not calibrated (no sts.json)"
    measured = "measured" if result.measured else "not measured (no eval.json)"
    kind = "" if result.shape == "drafter" else f", {result.shape}"
    return (
        f"{done} {path}: {result.name}{kind}, block size {result.gamma}, {len(result.files)} files "
        f"checked, {calibration}, {measured}."
    )


def package(
    source: Annotated[
        Path,
        typer.Argument(help="Drafter: config.json, weights, provenance.json. Or a bundle."),
    ],
    out: Annotated[
        Path | None, typer.Argument(help="Folder to write; may be SOURCE itself.")
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(help="The target's folder: its fingerprint is recorded in target.json."),
    ] = None,
    throughput: Annotated[
        Path | None, typer.Option(help="A result of `make bench-load` to put on the card.")
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Put the packaged drafter SOURCE and this target into one folder OUT."),
    ] = None,
    split: Annotated[
        bool, typer.Option("--split", help="Split the bundle SOURCE into OUT/target, OUT/drafter.")
    ] = False,
    method: Annotated[
        Method | None,
        typer.Option(
            help="How files are brought. Default: copy for a drafter; for bundles auto (reflink, "
            "else hard link, else copy)."
        ),
    ] = None,
    replace_mtp: Annotated[
        bool,
        typer.Option("--replace-mtp", help="Leave out the target's own mtp.* tensors."),
    ] = False,
    sign: Annotated[
        Path | None, typer.Option(help="Private key (PEM) for an OpenSSF signature, model.sig.")
    ] = None,
    card: Annotated[
        Literal["write", "check"] | None,
        typer.Option(
            help="Only write the model card of SOURCE again, or check that it is current."
        ),
    ] = None,
) -> None:
    """Build the folder to publish: weights, records, card, licence and checksums.

    A drafter alone, or with --bundle in one folder with its target; --split takes a bundle apart.
    Bundles of any size: files are linked where possible, and an interrupted build is continued
    by the same command.
    """
    from dspark_packaging.signing import sign as sign_folder

    if card is not None:
        if out is not None:
            raise PackageError(
                "--card was given with a folder to write.",
                expected="SOURCE alone: its card is beside its files",
                fix="Leave OUT away.",
            )
        _card(source, check=card == "check")
        return
    if out is None:
        raise PackageError(
            "No folder to write was named.",
            expected="dspark package SOURCE OUT",
            fix="Name one; it may be SOURCE itself.",
        )
    if split and (bundle or target or throughput or sign):
        raise PackageError(
            "--split was given with options of packaging.",
            expected="--split alone, or with --method",
            fix="Split first, then package the parts.",
        )
    if bundle and (target or throughput):
        raise PackageError(
            "--bundle was given with --target or --throughput.",
            expected="a SOURCE that `dspark package` made with them",
            fix="Package the drafter first, then bundle the package.",
        )
    require_writable(out, folder=True)
    if split:
        _split(source, out, method)
    elif bundle is not None:
        _bundle(source, out, bundle, method, replace_mtp)
    else:
        _drafter(source, out, target, throughput, method, sign)
    if sign is not None:
        typer.echo(f"Signed: {sign_folder(out, sign)}.")


def _drafter(
    source: Path,
    out: Path,
    target: Path | None,
    throughput: Path | None,
    method: Method | None,
    sign: Path | None,
) -> None:
    from dspark_packaging import artifact
    from dspark_packaging.layout import BUNDLE_FILE
    from dspark_packaging.transfer import shown
    from dspark_packaging.verify import verify_any

    if (source / BUNDLE_FILE).is_file() and source.resolve() == out.resolve() and sign:
        typer.echo(summary("Verified", out, verify_any(out, progress=shown)))
        return
    options = artifact.Options(target=target, throughput=throughput, method=method or "copy")
    typer.echo(summary("Wrote", out, artifact.build(source, out, options, progress=shown)))


def _bundle(
    source: Path,
    out: Path,
    target: Path,
    method: Method | None,
    replace_mtp: bool,
) -> None:
    from dspark_packaging import bundle
    from dspark_packaging.transfer import shown

    options = bundle.Options(method=method or "auto", replace_mtp=replace_mtp)
    try:
        done = bundle.build(target, source, out, options, progress=shown)
    except KeyboardInterrupt:
        typer.echo("Run the same command again to go on from here.", err=True)
        raise
    if done.resumed:
        typer.echo("Continued an interrupted build.")
    if done.left_out:
        typer.echo(f"Not carried from the target (code or folders): {', '.join(done.left_out)}.")
    how = ", ".join(f"{count} by {name}" for name, count in sorted(done.methods.items()))
    typer.echo(summary("Wrote", out, done.verified))
    typer.echo(f"Files: {how}; {done.written_bytes / 1e9:.2f} GB of shards written anew.")


def _split(source: Path, out: Path, method: Method | None) -> None:
    from dspark_packaging import bundle
    from dspark_packaging.transfer import shown

    done = bundle.split(source, out, method=method or "auto", progress=shown)
    if done.resumed:
        typer.echo("Continued an interrupted split.")
    state = "byte for byte the originals" if done.original else "every tensor's bytes unchanged"
    typer.echo(f"Wrote {done.target} and {done.drafter}: {state}.")
    if done.lost:
        typer.echo(f"The bundle had left out {done.lost} files or tensors; they are not back.")


def _card(directory: Path, *, check: bool) -> None:
    """Write the model card from the files beside it, or check that it is current."""
    from dspark_packaging.card import check_card, write_card

    path = directory / CARD_FILE
    if check:
        check_card(directory)
        typer.echo(f"{path} is current.")
    else:
        typer.echo(f"Wrote {path}." if write_card(directory) else f"{path} was current.")


def _files(given: list[str]) -> None:
    """Hold the files of ``DIRECTORY=CHECKSUMS`` pairs against the lists."""
    from dspark_packaging.manifest import verify_files

    for text in dict.fromkeys(given):
        directory, found, manifest = text.partition("=")
        if not found or not directory or not manifest:
            raise ConfigError(
                f"--files is {text!r}.",
                expected="DIRECTORY=CHECKSUMS",
                fix="For example: --files /models/target=/etc/dspark/checksums/target.json",
            )
        count = verify_files(Path(directory), Path(manifest))
        typer.echo(f"{directory}: {count} files as {manifest} lists them")


def verify(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="A packaged drafter or a bundle.")
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option(
            help="DIRECTORY=CHECKSUMS, instead of DIR: check size and SHA-256 of every file."
        ),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(help="The target's folder: compare fingerprints, then load both in SGLang."),
    ] = None,
    public_key: Annotated[
        Path | None, typer.Option(help="Key (PEM) that model.sig has to hold for.")
    ] = None,
    load: Annotated[
        bool,
        typer.Option(help="Load it in SGLang on the CPU, where it fits and a target is there."),
    ] = True,
) -> None:
    """Check a package: files, checksums, signature, tensors, records, target; then load it.

    With --files only bytes are checked, of any folder, for an initContainer: CHECKSUMS is what `dspark package`,
    `dspark demo --fetch-only` or `python -m sglang.srt.utils.model_file_verifier generate` wrote. Weight files that it
    does not list are refused too. Exit code 2 when one differs.
    """
    if files:
        if directory is not None:
            raise ConfigError(
                "--files was given with a package.",
                expected="one of them",
                fix="Check the package, then the files.",
            )
        _files(files)
        return
    if directory is None:
        raise ConfigError(
            "Nothing to check was named.",
            expected="DIR, or --files DIRECTORY=CHECKSUMS",
            fix="Name a packaged drafter or a bundle.",
        )
    from dspark_packaging.layout import SIGNATURE_FILE
    from dspark_packaging.records import open_package
    from dspark_packaging.signing import verify_signature
    from dspark_packaging.transfer import shown
    from dspark_packaging.verify import verify_any, verify_pair

    result = verify_any(directory, progress=shown)
    if public_key is not None:
        verify_signature(directory, public_key)
        typer.echo(f"Signature: {SIGNATURE_FILE} holds for {public_key}.")
    elif (directory / SIGNATURE_FILE).is_file():
        typer.echo(f"Signature: {SIGNATURE_FILE} is there, not checked (no --public-key).")
    bundled = result.shape != "drafter"
    if target is not None and bundled:
        raise PackageError(
            f"{directory} is a {result.shape}, and --target was given.",
            expected="no --target: a bundle is compared with the target inside it",
            fix="Leave --target out.",
        )
    if target is not None:
        compared = verify_pair(open_package(directory), target)
        how = "fingerprint equal" if compared else "shapes fit (the package has no target.json)"
        typer.echo(f"Target: {target}, {how}.")
    typer.echo(summary("Verified", directory, result))
    if not load:
        return
    if not bundled and target is None:
        typer.echo("Load in SGLang: not tried, a drafter needs its target (--target DIR).")
        return
    _load(directory, None if bundled else target)


def _load(directory: Path, target: Path | None) -> None:
    """Load a bundle, or a drafter with its target, and compare with what was measured."""
    from dspark_packaging.layout import EVAL_FILE
    from dspark_packaging.records import open_package
    from dspark_packaging.smoke import check_accepted, obstacle, smoke_load

    model, drafter = (target, directory) if target else (directory, None)
    reason = obstacle(model, drafter)
    if reason is not None:
        typer.echo(f"Load in SGLang: does not fit here: {reason}.")
        return
    typer.echo("Load in SGLang: starting a server on the CPU ...")
    done = smoke_load(model, drafter)
    typer.echo(
        f"Load in SGLang: {done.tokens} tokens in {done.rounds} rounds, beginning "
        f"{done.text.strip()[:60]!r}."
    )
    recorded = open_package(directory).records.eval
    if recorded is None:
        typer.echo(f"Accepted length: not compared (no {EVAL_FILE}).")
    else:
        check_accepted(done, recorded)
        typer.echo(f"Accepted length: {done.tokens / done.rounds:.2f}, as {EVAL_FILE} lets expect.")
