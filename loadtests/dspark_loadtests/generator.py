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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from dspark_loadtests.acceptance import Snapshot, take_snapshot
from dspark_loadtests.client import ChatClient, RequestSettings, ServerApi, chat_payload
from dspark_loadtests.prompts import Prompt, cycle
from dspark_loadtests.stream import Clock, Outcome, RequestRecord, StreamRecorder

#: A dead server refuses in microseconds; without a pause every user would spin on it.
_PAUSE_AFTER_FAILURE_S = 0.5
#: Requests in a row that have to fail before the server is asked whether it lives.
_SUSPICIOUS = 8
_POLL_S = 0.02
#: A look at the clock that is later than this says that the whole process stood still.
_STALL_S = 1.0
_NOT_ASKED = Snapshot(problem="the server was not asked for its counters")


class LoadSession:
    """Hands out requests and collects their records: nothing that was sent is lost from the count.

    A conversation's next turn is handed out as soon as its answer is there, before a new conversation begins.

    Args:
        prompts: conversations; the order of sends is the order drawn.
        clock: monotonic seconds.
    """

    def __init__(self, prompts: Iterator[Prompt], *, clock: Clock = time.perf_counter) -> None:
        self._prompts = prompts
        self._clock = clock
        self._in_flight: dict[int, tuple[StreamRecorder, Prompt]] = {}
        self._ready: deque[Prompt] = deque()
        self.records: list[RequestRecord] = []

    def open_since(self) -> list[float]:
        """When each request that has not ended was sent."""
        return [recorder.sent_at for recorder, _ in self._in_flight.values()]

    def begin(self, scheduled_at: float | None = None) -> tuple[Prompt, StreamRecorder]:
        """The next prompt, and a recorder whose clock starts now: send at once.

        Args:
            scheduled_at: when an open loop wanted it to be sent.
        """
        prompt = self._ready.popleft() if self._ready else next(self._prompts)
        recorder = StreamRecorder(
            prompt_id=prompt.id,
            prompt_kind=prompt.kind,
            clock=self._clock,
            scheduled_at=scheduled_at,
        )
        self._in_flight[id(recorder)] = recorder, prompt
        return prompt, recorder

    def end(self, recorder: StreamRecorder, record: RequestRecord) -> None:
        """File the record with which ``recorder`` was closed."""
        _, prompt = self._in_flight.pop(id(recorder))
        self.records.append(record)
        if record.outcome is Outcome.COMPLETED:
            following = prompt.after(recorder.text)
            if following is not None:
                self._ready.append(following)

    def abandon_in_flight(self) -> list[RequestRecord]:
        """File what is still open as unfinished, and return those records.

        Leaving it out would drop exactly the slowest requests of the run.
        """
        abandoned = [recorder.abandon() for recorder, _ in self._in_flight.values()]
        self._in_flight.clear()
        self.records.extend(abandoned)
        return abandoned


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One load: a closed loop of ``users``, or an open loop that sends ``rate`` requests a second.

    Attributes:
        warm_s: seconds before the window opens.
        requests: measured ones, after which the window ends; None: it ends after ``window_s``.
        drain_s: longest wait for measured requests after the window; 0 cuts them off at its end.
        seed: of the order of prompts, of an open loop's instants, and of the lengths of the first answers: with a
            warm-up, users of a closed loop start with answers of different lengths, or they would stay in step.
    """

    settings: RequestSettings
    users: int | None = None
    rate: float | None = None
    warm_s: float = 0.0
    window_s: float = math.inf
    requests: int | None = None
    drain_s: float = 30.0
    seed: int = 0


class Ran(NamedTuple):
    """What a run left. Times are on the records' clock."""

    records: list[RequestRecord]
    #: The window's begin, the end of sending measured requests, and when the last of these was answered or given up.
    #: The load is steady from ``begin`` to ``end``.
    begin: float
    closed: float
    end: float
    #: Seconds that each look at the clock in the window was late: a bound for how late a chunk was stamped.
    lags: list[float]
    peak: int
    incidents: list[str]
    complete: bool
    #: The server's counters at the window's ends.
    before: Snapshot
    after: Snapshot

    def measured(self) -> list[RequestRecord]:
        """Requests sent in the window, in order of sending."""
        own = [record for record in self.records if self.begin <= record.sent_at < self.closed]
        return sorted(own, key=lambda record: record.sent_at)


def poisson(rate: float, rng: random.Random) -> Iterator[float]:
    """Seconds after the start at which an open loop sends: drawn beforehand, whatever the server does."""
    due = 0.0
    while True:
        due += rng.expovariate(rate)
        yield due


class Generator:
    """Makes one load against one server.

    Args:
        client: already open.
        prompts: of any order; each pass is shuffled by the load's seed.
        api: asked for the server's counters when the window begins and ends, and whether it lives when many requests in
            a row have failed; None: nobody is asked.
    """

    def __init__(
        self,
        client: ChatClient,
        prompts: Sequence[Prompt],
        load: Load,
        *,
        api: ServerApi | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._client = client
        self._load = load
        self._api = api
        self._clock = clock
        self._rng = random.Random(load.seed)
        self._session = LoadSession(cycle(prompts, self._rng), clock=clock)
        self._encoder = msgspec.json.Encoder()
        self._incidents: list[str] = []
        self._lags: list[float] = []
        self._failures_in_a_row = 0
        self._dead = False
        self._peak = 0
        #: Requests sent, and how many of them before the window; None until it opens.
        self._sent = 0
        self._before: int | None = None
        self._begin = math.inf
        self._closed = math.inf
        self._before_window = self._after_window = _NOT_ASKED
        self._cut = False
        self._tasks: set[asyncio.Task[RequestRecord]] = set()

    async def run(self) -> Ran:
        """Make the load to its end. A server that dies or an interrupt ends it early; what there was is kept."""
        # Collecting what lies there from before would stop the loop for tens of milliseconds.
        gc.collect()
        gc.freeze()
        senders: list[asyncio.Task[None]] = []
        try:
            if not self._load.warm_s:
                self._before_window = await self._ask()
            began = self._clock()
            senders = self._start(began)
            end = await self._follow(began)
        except asyncio.CancelledError:
            # Ctrl-C cancels the event loop's main task, once; the second one is not caught here.
            self._cut = True
            self._incidents.append("the run was interrupted")
            end = self._clock()
        finally:
            for task in (*senders, *self._tasks):
                task.cancel()
            await asyncio.gather(*senders, *self._tasks, return_exceptions=True)
            self._session.abandon_in_flight()
            gc.unfreeze()
        return Ran(
            records=self._session.records,
            begin=min(self._begin, end),
            closed=min(self._closed, end),
            end=end,
            lags=self._lags,
            peak=self._peak,
            incidents=self._incidents,
            complete=not (self._dead or self._cut),
            before=self._before_window,
            after=self._after_window,
        )

    # --- the window ------------------------------------------------------------------------------------

    async def _follow(self, began: float) -> float:
        """Open the window, close it and wait for its requests; returns when the last was answered."""
        load = self._load
        if load.warm_s:
            await self._wait(lambda: self._clock() >= began + load.warm_s)
            self._before_window = await self._ask()
        # Without a warm-up the senders have not run yet: what they send first is sent in the window.
        self._begin = begin = self._clock()
        self._before = self._sent
        self._lags.clear()
        await self._wait(lambda: self._closed < math.inf or self._clock() >= begin + load.window_s)
        self._closed = min(self._closed, self._clock(), begin + load.window_s)
        deadline = self._closed + load.drain_s
        await self._wait(lambda: not self._unanswered(begin) or self._clock() >= deadline)
        left = self._unanswered(begin)
        if left and load.drain_s > 0 and not self._dead:
            self._incidents.append(
                f"{left} measured requests were unanswered {load.drain_s:g} s after the window"
            )
        end = self._clock()
        self._after_window = await self._ask()
        return end

    async def _ask(self) -> Snapshot:
        # In a thread: the generator goes on sending while the server answers.
        return await asyncio.to_thread(take_snapshot, self._api) if self._api else _NOT_ASKED

    def _unanswered(self, begin: float) -> int:
        return sum(begin <= at < self._closed for at in self._session.open_since())

    async def _wait(self, over: Callable[[], bool]) -> None:
        """Until ``over`` or the server is dead."""
        while not over() and not self._dead:
            due = time.perf_counter() + _POLL_S
            await asyncio.sleep(_POLL_S)
            late = max(0.0, time.perf_counter() - due)
            self._lags.append(late)
            if late > _STALL_S:
                self._incidents.append(
                    f"the generator stood still for {late:.1f} s (the process or the machine was stopped): "
                    "latencies of that time are not the server's"
                )

    # --- sending ---------------------------------------------------------------------------------------

    def _start(self, began: float) -> list[asyncio.Task[None]]:
        load = self._load
        if load.rate is not None:
            instants = poisson(load.rate, random.Random(load.seed + 1))
            return [asyncio.create_task(self._dispatch(began, instants))]
        longest = load.settings.max_tokens
        firsts = [
            self._rng.randint(max(1, longest // 4), longest) if load.warm_s else longest
            for _ in range(load.users or 0)
        ]
        return [asyncio.create_task(self._user(first)) for first in firsts]

    async def _user(self, first_tokens: int) -> None:
        """A closed loop: the next chat as soon as the last one ended."""
        settings = msgspec.structs.replace(self._load.settings, max_tokens=first_tokens)
        while not self._dead:
            record = await self._send(settings)
            if record.outcome is Outcome.UNFINISHED:
                return  # this task was cancelled
            settings = self._load.settings
            if record.outcome is Outcome.FAILED:
                await asyncio.sleep(_PAUSE_AFTER_FAILURE_S)

    async def _dispatch(self, began: float, instants: Iterator[float]) -> None:
        """An open loop: every instant its request, whatever became of the ones before."""
        for instant in instants:
            due = began + instant
            while (left := due - self._clock()) > 0:
                await asyncio.sleep(left)
            if self._dead:
                return
            task = asyncio.create_task(self._send(self._load.settings, due))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _send(self, settings: RequestSettings, due: float | None = None) -> RequestRecord:
        prompt, recorder = self._session.begin(due)
        self._sent += 1
        wanted = self._load.requests
        if wanted is not None and self._before is not None and self._sent - self._before == wanted:
            self._closed = math.nextafter(recorder.sent_at, math.inf)
        self._peak = max(self._peak, len(self._session.open_since()))
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
        if self._failures_in_a_row % _SUSPICIOUS or self._dead or self._api is None:
            return
        if await asyncio.to_thread(self._api.alive):
            return
        self._dead = True
        self._incidents.append(
            f"the server stopped answering after {self._sent} requests; the last error: {record.error}"
        )
