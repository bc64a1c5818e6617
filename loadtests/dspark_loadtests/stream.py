"""One streamed chat completion, from the bytes on the wire to a record of times and tokens.

:class:`StreamRecorder` takes bytes as they arrive, in pieces of any size, and stamps every
server-sent event when its last byte is in. It never reads ahead and never waits, so the
transport decides the resolution: feed it lines or raw socket reads, not fixed-size blocks.
"""

from __future__ import annotations

import enum
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

Clock = Callable[[], float]

# Every request asks for this: speculation puts several tokens into one chunk, so counting
# chunks would overstate the time per token by the accepted length.
STREAM_OPTIONS = {"include_usage": True, "continuous_usage_stats": True}


class Outcome(enum.StrEnum):
    """How a request ended. Every request sent ends as exactly one of these."""

    COMPLETED = "completed"
    FAILED = "failed"
    UNFINISHED = "unfinished"


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What one request did. Times are seconds on the recorder's monotonic clock."""

    prompt_id: str
    prompt_kind: str
    outcome: Outcome
    error: str | None
    sent_at: float
    first_content_at: float | None
    last_content_at: float | None
    ended_at: float
    #: Seconds between neighbouring content chunks; one less than there are content chunks.
    gaps_s: tuple[float, ...]
    #: Tokens each content chunk brought; empty when the server reports usage only at the end.
    chunk_tokens: tuple[int, ...]
    content_chunks: int
    prompt_tokens: int | None
    completion_tokens: int | None
    #: None when the server does not say (SGLang says it under ``--enable-cache-report``).
    cached_tokens: int | None
    finish_reason: str | None
    #: When an open loop wanted to send it; None in a closed loop, where sending is the schedule.
    scheduled_at: float | None = None
    #: The id the server gave the answer.
    server_id: str | None = None
    #: Verify rounds of this request, where the server says so (``return_spec_tokens_details``).
    rounds: int | None = None

    @property
    def due_at(self) -> float:
        """When the request should have been sent: its schedule, or the send where there is none."""
        return self.sent_at if self.scheduled_at is None else self.scheduled_at

    @property
    def ttft_from_schedule_s(self) -> float | None:
        """Time to first token as the schedule sees it: a generator that is late does not hide it."""
        return None if self.first_content_at is None else self.first_content_at - self.due_at

    @property
    def arrivals(self) -> list[float]:
        """When each content chunk arrived."""
        if self.first_content_at is None:
            return []
        return list(itertools.accumulate(self.gaps_s, initial=self.first_content_at))

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: from the send to the first chunk that carries text."""
        if self.first_content_at is None:
            return None
        return self.first_content_at - self.sent_at

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (last - first) / (n - 1), n in tokens.

        None when there is nothing to divide: one token, or one chunk holding all of them
        (its zero would read as infinite speed).
        """
        if self.first_content_at is None or self.last_content_at is None:
            return None
        if self.content_chunks < 2 or self.completion_tokens is None or self.completion_tokens < 2:
            return None
        return (self.last_content_at - self.first_content_at) / (self.completion_tokens - 1)

    @property
    def e2e_s(self) -> float:
        """From the send to the end of the stream."""
        return self.ended_at - self.sent_at


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[msgspec.Raw] | None = None

    @property
    def has_content(self) -> bool:
        # The opening chunk says only {"role": "assistant", "content": ""}: not a token.
        return bool(self.content or self.reasoning_content or self.tool_calls)


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct):
    id: Any = None
    sglext: Any = None
    object: str | None = None
    message: str | None = None
    error: dict[str, Any] | str | None = None
    choices: list[_Choice] = []
    usage: _Usage | None = None


_decoder = msgspec.json.Decoder(_Chunk)


class SSEDecoder:
    """Splits a byte stream into server-sent events, however the network cut it.

    Handles LF and CRLF line ends, comments and multi-line data. A last event without its
    closing blank line is dropped, as the specification says.
    """

    def __init__(self) -> None:
        self._pending = bytearray()
        self._data: list[bytes] = []
        self._event = ""

    def feed(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        """Yield ``(event name, data)`` for every event that ``data`` completes."""
        self._pending += data
        while (end := self._pending.find(b"\n")) >= 0:
            line = bytes(self._pending[:end]).removesuffix(b"\r")
            del self._pending[: end + 1]
            if line:
                self._field(line)
                continue
            if self._data:
                yield self._event, b"\n".join(self._data)
            self._data, self._event = [], ""

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")


class StreamRecorder:
    """Follows one request. Create it at the instant of sending; close it exactly once.

    Close with :meth:`finish` when the response ended, :meth:`fail` when the transport broke,
    or :meth:`abandon` when the test stopped waiting.
    """

    def __init__(
        self,
        *,
        prompt_id: str,
        prompt_kind: str,
        clock: Clock = time.perf_counter,
        scheduled_at: float | None = None,
    ) -> None:
        self._prompt_id = prompt_id
        self._prompt_kind = prompt_kind
        self._clock = clock
        self._sse = SSEDecoder()
        self._content_at: list[float] = []
        self._chunk_tokens: list[int] = []
        self._tokens_seen = 0
        self._usage: _Usage | None = None
        self._finish_reason: str | None = None
        self._error: str | None = None
        self._done_at: float | None = None
        self._started = False
        self._closed = False
        self._scheduled_at = scheduled_at
        self._server_id: str | None = None
        self._rounds: int | None = None
        self._text: list[str] = []
        self.sent_at = clock()

    @property
    def text(self) -> str:
        """The answer so far, without reasoning."""
        return "".join(self._text)

    @property
    def done(self) -> bool:
        """Whether the server said ``[DONE]``."""
        return self._done_at is not None

    def feed(self, data: bytes) -> None:
        """Take bytes of the response body as they arrive."""
        now = self._clock()
        self._started = True
        for event, payload in self._sse.feed(data):
            if self.done:
                return
            if payload == b"[DONE]":
                self._done_at = now
            elif event in ("", "message", "error"):
                # Other names are extensions (SGLang's "sglext_ids") that carry no tokens.
                self._take(event, payload, now)

    def _take(self, event: str, payload: bytes, now: float) -> None:
        try:
            chunk = _decoder.decode(payload)
        except msgspec.DecodeError as error:
            self._note_error(f"unreadable chunk {payload[:120]!r}: {error}")
            return
        if chunk.error is not None or chunk.object == "error" or event == "error":
            self._note_error(f"error in the stream: {_error_text(chunk)}")
            return
        if chunk.id is not None:
            self._server_id = str(chunk.id)
        if chunk.sglext is not None:
            self._rounds = _verify_rounds(chunk.sglext)
        has_content = False
        for choice in chunk.choices:
            if choice.delta is not None and choice.delta.has_content:
                has_content = True
                self._text.append(choice.delta.content or "")
            self._finish_reason = choice.finish_reason or self._finish_reason
        if has_content:
            self._content_at.append(now)
        if chunk.usage is not None:
            self._usage = chunk.usage
            if has_content:
                self._chunk_tokens.append(chunk.usage.completion_tokens - self._tokens_seen)
                self._tokens_seen = chunk.usage.completion_tokens

    def _note_error(self, message: str) -> None:
        # The first error is the cause; what follows it is usually its consequence.
        self._error = self._error or message

    def finish(self) -> RequestRecord:
        """Close after the response body ended, and judge whether it was whole."""
        if self._error is None:
            self._error = self._fault()
        return self._close(Outcome.COMPLETED if self._error is None else Outcome.FAILED)

    def fail(self, message: str) -> RequestRecord:
        """Close after a transport error. After ``[DONE]`` the answer is whole regardless."""
        if not self.done:
            self._note_error(f"truncated stream: {message}" if self._started else message)
        return self.finish()

    def abandon(self) -> RequestRecord:
        """Close a request that the end of the test overtook."""
        return self._close(Outcome.UNFINISHED)

    def _fault(self) -> str | None:
        if not self.done:
            return "truncated stream: it ended before [DONE]"
        if self._finish_reason is None:
            return "truncated stream: [DONE] came without a finish_reason"
        if self._finish_reason == "abort":
            return "the server aborted the request (finish_reason 'abort')"
        if self._usage is None:
            return (
                "no token counts in the stream: expected usage, which "
                "stream_options.include_usage asked for; let the proxy pass it through"
            )
        return None

    def _close(self, outcome: Outcome) -> RequestRecord:
        assert not self._closed, "a request is recorded exactly once"
        self._closed = True
        at = self._content_at
        details = None if self._usage is None else self._usage.prompt_tokens_details
        return RequestRecord(
            prompt_id=self._prompt_id,
            prompt_kind=self._prompt_kind,
            outcome=outcome,
            error=self._error,
            sent_at=self.sent_at,
            first_content_at=at[0] if at else None,
            last_content_at=at[-1] if at else None,
            ended_at=self._clock() if self._done_at is None else self._done_at,
            gaps_s=tuple(later - earlier for earlier, later in itertools.pairwise(at)),
            chunk_tokens=tuple(self._chunk_tokens),
            content_chunks=len(at),
            prompt_tokens=None if self._usage is None else self._usage.prompt_tokens,
            completion_tokens=None if self._usage is None else self._usage.completion_tokens,
            cached_tokens=None if details is None else details.cached_tokens,
            finish_reason=self._finish_reason,
            scheduled_at=self._scheduled_at,
            server_id=self._server_id,
            rounds=self._rounds,
        )


def _error_text(chunk: _Chunk) -> str:
    if isinstance(chunk.error, dict):
        parts = [chunk.error.get(key) for key in ("code", "type", "message")]
        return " ".join(str(part) for part in parts if part is not None) or str(chunk.error)
    return chunk.error or chunk.message or "no message given"


def _verify_rounds(extension: Any) -> int | None:
    """From SGLang's ``sglext`` (``SpecTokensDetails`` in its openai/protocol.py); others may use the name."""
    details = extension.get("spec_tokens_details") if isinstance(extension, dict) else None
    rounds = details.get("spec_verify_ct") if isinstance(details, dict) else None
    return rounds if isinstance(rounds, int) else None
