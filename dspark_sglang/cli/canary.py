"""``dspark canary``: is text with speculation the text without it, on a running server?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from dspark_sglang.config import read_api_key, read_baseline_key
from dspark_sglang.errors import ConfigError

if TYPE_CHECKING:
    from dspark_sglang.canary.run import Canary, Report


def canary(
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:30000",
    requests: Annotated[int, typer.Option(min=1, help="Questions, each asked twice.")] = 200,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions at once.")] = 8,
    tokens: Annotated[int, typer.Option(min=8, help="Most tokens of an answer.")] = 48,
    seed: Annotated[int, typer.Option(help="Of the questions.")] = 0,
    baseline_url: Annotated[
        str, typer.Option(help="A server of the same model without speculation to compare with, for servers "
                               "that cannot switch it off for a request. Its key: BASELINE_API_KEY.")
    ] = "",
    baseline: Annotated[
        Path | None, typer.Option(help="Compare accepted lengths with this file, if it is there.")
    ] = None,
    record: Annotated[Path | None, typer.Option(help="Write that file instead.")] = None,
    act: Annotated[
        bool, typer.Option("--act", help="On a fault turn speculation off; tell the server the verdict.")
    ] = False,
    every: Annotated[bool, typer.Option("--every", help="Go on after the first fault.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
) -> None:  # fmt: skip
    """Ask a server (or two) everything twice, with speculation and without, under concurrency.

    Exit code 0: no fault. 1: a fault, or acceptance drifted. 2: it could not be found out. The server's key is
    read from API_KEY.
    """
    from dspark_sglang.artifacts import write_json
    from dspark_sglang.canary import run as runs
    from dspark_sglang.provenance import provenance

    if record is not None and baseline is not None:
        raise ConfigError(
            "--record and --baseline were given.", expected="one of them", fix="Drop one."
        )
    options = runs.Options(url=url.rstrip("/"), requests=requests, concurrency=concurrency,
                           tokens=tokens, seed=seed, key=read_api_key(), stop=not every,
                           baseline_url=baseline_url.rstrip("/"),
                           baseline_key=read_baseline_key() if baseline_url else None)  # fmt: skip
    watched = runs.Canary(options)
    console = Console(stderr=True)
    known = None
    if baseline is not None and baseline.exists():
        known = runs.read_baseline(baseline, watched)
    elif baseline is not None:
        console.print(f"{baseline} does not exist: accepted lengths are not compared")
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("asking twice", total=requests)

        def told(done: int, faults: int) -> None:
            bar.update(task, completed=done, description=f"asking twice, {faults} faults")

        if record is not None:
            report = runs.record(watched, record, told, provenance(["dspark", *sys.argv[1:]]))
        else:
            report = runs.run(watched, known, told)
    if out is not None:
        write_json(out, report)
    _show(report)
    if act:
        _act(watched, report)
    if not report.passed:
        raise typer.Exit(1)


def _show(report: Report) -> None:
    for fault in report.faults:
        print(
            f"FAULT {fault.check}: question {fault.question} ({fault.kind}), token {fault.token}, "
            f"{fault.depth} tokens a round: {fault.detail}\n  prompt: {fault.prompt!r}"
        )
    if report.drifted_at is not None:
        print(
            f"FAULT acceptance: fallen below the baseline, certain after {report.drifted_at} requests"
        )
    lengths = ", ".join(f"{kind} {level.mean:.2f}" for kind, level in report.accepted.items())
    print(
        f"{'passed' if report.passed else 'FAILED'}: {report.requests} questions in {report.seconds} s, "
        f"{report.near_ties} near-ties ({report.dtype}), {report.familiar} held against the baseline; "
        f"accepted lengths: {lengths}"
    )


def _act(watched: Canary, report: Report) -> None:
    if not report.passed:
        refused = watched.turn_off()
        print(f"speculation not turned off: {refused}" if refused else "speculation turned off")
    refused = watched.report(report.passed)
    if refused:
        print(f"the server does not show the verdict: {refused}")
