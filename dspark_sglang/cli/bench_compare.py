"""``dspark bench compare``: ways of serving on servers, or by their results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dspark_loadtests import bench, compare, frontier
from dspark_loadtests.compare import SWITCHES, Cell, Versus, Way
from dspark_sglang import artifacts
from dspark_sglang.cli.bench import command
from dspark_sglang.cli.options import from_fields
from dspark_sglang.errors import ConfigError, DSparkError
from dspark_sglang.provenance import machine, provenance
from dspark_sglang.values import read_numbers


def _ways(given: list[str], modes: str, options: bench.Options) -> list[Way]:
    """From ``NAME=URL ...``, or one URL and the ways to switch it to."""
    pairs = [
        (text.partition("=")[0], text.partition("=")[2]) if "=" in text.split("://")[0] else (f"server{place}", text)
        for place, text in enumerate(given, start=1)
    ]  # fmt: skip
    if len(pairs) > 1:
        return [Way(name, options.connect(url), gpus=options.gpus) for name, url in pairs]
    chosen = modes.split(",")
    wrong = [each for each in chosen if each not in SWITCHES]
    if wrong:
        raise ConfigError(
            f"--modes names {', '.join(wrong)}.",
            expected=", ".join(SWITCHES),
            fix="Or name a server for each way: NAME=URL NAME=URL.",
        )
    endpoint = options.connect(pairs[0][1])
    return [Way(each, endpoint, SWITCHES[each], options.gpus) for each in chosen]


@from_fields
def compare_servers(
    *,
    ways: Annotated[
        list[str],
        typer.Argument(
            help="NAME=URL of each way, ours first: DSPARK, no speculation, NGRAM, EAGLE ... Or one URL of a server of ours, "
            "switched between --modes. Or frontier.json files: they are drawn together, and nothing is loaded."
        ),
    ],
    modes: Annotated[
        str, typer.Option(help="For one server: dspark, none, fixed.")
    ] = "dspark,none,fixed",
    concurrency: Annotated[str, typer.Option(help="Users, a cell for each number.")] = "1,4,16",
    blocks: Annotated[int, typer.Option(min=2, help="Turns of each way in a cell.")] = 4,
    warmup: Annotated[float, typer.Option(min=0.0, help="Seconds before each window.")] = 3.0,
    duration: Annotated[float, typer.Option(help="Seconds of each window.")] = 15.0,
    options: bench.Options,
    ours: Annotated[
        str | None,
        typer.Option(help="Of files: the series the others are held against. Default: the first."),
    ] = None,
    user_speed: Annotated[
        str | None, typer.Option(help="Of files: tokens/s and user to compare at, as 20,40.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("runs/bench-compare"),
) -> None:
    """Ways of serving in paired, interleaved windows; ratios with 95% intervals over blocks.

    Writes compare.json, frontier.json, frontier.png and, where a server tells it, budget.png.
    """
    if all(way.endswith(".json") and "://" not in way for way in ways):
        _draw([Path(way) for way in ways], ours, user_speed, out)
        return
    console = Console()
    source, slo = options.source(), options.slo
    loads = {
        f"c{users}": options.load(users=users, warm_s=warmup, window_s=duration, drain_s=60.0)
        for users in read_numbers(concurrency, "--concurrency", int)
    }
    bench.check(loads, source, slo)
    chosen = _ways(ways, modes, options)
    cells: list[Cell] = []
    stopped = ""

    def keep(cell: Cell) -> None:
        cells.append(cell)
        _write(_result(chosen, cells, complete=len(cells) == len(loads)), out)

    def told(users: int, block: int, way: str) -> None:
        console.print(f"{users} users, block {block + 1} of {blocks}, {way} ...", highlight=False)

    try:
        compare.compare(
            chosen, source, list(loads.values()), blocks=blocks, slo=slo, told=told, finished=keep
        )
    except (KeyboardInterrupt, DSparkError) as error:
        if not cells:
            raise
        stopped = str(error) or "interrupted"
        console.print(f"[red]Incomplete[/]: {escape(stopped)}", soft_wrap=True)
    found = _result(chosen, cells, complete=len(cells) == len(loads), why=stopped)
    _write(found, out)
    console.print(_table(found))
    console.print(f"Written: {out}/compare.json, frontier.json, frontier.png")
    raise typer.Exit(0 if found.complete else 1)


def _result(ways: list[Way], cells: list[Cell], *, complete: bool, why: str = "") -> Versus:
    return Versus(
        ways=[way.name for way in ways],
        gpus={way.name: way.gpus for way in ways},
        machine=machine(),
        cells=cells,
        complete=complete,
        incidents=[why] if why else [],
        provenance=provenance(command()),
    )


def _write(found: Versus, out: Path) -> None:
    artifacts.write_json(out / "compare.json", found)
    line = compare.frontier(found)
    artifacts.write_json(out / "frontier.json", line)
    frontier.draw_frontier(line, out / "frontier.png", ours=found.ways[0])
    frontier.draw_budget(line, out / "budget.png")


def _table(found: Versus) -> Table:
    ours, *others = found.ways
    view = Table(title=f"{ours} over the others, 95% over blocks")
    for heading in ("users", "over", "throughput", "a user's speed", "time to first token"):
        view.add_column(heading, justify="left" if heading == "over" else "right")
    for cell in found.cells:
        for other in others:
            ratios = cell.ratios.get(other, {})
            cells = [_interval(ratios.get(name)) for name in ("tok_s", "user_tok_s", "ttft")]
            view.add_row(str(cell.concurrency), other, *cells)
    return view


def _interval(found: list[float] | None) -> str:
    """A block without a whole request in its window has no latency, and so no ratio of it."""
    return "-" if found is None else "{1:.3f} ({0:.3f} to {2:.3f})".format(*found)


def _draw(files: list[Path], ours: str | None, user_speed: str | None, out: Path) -> None:
    """Draw throughput against a user's speed (the paper's Figure 7) and budget against load (Figure 8), with ratios at equal service."""
    console = Console()
    merged = frontier.merge([frontier.read(path) for path in files])
    first = ours or merged.series[0].name
    merged.of(first)
    speeds = read_numbers(user_speed, "--user-speed", float, zero=True) if user_speed else None
    artifacts.write_json(out / "frontier.json", merged)
    frontier.draw_frontier(merged, out / "frontier.png", ours=first, speeds=speeds)
    drawn = frontier.draw_budget(merged, out / "budget.png")
    view = Table(title=f"{first} over the others at equal service")
    for heading in ("over", "at", first, "other", "ratio"):
        view.add_column(heading, justify="left" if heading == "over" else "right")
    for found in frontier.iso(merged, first, speeds=speeds):
        unit = "tok/s a user" if found.kind == "speed" else "tok/s a GPU"
        values = [
            "cannot" if each is None else f"{each:.1f}" for each in (found.ours, found.theirs)
        ]
        ratio = "" if found.ratio is None else f"{found.ratio:.3f}"
        view.add_row(found.other, f"{found.at:.1f} {unit}", *values, ratio)
    console.print(view)
    console.print(f"Written: {out}/frontier.json, frontier.png" + (", budget.png" if drawn else ""))
