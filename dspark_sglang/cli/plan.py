"""``dspark plan``: will it fit, how many requests, and with which command."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from dspark_sglang.artifacts import as_json
from dspark_sglang.cli.options import from_fields
from dspark_sglang.errors import ConfigError
from dspark_sglang.planning import hardware, report
from dspark_sglang.planning import plan as planning
from dspark_sglang.planning.options import Options


@from_fields
def plan(
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            help="Target: a directory with config.json and the safetensors index (no weights), or the "
            "name of a published one, e.g. deepseek-v4-pro-dspark."
        ),
    ] = None,
    machine: Annotated[
        str,
        typer.Option(
            "--hardware", help="[NODESx]GPUxCOUNT, e.g. h100-80x8 or 2xh100-80x8, or a YAML file."
        ),
    ] = "",
    drafter: Annotated[
        str | None, typer.Option(help="A stand-alone drafter. Default: the one the target bundles.")
    ] = None,
    options: Options,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Trust config.json without an index.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    show_hardware: Annotated[
        str | None, typer.Option(help="Print this profile as a YAML file to edit, and stop.")
    ] = None,
) -> None:
    """Memory by part, concurrency and the command, from shapes alone. Nothing is loaded or run.

    Exit code 0: it fits. 1: it does not. 2: the input is wrong, or SGLang refuses the combination.
    """
    if show_hardware is not None:
        print(hardware.show(hardware.read(show_hardware)), end="")
        return
    if model is None or not machine:
        raise ConfigError(
            f"{'MODEL' if model is None else '--hardware'} is missing.",
            expected="a model and a machine",
            fix="For example: dspark plan deepseek-v4-flash-dspark --hardware h100-80x8",
        )
    made = planning.make(model, drafter, hardware.read(machine), options, config_only=config_only)
    if json:
        print(as_json(made))
    else:
        report.show(made, Console(highlight=False))
    if made.refused:
        raise typer.Exit(2)
    if not made.fits:
        raise typer.Exit(1)
