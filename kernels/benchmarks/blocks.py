"""Ways of serving compared in paired blocks that they share by turns; summed up as one JSON object, a table and a figure.

The speed of a shared machine changes within seconds. The servers are under load at the same time, of which one runs at
a time, in slices of a second or two; each is timed by a clock that runs only while its server does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import numpy as np
import uvloop
from rich.table import Table

from dspark_loadtests.closed_loop import (
    MODES,
    Delivered,
    ModeName,
    deliver,
    difference,
    state,
    wait_idle,
)
from dspark_loadtests.compare import ratio
from dspark_loadtests.frontier import Frontier, Point, Series
from dspark_loadtests.generator import Load
from dspark_loadtests.prompts import Prompt
from dspark_loadtests.stream import Clock
from dspark_sglang.demo.measure import running
from dspark_sglang.server import Server

K = TypeVar("K")
V = TypeVar("V")

# --- turns -----------------------------------------------------------------------------------------------


class RunningClock:
    """Seconds something has been running; it stands still in between.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._ran = 0.0
        self._since: float | None = None

    def __call__(self) -> float:
        return self._ran + (0.0 if self._since is None else self._clock() - self._since)

    def start(self) -> None:
        """Run from now on."""
        if self._since is None:
            self._since = self._clock()

    def stop(self) -> None:
        """Stand still from now on."""
        self._ran, self._since = self(), None


def hold(server: Server) -> None:
    """Stop a server between two of its steps: a step that is interrupted would be timed as a slow one.

    Raises:
        ServerError: it does not answer.
    """
    _post(server, "/pause_generation", {"mode": "in_place"})
    # The scheduler takes messages in order and between steps: once it has answered this one, it holds.
    server.info()
    server.pause()


def release(server: Server) -> None:
    """Let a server that :func:`hold` stopped go on.

    Raises:
        ServerError: it does not answer.
    """
    server.resume()
    _post(server, "/continue_generation", {})


def _post(server: Server, path: str, body: dict[str, str]) -> None:
    try:
        server.http.post(path, json=body).raise_for_status()
    except httpx.HTTPError as error:
        raise server.gone(error) from error


async def take_turns(
    servers: Mapping[K, Server],
    loads: Mapping[K, Callable[[Clock], Awaitable[V]]],
    slice_s: float,
) -> dict[K, V]:
    """Let every server run until its load is over, one at a time, each in slices; returns what the loads did.

    Args:
        servers: paused ones; they are held again at the end.
        loads: what keeps each server busy, timed by the clock it is given.
        slice_s: seconds of a slice, or a little more: a step is not interrupted.

    Raises:
        ServerError: a server stopped answering; or what a load raised.
    """
    clocks = {name: RunningClock() for name in servers}
    tasks = {name: asyncio.ensure_future(load(clocks[name])) for name, load in loads.items()}
    turn = 0
    try:
        while left := [name for name, task in tasks.items() if not task.done()]:
            for name in left[turn % len(left) :] + left[: turn % len(left)]:
                await asyncio.to_thread(release, servers[name])
                clocks[name].start()
                await asyncio.wait([tasks[name]], timeout=slice_s)
                await asyncio.to_thread(hold, servers[name])
                clocks[name].stop()
            turn += 1
        return {name: task.result() for name, task in tasks.items()}
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


# --- paired blocks ---------------------------------------------------------------------------------------


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """One mode's turn."""

    mode: ModeName
    number: int
    delivered: Delivered
    #: The plugin's counters over the block; empty where it does not run.
    counted: dict[str, float]


def run_cell(
    servers: Mapping[ModeName, Server],
    prompts: Sequence[Prompt],
    load: Load,
    *,
    blocks: int,
    slice_s: float,
    each: Callable[[int], None] = lambda number: None,
) -> list[Block]:
    """Measure all servers under one load; they are paused when not measured.

    In a block every mode gets the same prompts in the same order, and they take turns in slices
    (:func:`take_turns`).

    Args:
        load: of a block; its seed is counted on from the first one's.
        slice_s: seconds a mode runs at a time.
        each: told before every block.

    Raises:
        ServerError: a server failed.
    """
    found = []
    for number in range(blocks):
        each(number)
        own = msgspec.structs.replace(load, seed=load.seed + number)
        before = {name: _settled(server) for name, server in servers.items()}
        loads = {
            name: partial(deliver, server.url, prompts, own) for name, server in servers.items()
        }
        delivered = uvloop.run(take_turns(servers, loads, slice_s))
        for name, server in servers.items():
            release(server)
            counted = difference(before[name], _settled(server))
            found.append(
                Block(mode=name, number=number, delivered=delivered[name], counted=counted)
            )
    return found


def _settled(server: Server) -> dict[str, Any]:
    """The state of a paused server once nothing runs any more."""
    with running(server):
        wait_idle(server)
        return state(server)


def rates(blocks: Sequence[Block], mode: ModeName) -> np.ndarray:
    """Tokens a second of a mode in each block, in order."""
    own = sorted((b for b in blocks if b.mode == mode), key=lambda b: b.number)
    return np.array([block.delivered.tok_s for block in own])


# --- summed up -------------------------------------------------------------------------------------------


def cell_name(temperature: float, concurrency: int, dtype: str) -> str:
    """``T1-c8`` in bfloat16, ``T1-c8-float32`` otherwise."""
    name = f"T{temperature:g}-c{concurrency}"
    return name if dtype == "bfloat16" else f"{name}-{dtype}"


def summarise_cell(blocks: Sequence[Block], missing: Mapping[ModeName, str]) -> dict[str, Any]:
    """One cell: each mode's figures, and our ratios to no speculation and to the best of the rest.

    Args:
        missing: why a mode has no blocks.
    """
    cell: dict[str, Any] = {}
    speeds: dict[ModeName, np.ndarray] = {}
    for name in MODES:
        own = [block for block in blocks if block.mode == name]
        if own:
            speeds[name] = rates(own, name)
            cell[name] = {
                "tok_s": round(float(speeds[name].mean()), 2),
                "tok_s_spread": round(float(speeds[name].std()), 2),
                "ttft_s": _mean([block.delivered.ttft_s for block in own]),
                "tpot_s": _mean([block.delivered.tpot_s for block in own]),
                **_counted(own),
            }
        elif name in missing:
            cell[name] = {"missing": missing[name]}
    ours = speeds.pop("dspark", None)
    if ours is not None and "none" in speeds:
        cell["ratio_none"] = ratio(ours, speeds["none"]).rounded()
    if ours is not None and speeds:
        best = max(speeds, key=lambda name: float(speeds[name].sum()))
        cell["best_fixed"] = best
        cell["ratio_best_fixed"] = ratio(ours, speeds[best]).rounded()
    return cell


def _counted(blocks: Sequence[Block]) -> dict[str, float | None]:
    """Counters of all blocks of a mode: ratios of sums, since a block may have hardly a round."""
    every = [block.counted for block in blocks]
    total = {name: sum(c.get(name, 0.0) for c in every) for name in (
        "rounds", "plain_rounds", "verified_tokens", "committed_tokens")}  # fmt: skip
    rounds = total["rounds"] + total["plain_rounds"]
    if not rounds:  # not ours
        lengths = [c["accept_length"] for c in every if "accept_length" in c]
        length = round(float(np.mean(lengths)), 4) if lengths else None
        return {"accept_length": length, "mean_budget": None, "drafting_share": None}
    drafted = total["rounds"]
    return {
        "accept_length": round(total["committed_tokens"] / drafted, 4) if drafted else None,
        "mean_budget": round(total["verified_tokens"] / rounds, 4),
        "drafting_share": round(drafted / rounds, 4),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 4) if known else None


def frontier_of(
    cells: Mapping[str, Mapping[str, Any]],
    *,
    model: str,
    hardware: str,
    temperature: float,
    dtype: str,
) -> Frontier:
    """The cells of one temperature and dtype as a frontier: a series each mode, a point each concurrency.

    Args:
        hardware: where they were measured; its rates are those of the whole machine, counted as one GPU.
    """
    series: dict[str, list[Point]] = {}
    for name, cell in cells.items():
        concurrency = int(name.split("-")[1][1:])
        if name != cell_name(temperature, concurrency, dtype):
            continue
        for way in MODES:
            found = cell.get(way, {})
            if not found.get("tpot_s"):
                continue
            ttft = found.get("ttft_s")
            point = Point(
                load=concurrency,
                tok_s_per_gpu=found["tok_s"],
                tok_s_per_user=1.0 / found["tpot_s"],
                ttft_ms=None if ttft is None else 1e3 * ttft,
                accept_length=found.get("accept_length"),
                budget=found.get("mean_budget"),
            )
            series.setdefault(way, []).append(point)
    return Frontier(
        source="measured",
        model=model,
        hardware=hardware,
        assumptions={"temperature": temperature, "dtype": dtype, "load": "closed loop"},
        series=[Series(name=way, gpus=1, points=points) for way, points in series.items()],
    )


def table(cells: Mapping[str, Mapping[str, Any]]) -> Table:
    """Tokens a second of every mode and our ratios."""
    view = Table(title="Closed loop, output tokens a second")
    view.add_column("cell")
    for name in MODES:
        view.add_column(name, justify="right")
    for heading in ("over none", "over best fixed", "length", "budget", "drafting"):
        view.add_column(heading, justify="right")
    for label, cell in cells.items():
        ours = cell.get("dspark", {})
        speeds = [cell.get(mode, {"tok_s": None}) for mode in MODES]
        ratios = [cell.get(f"ratio_{other}") for other in ("none", "best_fixed")]
        view.add_row(
            label,
            *("does not run" if "missing" in one else _number(one["tok_s"], 1) for one in speeds),
            *("{1:.3f} ({0:.3f} to {2:.3f})".format(*each) if each else "" for each in ratios),
            *(_number(ours.get(f), 2) for f in ("accept_length", "mean_budget", "drafting_share")),
        )
    return view


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def draw(cells: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Throughput relative to no speculation, and budget, against concurrency."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for name, cell in cells.items():
        temperature, concurrency, *rest = name.split("-")
        key = (temperature, rest[0] if rest else "bfloat16")
        columns.setdefault(key, {})[int(concurrency[1:])] = cell
    figure, axes = plt.subplots(2, len(columns), figsize=(4.2 * len(columns), 6.4), squeeze=False,
                                sharex=True, sharey="row", layout="constrained")  # fmt: skip
    colours = {"fixed": "#c44e52", "builtin_static": "#8c8c8c", "dspark": "#1f6fb4"}
    for (temperature, dtype), (top, bottom) in zip(sorted(columns), axes.T, strict=True):
        at, known = zip(*sorted(columns[temperature, dtype].items()), strict=True)
        plain = _figures(known, "none", "tok_s")
        for mode, colour in colours.items():
            # What is not a number is not drawn.
            top.plot(at, _figures(known, mode, "tok_s") / plain, "o-", color=colour, label=mode)
            bottom.plot(at, _figures(known, mode, "mean_budget"), "o-", color=colour)
        low, _, high = zip(*(cell.get("ratio_none", [np.nan] * 3) for cell in known), strict=True)
        top.fill_between(at, low, high, color=colours["dspark"], alpha=0.2, linewidth=0)
        top.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        top.set_title(f"{temperature.replace('T', 'T = ')}, {dtype}")
        bottom.set_xlabel("concurrent requests")
        bottom.set_xscale("log", base=2)
        bottom.set_xticks(at, [str(users) for users in at])
    axes[0][0].set_ylabel("throughput over no speculation")
    axes[1][0].set_ylabel("drafted tokens verified a request")
    axes[1][0].set_ylim(bottom=0)
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _figures(cells: Sequence[Mapping[str, Any]], mode: str, field: str) -> np.ndarray:
    """A figure of a mode in each cell; NaN where it has none."""
    found = [cell.get(mode, {}).get(field) for cell in cells]
    return np.array([np.nan if value is None else value for value in found])
