"""One load on one server: refused where it is none, made, and summed up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import typer
import uvloop

from dspark_loadtests.acceptance import accepted_length
from dspark_loadtests.client import ChatClient, Endpoint, RequestSettings, connect, read_api_key
from dspark_loadtests.generator import Generator, Load, Ran
from dspark_loadtests.prompts import Source, read_prompts
from dspark_loadtests.report import Window, distribution, summarize
from dspark_loadtests.schema import GeneratorHealth, RunSettings, Slo, Summary
from dspark_sglang.errors import ConfigError


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What every load of a command has in common."""

    temperature: Annotated[float, typer.Option(min=0.0, help="Acceptance depends on it.")] = 1.0
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128
    seed: Annotated[int, typer.Option(help="Of the order of prompts and of arrivals.")] = 0
    sla_ttft_ms: Annotated[
        float, typer.Option(help="Goodput: largest TTFT, from the schedule.")
    ] = 1000.0
    sla_tpot_ms: Annotated[float, typer.Option(help="Goodput: largest TPOT.")] = 50.0
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A file: ours, ShareGPT, messages or text lines. Default: the packaged ones."
        ),
    ] = None
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of a server (1: a CPU).")] = 1
    model: Annotated[str | None, typer.Option(help="Model name. Default: the server's first.")] = (
        None
    )
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file that holds the server's API key.")
    ] = None

    @property
    def slo(self) -> Slo:
        """Limits of a good request."""
        return Slo(ttft_ms=self.sla_ttft_ms, tpot_ms=self.sla_tpot_ms)

    def source(self) -> Source:
        """The prompts."""
        return read_prompts(self.prompts)

    def load(self, **given: float | None) -> Load:
        """A load with these requests; ``given`` are fields of :class:`.generator.Load`."""
        settings = RequestSettings(
            model="", temperature=self.temperature, max_tokens=self.max_tokens
        )
        return Load(settings=settings, seed=self.seed, **given)  # type: ignore[arg-type]

    def connect(self, url: str) -> Endpoint:
        """Reach a server."""
        return connect(url, model=self.model, api_key=read_api_key(self.api_key_file))


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
