"""A closed loop of streaming chats against one server, and what it delivered in a window."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import uvloop

from dspark_loadtests.chat import ChatClient
from dspark_loadtests.client import RequestSettings
from dspark_loadtests.generator import Generator, Ran
from dspark_loadtests.generator import Load as generator_load
from dspark_loadtests.prompts import Prompt
from dspark_loadtests.report import tokens_in
from dspark_loadtests.stream import Clock, Outcome
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


async def _run(url: str, prompts: Sequence[Prompt], load: Load, clock: Clock) -> Ran:
    settings = RequestSettings(
        model="default", temperature=load.temperature, max_tokens=load.max_tokens
    )
    client = ChatClient(url)
    try:
        generator = Generator(
            client,
            prompts,
            generator_load(
                settings=settings,
                users=load.concurrency,
                warm_s=load.warm_s,
                window_s=load.window_s,
                drain_s=0.0,
                seed=load.seed,
            ),
            clock=clock,
        )
        return await generator.run()
    finally:
        await client.close()


def run_block(url: str, prompts: Sequence[Prompt], load: Load) -> Delivered:
    """:func:`deliver` alone, on an event loop of its own."""
    return uvloop.run(deliver(url, prompts, load))


async def deliver(
    url: str, prompts: Sequence[Prompt], load: Load, *, clock: Clock = time.perf_counter
) -> Delivered:
    """Keep ``load.concurrency`` chats running and count the tokens that arrive in the window.

    Chats still running at its end are cut off by closing their connections.

    Args:
        clock: of the warm-up, the window and every latency.

    Raises:
        ServerError: too many requests failed.
    """
    ran = await _run(url, prompts, load, clock)
    records, begin = ran.records, ran.begin
    failed = [record for record in records if record.outcome is Outcome.FAILED]
    if len(failed) > _TOLERATED_FAILURES * len(records):
        raise ServerError(
            f"{len(failed)} of {len(records)} requests failed, the first one: {failed[0].error}.",
            expected="a server that answers under this load",
            fix="See the server's log.",
        )
    tokens = round(sum(tokens_in(record, begin, begin + load.window_s) for record in records))
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
