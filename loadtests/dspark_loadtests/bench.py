"""One stage of a load test: generate it, ask the server before and after, and sum it up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import httpx
import msgspec
import uvloop

from dspark_loadtests.acceptance import Acceptance, Snapshot, accepted_length, take_snapshot
from dspark_loadtests.chat import ChatClient
from dspark_loadtests.client import ServerApi
from dspark_loadtests.estimate import estimates, timeline
from dspark_loadtests.generator import Generator, Load, Ran
from dspark_loadtests.prompts import Prompt
from dspark_loadtests.report import distribution, summarize, window_of
from dspark_loadtests.schema import GeneratorHealth, RunSettings, Slo, Summary
from dspark_loadtests.scrape import Scraped, over_run, scrape
from dspark_loadtests.session import LoadSession
from dspark_loadtests.stream import RequestRecord
from dspark_sglang.errors import ConfigError

_ALIVE_S = 3.0


class Endpoint(NamedTuple):
    """A server and how it is reached."""

    url: str
    model: str
    api: ServerApi
    api_key: str | None = None


def connect(url: str, *, model: str | None = None, api_key: str | None = None) -> Endpoint:
    """Reach a server and ask which model it serves.

    Raises:
        ServerError: it does not answer.
    """
    url = url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(
            f"The server's address is {url!r}.",
            expected="a base URL",
            fix="As in http://127.0.0.1:30000.",
        )
    api = ServerApi(url, api_key=api_key)
    return Endpoint(url, model or api.model(), api, api_key)


class Stage(NamedTuple):
    """What a stage gave: the summary, and the records behind it."""

    summary: Summary
    ran: Ran
    measured: list[RequestRecord]


class _Asked(msgspec.Struct):
    """The server's answers at the window's edges."""

    snapshots: dict[str, Snapshot] = {}
    metrics: dict[str, Scraped] = {}


def run_stage(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    load: Load,
    *,
    slo: Slo,
    name: str,
    instants: Iterator[float] | None = None,
    rate: float | None = None,
    source: str = "packaged",
    told: Callable[[LoadSession], None] = lambda _: None,
) -> Stage:
    """Make one load and sum it up. A server that dies gives an incomplete summary, not an error.

    Args:
        instants, rate: of an open loop; see :class:`Generator`.
        source: where the prompts are from, for the report.
        told: called about fifty times a second, for progress.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    asked = _Asked()
    ran = uvloop.run(_run(endpoint, prompts, load, instants, asked, told))
    settings = RunSettings(
        host=endpoint.url,
        model=endpoint.model,
        temperature=load.settings.temperature,
        max_tokens=load.settings.max_tokens,
        users=load.users,
        seed=load.seed,
        slo=slo,
        arrival="closed_loop" if load.users is not None else "open_loop",
        rate=rate,
        prompts=source,
    )
    before = asked.snapshots.get("begin", Snapshot(problem="the server was not asked before"))
    after = asked.snapshots.get("end", Snapshot(problem="the server was not asked after"))
    measured = ran.sent_between(ran.begin, ran.closed)
    summary = summarize_part(
        ran, (ran.begin, ran.closed, ran.end), settings=settings, name=name, started_at=started,
        acceptance=accepted_length(before, after, measured), server=after if after.problem is None else before,
    )  # fmt: skip
    metrics = asked.metrics
    if metrics.keys() == {"begin", "end"}:
        summary = msgspec.structs.replace(
            summary, server_metrics=over_run(metrics["begin"], metrics["end"])
        )
    return Stage(summary, ran, measured)


def summarize_part(
    ran: Ran,
    part: tuple[float, float, float],
    *,
    settings: RunSettings,
    name: str,
    started_at: str,
    acceptance: Acceptance | None,
    server: Snapshot,
) -> Summary:
    """The summary of the requests sent in a part of a run.

    Args:
        part: when it begins, when sending for it ends, and until when its load was steady.
        acceptance: None: what the part's own requests say.
    """
    begin, closed, end = part
    measured = ran.sent_between(begin, closed)
    whole = summarize(
        measured,
        settings=settings,
        started_at=started_at,
        server=server.identity,
        acceptance=acceptance or accepted_length(Snapshot(), Snapshot(), measured),
        window=window_of(ran.records, begin, end),
    )
    lags = [late * 1e3 for at, late in ran.lags if begin <= at < end]
    # The dispatcher may be early by the timer's grain; that is not lag.
    late_sends = [max(0.0, r.sent_at - r.scheduled_at) * 1e3 for r in measured if r.scheduled_at is not None]  # fmt: skip
    return msgspec.structs.replace(
        whole,
        name=name,
        counts=msgspec.structs.replace(whole.counts, unmeasured=len(ran.records) - len(measured)),
        generator=GeneratorHealth(
            send_lag_ms=distribution(late_sends),
            loop_lag_ms=distribution(lags),
            peak_streams=ran.peak,
        ),
        incidents=list(ran.incidents),
        complete=ran.complete,
        estimates=estimates(measured, ran.records, begin=begin, end=end, slo=settings.slo),
        timeline=timeline(ran.records, begin, end),
    )


async def _run(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    load: Load,
    instants: Iterator[float] | None,
    asked: _Asked,
    told: Callable[[LoadSession], None],
) -> Ran:
    async def edge(which: str) -> None:
        # In a thread: the generator goes on sending while the server answers.
        asked.snapshots[which] = await asyncio.to_thread(take_snapshot, endpoint.api)
        asked.metrics[which] = await asyncio.to_thread(scrape, endpoint.api)

    client = ChatClient(endpoint.url, api_key=endpoint.api_key)
    try:
        generator = Generator(
            client,
            prompts,
            load,
            instants=instants,
            edge=edge,
            alive=lambda: asyncio.to_thread(_answers, endpoint.api),
            told=told,
        )
        return await generator.run()
    finally:
        await client.close()


def _answers(api: ServerApi) -> bool:
    """Whether anything listens there still; what it answers does not matter, a full server may refuse."""
    try:
        httpx.get(f"{api.host}/v1/models", timeout=_ALIVE_S)
    except httpx.TransportError:
        return False
    return True
