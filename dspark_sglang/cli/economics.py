"""``dspark economics``: what serving at a speed costs, and how sure that is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from dspark_sglang.artifacts import write_json
from dspark_sglang.economics import prices, quoted, slots, study, view
from dspark_sglang.errors import ConfigError
from dspark_sglang.load import frontier
from dspark_sglang.provenance import provenance

_PRESETS = "; ".join(f"{name}: {about}" for name, about in prices.presets().items())


def economics(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FRONTIER", help="A frontier of `dspark simulate` or `dspark bench`."
        ),
    ] = None,
    sla: Annotated[
        float | None, typer.Option(help="Tokens a second that every user gets at least.")
    ] = None,
    series: Annotated[
        str | None, typer.Option(help="The way of serving. Default: dspark, else the last one.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="What it is compared with. Default: the first other one.")
    ] = None,
    max_ttft_ms: Annotated[
        float | None, typer.Option(help="Most milliseconds to the first token.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"Prices and workload. {_PRESETS}.")] = None,
    file_prices: Annotated[
        Path | None, typer.Option("--prices", help="A file of your own presets (TOML).")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="NAME=VALUE or NAME=VALUE:LOW:HIGH, as often as wanted. Names: "
            + ", ".join(f"{name} ({prices.UNITS[name]})" for name in prices.NAMES)
            + ".",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Count the requests that fit beside the drafter, as `dspark plan MODEL` does."
        ),
    ] = None,
    drafter: Annotated[str | None, typer.Option(help="Stand-alone drafter for --model.")] = None,
    hardware: Annotated[str, typer.Option(help="Machine of --model.")] = "h800-80x8",
    context: Annotated[int, typer.Option(help="Tokens of a request for --model.")] = 8192,
    draws: Annotated[int, typer.Option(help="Draws of all assumptions at once.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Their seed.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Also write economics.json and economics.png there.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    show_quoted: Annotated[
        bool,
        typer.Option(
            "--quoted", help="Do the arithmetic quoted with DSpark again; needs no frontier."
        ),
    ] = False,
) -> None:
    """Tokens an hour, cost a million and margin at a speed, from a frontier and prices, and how far they may be off.

    For example: dspark economics frontier.json --sla 80 --preset v4-flash --model deepseek-v4-flash-dspark
    """
    console = Console(highlight=False)
    if show_quoted:
        _quoted(console, out, as_json=json)
        return
    if file is None or sla is None:
        raise ConfigError(
            f"{'FRONTIER' if file is None else '--sla'} is missing.",
            expected="a frontier file and the speed that every user gets"
            if file is None
            else _speeds(file),
            fix="For example: dspark economics frontier.json --sla 80. Without a frontier: dspark economics --quoted.",
        )
    found = frontier.read(file)
    ours = series or _default(found)
    question = study.Question(
        series=ours,
        baseline=baseline or next((s.name for s in found.series if s.name != ours), None),
        sla=sla,
        max_ttft_ms=max_ttft_ms,
        draws=draws,
        seed=seed,
    )
    made, samples = study.answer(
        found,
        question,
        prices.load(preset, file_prices, change or ()),
        slots.count(model, drafter, hardware, context) if model is not None else None,
        provenance(_command(), data=f"{found.source} frontier {file.name}"),
    )
    if out is not None:
        write_json(out / "economics.json", made)
        view.draw(made, samples, out / "economics.png")
    if json:
        print(msgspec.json.format(msgspec.json.encode(made)).decode())
        return
    view.show(made, console)
    if out is not None:
        console.print(f"Written: {out / 'economics.json'}, {out / 'economics.png'}")


def _quoted(console: Console, out: Path | None, *, as_json: bool) -> None:
    found = quoted.work_out()
    if out is not None:
        write_json(out / "quoted.json", found)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    view.show_quoted(found, console)
    if out is not None:
        console.print(f"Written: {out / 'quoted.json'}")


def _default(found: frontier.Frontier) -> str:
    names = [series.name for series in found.series]
    if not names:
        raise ConfigError(
            "The frontier has no series.",
            expected="at least one",
            fix="Make it again with `dspark simulate` or `dspark bench`.",
        )
    return next((name for name in names if "dspark" in name.lower()), names[-1])


def _speeds(file: Path) -> str:
    """What speeds a frontier has, for the message that one is missing."""
    found = frontier.read(file)
    speeds = [point.tok_s_per_user for series in found.series for point in series.points]
    return f"{min(speeds):.4g} to {max(speeds):.4g} tokens/s/user" if speeds else "a speed"


def _command() -> list[str]:
    return ["dspark", *sys.argv[1:]]
