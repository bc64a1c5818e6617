"""``dspark plan``: will it fit, how many requests, and with which command."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.console import Console

from dspark_sglang.errors import ConfigError
from dspark_sglang.planning import hardware, report
from dspark_sglang.planning import plan as planning
from dspark_sglang.planning.options import Options

#: The parameters below that are a plan's own, under the same names.
_FIELDS = Options.__struct_fields__


def plan(
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
    tp: Annotated[int | None, typer.Option(help="Ranks. Default: as many as can be used.")] = None,
    ep: Annotated[int, typer.Option(help="Expert parallel size.")] = 1,
    attention_dp: Annotated[int, typer.Option(help="Attention data parallel size.")] = 1,
    pd: Annotated[
        Literal["null", "prefill", "decode"], typer.Option(help="Side of PD disaggregation.")
    ] = "null",
    context: Annotated[
        int | None, typer.Option(help="Tokens a request must have room for. Default: 32,768.")
    ] = None,
    requests: Annotated[int, typer.Option(help="So many of them at once, at least.")] = 1,
    max_running: Annotated[
        int | None,
        typer.Option("--max-running-requests", help="Default: 48, fewer where it would not fit."),
    ] = None,
    chunked_prefill: Annotated[
        int | None,
        typer.Option(
            "--chunked-prefill-size", help="Default: SGLang's, less where it would not fit."
        ),
    ] = None,
    mem_fraction: Annotated[
        float | None,
        typer.Option("--mem-fraction-static", help="Default: what SGLang's heuristic gives."),
    ] = None,
    max_total_tokens: Annotated[int | None, typer.Option(help="Cap of the pool.")] = None,
    page_size: Annotated[int | None, typer.Option(help="Tokens a page.")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None, typer.Option(help="Type of weights.")
    ] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, bf16 or fp8_e4m3.")] = "auto",
    attention_backend: Annotated[str | None, typer.Option(help="Of the target.")] = None,
    moe_runner: Annotated[
        str | None, typer.Option("--moe-runner-backend", help="Kernels of the experts.")
    ] = None,
    moe_a2a: Annotated[
        str, typer.Option("--moe-a2a-backend", help="All-to-all of the experts.")
    ] = "none",
    lora: Annotated[bool, typer.Option("--lora", help="Serve LoRA adapters.")] = False,
    hicache: Annotated[bool, typer.Option("--hicache", help="Hierarchical KV cache.")] = False,
    radix_cache: Annotated[
        bool, typer.Option(" /--no-radix-cache", help="No prefix reuse.")
    ] = True,
    eplb: Annotated[bool, typer.Option("--eplb", help="Balance experts while serving.")] = False,
    builtin: Annotated[
        bool, typer.Option("--builtin", help="Draft with SGLang's builtin (DSPARK_PLUGIN=off).")
    ] = False,
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
    options = Options(**{name: value for name, value in locals().items() if name in _FIELDS})
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
        print(report.as_json(made))
    else:
        report.show(made, Console(highlight=False))
    if made.refused:
        raise typer.Exit(2)
    if not made.fits:
        raise typer.Exit(1)
