"""``dspark ablate``: heads, depths and block sizes on the same data, states and steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from dspark_sglang.training.ablation import Outcome


def ablate(
    config: Annotated[Path, typer.Option(help="A training file; its drafter is the base.")],
    out: Annotated[Path, typer.Option(help="Folder for ablations.json and ablations.png.")],
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override one field, such as optim.steps=300. Repeatable."),
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0, help="Start no further variant after this time. 0: no limit.")
    ] = 0.0,
) -> None:
    """Train one drafter per variant and compare them; the same command goes on where it stopped."""
    from dspark_sglang.memory import keep_freed_memory
    from dspark_sglang.training import ablation
    from dspark_sglang.training.config import read_config

    console = Console()
    settings = read_config(config, tuple(assign or ()))
    if settings.device == "cpu":
        keep_freed_memory()
    path = out / "ablations.json"
    for outcome in ablation.run(settings, path, log=console.print, minutes=minutes):
        console.print(
            f"{outcome.name} (seed {outcome.seed}): {_length(outcome.accept_length_greedy)} "
            f"greedy, {_length(outcome.accept_length_t1)} at temperature 1"
        )
    results = ablation.read_results(path)
    if results is None:
        console.print("no time for a variant")
        return
    ablation.plot(results.outcomes, out / "ablations.png")
    console.print(_table(results.outcomes))
    gain = ablation.gain_over_dflash(results.outcomes)
    if gain is not None:
        console.print(f"DSpark over DFlash: {gain:+.1f}%")


def _length(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _table(outcomes: list[Outcome]) -> Table:
    view = Table(title="Ablations: equal data, states and steps")
    for heading in ("variant", "seed", "parameters", "greedy", "T=1", "seconds"):
        view.add_column(heading, justify="left" if heading == "variant" else "right")
    for outcome in outcomes:
        view.add_row(
            outcome.name,
            str(outcome.seed),
            f"{outcome.parameters / 1e6:.1f} M",
            _length(outcome.accept_length_greedy),
            _length(outcome.accept_length_t1),
            f"{outcome.seconds:.0f}",
        )
    return view
