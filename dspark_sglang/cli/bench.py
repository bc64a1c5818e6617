"""``dspark bench``: load a running server, compare ways of serving, hold a result against a saved one."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dspark_loadtests import output, plan
from dspark_loadtests.bench import Endpoint, Stage, connect
from dspark_loadtests.client import read_api_key
from dspark_loadtests.schema import BenchResult, PatternName, Slo, Summary
from dspark_loadtests.selfcheck import self_check
from dspark_loadtests.session import LoadSession
from dspark_loadtests.terminal import print_stages, print_summary, verdict
from dspark_sglang.artifacts import write_json
from dspark_sglang.errors import ConfigError, DSparkError
from dspark_sglang.load.prompts import read_prompts
from dspark_sglang.load.sweep import frontier_of
from dspark_sglang.provenance import machine, provenance
from dspark_sglang.values import read_numbers

app = typer.Typer(invoke_without_command=True, no_args_is_help=True)
#: Streams whose lag is bound, and by how much (milliseconds, percent).
_LAG_MS, _ERROR_PCT = 5.0, 1.0

Prompts = Annotated[
    Path | None,
    typer.Option(
        help="A file: ours, ShareGPT, messages, text lines or a Mooncake trace. Default: the packaged ones."
    ),
]
Out = Annotated[Path, typer.Option(help="Where results go.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Acceptance depends on it.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Seed = Annotated[int, typer.Option(help="Of the order of prompts and of arrivals.")]
SlaTtft = Annotated[float, typer.Option(help="Goodput: largest TTFT, from the schedule.")]
SlaTpot = Annotated[float, typer.Option(help="Goodput: largest TPOT.")]
ApiKey = Annotated[Path | None, typer.Option(help="A file that holds the server's API key.")]
Model = Annotated[str | None, typer.Option(help="Model name. Default: the server's first.")]


def command() -> list[str]:
    """This command line, as a reader would type it."""
    return ["dspark", *sys.argv[1:]]


@app.callback()
def bench(
    context: typer.Context,
    url: Annotated[str | None, typer.Option(help="The server, as http://127.0.0.1:30000.")] = None,
    name: Annotated[
        str, typer.Option(help="What the result calls this way of serving.")
    ] = "server",
    pattern: Annotated[
        str,
        typer.Option(
            help="closed: users who wait for each answer. Open loops, which do not wait: poisson, ramp, step, trace."
        ),
    ] = "closed",
    concurrency: Annotated[
        str, typer.Option(help="closed: users; a stage for each number.")
    ] = "1,4,16",
    rate: Annotated[
        str,
        typer.Option(
            help="Requests/s. poisson: a stage each; ramp: first,last; step: each in turn."
        ),
    ] = "1",
    requests: Annotated[
        int | None, typer.Option(min=1, help="Measured requests a stage, instead of --duration.")
    ] = None,
    duration: Annotated[float, typer.Option(help="Seconds of a stage's window.")] = 30.0,
    warmup: Annotated[float, typer.Option(min=0.0, help="Seconds before it, not measured.")] = 5.0,
    drain: Annotated[
        float, typer.Option(min=0.0, help="Longest wait for answers after it.")
    ] = 60.0,
    temperature: Temperature = 1.0,
    max_tokens: MaxTokens = 128,
    seed: Seed = 0,
    sla_ttft_ms: SlaTtft = 1000.0,
    sla_tpot_ms: SlaTpot = 50.0,
    prompts: Prompts = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the server (1: a CPU).")] = 1,
    model: Model = None,
    api_key_file: ApiKey = None,
    out: Out = Path("runs/bench"),
    self_check: Annotated[
        bool,
        typer.Option(
            "--self-check", help="Check the generator itself on this machine; needs no server."
        ),
    ] = False,
    streams: Annotated[int, typer.Option(min=1, help="Of --self-check: chats at once.")] = 500,
) -> None:
    """Load a running server: latencies, throughput, goodput at an SLA, accepted length. Or compare, gate and draw results.

    Examples: dspark bench --url http://127.0.0.1:30000 --concurrency 1,8,32;
    dspark bench --url http://127.0.0.1:30000 --pattern poisson --rate 2,4 --duration 60.

    Writes result.json, stages.csv, requests.csv, report.html, report.png and, of several loads, frontier.json.
    Exit code 0: all answered; 1: requests failed, none completed, or the server died; 2: it could not be run.
    """
    if context.invoked_subcommand is not None:
        return
    if self_check:
        raise typer.Exit(_check_self(streams, duration, out))
    if url is None:
        raise ConfigError(
            "No server was named.",
            expected="its base URL",
            fix="Give --url http://127.0.0.1:30000.",
        )
    source = read_prompts(prompts)
    request = plan.Request(
        pattern=_pattern(pattern),
        concurrency=tuple(read_numbers(concurrency, "--concurrency", int)),
        rates=tuple(read_numbers(rate, "--rate", float, zero=True)),
        requests=requests,
        duration_s=duration,
        warmup_s=warmup,
        drain_s=drain,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        slo=Slo(ttft_ms=sla_ttft_ms, tpot_ms=sla_tpot_ms),
    )
    plan.check(request, source.prompts)
    endpoint = connect(url, model=model, api_key=read_api_key(api_key_file))
    run = _Run(Console(), name, gpus, request, out)
    run.measure(endpoint, source.prompts, source.name)
    raise typer.Exit(run.report())


def _pattern(text: str) -> PatternName:
    for known in get_args(PatternName):
        if text == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(
        f"--pattern is {text!r}.",
        expected=", ".join(get_args(PatternName)),
        fix="Use one of these.",
    )


class _Run:
    """One run; after every stage what there is lies on disk."""

    def __init__(
        self, console: Console, name: str, gpus: int, request: plan.Request, out: Path
    ) -> None:
        self._console = console
        self._name = name
        self._gpus = gpus
        self._request = request
        self._out = out
        self._stages: list[Stage] = []
        self._summaries: list[Summary] = []
        self._stopped = ""

    def measure(self, endpoint: Endpoint, prompts: list[Any], source: str) -> None:
        """Run every stage; an interrupt keeps those that are done."""
        try:
            with progress(self._console, self._request) as told:
                for stage, parts in plan.run(endpoint, prompts, self._request, source=source, told=told):  # fmt: skip
                    self._stages.append(stage)
                    self._summaries += [stage.summary, *parts]
                    self._write()
        except (KeyboardInterrupt, DSparkError) as error:
            if not self._stages:
                raise
            self._stopped = str(error) or "interrupted"
            self._write()

    def result(self) -> BenchResult:
        """What is known so far."""
        incidents = [
            f"{stage.summary.name}: {line}"
            for stage in self._stages
            for line in stage.summary.incidents
        ]
        planned = len(plan.stages(self._request))
        if len(self._stages) < planned:
            incidents.append(f"{len(self._stages)} of {planned} stages were run: {self._stopped or 'the last one was cut off'}")  # fmt: skip
        return BenchResult(
            name=self._name,
            pattern=self._request.pattern,
            gpus=self._gpus,
            machine=machine(),
            stages=self._summaries,
            complete=len(self._stages) == planned and all(s.summary.complete for s in self._stages),
            incidents=incidents,
            provenance=provenance(command()),
        )

    def _write(self) -> list[Path]:
        result = self.result()
        paths = output.write(result, self._stages, self._out)
        frontier = frontier_of([result])
        if len(frontier.series[0].points) > 1 and self._request.pattern in ("closed", "poisson"):
            write_json(self._out / "frontier.json", frontier)
        return paths

    def report(self) -> int:
        """Print what came of it; the exit code."""
        result = self.result()
        if len(self._summaries) == 1:
            print_summary(self._summaries[0], self._console)
        else:
            print_stages(result.stages, self._console)
        for line in result.incidents:
            self._console.print(f"[yellow]![/] {escape(line)}", soft_wrap=True)
        passed = result.complete
        for stage in self._stages:
            ok, line = verdict(stage.summary)
            passed = passed and ok
            self._console.print(f"{stage.summary.name}: {line}", markup=False, highlight=False, soft_wrap=True)  # fmt: skip
        if not result.complete:
            self._console.print("INCOMPLETE: the results are of what there was.")
        self._console.print(
            f"Written: {self._out}/result.json, report.html, stages.csv, requests.csv"
        )
        return 0 if passed else 1


@contextmanager
def progress(console: Console, request: plan.Request) -> Iterator[Any]:
    """A bar for each stage, by requests or by seconds."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
    )
    # Drawing takes the interpreter from the generator for milliseconds: seldom.
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as bar:
        tasks: dict[str, Any] = {}
        total = request.requests or request.warmup_s + request.duration_s

        def told(stage: str, session: LoadSession) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, text="")
            task = bar.tasks[tasks[stage]]
            done = len(session.records) if request.requests else (task.elapsed or 0.0)
            text = f"{session.in_flight} in flight, {len(session.records)} done"
            bar.update(tasks[stage], completed=min(done, total), text=text)

        yield told


def _check_self(streams: int, seconds: float, out: Path) -> int:
    console = Console()
    # No spinner: drawing it would be the lag that is measured.
    console.print(f"{streams} streams of 10 chunks/s for {seconds:g} s, after 6 s to begin ...")
    found = self_check(streams, seconds)
    path = out / "selfcheck.json"
    write_json(path, found)
    good = found.lag_ms < _LAG_MS and found.metric_error_pct < _ERROR_PCT and not found.failed
    console.print(
        f"{found.streams} streams, {found.chunks} chunks: lag {found.lag_p50_ms:.2f} ms p50, {found.lag_ms:.2f} ms p99, "
        f"{found.lag_max_ms:.1f} ms at most; generator on {found.busy:.0%} of a core\n"
        f"largest error of a metric {found.metric_error_pct:.3f}% ({found.worst})",
        highlight=False,
        soft_wrap=True,
    )
    for line in found.incidents:
        console.print(f"[yellow]![/] {escape(line)}", soft_wrap=True)
    state = "OK" if good else "FAILED"
    console.print(f"{state}: p99 lag below {_LAG_MS:g} ms and every metric within {_ERROR_PCT:g}%")
    if not good:
        console.print("Other work on these cores shows here. Close it, or use fewer --streams.")
    console.print(f"Written: {shlex.quote(str(path))}")
    return 0 if good else 1
