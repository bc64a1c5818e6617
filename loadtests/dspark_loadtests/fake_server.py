"""A chat server with no model behind it, whose timing and token counts are known.

It rehearses a load test without a GPU, and it is the truth the tests compare with: it speaks SGLang's streaming
dialect over real sockets and notes when it wrote each chunk. One event loop, so that it keeps time under load.

    python -m dspark_loadtests.fake_server --port 30000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, cast

import msgspec
import uvloop

Ending = Literal["done", "error", "truncate", "hang", "http_500"]
Usage = Literal["continuous", "last"]
Speculation = Literal["counters", "requests", "lifetime", "off"]


class Chunk(msgspec.Struct, frozen=True):
    """Wait ``delay_s``, then send ``tokens`` tokens in one chunk."""

    delay_s: float
    tokens: int
    #: Send it as two TCP writes, this many seconds apart, cut inside the JSON.
    split_s: float = 0.0


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """How the server answers one request. Its chunks after the first are verify rounds."""

    chunks: tuple[Chunk, ...]
    ending: Ending = "done"
    usage: Usage = "continuous"
    prompt_tokens: int = 20
    cached_tokens: int | None = None


class Served(msgspec.Struct):
    """What the server did for one request; times are ``time.perf_counter`` seconds."""

    body: dict[str, Any]
    received_at: float
    #: Before each content chunk's last write: no client can have read it earlier.
    chunk_times: list[float] = []
    chunk_tokens: list[int] = []
    ended_at: float | None = None
    tokens: int = 0


class FakeServer:
    """Serves scripts on 127.0.0.1 in a background thread while the ``with`` block runs.

    Args:
        script_for: chooses the script of the n-th request, counted from 0.
        speculation: what it tells of it, and where: ``/server_info`` or the streams themselves.
        port: 0 takes a free one.
        dies_after: requests after which it closes every connection and listens no more.
    """

    def __init__(
        self,
        script_for: Callable[[int], Script],
        *,
        speculation: Speculation = "counters",
        port: int = 0,
        dies_after: int | None = None,
    ) -> None:
        self.script_for = script_for
        self.speculation = speculation
        self.dies_after = dies_after
        self.served: list[Served] = []
        #: What ``/set_internal_state`` was told last, by key.
        self.state: dict[str, float] = {}
        # Not zero: a run must use the difference, not the totals.
        self.rounds, self.committed_tokens, self.verified_tokens = 1000, 1500, 3000
        self.connections: set[_Connection] = set()
        self.loop = uvloop.new_event_loop()
        self._socket = socket.create_server(("127.0.0.1", port), backlog=4096)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._listening: asyncio.AbstractServer | None = None
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self.loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _listen(self) -> None:
        self._listening = await self.loop.create_server(
            lambda: _Connection(self), sock=self._socket
        )

    async def _close(self) -> None:
        self.die()
        await asyncio.sleep(0)  # connections are told that they are lost

    def die(self) -> None:
        """What a killed process looks like from outside. On the server's own loop."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        for connection in tuple(self.connections):
            connection.abort()

    def server_info(self) -> dict[str, Any]:
        """The body of ``/server_info``."""
        state: dict[str, Any] = {}
        if self.speculation != "off":
            state["avg_spec_accept_length"] = self.committed_tokens / self.rounds
        if self.speculation == "counters":
            state["dspark_info_record"] = {
                "active": True,
                "rounds": self.rounds,
                "plain_rounds": 0,
                "committed_tokens": self.committed_tokens,
                "verified_tokens": self.verified_tokens,
            }
        return {
            "version": "fake",
            "model_path": "fake-model",
            "speculative_algorithm": None if self.speculation == "off" else "DSPARK",
            "max_running_requests": 48,
            "api_key": "must-not-be-reported",
            "internal_states": [state],
        }

    def metrics(self) -> str:
        """The body of ``/metrics``."""
        return (
            "# TYPE sglang:generation_tokens_total counter\n"
            f'sglang:generation_tokens_total{{model_name="fake-model"}} {self.committed_tokens}\n'
            "# TYPE sglang:num_running_reqs gauge\n"
            f'sglang:num_running_reqs{{model_name="fake-model"}} {len(self.connections)}\n'
        )


class _Connection(asyncio.Protocol):
    """HTTP/1.1 as far as this needs it: one request at a time, bodies with a length, chunked answers."""

    def __init__(self, fake: FakeServer) -> None:
        self.fake = fake
        self._transport: asyncio.Transport
        self._received = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self._close_after = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.fake.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.fake.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()

    def abort(self) -> None:
        """Break the connection."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}  # fmt: skip
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            return
        del self._received[: len(head) + 4 + length]
        method, path, _ = lines[0].split(" ")
        body = json.loads(rest[:length]) if length else {}
        self._close_after = headers.get("connection", "").lower() == "close"
        self._answer(method, path.partition("?")[0], body)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self.fake.loop

    def _answer(self, method: str, path: str, body: dict[str, Any]) -> None:
        fake = self.fake
        if method == "POST" and path == "/v1/chat/completions":
            self._chat(body)
        elif method == "POST" and path == "/set_internal_state":
            fake.state |= body["server_args"]
            self._json(200, [True])
        elif path == "/server_info":
            self._json(200, fake.server_info())
        elif path == "/v1/models":
            self._json(200, {"object": "list", "data": [{"id": "fake-model"}]})
        elif path == "/metrics":
            self._whole(200, "text/plain", fake.metrics().encode())
        elif path == "/health":
            self._json(200, {})
        elif path == "/truth":
            self._whole(200, "application/json", msgspec.json.encode(fake.served))
        else:
            self._json(404, {"detail": "Not Found"})

    def _chat(self, body: dict[str, Any]) -> None:
        fake = self.fake
        number = len(fake.served)
        script = fake.script_for(number)
        fake.served.append(Served(body=body, received_at=time.perf_counter()))
        if fake.dies_after is not None and number + 1 > fake.dies_after:
            fake.die()
        elif script.ending == "http_500":
            self._json(500, {"object": "error", "message": "out of luck"})
        else:
            self._write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            _Answer(self, number, script).begin()

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Call that at a time of the loop, unless the client has gone."""
        self._timer = self.loop.call_at(when, call)

    def chunk(self, data: bytes) -> None:
        """One piece of a chunked body, its own write."""
        self._write(b"%x\r\n%s\r\n" % (len(data), data))

    def end(self) -> None:
        """The end of a chunked body."""
        self._write(b"0\r\n\r\n")
        if self._close_after:
            self.close()

    def close(self) -> None:
        """Close once everything is written."""
        self._transport.close()

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def _json(self, status: int, value: object) -> None:
        self._whole(status, "application/json", json.dumps(value).encode())

    def _whole(self, status: int, kind: str, body: bytes) -> None:
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._write(head.encode() + body)
        if self._close_after:
            self.close()


class _Answer:
    """One streamed answer. Its chunks are due at times of the script, however late the one before was."""

    def __init__(self, connection: _Connection, number: int, script: Script) -> None:
        self._connection = connection
        self._fake = connection.fake
        self._served = self._fake.served[number]
        self._id = f"fake-{number}"
        self._script = script
        self._next = 0
        self._due = connection.loop.time()

    def begin(self) -> None:
        self._event(self._chunk({"role": "assistant", "content": ""}))
        self._plan()

    def _plan(self) -> None:
        if self._next == len(self._script.chunks):
            self._end()
            return
        self._due += self._script.chunks[self._next].delay_s
        self._connection.at(self._due, self._send)

    def _send(self) -> None:
        chunk = self._script.chunks[self._next]
        self._served.tokens += chunk.tokens
        event = self._chunk({"content": "word " * chunk.tokens})
        if self._script.usage == "continuous":
            event["usage"] = self._usage()
        data = _encode(event)
        if chunk.split_s > 0:
            self._connection.chunk(data[: len(data) // 2])
            self._due += chunk.split_s
            self._connection.at(
                self._due, lambda: self._finish_chunk(data[len(data) // 2 :], chunk)
            )
        else:
            self._finish_chunk(data, chunk)

    def _finish_chunk(self, data: bytes, chunk: Chunk) -> None:
        self._served.chunk_times.append(time.perf_counter())
        self._served.chunk_tokens.append(chunk.tokens)
        self._connection.chunk(data)
        if self._next > 0:
            self._fake.rounds += 1
            self._fake.committed_tokens += chunk.tokens
            self._fake.verified_tokens += chunk.tokens
        self._next += 1
        self._plan()

    def _end(self) -> None:
        ending = self._script.ending
        if ending == "hang":
            return
        if ending == "truncate":
            self._connection.close()
            return
        if ending == "error":
            error = {"object": "error", "message": "no memory left", "type": "X", "code": 503}
            self._event({"error": error})
        else:
            self._event(self._chunk({}, finish_reason="stop"))
            if self._fake.speculation == "requests":
                details = {"spec_verify_ct": len(self._script.chunks) - 1}
                self._event(self._chunk(None) | {"sglext": {"spec_tokens_details": details}})
            self._event(self._chunk(None) | {"usage": self._usage()})
        # SGLang says [DONE] after an error too.
        self._served.ended_at = time.perf_counter()
        self._connection.chunk(b"data: [DONE]\n\n")
        self._connection.end()

    def _event(self, event: dict[str, Any]) -> None:
        self._connection.chunk(_encode(event))

    def _chunk(
        self, delta: dict[str, str] | None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]  # fmt: skip
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "model": "fake-model",
            "choices": choices,
        }

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self._script.prompt_tokens, self._served.tokens
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": None,
        }
        if self._script.cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self._script.cached_tokens}
        return usage


def _encode(event: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


def rehearsal_script() -> Script:
    """A plausible answer: 80 ms to the first token, then 20 rounds of 1 to 6 tokens."""
    rounds = (3, 6, 1, 4, 2) * 4
    return Script(chunks=(Chunk(0.08, 1), *(Chunk(0.02, tokens) for tokens in rounds)))


def paced_script(number: int, *, chunks: int, chunk_s: float) -> Script:
    """An answer of evenly paced chunks of 1 to 4 tokens.

    Requests differ in TTFT (one to two paces) and length (half of ``chunks`` to one and a half), so that they do not
    stay in step.
    """
    first = chunk_s * (1 + (number * 0.618034) % 1)
    length = round(chunks * (0.5 + (number * 0.754877) % 1))
    rounds = (Chunk(chunk_s, 1 + (number + each) % 4) for each in range(1, length))
    return Script(chunks=(Chunk(first, 1), *rounds))


def main() -> None:
    """Serve until interrupted: :func:`rehearsal_script`, or evenly paced chunks."""
    parser = argparse.ArgumentParser(description="A chat server with no model, for rehearsals.")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--core", type=int, help="the core to run on")
    parser.add_argument("--chunks", type=int, help="chunks of an answer, instead of a rehearsal's")
    parser.add_argument("--chunk-s", type=float, default=0.1, help="seconds between them")
    options = parser.parse_args()
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})

    def script(number: int) -> Script:
        if options.chunks is None:
            return rehearsal_script()
        return paced_script(number, chunks=options.chunks, chunk_s=options.chunk_s)

    with FakeServer(script, port=options.port) as server, contextlib.suppress(KeyboardInterrupt):
        print(f"fake server at {server.url} (Ctrl-C stops it)", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
