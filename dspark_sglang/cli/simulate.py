"""``dspark simulate``: a serving system as discrete events, around the server's own scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dspark_sglang.artifacts import as_json as dumps
from dspark_sglang.cli.options import from_fields
from dspark_sglang.simulate.options import Options

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_COLUMNS = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip


def progress(console: Console) -> Progress:
    """A bar on standard error, so that --json stays alone on standard output."""
    return Progress(*_COLUMNS, console=console, transient=True)


@app.callback(invoke_without_command=True)
@from_fields
def simulate(
    context: typer.Context,
    options: Options,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, nothing else.")
    ] = False,
) -> None:
    """Simulate loads on one machine, with and without drafting.

    Arrivals are one of --concurrency, --rate, --trace. Step times come from --profile or --model; acceptance from
    --evaluation (or with --model).
    """
    if context.invoked_subcommand is not None:
        return
    from dspark_sglang.simulate import study

    console, errors = Console(), Console(stderr=True)
    plan = study.plan(options)
    with progress(errors) as bar:
        task = bar.add_task("", total=plan.total)
        found = study.run(
            plan, lambda what, done: bar.update(task, completed=done, description=what)
        )
    study.write(found, options.out)
    if as_json:
        print(dumps(found))
    else:
        console.print(table(found))
        for name in ("simulation.json", "frontier.json", "frontier.png"):
            if (options.out / name).exists():
                console.print(f"Written: {options.out / name}")
    if found.interrupted:
        errors.print("[yellow]Interrupted: the result is partial and says so.[/]")
        raise typer.Exit(130)


def table(found: Any) -> Table:
    """Loads and modes of a study."""
    view = Table(
        "mode", title="Simulated" + (" (interrupted: partial)" if found.interrupted else "")
    )
    for heading in ("load", "tok/s", "TTFT ms", "TPOT ms", "p99", "length", "budget", "drafting", "SLA", "events/s"):  # fmt: skip
        view.add_column(heading, justify="right")
    for mode, summaries in found.summaries.items():
        for one in summaries:
            ttft, (tpot, _, late) = one.ttft_ms or [None], one.tpot_ms or [None] * 3
            cells = ((one.load, "g"), (one.tok_s, ".1f"), (ttft[0], ".1f"), (tpot, ".2f"), (late, ".2f"),
                     (one.accept_length, ".2f"), (one.budget, ".2f"), (one.drafting, ".0%"),
                     (one.sla_share, ".1%"), (found.events_s[mode], ",.0f"))  # fmt: skip
            view.add_row(
                mode, *("-" if value is None else f"{value:{form}}" for value, form in cells)
            )
    return view


@app.command("price")
def price_(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FRONTIER", help="Of `dspark simulate`, `dspark bench` or `make bench-load`."
        ),
    ],
    sla: Annotated[float, typer.Option(help="Tokens a second that every user gets at least.")],
    max_ttft_ms: Annotated[
        float | None, typer.Option(help="Most milliseconds to the first token.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="quoted, r1-2025, v4-pro, v4-flash, cpu, or one of --prices. "
            "Default: the only one of --prices, else quoted."
        ),
    ] = None,
    prices: Annotated[Path | None, typer.Option(help="Presets of your own (TOML).")] = None,
    gpu_hour: Annotated[
        float | None, typer.Option(help="Dollars an hour for a GPU, instead of the preset's.")
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(help="Share of paid hours that is busy, instead of the preset's."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, nothing else: all inputs and sources, too.")
    ] = False,
) -> None:
    """Price a million output tokens at a speed, with and without speculation, from a frontier.

    Computed, not run. One input at a time is set to both ends of its range. For example: dspark simulate price
    frontier.json --sla 80 --preset v4-flash
    """
    from dspark_loadtests import frontier
    from dspark_sglang.simulate import price

    given = price.load(preset, prices, gpu_hour=gpu_hour, utilisation=utilisation)
    found = price.answer(frontier.read(file), given, sla=sla, max_ttft_ms=max_ttft_ms)
    if as_json:
        print(dumps(found))
        return
    console = Console(highlight=False)
    console.print(f"{found.prices.about}.")
    for view in price_tables(found):
        console.print(view)
    for note in found.notes:
        console.print(f"- {note}")


def price_tables(found: Any) -> tuple[Table, Table]:
    """Ways of serving of an answer beside each other, and one input at a time."""
    from dspark_sglang.simulate.price import UNITS

    view = Table(
        title=f"{found.model} on {found.hardware}, {found.source}; {found.sla:g} tokens/s for every user"
    )
    view.add_column("way of serving")
    over = f"cost over {found.sides[0].name}'s"
    for heading in ("tok/s/GPU", "M tok/hour", "prefill", "$/M tok", over, "margin"):
        view.add_column(heading, justify="right")
    for side in found.sides:
        hour = side.hour
        if hour is None:
            view.add_row(side.name, f"at most {side.fastest:.4g} tok/s/user", *["-"] * 5)
            continue
        view.add_row(
            side.name,
            short(side.tok_s_per_gpu),
            short(hour.tokens / 1e6),
            f"{hour.prefill_share:.0%}",
            short(hour.cost_per_million),
            "-" if side.times_first is None else f"{side.times_first:.2f}",
            "-" if hour.margin is None else f"{hour.margin:.0%}",
        )
    ranges = Table(title="$/M tok with one input at its low and high end")
    ranges.add_column("input")
    able = [side.name for side in found.sides if side.hour is not None]
    for heading in ("low", "middle", "high", *able):
        ranges.add_column(heading, justify="right")
    known = found.prices.quantities()
    for name, ends in found.sensitivity.items():
        one, spans = known[name], (f"{short(low)} to {short(high)}" for low, high in ends.values())
        ranges.add_row(
            f"{name}, {UNITS[name]}", short(one.low), short(one.value), short(one.high), *spans
        )
    return view, ranges


def short(value: float) -> str:
    """Three digits, and no power of ten."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
