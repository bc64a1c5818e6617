"""``dspark package``, ``dspark card`` and ``dspark verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspark_packaging.build import build_artifact
from dspark_packaging.card import check_card, write_card
from dspark_packaging.layout import CARD_FILE
from dspark_packaging.verify import Verified, verify_artifact

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A packaged drafter.")]


def _summary(done: str, path: Path, result: Verified) -> str:
    calibration = "calibrated" if result.calibrated else "not calibrated (no sts.json)"
    measured = "measured" if result.measured else "not measured (no eval.json)"
    return (
        f"{done} {path}: {result.name}, block size {result.gamma}, {len(result.files)} files "
        f"checked, {calibration}, {measured}."
    )


def package(
    source: Annotated[
        Path, typer.Argument(help="Folder with config.json, weights and provenance.json.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; may be SOURCE itself.")],
) -> None:
    """Build the folder to publish: weights, records, card, licence and checksums."""
    typer.echo(_summary("Wrote", out, build_artifact(source, out)))


def card(
    directory: Folder,
    check: Annotated[
        bool, typer.Option("--check", help="Only check that README.md is current.")
    ] = False,
) -> None:
    """Write the model card from the files beside it, or check that it is current."""
    path = directory / CARD_FILE
    if check:
        check_card(directory)
        typer.echo(f"{path} is current.")
        return
    typer.echo(f"Wrote {path}." if write_card(directory) else f"{path} was current.")


def verify(directory: Folder) -> None:
    """Check a packaged drafter: files, checksums, tensors, records and front matter."""
    typer.echo(_summary("Verified", directory, verify_artifact(directory)))
