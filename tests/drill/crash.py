"""kill -9 of each process under load, and SIGTERM with many requests in flight."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import httpx
import psutil

from dspark_sglang.server import Server
from tests.drill.requests import End, Reference, Result, ask, ask_all, client, references
from tests.drill.section import Findings, Tell
from tests.drill.world import (
    Pair,
    Part,
    World,
    find,
    processes,
    started,
    terminate,
    wait_gone,
)

#: Seconds in which every request of a server that was killed has to end, and one of a living server.
CUT_S, LIMIT_S = 60.0, 180.0
#: Seconds from a kill to the next ready.
RESTART_S = 60.0
_PARTS: tuple[Part, ...] = ("scheduler", "detokenizer", "server")
IN_FLIGHT = 140
#: Seconds that the manifests' probes wait for an answer, under load too (deploy/base/deployment.yaml).
PROBES = {"/ready": 5.0, "/health": 25.0}
#: Streams of which the victim is killed once ``_BEGUN`` have had their first tokens.
_STREAMS: dict[Pair, int] = {"tiny": 64, "real": 16}
_BEGUN, _TOKENS = 4, 96


async def _killed(
    url: str, wanted: list[Reference], victim: psutil.Process
) -> tuple[list[Result], float]:
    """Ask everything at once and kill as soon as some streams have begun; results, and when it was."""
    begun, killed_at = 0, 0.0

    def began() -> None:
        nonlocal begun, killed_at
        begun += 1
        # At once: by the time a busy client came round to it, short answers would be over.
        if begun == _BEGUN:
            victim.kill()
            killed_at = time.monotonic()

    async with client(url) as http:
        results = await asyncio.gather(
            *(
                ask(http, reference, openai=bool(i % 2), limit_s=CUT_S, began=began)
                for i, reference in enumerate(wanted)
            )
        )
    return list(results), killed_at


async def _take(url: str, count: int, tokens: int, seed: int) -> list[Reference]:
    async with client(url) as http:
        return await references(http, count, tokens=tokens, seed=seed)


async def _again(url: str, wanted: list[Reference]) -> list[Result]:
    async with client(url) as http:
        return await ask_all(http, wanted, limit_s=LIMIT_S)


def kills(world: World, tell: Tell, *, pair: Pair) -> Findings:
    """Kill each process in turn: clients learn of it, nothing stays behind, the next start is right."""
    found = Findings()
    server = world.server(f"crash-{pair}", pair=pair)
    port = int(server.url.rsplit(":", 1)[1])
    streams = _STREAMS[pair]
    restarts: dict[str, float] = {}
    gone: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        tell("starting a server")
        stack.enter_context(started(server))
        wanted = asyncio.run(_take(server.url, 16, _TOKENS if pair == "tiny" else 32, world.seed))
        load = (wanted * (streams // len(wanted) + 1))[:streams]
        for number, part in enumerate(_PARTS):
            tell(f"kill -9 of the {part} with {streams} streams")
            known = processes(server)
            victim = find(server, part)
            results, at = asyncio.run(_killed(server.url, load, victim))
            if not at:
                found.faults.append(f"the {part} was not killed: {results[0].detail}")
                break
            found.take(f"kill of the {part}", results, allowed={End.CUT, End.REFUSED})
            cut = sum(result.end is End.CUT for result in results)
            found.expect(cut > 0, f"kill of the {part}: no stream was under way")
            left = wait_gone(known)
            found.expect(not left, f"kill of the {part}: processes {left} stayed behind")
            gone[part] = round(time.monotonic() - at, 1)
            server.stop()
            server = world.server(f"crash-{pair}-{number}", pair=pair, port=port)
            stack.enter_context(started(server))
            restarts[part] = round(time.monotonic() - at, 1)
            tell(f"asking again after the kill of the {part}")
            found.take(f"after the kill of the {part}",
                       asyncio.run(_again(server.url, wanted)), allowed=())  # fmt: skip
            found.expect(
                restarts[part] <= RESTART_S,
                f"kill of the {part}: ready after {restarts[part]} s, not {RESTART_S:.0f}",
            )
    found.figures = {"streams": streams, "restart_s": restarts, "gone_s": gone}
    return found


def drain(world: World, tell: Tell, *, in_flight: int = IN_FLIGHT) -> Findings:
    """SIGTERM with ``in_flight`` requests running and waiting: every one gets its whole text."""
    found = Findings()
    tell("starting a server")
    with started(world.server("drain")) as server:
        wanted = asyncio.run(_take(server.url, 24, _TOKENS, world.seed + 1))
        load = (wanted * (in_flight // len(wanted) + 1))[:in_flight]
        tell(f"SIGTERM with {in_flight} requests in flight")
        results, figures = asyncio.run(_drained(server, load))
        lost = found.take("drain", results, allowed=())
        known = processes(server)
        at = time.monotonic()
        left = wait_gone(known)
        found.expect(not left, f"after the drain processes {left} stayed behind")
        figures["exit_s"] = round(time.monotonic() - at, 1)
    found.figures = {**figures, "drain_lost": lost}
    seen = figures["in_flight_at_sigterm"]
    found.expect(seen >= min(100, in_flight), f"only {seen} requests were in flight at SIGTERM")
    for path, seconds in figures["probes_s"].items():
        found.expect(seconds is not None, f"the probe {path} fails with {in_flight} in flight")
    found.expect(figures["not_ready_s"] is not None, "/ready said 200 through the whole drain")
    return found


async def _probe(http: httpx.AsyncClient, path: str) -> tuple[str, float | None]:
    """Seconds a probe takes; None where it fails by a kubelet's rules."""
    began = time.monotonic()
    try:
        answer = await http.get(path, timeout=PROBES[path])
    except httpx.HTTPError:
        return path, None
    return path, round(time.monotonic() - began, 2) if answer.status_code == 200 else None


async def _drained(server: Server, load: list[Reference]) -> tuple[list[Result], dict[str, Any]]:
    """Ask everything at once, terminate when all of it has reached the scheduler, wait for all."""
    async with client(server.url) as http:
        tasks = [
            asyncio.create_task(ask(http, reference, openai=bool(i % 2), limit_s=LIMIT_S))
            for i, reference in enumerate(load)
        ]
        seen = 0
        for _ in range(100):
            seen = await asyncio.to_thread(server.requests)
            if seen >= len(load) - 4 or any(task.done() for task in tasks):
                break
            await asyncio.sleep(0.05)
        probes = dict(await asyncio.gather(*(_probe(http, path) for path in PROBES)))
        seen = await asyncio.to_thread(server.requests)
        terminate(server)
        at, not_ready = time.monotonic(), None
        everything = asyncio.gather(*tasks)
        while not everything.done():
            with contextlib.suppress(Exception):
                answer = await http.get("/ready", timeout=5.0)
                if answer.status_code == 503 and not_ready is None:
                    not_ready = round(time.monotonic() - at, 2)
            await asyncio.sleep(0.2)
        figures: dict[str, Any] = {
            "in_flight": len(load), "in_flight_at_sigterm": seen,
            "probes_s": probes, "drained_s": round(time.monotonic() - at, 1), "not_ready_s": not_ready,
        }  # fmt: skip
        return list(await everything), figures
