"""What ``dspark simulate`` is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from dspark_sglang.core.schedule.policy import Choice

#: ``random`` splits a Poisson process into Poisson processes; ``round-robin`` deals in turn;
#: ``least-work`` sends each to the replica with fewest answer tokens still to come, as if each made them
#: at one speed.
Router = Literal["random", "round-robin", "least-work"]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """A study: arrivals, step times, acceptance, and how the servers are run."""

    profile: Annotated[
        Path | None,
        typer.Option(help="Step cost: what `dspark calibrate --cost` wrote (file or directory)."),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(help="Or a published model on H800s, from shapes: deepseek-v4-flash-dspark."),
    ] = None
    evaluation: Annotated[
        Path | None, typer.Option(help="Acceptance: a result of `dspark eval --json`.")
    ] = None
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Of the evaluation, and of requests.")
    ] = 1.0
    modes: Annotated[str, typer.Option(help="none, fixed, adaptive, lagged.")] = "none,adaptive"
    concurrency: Annotated[
        str | None, typer.Option(help="Closed loop: users of each replica, with commas.")
    ] = None
    rate: Annotated[
        str | None, typer.Option(help="Poisson: requests a second over all replicas, with commas.")
    ] = None
    trace: Annotated[
        Path | None, typer.Option(help="Arrivals of a Mooncake trace, JSON lines.")
    ] = None
    speed: Annotated[float, typer.Option(help="Replay a trace so many times as fast.")] = 1.0
    requests: Annotated[int, typer.Option(min=1, help="Requests of each load.")] = 10_000
    seconds: Annotated[
        float | None, typer.Option(help="Closed loop: stop after so many simulated seconds.")
    ] = None
    warm: Annotated[float, typer.Option(min=0.0, help="Simulated seconds left out.")] = 0.0
    prompt: Annotated[float, typer.Option(help="Tokens of a prompt.")] = 128.0
    answer: Annotated[float, typer.Option(help="Tokens of an answer.")] = 96.0
    variation: Annotated[float, typer.Option(help="Coefficient of variation of both.")] = 0.0
    cached: Annotated[float, typer.Option(help="Share of prompts that caches hold.")] = 0.0
    prefill_ms: Annotated[
        str, typer.Option(help="Milliseconds of a prefill step, a request in it, 1000 tokens.")
    ] = "0,0,0"
    slots: Annotated[int, typer.Option(min=1, help="Most requests of a replica at once.")] = 64
    pool: Annotated[int | None, typer.Option(help="Most tokens of context of a replica.")] = None
    speculation: Annotated[Choice, typer.Option(help="Draft where it pays, always, never.")] = (
        "auto"
    )
    noise: Annotated[float, typer.Option(help="Spread of step times (logarithm).")] = 0.0
    replicas: Annotated[int, typer.Option(min=1, help="Servers behind the router.")] = 1
    router: Annotated[Router, typer.Option(help="Which replica a request goes to.")] = "random"
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes. Default: the cores, at most one a replica."),
    ] = None
    sla_ttft_ms: Annotated[float | None, typer.Option(help="Milliseconds to the first token.")] = (
        None
    )
    sla_tpot_ms: Annotated[float | None, typer.Option(help="Milliseconds a token after it.")] = None
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same result.")] = 0
    out: Annotated[
        Path, typer.Option(help="Where frontier.json, simulation.json and frontier.png go.")
    ] = Path("runs/simulate")
