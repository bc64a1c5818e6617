"""``dspark drill``: what becomes of clients when a server fails, is drained, badly asked or worn."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dspark_sglang.config import read_api_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dspark_sglang.drill.run import Options, Run
    from dspark_sglang.drill.section import Section, Tell


def drill(
    url: Annotated[
        str, typer.Option(help="Drill this running server instead: no kill, drain, disk or key. "
                               "Do not do this to one that serves people.")
    ] = "",
    only: Annotated[str, typer.Option(help="Sections, with commas between. Default: all.")] = "",
    tiny_requests: Annotated[
        int, typer.Option(min=50, help="Requests of the soak of the tiny random model, or of --url.")
    ] = 10_000,
    real_requests: Annotated[
        int, typer.Option(min=50, help="Requests of the soak of the real model.")
    ] = 1_000,
    drafter: Annotated[
        Path, typer.Option(help="The real model's drafter.")
    ] = Path("model_cards/smollm2-135m-instruct-dspark"),
    seed: Annotated[int, typer.Option(help="Of prompts, aborts and the tiny models.")] = 0,
    out: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("runs/drill"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run sections again that have passed before.")
    ] = False,
) -> None:  # fmt: skip
    """Kill, drain, starve and misuse a real server on this machine, and check every token clients receive.

    A section that passed is not run again under the same settings and source, so an interrupted drill goes on where
    it stopped. Exit code 0: all passed. 1: something is wrong. 2: it could not be found out. The key of --url is
    read from API_KEY.
    """
    from dspark_sglang.drill import run as runs
    from dspark_sglang.drill.world import World

    options = runs.Options(out=out, drafter=drafter, seed=seed, tiny_requests=tiny_requests,
                           real_requests=real_requests, url=url.rstrip("/"), api_key=read_api_key())  # fmt: skip
    known = runs.remote(options) if url else runs.own(World(out, drafter, seed), options)
    found = show(runs.choose(known, only), options, fresh=fresh)
    if not found["passed"]:
        raise typer.Exit(1)


def show(sections: Mapping[str, Run], options: Options, *, fresh: bool) -> dict[str, Any]:
    """Run sections with their progress on the terminal; what they found, also in ``drill.json``."""
    from dspark_sglang.artifacts import write_json
    from dspark_sglang.drill import run as runs

    console, began, done = Console(stderr=True), time.monotonic(), list[Any]()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:

        def tell(name: str) -> Tell:
            task = bar.add_task(name, total=1.0)

            def told(what: str, share: float) -> None:
                bar.update(task, completed=share, description=f"{name}: {what}")

            return told

        for section in runs.run(sections, options, tell=tell, fresh=fresh):
            for task in bar.task_ids:
                bar.remove_task(task)
            done.append(section)
            _line(console, section)
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    found = runs.summary(done, command, time.monotonic() - began)
    write_json(options.out / "drill.json", found)
    console.print(f"{'passed' if found['passed'] else '[red]FAILED[/]'}: {options.out}/drill.json")
    return found


def _line(console: Console, section: Section) -> None:
    if section.skipped:
        console.print(f"[yellow]-[/] {section.name} skipped: {section.skipped}")
        return
    mark = "[red]✗[/]" if section.faults else "[green]✓[/]"
    ends = ", ".join(f"{count} {end}" for end, count in section.ends.items())
    console.print(f"{mark} {section.name} in {section.seconds:.0f} s: {ends}")
    for fault in section.faults:
        console.print(f"    {fault}", style="red", markup=False)
