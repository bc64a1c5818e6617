"""``dspark package-check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspark_sglang.cli.demo import DRAFTER


def package_check(
    out: Annotated[Path, typer.Option(help="Folder for summary.json.")] = Path("runs/package"),
    artifact: Annotated[
        Path, typer.Option(help="Packaged drafter that makes the round trip.")
    ] = DRAFTER,
    target: Annotated[Path | None, typer.Option(help="Its target. Default: the demo's.")] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Scratch folder (3 GB, a file system with holes). Default: temporary."),
    ] = None,
) -> None:
    """Try everything that packaging promises: bad input, 100 GB, V4-Pro's keys, a served round trip.

    Needs PyPI once, for two releases of the Hub's client; the Hub itself is a local stand-in.
    """
    from dspark_packaging.check.run import check, require_good
    from dspark_sglang import targets
    from dspark_sglang.artifacts import write_json

    def say(line: str) -> None:
        typer.echo(line, err=True)

    where = target or targets.ensure_target(progress=say)
    summary = check(artifact, where, work, say)
    write_json(out / "summary.json", summary)
    typer.echo(f"Wrote {out / 'summary.json'} ({summary['seconds']} s).")
    require_good(summary)
    typer.echo(f"All held; {len(summary['refused'])} kinds of bad input refused or resumed.")
