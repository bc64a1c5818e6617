"""One run's bookkeeping: nothing that was sent is ever lost from the count."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

from dspark_loadtests.prompts import Prompt
from dspark_loadtests.stream import Clock, Outcome, RequestRecord, StreamRecorder


class LoadSession:
    """Hands out requests and collects their records.

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

    @property
    def in_flight(self) -> int:
        """Requests sent that have not ended."""
        return len(self._in_flight)

    def open_since(self) -> list[float]:
        """When each of them was sent."""
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
