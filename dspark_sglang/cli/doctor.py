"""``dspark doctor``: is the plugin active here, and if not, why not and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dspark_sglang import diagnosis
from dspark_sglang.artifacts import as_json
from dspark_sglang.errors import DSparkError
from dspark_sglang.layouts.base import bundle_at

_MARKS = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "problem": "[red]✗[/]"}


def doctor(
    url: Annotated[
        str | None, typer.Option(help="Ask a running server too, e.g. http://127.0.0.1:30000.")
    ] = None,
    target: Annotated[
        Path | None, typer.Option(help="Check that this target fits here, as `dspark plan` does.")
    ] = None,
    drafter: Annotated[
        Path | None,
        typer.Option(help="Check this drafter directory. Default: the target, if it is a bundle."),
    ] = None,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="The port a server is to have.")
    ] = 30000,
    json: Annotated[bool, typer.Option("--json", help="Print findings as JSON.")] = False,
) -> None:
    """Check the installation (and a server, and models); exit code 1 when something is wrong.

    The server's key is read from API_KEY.
    """
    console = Console(stderr=json)
    if drafter is None and target is not None:
        drafter = bundle_at(target)
    with console.status("checking (importing SGLang takes about 10 s)"):
        findings = diagnosis.local()
        findings += diagnosis.look(None if url else port, drafter)
        if drafter is not None:
            findings += diagnosis.models(target, drafter)
        if target is not None:
            findings.append(_memory(target, drafter))
        if url is not None:
            findings += diagnosis.server(url)
    if json:
        print(as_json(findings))
    else:
        for finding in findings:
            console.print(f"{_MARKS[finding.level]} {finding.what}")
            if finding.fix:
                console.print(f"    [dim]→ {finding.fix}[/]")
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


def _memory(target: Path, drafter: Path | None) -> diagnosis.Finding:
    """Whether target and drafter fit on the machine at hand; imported late, since it is not always asked."""
    from dspark_sglang.planning import hardware, plan, report

    own = None if drafter is None else str(drafter)
    try:
        made = plan.make(str(target), own, hardware.at_hand())
    except DSparkError as error:
        return diagnosis.Finding(
            "warning", f"memory: {error.found} Expected {error.expected}.", error.fix
        )
    where = f"{made.hardware.gpus} × {made.hardware.gpu}"
    what = f"memory of {where}: {report.verdict(made)} ({made.label})"
    if made.fits:
        return diagnosis.Finding("ok", what)
    reasons = " ".join(finding.message for finding in made.refused)
    fix = reasons or "Free memory, or try a smaller model or another type: `dspark plan --help`."
    return diagnosis.Finding("problem", what, fix)
