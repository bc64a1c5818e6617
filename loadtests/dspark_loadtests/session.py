"""One run's bookkeeping: nothing that was sent is ever lost from the count."""

from __future__ import annotations

import time
from collections.abc import Iterator

from dspark_loadtests.prompts import Prompt
from dspark_loadtests.stream import Clock, RequestRecord, StreamRecorder


class LoadSession:
    """Hands out requests and collects their records.

    Args:
        prompts: endless; the order of sends is the order drawn.
        clock: monotonic seconds.
    """

    def __init__(self, prompts: Iterator[Prompt], *, clock: Clock = time.perf_counter) -> None:
        self._prompts = prompts
        self._clock = clock
        self._in_flight: dict[int, StreamRecorder] = {}
        self.records: list[RequestRecord] = []

    def begin(self) -> tuple[Prompt, StreamRecorder]:
        """The next prompt, and a recorder whose clock starts now: send at once."""
        prompt = next(self._prompts)
        recorder = StreamRecorder(prompt_id=prompt.id, prompt_kind=prompt.kind, clock=self._clock)
        self._in_flight[id(recorder)] = recorder
        return prompt, recorder

    def end(self, recorder: StreamRecorder, record: RequestRecord) -> None:
        """File the record with which ``recorder`` was closed."""
        del self._in_flight[id(recorder)]
        self.records.append(record)

    def abandon_in_flight(self) -> list[RequestRecord]:
        """File what is still open as unfinished, and return those records.

        Leaving it out would drop exactly the slowest requests of the run.
        """
        abandoned = [recorder.abandon() for recorder in self._in_flight.values()]
        self._in_flight.clear()
        self.records.extend(abandoned)
        return abandoned
