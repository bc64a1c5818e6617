"""Throughput under load, ours against no speculation and static ways, in paired blocks on real servers.

The ways of serving run by turns of a second or two.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.blocks import cell_name, draw, frontier_of, run_cell, summarise_cell, table
from dspark_loadtests.client import RequestSettings
from dspark_loadtests.closed_loop import MODES, ModeName, make_server, mode
from dspark_loadtests.generator import Load
from dspark_loadtests.prompts import BALANCED, Prompt, load_prompts
from dspark_sglang import targets
from dspark_sglang.artifacts import write_json
from dspark_sglang.cli.demo import DRAFTER
from dspark_sglang.cli.main import run as run_command
from dspark_sglang.demo.measure import running, stream_text
from dspark_sglang.errors import ConfigError, ServerError
from dspark_sglang.layouts.base import weights_digest
from dspark_sglang.provenance import machine, versions
from dspark_sglang.server import Server, free_ports, pause_when_up
from dspark_sglang.values import read_numbers

SCHEMA_VERSION = 1
#: Not ours, and not made for this device.
_MAY_FAIL = ("builtin_static",)
_DTYPES = ("bfloat16", "float32")
T = TypeVar("T")
_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(bar_width=24),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
)


def _names(text: str, name: str, known: tuple[T, ...]) -> list[T]:
    parts = text.split(",")
    wrong = [part for part in parts if part not in known]
    if wrong:
        raise ConfigError(
            f"{name} names {', '.join(wrong)}.",
            expected=", ".join(str(each) for each in known),
            fix="Use one of these.",
        )
    return [each for part in parts for each in known if each == part]


def _start(
    stack: ExitStack, console: Console, servers: dict[ModeName, Server]
) -> dict[ModeName, str]:
    """Start one after the other and pause them: ours times its steps while it starts.

    Returns:
        Why a mode did not start. Ours and no speculation must.
    """
    failed: dict[ModeName, ServerError] = {}
    with console.status("") as status:
        for number, (name, server) in enumerate(servers.items(), 1):
            stack.enter_context(server)
            status.update(f"starting server {number} of {len(servers)}, {name} (usually 30 s)")
            failed |= pause_when_up({name: server}, tell=lambda took: None, may_fail=_MAY_FAIL)
    for name, error in failed.items():
        console.print(f"[yellow]![/] {name} does not run: {error}")
    return {name: servers[name].reason() for name in failed}


def _try(
    servers: dict[ModeName, Server], prompt: Prompt, temperature: float
) -> dict[ModeName, str]:
    """Which servers cannot answer at this temperature, and why.

    Raises:
        ServerError: one that must.
    """
    missing: dict[ModeName, str] = {}
    for name, server in servers.items():
        try:
            with running(server), httpx.Client(timeout=120.0) as client:
                stream_text(client, server, prompt, max_tokens=16, temperature=temperature)
        except ServerError:
            if name not in _MAY_FAIL:
                raise
            missing[name] = server.reason()
            server.stop()
    return missing


def _measure(
    given: argparse.Namespace, dtype: str, console: Console, found: dict[str, Any]
) -> None:
    """Add all cells of one dtype, measured on servers of their own, to ``found``; write it after each."""
    prompts, missing = list(load_prompts()[:BALANCED]), dict[ModeName, str]()
    with ExitStack() as stack:
        servers = {
            name: make_server(
                mode(name),
                target=given.target,
                drafter=given.drafter,
                dtype=dtype,
                port=port,
                requests=max(given.concurrency),
                log=given.out / "logs" / f"{name}-{dtype}.log",
            )
            for name, port in zip(given.modes, free_ports(len(given.modes)), strict=True)
        }
        missing |= _start(stack, console, servers)
        bar = stack.enter_context(Progress(*_COLUMNS, console=console))
        cells = list(itertools.product(given.temperatures, given.concurrency))
        task = bar.add_task(dtype, total=len(cells) * given.blocks)
        for number, (heat, users) in enumerate(cells):
            name = cell_name(heat, users, dtype)
            if users == given.concurrency[0]:
                able = {mode: own for mode, own in servers.items() if mode not in missing}
                missing |= _try(able, prompts[0], heat)
            settings = RequestSettings(
                model="default", temperature=heat, max_tokens=given.max_tokens
            )
            blocks = run_cell(
                {mode: own for mode, own in servers.items() if mode not in missing},
                prompts,
                Load(settings=settings, users=users, warm_s=given.warm_s, window_s=given.window_s),
                blocks=given.blocks,
                slice_s=given.slice_s,
                each=lambda block, done=number * given.blocks, name=name: bar.update(  # type: ignore[misc]
                    task, completed=done + block, description=f"{name} {block + 1}"
                ),
            )
            bar.update(task, completed=(number + 1) * given.blocks)
            found["cells"][name] = summarise_cell(blocks, missing)
            _write(given, found)
        if "dspark" in servers:
            with running(servers["dspark"]) as server:
                found["server"][dtype] = server.record()


def _write(given: argparse.Namespace, found: dict[str, Any]) -> None:
    """What is known so far; a run that is cut off leaves its finished cells."""
    write_json(given.out / "summary.json", found)
    for heat, dtype in itertools.product(given.temperatures, _DTYPES):
        frontier = frontier_of(
            found["cells"],
            model=given.target.name,
            hardware=machine(),
            temperature=heat,
            dtype=dtype,
        )
        if frontier.series:
            write_json(given.out / f"frontier-T{heat:g}-{dtype}.json", frontier)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/load"), help="where results and logs go")
    add("--drafter", type=Path, default=DRAFTER)
    add("--target", type=Path, help="default: the bundle itself, else SmolLM2, fetched once")
    add("--concurrency", default="1,8,32", help="concurrent requests")
    add("--temperatures", default="0,1")
    add("--dtypes", default=",".join(_DTYPES))
    add("--modes", default=",".join(MODES), help="what is compared")
    add("--blocks", type=int, default=3, help="loads of each mode in a cell, two at least")
    add("--warm-s", type=float, default=2.5, help="seconds before a window")
    add("--window-s", type=float, default=7.0, help="seconds of a window")
    add("--slice-s", type=float, default=1.5, help="seconds one mode runs before the next one")
    add("--max-tokens", type=int, default=96, help="tokens of each answer")
    given = parser.parse_args(arguments)
    if given.blocks < 2:
        parser.error(f"--blocks is {given.blocks}: expected two at least")
    given.modes = _names(given.modes, "--modes", MODES)
    given.dtypes = _names(given.dtypes, "--dtypes", _DTYPES)
    given.concurrency = read_numbers(given.concurrency, "--concurrency", int)
    given.temperatures = read_numbers(given.temperatures, "--temperatures", float, zero=True)
    given.target = targets.of_drafter(given.drafter, given.target)
    console = Console()
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "cells": {},
        "server": {},
        "drafter_sha256": weights_digest(given.drafter),
        **{name: getattr(given, name) for name in (
            "modes", "blocks", "warm_s", "window_s", "slice_s", "max_tokens")},
        "machine": machine(),
        "versions": versions(),
        "command": shlex.join(["python", "-m", "benchmarks.load", *(arguments or sys.argv[1:])]),
    }  # fmt: skip
    for dtype in given.dtypes:
        _measure(given, dtype, console, found)
    _write(given, found)
    draw(found["cells"], given.out / "load.png")
    console.print(table(found["cells"]))
    console.print(f"Written: {given.out / 'summary.json'}, {given.out / 'load.png'}")


if __name__ == "__main__":
    run_command(main)
