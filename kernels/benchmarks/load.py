"""Throughput under load, ours against no speculation and static ways, in paired blocks on real servers.

The ways of serving run by turns of a second or two.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

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
    servers: dict[ModeName, Server], prompts: list[Prompt], temperature: float
) -> dict[ModeName, str]:
    """Which servers cannot answer at this temperature, and why.

    Raises:
        ServerError: one that must.
    """
    missing: dict[ModeName, str] = {}
    for name, server in servers.items():
        try:
            with running(server), httpx.Client(timeout=120.0) as client:
                stream_text(client, server, prompts[0], max_tokens=16, temperature=temperature)
        except ServerError:
            if name not in _MAY_FAIL:
                raise
            missing[name] = server.reason()
            server.stop()
    return missing


@dataclasses.dataclass(kw_only=True)
class _Run:
    """One run of the benchmark and what it found so far."""

    console: Console
    out: Path
    target: Path
    drafter: Path
    modes: list[ModeName]
    concurrency: list[int]
    temperatures: list[float]
    blocks: int
    warm_s: float
    window_s: float
    slice_s: float
    max_tokens: int
    command: str = ""
    cells: dict[str, Any] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def measure(self, dtype: str) -> None:
        """All cells of one dtype, on servers of their own."""
        prompts, ports = list(load_prompts()[:BALANCED]), free_ports(len(self.modes))
        with ExitStack() as stack:
            servers = {
                name: make_server(
                    mode(name),
                    target=self.target,
                    drafter=self.drafter,
                    dtype=dtype,
                    port=port,
                    requests=max(self.concurrency),
                    log=self.out / "logs" / f"{name}-{dtype}.log",
                )
                for name, port in zip(self.modes, ports, strict=True)
            }
            missing = _start(stack, self.console, servers)
            bar = stack.enter_context(Progress(*_COLUMNS, console=self.console))
            turns = len(self.temperatures) * len(self.concurrency) * self.blocks
            task = bar.add_task(dtype, total=turns)
            for heat in self.temperatures:
                if all(cell_name(heat, c, dtype) in self.cells for c in self.concurrency):
                    continue
                able = {name: own for name, own in servers.items() if name not in missing}
                missing |= _try(able, prompts, heat)
                able = {name: own for name, own in servers.items() if name not in missing}
                for users in self.concurrency:
                    self._cell(able, prompts, (heat, users, dtype), missing, (bar, task))
            if "dspark" in servers:
                with running(servers["dspark"]) as server:
                    self.about[dtype] = server.record()

    def _cell(
        self,
        servers: dict[ModeName, Server],
        prompts: list[Prompt],
        cell: tuple[float, int, str],
        missing: dict[ModeName, str],
        shown: tuple[Progress, TaskID],
    ) -> None:
        (heat, users, dtype), (bar, task) = cell, shown
        name = cell_name(heat, users, dtype)
        if name in self.cells:
            bar.update(task, advance=self.blocks)
            return
        found = run_cell(
            servers,
            prompts,
            Load(
                settings=RequestSettings(
                    model="default", temperature=heat, max_tokens=self.max_tokens
                ),
                users=users,
                warm_s=self.warm_s,
                window_s=self.window_s,
            ),
            blocks=self.blocks,
            slice_s=self.slice_s,
            each=lambda number: bar.update(
                task, advance=min(1, number), description=f"{name} {number + 1}"
            ),
        )
        bar.update(task, advance=1)
        self.cells[name] = summarise_cell(found, missing)
        self.write()

    def setting(self) -> dict[str, Any]:
        """What cells of one summary have in common."""
        return {
            "drafter_sha256": weights_digest(self.drafter),
            "modes": self.modes,
            "blocks": self.blocks,
            "warm_s": self.warm_s,
            "window_s": self.window_s,
            "slice_s": self.slice_s,
            "max_tokens": self.max_tokens,
            "machine": machine(),
            "versions": versions(),
        }

    def write(self) -> dict[str, Any]:
        """What is known so far; a run that is cut off leaves its finished cells."""
        summary = {
            "schema_version": SCHEMA_VERSION,
            "cells": self.cells,
            "server": self.about,
            **self.setting(),
            "command": self.command,
        }
        write_json(self.out / "summary.json", summary)
        for heat, dtype in itertools.product(self.temperatures, _DTYPES):
            found = frontier_of(
                self.cells,
                model=self.target.name,
                hardware=machine(),
                temperature=heat,
                dtype=dtype,
            )
            if found.series:
                write_json(self.out / f"frontier-T{heat:g}-{dtype}.json", found)
        return summary


def _finished(out: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """Cells of an earlier run with the same setting.

    Raises:
        ConfigError: the summary there is of another setting, or damaged.
    """
    path = out / "summary.json"
    if not path.is_file():
        return {}
    try:
        known = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        other = [name for name, value in setting.items() if known.get(name) != value]
        cells: dict[str, Any] = known["cells"]
    except (msgspec.DecodeError, KeyError) as error:
        other, cells = [repr(error)], {}
    if other:
        raise ConfigError(
            f"{path} was measured with another {', '.join(other)}.",
            expected="the same setting",
            fix="Leave --resume out, or choose another --out.",
        )
    return cells


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
    add("--resume", action="store_true", help="keep the cells that an earlier run finished")
    given = parser.parse_args(arguments)
    if given.blocks < 2:
        parser.error(f"--blocks is {given.blocks}: expected two at least")
    own = {f.name for f in dataclasses.fields(_Run)}
    chosen = {name: value for name, value in vars(given).items() if name in own}
    run = _Run(
        **chosen
        | {
            "console": Console(),
            "target": targets.of_drafter(given.drafter, given.target),
            "modes": _names(given.modes, "--modes", MODES),
            "concurrency": read_numbers(given.concurrency, "--concurrency", int),
            "temperatures": read_numbers(given.temperatures, "--temperatures", float, zero=True),
            "command": shlex.join(
                ["python", "-m", "benchmarks.load", *(arguments or sys.argv[1:])]
            ),
        }
    )
    if given.resume:
        run.cells = _finished(given.out, run.setting())
    for dtype in _names(given.dtypes, "--dtypes", _DTYPES):
        run.measure(dtype)
    draw(run.write(), given.out / "load.png")
    run.console.print(table(run.cells))
    run.console.print(f"Written: {given.out / 'summary.json'}, {given.out / 'load.png'}")


if __name__ == "__main__":
    run_command(main)
