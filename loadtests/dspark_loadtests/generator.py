"""The load: one event loop that sends chats in a closed or an open loop and follows each to its end.

A run has a warm-up, a window whose requests are measured, and an end in which the load goes on until every measured
request is answered; otherwise the last ones would meet an idle server. What is then still under way is cut off.
"""

from __future__ import annotations

import asyncio
import gc
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from dspark_loadtests.chat import ChatClient
from dspark_loadtests.client import RequestSettings, chat_payload
from dspark_loadtests.prompts import Prompt, cycle
from dspark_loadtests.session import LoadSession
from dspark_loadtests.stream import Clock, Outcome, RequestRecord
from dspark_loadtests.watch import Watch

#: A dead server refuses in microseconds; without a pause every user would spin on it.
_PAUSE_AFTER_FAILURE_S = 0.5
#: Requests in a row that have to fail before the server is asked whether it lives.
_SUSPICIOUS = 8
_POLL_S = 0.02


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One stage.

    Attributes:
        users: of a closed loop; None: an open one.
        warm_s, warm_requests: the window opens once both are over.
        requests: measured ones, after which the window ends; None: it ends after ``window_s``.
        drain_s: longest wait for measured requests after the window; 0 cuts them off at its end.
        seed: of the order of prompts, and of the lengths of the first answers: with a warm-up, users of a closed loop
            start with answers of different lengths, or they would stay in step.
    """

    settings: RequestSettings
    users: int | None = None
    warm_s: float = 0.0
    warm_requests: int = 0
    window_s: float = math.inf
    requests: int | None = None
    drain_s: float = 30.0
    seed: int = 0

    @property
    def warms(self) -> bool:
        """Whether there is a warm-up."""
        return self.warm_s > 0 or self.warm_requests > 0


class Ran(NamedTuple):
    """What a run left. Times are on the records' clock."""

    records: list[RequestRecord]
    #: When the load began, the window's begin, the end of sending measured requests, and when the last of these was
    #: answered or given up. The load is steady from ``begin`` to ``end``.
    began: float
    begin: float
    closed: float
    end: float
    #: ``(when, seconds late)`` of the event loop's probes.
    lags: list[tuple[float, float]]
    peak: int
    incidents: list[str]
    complete: bool

    def sent_between(self, begin: float, end: float) -> list[RequestRecord]:
        """Requests sent in ``[begin, end)``, in order of sending."""
        own = [record for record in self.records if begin <= record.sent_at < end]
        return sorted(own, key=lambda record: record.sent_at)


#: Told at the window's ``"begin"`` and ``"end"``; may await.
Edge = Callable[[str], Awaitable[None]]
#: Whether the server still lives.
Alive = Callable[[], Awaitable[bool]]


async def _no_edge(_: str) -> None: ...


async def _always() -> bool:
    return True


class Generator:
    """Makes one load against one server.

    Args:
        client: already open.
        prompts: of any order; each pass is shuffled by the load's seed. A trace's are sent as they come.
        instants: seconds after the start at which an open loop sends, ascending; they should go on beyond the window.
        edge: told when the window begins and ends.
        alive: asked when many requests in a row have failed.
        told: called with the requests in flight and done about ten times a second.
    """

    def __init__(
        self,
        client: ChatClient,
        prompts: Sequence[Prompt],
        load: Load,
        *,
        instants: Iterator[float] | None = None,
        edge: Edge = _no_edge,
        alive: Alive = _always,
        told: Callable[[LoadSession], None] = lambda _: None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._client = client
        self._load = load
        self._instants = instants
        self._edge = edge
        self._alive = alive
        self._told = told
        self._clock = clock
        self._rng = random.Random(load.seed)
        traced = all(prompt.at_s is not None for prompt in prompts)
        order = iter(prompts) if traced else cycle(prompts, self._rng)
        self._session = LoadSession(order, clock=clock)
        self._encoder = msgspec.json.Encoder()
        self._incidents: list[str] = []
        self._failures_in_a_row = 0
        self._dead = False
        self._peak = 0
        #: Requests sent, and how many of them before the window; None until it opens.
        self._sent = 0
        self._before: int | None = None
        self._closed = math.inf
        self._tasks: set[asyncio.Task[RequestRecord | None]] = set()

    async def run(self) -> Ran:
        """Make the load to its end. A server that dies ends it early; what there was is kept."""
        # Collecting what lies there from before would stop the loop for tens of milliseconds.
        gc.collect()
        gc.freeze()
        watch = Watch(self._incidents.append, clock=self._clock)
        running = [asyncio.create_task(watch.run())]
        try:
            if not self._load.warms:
                await self._edge("begin")
            began = self._clock()
            senders = self._start(began)
            running += senders
            begin, closed, end = await self._follow(began, senders)
        finally:
            for task in (*running, *self._tasks):
                task.cancel()
            await asyncio.gather(*running, *self._tasks, return_exceptions=True)
            self._session.abandon_in_flight()
            gc.unfreeze()
        return Ran(
            records=self._session.records,
            began=began,
            begin=begin,
            closed=closed,
            end=end,
            lags=[probe for probe in watch.lags if probe[0] <= end],
            peak=self._peak,
            incidents=self._incidents,
            complete=not self._dead,
        )

    # --- the window ------------------------------------------------------------------------------------

    async def _follow(
        self, began: float, senders: Sequence[asyncio.Task[None]]
    ) -> tuple[float, float, float]:
        load = self._load
        if load.warms:
            await self._wait(lambda: self._is_warm(began), senders)
            await self._edge("begin")
        # Without a warm-up the senders have not run yet: what they send first is sent in the window.
        begin = self._clock()
        self._before = self._sent
        await self._wait(
            lambda: self._closed < math.inf or self._clock() >= begin + load.window_s, senders
        )
        self._closed = closed = min(self._closed, self._clock(), begin + load.window_s)
        deadline = closed + load.drain_s
        await self._wait(lambda: not self._unanswered(begin) or self._clock() >= deadline, senders)
        left = self._unanswered(begin)
        if left and load.drain_s > 0 and not self._dead:
            self._incidents.append(
                f"{left} measured requests were unanswered {load.drain_s:g} s after the window"
            )
        end = self._clock()
        await self._edge("end")
        return begin, closed, end

    def _is_warm(self, began: float) -> bool:
        done = len(self._session.records)
        return self._clock() >= began + self._load.warm_s and done >= self._load.warm_requests

    def _unanswered(self, begin: float) -> int:
        return sum(begin <= at < self._closed for at in self._session.open_since())

    async def _wait(self, over: Callable[[], bool], senders: Sequence[asyncio.Task[None]]) -> None:
        """Until ``over``, the server is dead, or nothing can happen any more."""
        while not over() and not self._dead:
            if all(task.done() for task in senders) and not self._session.in_flight:
                return
            self._told(self._session)
            await asyncio.sleep(_POLL_S)

    # --- sending ---------------------------------------------------------------------------------------

    def _start(self, began: float) -> list[asyncio.Task[None]]:
        load = self._load
        if load.users is None:
            return [asyncio.create_task(self._dispatch(began))]
        longest = load.settings.max_tokens
        firsts = [
            self._rng.randint(max(1, longest // 4), longest) if load.warms else longest
            for _ in range(load.users)
        ]
        return [asyncio.create_task(self._user(first)) for first in firsts]

    async def _user(self, first_tokens: int) -> None:
        """A closed loop: the next chat as soon as the last one ended."""
        settings = msgspec.structs.replace(self._load.settings, max_tokens=first_tokens)
        while not self._dead:
            record = await self._send(settings)
            if record is None or record.outcome is Outcome.UNFINISHED:
                return  # the trace is over, or this task was cancelled
            settings = self._load.settings
            if record.outcome is Outcome.FAILED:
                await asyncio.sleep(_PAUSE_AFTER_FAILURE_S)

    async def _dispatch(self, began: float) -> None:
        """An open loop: every instant its request, whatever became of the ones before."""
        for instant in self._instants or ():
            due = began + instant
            while (left := due - self._clock()) > 0:
                await asyncio.sleep(left)
            if self._dead:
                return
            task = asyncio.create_task(self._send(self._load.settings, due))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _send(
        self, settings: RequestSettings, due: float | None = None
    ) -> RequestRecord | None:
        try:
            prompt, recorder = self._session.begin(due)
        except StopIteration:
            return None
        self._sent += 1
        wanted = self._load.requests
        if wanted is not None and self._before is not None and self._sent - self._before == wanted:
            self._closed = math.nextafter(recorder.sent_at, math.inf)
        self._peak = max(self._peak, self._session.in_flight)
        payload = self._encoder.encode(chat_payload(prompt, settings))
        record = await self._client.stream(payload, recorder)
        self._session.end(recorder, record)
        await self._judge(record)
        return record

    async def _judge(self, record: RequestRecord) -> None:
        """Stop when the server is gone: failures alone may be of the requests."""
        if record.outcome is not Outcome.FAILED:
            self._failures_in_a_row = 0
            return
        self._failures_in_a_row += 1
        if self._failures_in_a_row % _SUSPICIOUS or self._dead or await self._alive():
            return
        self._dead = True
        self._incidents.append(
            f"the server stopped answering after {self._sent} requests; the last error: {record.error}"
        )
