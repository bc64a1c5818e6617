"""``dspark report``: measure, simulate, work out what it is worth, and write one page about it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from dspark_sglang.errors import ConfigError
from dspark_sglang.provenance import machine, provenance
from dspark_sglang.report import browser, make
from dspark_sglang.report.steps import Outcome, Runner, Step

_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(bar_width=24),
    TextColumn("{task.fields[left]}"),
    TextColumn("[dim]{task.fields[doing]}[/]", table_column=None),
)
_STYLES = {"done": "green", "kept": "green", "failed": "red", "interrupted": "yellow"}


def report(
    out: Annotated[
        Path, typer.Option(help="Where the page, its figures and what steps leave go.")
    ] = Path("runs/report"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run again what an earlier run finished.")
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(help="Run these steps alone, with commas; the page shows the rest as it is."),
    ] = None,
    validation: Annotated[
        Path, typer.Option(help="The simulator against a real server (`dspark simulate check`).")
    ] = make.VALIDATION,
    with_browser: Annotated[
        str,
        typer.Option(
            "--browser", help="Check the page in this browser; auto: one that is there; none."
        ),
    ] = "auto",
) -> None:
    """Run the report's steps (about 10 minutes on 2 cores) and write report.html and report.json.

    Steps that an earlier run finished are kept. A step that fails is marked in the page and the others go on; an
    interrupt keeps what is there. Exit code 1: a step failed or the page does not show well.
    """
    console = Console(highlight=False)
    steps = make.plan()
    chosen = _chosen(only, steps)
    runner = Runner(out, fresh=fresh)
    stopped: BaseException | None = None
    try:
        outcomes = _run(runner, steps, chosen, console)
    except (KeyboardInterrupt, SystemExit) as error:
        stopped = error
        outcomes = [runner.not_run(step) for step in steps]
    page = make.write(
        out, outcomes, validation=validation, machine=machine(), provenance=provenance(["dspark", *sys.argv[1:]])
    )  # fmt: skip
    console.print(f"Written: {page}, {out / make.RESULTS}")
    if stopped is not None:
        console.print(
            "[yellow]Interrupted: the page is partial and says so. Run it again to go on.[/]"
        )
        raise stopped
    problems = _look(page, out, with_browser, console)
    failed = [o for o in outcomes if o.status == "failed" and o.name in chosen]
    if problems or failed:
        raise typer.Exit(1)


def _chosen(only: str | None, steps: list[Step]) -> set[str]:
    names = [step.name for step in steps]
    wanted = only.split(",") if only is not None else names
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ConfigError(
            f"--only names {', '.join(unknown)}.", expected=", ".join(names), fix="Use one of these."
        )  # fmt: skip
    return set(wanted)


def _run(runner: Runner, steps: list[Step], chosen: set[str], console: Console) -> list[Outcome]:
    """Every step, with what is left of all of them."""
    todo = {s.name: runner.seconds(s) for s in steps if s.name in chosen and not runner.kept(s)}
    outcomes = []
    with Progress(*_COLUMNS, console=console) as bar:
        task = bar.add_task("", total=max(1.0, sum(todo.values())), left="", doing="")
        past = 0.0

        def watch(step: Step, spent: float, line: str) -> None:
            share = todo[step.name]
            later = sum(todo.values()) - past - share
            left = max(share - spent, 0.05 * share) + later
            bar.update(
                task,
                completed=past + min(spent, share),
                description=step.title,
                left=f"{spent:.0f} s, about {left / 60:.0f} min left",
                doing=line[-60:],
            )

        for step in steps:
            outcome = runner.run(step, watch) if step.name in chosen else runner.not_run(step)
            past += todo.get(step.name, 0.0)
            outcomes.append(outcome)
            if step.name in chosen:
                _tell(bar.console, outcome, runner.folder)
        bar.update(task, completed=past, description="", left="", doing="")
    return outcomes


def _tell(console: Console, outcome: Outcome, folder: Path) -> None:
    """How a step ended, in a line."""
    style = _STYLES.get(outcome.status, "dim")
    took = f" ({outcome.seconds:.0f} s)" if outcome.seconds else ""
    why = f": {outcome.message}" if outcome.message else ""
    console.print(
        f"[{style}]{outcome.status}[/] {outcome.title}{took}{escape(why)}", soft_wrap=True
    )
    if outcome.status == "failed":
        console.print(f"  log: {folder / outcome.name / 'log.txt'}", soft_wrap=True)


def _look(page: Path, out: Path, name: str, console: Console) -> list[str]:
    """Check the page in a browser. Returns what is wrong."""
    if name == "none":
        return []
    found = browser.find(None if name == "auto" else name)
    if found is None:
        console.print(
            f"[yellow]Skipped:[/] the page was not looked at, no browser is installed. {browser.HINT}"
        )
        return []
    with console.status("looking at the page in a browser"):
        checked = browser.check(page, out / "browser", found)
    for problem in checked.problems:
        console.print(f"[red]wrong[/] {problem}")
    if not checked.problems:
        views = ", ".join(view.name for view in checked.views)
        console.print(
            f"[green]shown[/] {views}, {checked.printed_pages} pages on paper; screenshots in {out / 'browser'}"
        )
    return checked.problems
