"""``dspark bench``: load a running server."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dspark_loadtests import bench as stage
from dspark_loadtests import gate
from dspark_loadtests.bench import Stage
from dspark_loadtests.client import Endpoint
from dspark_loadtests.frontier import frontier_of
from dspark_loadtests.generator import Load
from dspark_loadtests.prompts import Source
from dspark_loadtests.report import print_summaries, verdict
from dspark_loadtests.schema import BenchResult, Slo
from dspark_sglang.artifacts import read_artifact, write_bytes, write_json
from dspark_sglang.cli.options import from_fields
from dspark_sglang.errors import ConfigError, DSparkError
from dspark_sglang.provenance import machine, provenance
from dspark_sglang.values import read_numbers

app = typer.Typer(invoke_without_command=True, no_args_is_help=True)
_GONE = ("ramp", "step", "trace")


def command() -> list[str]:
    """This command line, as a reader would type it."""
    return ["dspark", *sys.argv[1:]]


@app.callback()
@from_fields
def bench(
    context: typer.Context,
    *,
    url: Annotated[str | None, typer.Option(help="The server, as http://127.0.0.1:30000.")] = None,
    name: Annotated[
        str, typer.Option(help="What the result calls this way of serving.")
    ] = "server",
    pattern: Annotated[
        str,
        typer.Option(
            help="closed: users who wait for each answer. poisson: an open loop, which does not wait."
        ),
    ] = "closed",
    concurrency: Annotated[
        str, typer.Option(help="closed: users; a stage for each number.")
    ] = "1,4,16",
    rate: Annotated[str, typer.Option(help="poisson: requests/s; a stage for each number.")] = "1",
    requests: Annotated[
        int | None, typer.Option(min=1, help="Measured requests a stage, instead of --duration.")
    ] = None,
    duration: Annotated[float, typer.Option(help="Seconds of a stage's window.")] = 30.0,
    warmup: Annotated[float, typer.Option(min=0.0, help="Seconds before it, not measured.")] = 5.0,
    drain: Annotated[
        float, typer.Option(min=0.0, help="Longest wait for answers after it.")
    ] = 60.0,
    options: stage.Options,
    baseline: Annotated[
        Path | None,
        typer.Option(help="A result.json that was good: exit code 1 where this one is worse."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Of --baseline: largest loss of a metric, 0.05 is 5%.")
    ] = 0.05,
    result: Annotated[
        Path | None, typer.Option(help="Judge this result.json by --baseline; nothing is loaded.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("runs/bench"),
) -> None:
    """Load a running server: latencies, throughput, goodput at an SLA, accepted length.

    Examples: dspark bench --url http://127.0.0.1:30000 --concurrency 1,8,32;
    dspark bench --url http://127.0.0.1:30000 --pattern poisson --rate 2,4 --duration 60;
    dspark bench --result runs/bench/result.json --baseline saved/result.json.

    Writes result.json, requests.jsonl (a line for each request) and, of several loads, frontier.json.
    Exit code 0: all answered; 1: requests failed, none completed, the server died, or --baseline was better by more
    than the tolerance and than noise; 2: it could not be run.
    """
    if context.invoked_subcommand is not None:
        return
    console = Console()
    if result is not None:
        if baseline is None or url is not None:
            raise ConfigError(
                "--result needs --baseline, and no --url.",
                expected="two results to hold against each other",
                fix="For example: --result runs/bench/result.json --baseline saved/result.json.",
            )
        raise typer.Exit(0 if judge(console, result, baseline, tolerance) else 1)
    if url is None:
        raise ConfigError(
            "No server was named.",
            expected="its base URL",
            fix="Give --url http://127.0.0.1:30000.",
        )
    if pattern not in ("closed", "poisson"):
        raise ConfigError(
            f"--pattern is {pattern!r}.",
            expected="closed or poisson",
            fix="aiperf makes it: docs/guides/load-test.md."
            if pattern in _GONE
            else "Use one of these.",
        )
    source, slo = options.source(), options.slo
    common = options.load(
        warm_s=warmup,
        window_s=duration if requests is None else math.inf,
        requests=requests,
        drain_s=drain,
    )
    users = read_numbers(concurrency, "--concurrency", int)
    rates = read_numbers(rate, "--rate", float)
    loads = (
        {f"c{each}": msgspec.structs.replace(common, users=each) for each in users}
        if pattern == "closed"
        else {f"r{each:g}": msgspec.structs.replace(common, rate=each) for each in rates}
    )
    stage.check(loads, source, slo)
    endpoint = options.connect(url)
    empty = BenchResult(
        name=name,
        pattern=pattern,
        gpus=options.gpus,
        machine=machine(),
        stages=[],
        complete=False,
        incidents=[],
        provenance=provenance(command()),
    )
    good = None if baseline is None else read_result(baseline)  # before minutes of load
    found = _run(console, endpoint, source, loads, slo, empty, out)
    passed = found.complete and all(verdict(s)[0] for s in found.stages)
    if good is not None and baseline is not None:
        passed &= judge(console, out / "result.json", baseline, tolerance)
    raise typer.Exit(0 if passed else 1)


def read_result(path: Path) -> BenchResult:
    """A result.json.

    Raises:
        ArtifactError: it is none.
    """
    return read_artifact(path, BenchResult, "a result", "Make one with `dspark bench`.")


def judge(console: Console, result: Path, baseline: Path, tolerance: float) -> bool:
    """Hold a result against a saved one, and show how they differ.

    Not passed: a metric is worse by more than the tolerance and by more than noise, requests failed that did not before,
    a stage is missing, the load differs or the run is incomplete.
    """
    found = gate.compare(read_result(result), read_result(baseline), tolerance=tolerance)
    view = Table(title=f"{result} against {baseline}, tolerance {tolerance:.1%}")
    for heading in ("stage", "metric", "before", "after", "change (95%)", "verdict"):
        view.add_column(heading, justify="left" if heading in ("stage", "metric") else "right")
    colours = {"worse": "red", "better": "green", "unsure": "yellow", "ok": ""}
    for one in found.checks:
        change = f"{one.change:+.1%} ({one.low:+.1%} to {one.high:+.1%})"
        view.add_row(
            one.stage, one.metric, f"{one.before:.2f}", f"{one.after:.2f}", change, one.verdict,
            style=colours[one.verdict],
        )  # fmt: skip
    console.print(view)
    for problem in found.problems:
        console.print(f"[red]![/] {escape(problem)}", soft_wrap=True)
    unsure = sum(one.verdict == "unsure" for one in found.checks)
    if unsure:
        console.print(f"{unsure} metrics are too noisy to exclude such a loss: measure longer.")
    console.print("PASSED" if found.passed else "FAILED")
    return found.passed


def _run(
    console: Console,
    endpoint: Endpoint,
    source: Source,
    loads: dict[str, Load],
    slo: Slo,
    result: BenchResult,
    out: Path,
) -> BenchResult:
    """Run every load; after each, and after an interrupt, what there is lies on disk."""
    done: list[Stage] = []
    stopped = "the last one was cut off"
    try:
        for number, (name, load) in enumerate(loads.items(), 1):
            console.print(f"{name}, {number} of {len(loads)} ...", highlight=False)
            done.append(stage.run(endpoint, source, load, slo=slo, name=name))
            result = _write(result, done, out)
            if not done[-1].summary.complete:
                break
    except (KeyboardInterrupt, DSparkError) as error:
        if not done:
            raise
        stopped = str(error) or "interrupted"
    incidents = [f"{s.summary.name}: {line}" for s in done for line in s.summary.incidents]
    if len(done) < len(loads):
        incidents.append(f"{len(done)} of {len(loads)} stages were run: {stopped}")
    complete = len(done) == len(loads) and all(s.summary.complete for s in done)
    result = msgspec.structs.replace(result, incidents=incidents, complete=complete)
    result = _write(result, done, out)
    print_summaries(result.stages, console)
    lines = [f"! {line}" for line in incidents]
    lines += [f"{summary.name}: {verdict(summary)[1]}" for summary in result.stages]
    lines += [] if complete else ["INCOMPLETE: the results are of what there was."]
    for line in [*lines, f"Written: {out}/result.json, requests.jsonl"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return result


def _write(result: BenchResult, done: list[Stage], out: Path) -> BenchResult:
    result = msgspec.structs.replace(result, stages=[each.summary for each in done])
    write_json(out / "result.json", result)
    lines = [
        {"stage": each.summary.name, "measured": each.ran.begin <= record.sent_at < each.ran.closed}
        | msgspec.structs.asdict(record)
        for each in done
        for record in sorted(each.ran.records, key=lambda record: record.sent_at)
    ]
    write_bytes(out / "requests.jsonl", msgspec.json.Encoder().encode_lines(lines))
    loads = {result.name: [[summary] for summary in result.stages]}
    frontier = frontier_of(loads, gpus=result.gpus, hardware=result.machine)
    if len(frontier.series[0].points) > 1:
        write_json(out / "frontier.json", frontier)
    return result
