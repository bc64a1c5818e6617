"""``dspark doctor``: is the plugin active here, and if not, why not and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from dspark_sglang.serving import diagnosis

_MARKS = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "problem": "[red]✗[/]"}


def doctor(
    url: Annotated[
        str | None, typer.Option(help="Ask a running server too, e.g. http://127.0.0.1:30000.")
    ] = None,
    target: Annotated[Path | None, typer.Option(help="Check this target directory.")] = None,
    drafter: Annotated[Path | None, typer.Option(help="Check this drafter directory.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print findings as JSON.")] = False,
) -> None:
    """Check the installation (and a server, and a drafter); exit code 1 when something is wrong."""
    console = Console(stderr=json)
    with console.status("checking (importing SGLang takes about 10 s)"):
        findings = diagnosis.local()
        if drafter is not None:
            findings += diagnosis.models(target, drafter)
        if url is not None:
            findings += diagnosis.server(url)
    if json:
        print(msgspec.json.format(msgspec.json.encode(findings), indent=2).decode())
    else:
        for finding in findings:
            console.print(f"{_MARKS[finding.level]} {finding.what}")
            if finding.fix:
                console.print(f"    [dim]→ {finding.fix}[/]")
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)
