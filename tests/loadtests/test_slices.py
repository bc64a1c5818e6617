"""Turns of servers under load: one runs at a time, and each is timed by its own clock."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks.blocks import RunningClock, hold, release, take_turns
from dspark_loadtests.stream import Clock
from dspark_sglang.errors import ServerError
from dspark_sglang.server import Server


class Told(Server):
    """A server whose process is not there; what happens to it is written down."""

    def __init__(self, name: str, events: list[tuple[str, str]], *, port: int, log: Path) -> None:
        super().__init__([], port=port, log=log)
        self.name, self.events = name, events

    def pause(self) -> None:
        self.events.append((self.name, "pause"))

    def resume(self) -> None:
        self.events.append((self.name, "resume"))


@contextmanager
def told(
    names: str, log: Path, *, status: int = 200
) -> Iterator[tuple[dict[str, Server], list[Any]]]:
    """Servers, and what was asked of them in order."""
    events: list[tuple[str, str]] = []
    made: list[ThreadingHTTPServer] = []
    log.write_text("")

    def serve(name: str) -> Server:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def _answer(self) -> None:
                events.append((name, self.path))
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps({"internal_states": [{}]}).encode())

            do_GET = do_POST = _answer

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        made.append(http)
        return Told(name, events, port=http.server_address[1], log=log)

    try:
        yield {name: serve(name) for name in names}, events
    finally:
        for http in made:
            http.shutdown()
            http.server_close()


def test_the_clock_stands_still_while_its_server_does() -> None:
    now = itertools.count(10.0, 1.0)  # every look is a second later
    clock = RunningClock(lambda: next(now))
    assert clock() == 0.0
    clock.start()  # 10
    assert clock() == 1.0
    clock.start()  # runs already
    clock.stop()  # 12
    assert clock() == clock() == 2.0
    clock.stop()
    assert clock() == 2.0
    clock.start()  # 13
    assert clock() == 3.0


def test_a_server_is_stopped_once_its_scheduler_holds(tmp_path: Path) -> None:
    with told("a", tmp_path / "log") as (servers, events):
        hold(servers["a"])
        release(servers["a"])
    happened = [what for _, what in events]
    assert happened == [
        "/pause_generation", "/server_info", "pause", "resume", "/continue_generation"
    ]  # fmt: skip


def lasting(seconds: float) -> Callable[[Clock], Any]:
    """A load that is over after so many seconds of its clock; returns how long it took by both clocks."""

    async def load(clock: Clock) -> tuple[float, float]:
        began = time.perf_counter()
        while clock() < seconds:
            await asyncio.sleep(0.005)
        return clock(), time.perf_counter() - began

    return load


def test_one_server_runs_at_a_time_and_each_gets_its_seconds(tmp_path: Path) -> None:
    with told("abc", tmp_path / "log") as (servers, events):
        loads = {name: lasting(0.9) for name in servers}
        found = asyncio.run(take_turns(servers, loads, 0.1))
    for own, wall in found.values():
        assert 0.9 <= own < 3.0
        assert wall > own + 0.5  # the others ran meanwhile
    running: set[str] = set()
    order = []
    for name, what in events:
        if what == "resume":
            assert not running
            running.add(name)
            order.append(name)
        elif what == "pause":
            running.remove(name)
    assert not running
    # Nobody always goes first.
    assert {tuple(sorted(order[n : n + 3])) for n in (0, 3, 6)} == {("a", "b", "c")}
    assert len({order[0], order[3], order[6]}) == 3


def test_a_load_that_is_over_leaves_the_time_to_the_others(tmp_path: Path) -> None:
    with told("ab", tmp_path / "log") as (servers, events):
        asyncio.run(take_turns(servers, {"a": lasting(0.05), "b": lasting(1.0)}, 0.1))
    slices = [name for name, what in events if what == "resume"]
    assert slices.count("a") == 1 and slices.count("b") >= 3


def test_a_server_that_refuses_ends_the_turns(tmp_path: Path) -> None:
    cancelled = []

    async def load(_: Clock) -> None:
        try:
            await asyncio.sleep(60.0)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with (
        told("ab", tmp_path / "log", status=500) as (servers, _),
        pytest.raises(ServerError, match="stopped answering"),
    ):
        asyncio.run(take_turns(servers, dict.fromkeys(servers, load), 0.1))
    # The turns fail before a load has begun, or cancel it.
    assert len(cancelled) in (0, 2)


def test_a_load_that_fails_is_told(tmp_path: Path) -> None:
    async def fails(_: Clock) -> None:
        raise ServerError("no", expected="yes", fix="try")

    with (
        told("ab", tmp_path / "log") as (servers, events),
        pytest.raises(ServerError, match="no"),
    ):
        asyncio.run(take_turns(servers, {"a": fails, "b": lasting(0.2)}, 0.1))
    assert [what for _, what in events].count("resume") == [what for _, what in events].count(
        "pause"
    )
