"""``dspark bench-kernels``: what the kernels cost, counted without a GPU and timed with one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dspark_sglang.artifacts import write_json

if TYPE_CHECKING:
    from dspark_sglang.profiling.kernels import Step, Summary


def bench_kernels(
    out: Annotated[Path, typer.Option(help="Folder for summary.json.")] = Path("runs/kernels"),
    ops: Annotated[str, typer.Option(help="Comma-separated ops, or all.")] = "all",
    docs: Annotated[
        Path | None, typer.Option(help="A document whose generated tables are replaced.")
    ] = None,
    summary: Annotated[
        Path | None, typer.Option(help="Show this summary.json; measure nothing.")
    ] = None,
    shortlist: Annotated[
        Path | None,
        typer.Option(help="What dspark eval --shortlist-loss wrote. Default: the committed one."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON and nothing else.")
    ] = False,
) -> None:
    """Compile every kernel for sm_90, count its bytes next to floor and builtin, time it on a GPU.

    Without a CUDA device nothing is timed and nothing says it was.
    """
    from dspark_sglang.profiling import kernels, tables

    console = Console(stderr=as_json)
    if summary is not None:
        found = kernels.read_summary(summary)
    else:
        found = _measure(console, kernels.choose(ops), ops, shortlist or kernels.SHORTLIST_LOSS)
        write_json(out / "summary.json", found)
    if docs is not None:
        tables.insert(docs, found)
        console.print(f"Written: {docs}")
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
        return
    for view in tables.views(found):
        console.print(view)
    console.print(
        f"Timed on {found.device}." if found.device else "Nothing was timed: no CUDA device here."
    )
    if summary is None:
        console.print(f"Written: {out / 'summary.json'}")


def _run(stage: Sequence[Step]) -> Iterator[str]:
    """Run the steps of a stage, two at a time; the names of those that are done.

    Each is a process of its own that keeps one core busy.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        running = {pool.submit(step.run): step.name for step in stage}
        try:
            for done in as_completed(running):
                done.result()
                yield running[done]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _measure(console: Console, chosen: tuple[str, ...], text: str, shortlist: Path) -> Summary:
    from dspark_sglang.profiling import kernels
    from dspark_sglang.provenance import machine, provenance

    loss = kernels.read_shortlist_loss(shortlist)
    measurement = kernels.Measurement(chosen)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("starting", total=None)
        for stage in measurement.stages():
            for name in _run(stage):
                bar.update(task, description=name, advance=1, total=measurement.total)
        bar.update(task, description="done")
    flags = [] if text == "all" else ["--ops", text]
    return kernels.summary(
        measurement.measured(),
        shortlist_tau_loss_pct=loss,
        machine=machine(),
        commit=kernels.commit(),
        provenance=provenance(["dspark", "bench-kernels", *flags]),
    )
