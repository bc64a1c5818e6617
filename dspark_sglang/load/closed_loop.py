"""A closed loop of streaming chats against one server, and what it delivered in a window."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence

import httpx
import msgspec

from dspark_loadtests.client import CHAT_PATH, RequestSettings, chat_payload, request_headers
from dspark_loadtests.prompts import Prompt, cycle
from dspark_loadtests.stream import Outcome, RequestRecord, StreamRecorder
from dspark_sglang.errors import ServerError

#: Most of a window's requests that may fail before its numbers are thrown away.
_TOLERATED_FAILURES = 0.02


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One block of load."""

    concurrency: int
    temperature: float
    max_tokens: int
    #: Seconds before the window, in which the loop fills, and of the window.
    warm_s: float
    window_s: float
    #: Of the order of prompts and the lengths of the first answers.
    seed: int


class Delivered(msgspec.Struct, frozen=True, kw_only=True):
    """What one block brought."""

    tok_s: float
    tokens: int
    window_s: float
    requests: int
    #: Median seconds from sending to the first token, and a token after it, of finished requests.
    ttft_s: float | None
    tpot_s: float | None
    #: Tokens of the finished answers and of their prompts, one entry each.
    answer_tokens: list[int] = []
    prompt_tokens: list[int] = []


def _tokens_in(record: RequestRecord, begin: float, end: float) -> int:
    """Tokens of a request that arrived in ``[begin, end)``."""
    if record.first_content_at is None:
        return 0
    at, count = record.first_content_at, 0
    for gap, tokens in zip((0.0, *record.gaps_s), record.chunk_tokens, strict=False):
        at += gap
        if begin <= at < end:
            count += tokens
    return count


async def _chat(
    client: httpx.AsyncClient, url: str, prompt: Prompt, settings: RequestSettings
) -> RequestRecord:
    recorder = StreamRecorder(prompt_id=prompt.id, prompt_kind=prompt.kind)
    body = chat_payload(prompt, settings)
    try:
        async with client.stream("POST", url + CHAT_PATH, json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode("utf-8", "replace")[:200]
                return recorder.fail(f"HTTP {response.status_code}: {text}")
            async for data in response.aiter_raw():
                recorder.feed(data)
    except asyncio.CancelledError:
        return recorder.abandon()  # the window is over; what arrived in it counts
    except httpx.HTTPError as error:
        return recorder.fail(repr(error))
    return recorder.finish()


async def _user(
    client: httpx.AsyncClient,
    url: str,
    prompts: Iterator[Prompt],
    load: Load,
    first_tokens: int,
    stop_at: float,
    records: list[RequestRecord],
) -> None:
    """One user: the next chat as soon as the last one ended."""
    tokens = first_tokens
    while time.perf_counter() < stop_at:
        settings = RequestSettings(model="default", temperature=load.temperature, max_tokens=tokens)
        records.append(await _chat(client, url, next(prompts), settings))
        tokens = load.max_tokens


async def _run(
    url: str, prompts: Sequence[Prompt], load: Load
) -> tuple[list[RequestRecord], float]:
    rng = random.Random(load.seed)
    order = cycle(prompts, rng)
    records: list[RequestRecord] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=load.concurrency)
    async with httpx.AsyncClient(
        timeout=300.0, limits=limits, headers=request_headers(None)
    ) as client:
        began = time.perf_counter()
        stop_at = began + load.warm_s + load.window_s
        # Users start out of step, or all of them would finish and prefill together.
        firsts = [rng.randint(max(1, load.max_tokens // 4), load.max_tokens)
                  for _ in range(load.concurrency)]  # fmt: skip
        users = [
            asyncio.create_task(_user(client, url, order, load, first, stop_at, records))
            for first in firsts
        ]
        _, late = await asyncio.wait(users, timeout=load.warm_s + load.window_s)
        for user in late:
            user.cancel()
        await asyncio.gather(*users)
    return records, began + load.warm_s


def run_block(url: str, prompts: Sequence[Prompt], load: Load) -> Delivered:
    """Keep ``load.concurrency`` chats running and count the tokens that arrive in the window.

    Chats still running at its end are cut off by closing their connections.

    Raises:
        ServerError: too many requests failed.
    """
    records, begin = asyncio.run(_run(url, prompts, load))
    failed = [record for record in records if record.outcome is Outcome.FAILED]
    if len(failed) > _TOLERATED_FAILURES * len(records):
        raise ServerError(
            f"{len(failed)} of {len(records)} requests failed, the first one: {failed[0].error}.",
            expected="a server that answers under this load",
            fix="See the server's log.",
        )
    tokens = sum(_tokens_in(record, begin, begin + load.window_s) for record in records)
    whole = [record for record in records if record.outcome is Outcome.COMPLETED]
    return Delivered(
        tok_s=tokens / load.window_s,
        tokens=tokens,
        window_s=load.window_s,
        requests=len(whole),
        ttft_s=_median([r.ttft_s for r in whole]),
        tpot_s=_median([r.tpot_s for r in whole]),
        answer_tokens=[r.completion_tokens for r in whole if r.completion_tokens],
        prompt_tokens=[r.prompt_tokens for r in whole if r.prompt_tokens],
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None
