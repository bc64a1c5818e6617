"""``dspark eval``: accepted length and calibration of a drafter, the one command everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dspark_sglang.artifacts import as_json as dumps
from dspark_sglang.cli.options import from_fields
from dspark_sglang.evaluation.options import Options


@from_fields
def evaluate(
    options: Options,
    out: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and reliability.png.")
    ] = None,
    record: Annotated[
        bool, typer.Option(help="Write eval.json beside the weights, for the model card.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON and nothing else.")
    ] = False,
) -> None:
    """Measure accepted length per domain at temperatures 0 and 1, and calibration.

    The standalone engine is the reference one, with everything drafted verified; the server engine
    counts what a real server did.
    """
    from dspark_packaging.card import KINDS
    from dspark_sglang.evaluation import report, run

    console = Console(stderr=as_json)
    found = run.evaluate(options, console, accepts=KINDS if record else None)
    if out is not None:
        run.save(out, found)
        console.print(f"Written: {out}")
    if record:
        console.print(f"Written: {run.record(options.artifact, found)}")
    if as_json:
        typer.echo(dumps(found))
        return
    report.show(found, console)
