"""Servers under load at the same time, of which one runs at a time, in slices of a second or two.

The speed of a shared machine changes within seconds. Ways of serving that alternate in slices meet the same machine;
each is timed by a clock that runs only while its server does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from typing import Generic, TypeVar

import httpx

from dspark_loadtests.stream import Clock
from dspark_sglang.demo.server import Server

K = TypeVar("K")
V = TypeVar("V")


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


class Turns(Generic[K]):
    """Gives servers their slices until their loads are over.

    Args:
        servers: paused ones; they are held again at the end.
        slice_s: seconds of a slice, or a little more: a step is not interrupted.
    """

    def __init__(self, servers: Mapping[K, Server], slice_s: float) -> None:
        self._servers = servers
        self._slice_s = slice_s
        self.clocks = {name: RunningClock() for name in servers}

    async def run(self, loads: Mapping[K, Awaitable[V]]) -> dict[K, V]:
        """Let every server run until its load is over, each in slices; returns what the loads did.

        Args:
            loads: what keeps each server busy, timed by its clock.

        Raises:
            ServerError: a server stopped answering; or what a load raised.
        """
        tasks = {name: asyncio.ensure_future(load) for name, load in loads.items()}
        try:
            turn = 0
            while left := [name for name, task in tasks.items() if not task.done()]:
                for name in left[turn % len(left) :] + left[: turn % len(left)]:
                    await self._slice(name, tasks[name])
                turn += 1
            return {name: task.result() for name, task in tasks.items()}
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _slice(self, name: K, load: asyncio.Future[V]) -> None:
        server, clock = self._servers[name], self.clocks[name]
        await asyncio.to_thread(release, server)
        clock.start()
        await asyncio.wait([load], timeout=self._slice_s)
        await asyncio.to_thread(hold, server)
        clock.stop()
