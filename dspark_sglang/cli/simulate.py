"""``dspark simulate``: a serving system as discrete events, around the server's own scheduler."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dspark_sglang.cli.demo import DRAFTER
from dspark_sglang.errors import ConfigError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_COLUMNS = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[at]}"),
            TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
_EVALUATION = Path("docs/results/evaluation/evaluation.json")
_RESULTS = Path("docs/results")
PARAMETERS = _RESULTS / "simulation-parameters.json"


def progress(console: Console) -> Progress:
    """A bar on standard error, so that --json stays alone on standard output."""
    return Progress(*_COLUMNS, console=console, transient=True)


def numbers(text: str, name: str, kind: type[Any]) -> list[Any]:
    """A list of numbers above 0.

    Raises:
        ConfigError: anything else.
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < value < float("inf") for value in found):
        raise ConfigError(
            f"{name} is {text!r}.",
            expected="numbers above 0 with commas between them",
            fix="As in 1,8,32.",
        )
    return found


@app.callback(invoke_without_command=True)
def simulate(
    context: typer.Context,
    profile: Annotated[
        Path | None,
        typer.Option(help="Step cost: what `dspark profile` wrote (file or directory)."),
    ] = None,
    parameters: Annotated[
        Path | None,
        typer.Option(help="Step cost and acceptance of a fitted server (`dspark simulate fit`)."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Or a published model on H800s, from shapes: deepseek-v4-flash-dspark."),
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Acceptance: a result of `dspark eval --json`.")
    ] = None,
    blocks: Annotated[
        Path | None, typer.Option(help="Acceptance: recorded blocks, JSON lines.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Of the evaluation, and of requests.")
    ] = 1.0,
    modes: Annotated[str, typer.Option(help="none, fixed, adaptive, lagged.")] = "none,adaptive",
    concurrency: Annotated[
        str | None, typer.Option(help="Closed loop: users of each replica, with commas.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Poisson: requests a second over all replicas, with commas.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Arrivals of a Mooncake trace, JSON lines.")
    ] = None,
    speed: Annotated[float, typer.Option(help="Replay a trace so many times as fast.")] = 1.0,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each load.")] = 10_000,
    seconds: Annotated[
        float | None, typer.Option(help="Closed loop: stop after so many simulated seconds.")
    ] = None,
    warm: Annotated[float, typer.Option(min=0.0, help="Simulated seconds left out.")] = 0.0,
    prompt: Annotated[float, typer.Option(help="Tokens of a prompt.")] = 128.0,
    answer: Annotated[float, typer.Option(help="Tokens of an answer.")] = 96.0,
    variation: Annotated[float, typer.Option(help="Coefficient of variation of both.")] = 0.0,
    cached: Annotated[float, typer.Option(help="Share of prompts that caches hold.")] = 0.0,
    prefill_ms: Annotated[
        str, typer.Option(help="Milliseconds of a prefill step, a request in it, 1000 tokens.")
    ] = "0,0,0",
    slots: Annotated[int, typer.Option(min=1, help="Most requests of a replica at once.")] = 64,
    pool: Annotated[int | None, typer.Option(help="Most tokens of context of a replica.")] = None,
    speculation: Annotated[str, typer.Option(help="auto, on or off.")] = "auto",
    noise: Annotated[float, typer.Option(help="Spread of step times (logarithm).")] = 0.0,
    replicas: Annotated[int, typer.Option(min=1, help="Servers behind the router.")] = 1,
    router: Annotated[str, typer.Option(help="random, round-robin, least-work.")] = "random",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes. Default: the cores, at most one a replica."),
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Run replicas on a Ray cluster: auto, local or an address.")
    ] = None,
    sla_ttft_ms: Annotated[
        float | None, typer.Option(help="Milliseconds to the first token.")
    ] = None,
    sla_tpot_ms: Annotated[
        float | None, typer.Option(help="Milliseconds a token after it.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same result.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Where frontier.json, simulation.json and frontier.png go.")
    ] = Path("runs/simulate"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, nothing else.")
    ] = False,
) -> None:
    """Simulate loads on one machine, with and without drafting.

    Arrivals are one of --concurrency, --rate, --trace. Step times come from one of --profile, --parameters,
    --model; acceptance from --evaluation or --blocks (or with --parameters and --model).
    """
    if context.invoked_subcommand is not None:
        return
    given = {key: value for key, value in locals().items() if key not in ("context", "as_json")}
    from dspark_sglang.simulate import study

    study.check_choices(given)
    workers = workers or len(os.sched_getaffinity(0))
    console, errors = Console(), Console(stderr=True)
    plan = study.plan({**given, "workers": workers})
    with progress(errors) as bar:
        task = bar.add_task("", total=plan.total, at="")
        found = study.run(
            plan,
            lambda what, done, rate: bar.update(
                task, completed=done, description=what, at=f"{rate:,.0f} events/s"
            ),
        )
    study.write(found, out)
    if as_json:
        print(study.dumps(found))
    else:
        console.print(table(found))
        for name in ("simulation.json", "frontier.json", "frontier.png"):
            if (out / name).exists():
                console.print(f"Written: {out / name}")
    if found.interrupted:
        errors.print("[yellow]Interrupted: the result is partial and says so.[/]")
        raise typer.Exit(130)


def table(found: Any) -> Table:
    """Loads and modes of a study."""
    view = Table(title="Simulated" + (" (interrupted: partial)" if found.interrupted else ""))
    view.add_column("mode")
    headings = (
        "load",
        "tok/s",
        "TTFT ms",
        "TPOT ms",
        "p99",
        "length",
        "budget",
        "drafting",
        "SLA",
        "events/s",
    )
    for heading in headings:
        view.add_column(heading, justify="right")
    for mode, summaries in found.summaries.items():
        for one in summaries:
            view.add_row(
                mode,
                f"{one.load:g}",
                f"{one.tok_s:.1f}",
                *("-" if one.ttft_ms is None else f"{one.ttft_ms[0]:.1f}",),
                *(
                    ("-", "-")
                    if one.tpot_ms is None
                    else (f"{one.tpot_ms[0]:.2f}", f"{one.tpot_ms[2]:.2f}")
                ),
                "-" if one.accept_length is None else f"{one.accept_length:.2f}",
                f"{one.budget:.2f}",
                f"{one.drafting:.0%}",
                "-" if one.sla_share is None else f"{one.sla_share:.1%}",
                f"{found.events_s[mode]:,.0f}",
            )
    return view


@app.command("published")
def published_(
    out: Annotated[
        Path, typer.Option(help="Where frontiers, figures and simulation.json go.")
    ] = Path("runs/simulate-published"),
    sensitivity: Annotated[bool, typer.Option(help="Replace each assumption in turn, too.")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print simulation.json, nothing else.")
    ] = False,
) -> None:
    """Re-derive the published V4-Flash and V4-Pro result on H800s from one table of assumptions.

    Computed, not run. Keeps the validation of an earlier `dspark simulate check` with the same --out.
    """
    from dspark_sglang.simulate import rederive

    console, errors = Console(), Console(stderr=True)
    with progress(errors) as bar:
        task = bar.add_task("", total=rederive.total(sensitivity), at="")
        found = rederive.run(
            out, sensitivity, lambda what: bar.update(task, advance=1, description=what)
        )
    if as_json:
        print(rederive.dumps(found))
        return
    console.print(rederive.table(found))
    console.print(f"Written: {out / 'simulation.json'}, frontiers and figures beside it")


@app.command("fit")
def fit_(
    out: Annotated[Path, typer.Option(help="The parameters' file.")] = PARAMETERS,
    work: Annotated[Path, typer.Option(help="Where log and cache go.")] = Path("runs/simulate-fit"),
    target: Annotated[Path | None, typer.Option(help="Default: the bundle, else SmolLM2.")] = None,
    drafter: Annotated[Path, typer.Option(help="The drafter to serve.")] = DRAFTER,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    temperature: Annotated[float, typer.Option(min=0.0, help="Of requests.")] = 1.0,
    concurrency: Annotated[str, typer.Option(help="Loads to fit at.")] = "1,4,8,16,32",
    speculation: Annotated[str, typer.Option(help="on: always draft; auto: where it pays.")] = "on",
    blocks: Annotated[int, typer.Option(min=1, help="Turns of each load.")] = 2,
    warm_s: Annotated[float, typer.Option(min=0.0, help="Seconds before a window.")] = 4.0,
    window_s: Annotated[float, typer.Option(min=1.0, help="Seconds of a window.")] = 24.0,
    max_tokens: Annotated[int, typer.Option(min=8, help="Tokens of each answer.")] = 96,
) -> None:
    """Learn a real server on this machine: step cost, acceptance, what lies between steps.

    Takes about 7 minutes on 2 cores; nothing else may run. Commit the file before `dspark simulate check`.
    """
    from dspark_sglang import targets
    from dspark_sglang.artifacts import write_json
    from dspark_sglang.simulate import measure

    if speculation not in ("on", "auto") or dtype not in ("bfloat16", "float32"):
        raise ConfigError(
            f"--speculation {speculation}, --dtype {dtype}.",
            expected="on or auto, bfloat16 or float32",
            fix="Use one of these.",
        )
    loads = numbers(concurrency, "--concurrency", int)
    console, work = Console(), work.absolute()
    plan = measure.Plan(
        temperature=temperature,
        max_tokens=max_tokens,
        warm_s=warm_s,
        window_s=window_s,
        blocks=blocks,
    )
    given = ["dspark", "simulate", "fit", "--concurrency", concurrency, "--temperature", f"{temperature:g}",
             "--speculation", speculation, "--dtype", dtype, "--blocks", str(blocks),
             "--warm-s", f"{warm_s:g}", "--window-s", f"{window_s:g}", "--max-tokens", str(max_tokens)]  # fmt: skip
    fixed: dict[str, Any] = {
        "target": targets.of_drafter(drafter, target),
        "drafter": drafter,
        "dtype": dtype,
        "slots": max(32, *loads),
    }
    with (
        console.status("starting the server (about 90 s)") as status,
        measure.serving(**fixed, out=work) as server,
    ):
        found = measure.fit(
            server,
            plan,
            loads=loads,
            speculation=speculation,
            tell=status.update,
            given=given,
            **fixed,
        )
    write_json(out, found)
    own = found.overheads
    console.print(
        f"Between steps {1e3 * own.step:.1f} ms and {1e3 * own.request:.2f} ms a request; "
        f"prefill {1e3 * own.prefill_step:.0f} ms."
    )
    console.print(
        f"Written: {out}. Commit it, then compare: dspark simulate check --parameters {out}"
    )


@app.command("check")
def check_(
    parameters: Annotated[
        Path, typer.Option(help="What `dspark simulate fit` wrote.")
    ] = PARAMETERS,
    out: Annotated[Path, typer.Option(help="Result: simulation.json there is updated.")] = Path(
        "runs/simulate-published"
    ),
    work: Annotated[Path, typer.Option(help="Where log and cache go.")] = Path(
        "runs/simulate-check"
    ),
    target: Annotated[Path | None, typer.Option(help="Default: the bundle, else SmolLM2.")] = None,
    drafter: Annotated[Path, typer.Option(help="The drafter to serve.")] = DRAFTER,
    concurrency: Annotated[
        str, typer.Option(help="Loads to compare at; none that was fitted.")
    ] = "2,3,6,12,24",
    blocks: Annotated[int, typer.Option(min=1, help="Turns of each load.")] = 2,
    warm_s: Annotated[float, typer.Option(min=0.0, help="Seconds before a window.")] = 4.0,
    window_s: Annotated[float, typer.Option(min=1.0, help="Seconds of a window.")] = 32.0,
    tolerance: Annotated[float, typer.Option(help="Per cent; more is exit code 1.")] = 10.0,
    simulate_only: Annotated[
        bool, typer.Option(help="Print predictions, start no server.")
    ] = False,
) -> None:
    """Compare the simulator with a real server at loads it was not fitted at.

    All loads are simulated first. Takes about 7 minutes on 2 cores; nothing else may run.
    """
    from dspark_sglang.simulate import checking
    from dspark_sglang.simulate import parameters as fitted

    loads = numbers(concurrency, "--concurrency", int)
    console = Console()
    given = fitted.read(parameters, here=not simulate_only)
    checking.check_loads(given, loads)
    with console.status("simulating") as status:
        predicted = {}
        for users in loads:
            status.update(f"simulating {users} requests")
            predicted[users] = fitted.predict(given, users)
    if simulate_only:
        console.print(checking.predictions(predicted))
        return
    with console.status("starting the server (about 60 s)") as status:
        found = checking.run(
            given,
            predicted,
            target=target,
            drafter=drafter,
            work=work.absolute(),
            tell=status.update,
            blocks=blocks,
            warm_s=warm_s,
            window_s=window_s,
        )
    path = checking.write(found, given, parameters, out)
    console.print(checking.table(found))
    wrong = {name: value for name, value in fitted.worst(found).items() if not value <= tolerance}
    console.print(f"Written: {path}")
    if wrong:
        shown = ", ".join(f"{name} {value:.1f}%" for name, value in wrong.items())
        console.print(f"[red]Beyond {tolerance:g}%:[/] {shown}")
        raise typer.Exit(1)


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
    import msgspec

    from dspark_loadtests import frontier
    from dspark_sglang.simulate import price

    given = price.load(preset, prices, gpu_hour=gpu_hour, utilisation=utilisation)
    found = price.answer(frontier.read(file), given, sla=sla, max_ttft_ms=max_ttft_ms)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
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
