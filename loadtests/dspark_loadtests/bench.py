"""One load on one server: refused where it is none, made, and summed up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
import uvloop

from dspark_loadtests.acceptance import accepted_length
from dspark_loadtests.client import ChatClient, Endpoint
from dspark_loadtests.generator import Generator, Load, Ran
from dspark_loadtests.prompts import Source
from dspark_loadtests.report import Window, distribution, summarize
from dspark_loadtests.schema import GeneratorHealth, RunSettings, Slo, Summary
from dspark_sglang.errors import ConfigError


class Stage(NamedTuple):
    """What a load gave: the summary, and the records behind it."""

    summary: Summary
    ran: Ran


def check(loads: Mapping[str, Load], source: Source, slo: Slo) -> None:
    """Refuse what cannot be run, before anything is sent.

    Raises:
        ConfigError: no prompts, limits nobody can meet, or a load that is none.
    """
    if not source.prompts:
        raise ConfigError(
            "There is no prompt.",
            expected="at least one",
            fix="Name another file with --prompts, or leave it out for the packaged ones.",
        )
    numbers = [("--sla-ttft-ms", slo.ttft_ms), ("--sla-tpot-ms", slo.tpot_ms)]
    for load in loads.values():
        numbers.append(("--concurrency", 1 if load.users is None else load.users))
        numbers.append(("--rate", 1 if load.rate is None else load.rate))
        numbers.append(("--duration", 1 if load.requests else load.window_s))
    for name, value in numbers:
        if not value > 0 or not math.isfinite(value):
            raise ConfigError(
                f"{name} is {value:g}.",
                expected="a number above 0" + (", or nothing can be good" if "sla" in name else ""),
                fix=f"Correct {name}.",
            )


def run(endpoint: Endpoint, source: Source, load: Load, *, slo: Slo, name: str) -> Stage:
    """Make one load and sum it up. A server that dies gives an incomplete summary, not an error.

    Args:
        load: its model's name is the endpoint's.
        name: of the stage.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    settings = msgspec.structs.replace(load.settings, model=endpoint.model)
    load = msgspec.structs.replace(load, settings=settings)
    ran = uvloop.run(_run(endpoint, source, load))
    measured = ran.measured()
    summary = summarize(
        measured,
        settings=RunSettings(
            host=endpoint.url,
            model=endpoint.model,
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
            users=load.users,
            seed=load.seed,
            slo=slo,
            arrival="closed_loop" if load.rate is None else "open_loop",
            rate=load.rate,
            prompts=source.name,
        ),
        started_at=started,
        server=(ran.before if ran.after.problem else ran.after).identity,
        acceptance=accepted_length(ran.before, ran.after, measured),
        window=Window(ran.begin, ran.end, ran.records),
    )
    # The dispatcher may be early by the timer's grain; that is not lag.
    late = [max(0.0, r.sent_at - r.due_at) * 1e3 for r in measured if load.rate is not None]
    summary = msgspec.structs.replace(
        summary,
        name=name,
        generator=GeneratorHealth(
            send_lag_ms=distribution(late),
            loop_lag_ms=distribution(each * 1e3 for each in ran.lags),
            peak_streams=ran.peak,
        ),
        incidents=ran.incidents,
        complete=ran.complete,
    )
    return Stage(summary, ran)


async def _run(endpoint: Endpoint, source: Source, load: Load) -> Ran:
    client = ChatClient(endpoint.url, api_key=endpoint.api_key)
    try:
        return await Generator(client, source.prompts, load, api=endpoint.api).run()
    finally:
        await client.close()
