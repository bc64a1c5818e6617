"""Many requests, some of them given up half-way: every text right, and memory that does not grow."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

import httpx
import msgspec
import numpy as np

from tests.drill.clients import Address, busy
from tests.drill.requests import (
    End,
    Reference,
    Result,
    ask,
    client,
    references,
)
from tests.drill.section import Findings, Tell

#: Seconds for one request, among others.
LIMIT_S = 180.0
#: Percent by which resident memory may grow in 1,000 requests.
GROWTH_PCT = 1.0
#: Share of requests that are given up, and of all requests before memory is looked at.
ABORTED, WARM = 0.2, 0.25
#: Memory is read so often, in all.
_READINGS = 60


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One soak."""

    requests: int
    concurrency: int = 16
    tokens: int = 16
    prompts: int = 96
    seed: int = 0


def growth(readings: list[tuple[int, int]]) -> tuple[float, float]:
    """Growth in percent of the mean a thousand requests, and its standard error (least squares).

    Args:
        readings: requests done, and bytes.
    """
    done, size = np.array(readings, dtype=np.float64).T
    slope, error = 0.0, float("inf")
    if len(readings) > 2 and np.ptp(done) > 0:
        x = done - done.mean()
        slope = float((x * size).sum() / (x * x).sum())
        rest = size - size.mean() - slope * x
        error = float(np.sqrt((rest**2).sum() / (len(x) - 2) / (x * x).sum()))
    scale = 1e5 / float(size.mean())
    return slope * scale, error * scale


async def _run(
    address: Address, plan: Plan, found: Findings, tell: Tell, read: Callable[[], int] | None
) -> list[tuple[int, int]]:
    rng = random.Random(plan.seed)
    readings: list[tuple[int, int]] = []
    results: list[Result] = []
    async with client(address.url, address.key) as http:
        wanted = await references(http, plan.prompts, tokens=plan.tokens, seed=plan.seed)
        asked = iter(range(plan.requests))
        every = max(1, plan.requests // _READINGS)

        async def user() -> None:
            for number in asked:
                results.append(await _one(http, rng.choice(wanted), number, rng))
                done = len(results)
                if done % every == 0:
                    tell(f"{done} of {plan.requests} requests")
                    if read is not None and done >= WARM * plan.requests:
                        readings.append((done, read()))

        await asyncio.gather(*(user() for _ in range(plan.concurrency)))
        await _idle(http, found)
    found.take("soak", results, allowed={End.ABORTED})
    return readings


async def _one(
    http: httpx.AsyncClient, wanted: Reference, number: int, rng: random.Random
) -> Result:
    gives_up = rng.randint(1, 3) if rng.random() < ABORTED else None
    return await ask(http, wanted, openai=bool(number % 2), limit_s=LIMIT_S, abort_after=gives_up)


async def _idle(http: httpx.AsyncClient, found: Findings) -> None:
    """Nothing of what was given up may go on running."""
    left = 0
    for _ in range(60):
        left = await busy(http)
        if not left:
            return
        await asyncio.sleep(0.5)
    found.faults.append(f"soak: {left} requests still run after all have ended")


def soak(
    address: Address, plan: Plan, tell: Tell, *, read: Callable[[], int] | None = None
) -> Findings:
    """Keep a server under load for a number of requests.

    Args:
        read: resident bytes of the server; None where it cannot be told.
    """
    found, began = Findings(), time.monotonic()
    readings = asyncio.run(_run(address, plan, found, tell, read))
    found.figures = {
        "requests": plan.requests, "aborted": found.ends[End.ABORTED.value],
        "requests_per_s": round(plan.requests / (time.monotonic() - began), 1),
        "plan": msgspec.to_builtins(plan),
    }  # fmt: skip
    found.expect(
        found.ends[End.ABORTED.value] > 0.5 * ABORTED * plan.requests, "soak: few were aborted"
    )
    if readings:
        percent, error = growth(readings)
        found.figures |= {
            "rss_growth_pct_per_1000": round(percent, 3), "standard_error": round(error, 3),
            "rss_mib": [round(size / 2**20, 1) for _, size in readings],
        }  # fmt: skip
        found.expect(
            percent < GROWTH_PCT,
            f"soak: memory grows by {percent:.2f}% in 1,000 requests, not below {GROWTH_PCT}%",
        )
    return found
