"""A chat server with no model behind it, whose timing and token counts are known.

It is the truth that the load tests are held against, and it rehearses one without a GPU: it speaks SGLang's streaming
dialect over real sockets and notes when it wrote each chunk.

    python -m tests.fake_server --port 30000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import uvloop
from aiohttp import web


class Chunk(msgspec.Struct, frozen=True):
    """Wait ``delay_s``, then send ``tokens`` tokens in one chunk."""

    delay_s: float
    tokens: int
    #: Send it as two TCP writes, this many seconds apart, cut inside the JSON.
    split_s: float = 0.0


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """How the server answers one request. Its chunks after the first are verify rounds."""

    chunks: tuple[Chunk, ...]
    ending: Literal["done", "error", "truncate", "hang", "http_500"] = "done"
    usage: Literal["continuous", "last"] = "continuous"
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


def rehearsal_script(_: int) -> Script:
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


class FakeServer:
    """Serves scripts on 127.0.0.1 in a background thread while the ``with`` block runs.

    Args:
        script_for: chooses the script of the n-th request, counted from 0.
        speculation: what it tells of it, and where: ``/server_info`` or the streams themselves.
        port: 0 takes a free one.
        dies_after: requests after which it closes every connection and listens no more.
        switches: whether it takes what ``/set_internal_state`` tells it.
    """

    def __init__(
        self,
        script_for: Callable[[int], Script],
        *,
        speculation: Literal["counters", "requests", "lifetime", "off"] = "counters",
        port: int = 0,
        dies_after: int | None = None,
        switches: bool = True,
    ) -> None:
        self.script_for = script_for
        self.speculation = speculation
        self.dies_after = dies_after
        self.switches = switches
        self.served: list[Served] = []
        #: What ``/set_internal_state`` was told last, by key.
        self.state: dict[str, float] = {}
        # Not zero: a run must use the difference, not the totals.
        self.rounds, self.committed_tokens, self.verified_tokens = 1000, 1500, 3000
        self._loop = uvloop.new_event_loop()
        self._socket = socket.create_server(("127.0.0.1", port), backlog=4096)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        app = web.Application()
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._chat),
                web.post("/set_internal_state", self._set_state),
                web.get("/server_info", lambda _: self._json(self.server_info())),
                web.get("/v1/models", lambda _: self._json({"data": [{"id": "fake-model"}]})),
                web.get("/truth", lambda _: self._json(self.served)),
            ]
        )
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=0.0, handler_cancellation=True
        )
        await self._runner.setup()
        assert self._runner.server is not None
        self._listening = await self._loop.create_server(self._runner.server, sock=self._socket)

    async def _close(self) -> None:
        self.die()
        await self._runner.cleanup()

    def die(self) -> None:
        """What a killed process looks like from outside. On the server's own loop."""
        self._listening.close()
        assert self._runner.server is not None
        for connection in self._runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()

    async def _json(self, value: object) -> web.Response:
        return web.Response(body=msgspec.json.encode(value), content_type="application/json")

    async def _set_state(self, request: web.Request) -> web.Response:
        if self.switches:
            self.state |= (await request.json())["server_args"]
        return await self._json([self.switches])

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

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        served = Served(body=await request.json(), received_at=time.perf_counter())
        number = len(self.served)
        self.served.append(served)
        script = self.script_for(number)
        if self.dies_after is not None and number >= self.dies_after:
            self.die()
        if script.ending == "http_500":
            return web.json_response({"object": "error", "message": "out of luck"}, status=500)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        # The client may be gone at any write.
        with contextlib.suppress(ConnectionResetError):
            await response.prepare(request)
            await self._stream(_Answer(response, f"fake-{number}"), script, served)
            if script.ending == "truncate" and request.transport is not None:
                request.transport.close()
        return response

    async def _stream(self, answer: _Answer, script: Script, served: Served) -> None:
        await answer.say({"role": "assistant", "content": ""})
        due = self._loop.time()
        for place, chunk in enumerate(script.chunks):
            due = await _until(due + chunk.delay_s)
            served.tokens += chunk.tokens
            usage = _usage(script, served) if script.usage == "continuous" else {}
            data = answer.chunk({"content": "word " * chunk.tokens}, **usage)
            if chunk.split_s > 0:
                await answer.write(data[: len(data) // 2])
                data = data[len(data) // 2 :]
                due = await _until(due + chunk.split_s)
            if place:
                self.rounds += 1
                self.committed_tokens += chunk.tokens
                self.verified_tokens += chunk.tokens
            served.chunk_times.append(time.perf_counter())
            served.chunk_tokens.append(chunk.tokens)
            await answer.write(data)
        if script.ending == "hang":
            await asyncio.Event().wait()
        if script.ending == "truncate":
            return
        if script.ending == "error":
            error = {"object": "error", "message": "no memory left", "type": "X", "code": 503}
            await answer.write(b"data: " + msgspec.json.encode({"error": error}) + b"\n\n")
        else:
            await answer.say({}, finish_reason="stop")
            if self.speculation == "requests":
                details = {"spec_verify_ct": len(script.chunks) - 1}
                await answer.say(None, sglext={"spec_tokens_details": details})
            await answer.say(None, **_usage(script, served))
        # SGLang says [DONE] after an error too.
        served.ended_at = time.perf_counter()
        await answer.write(b"data: [DONE]\n\n")


class _Answer:
    """One streamed answer."""

    def __init__(self, response: web.StreamResponse, name: str) -> None:
        self.write = response.write
        self._name = name

    def chunk(
        self, delta: dict[str, str] | None, finish_reason: str | None = None, **more: Any
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        event = {"id": self._name, "object": "chat.completion.chunk", "model": "fake-model",
                 "choices": [] if delta is None else [choice]}  # fmt: skip
        return b"data: " + msgspec.json.encode(event | more) + b"\n\n"

    async def say(self, delta: dict[str, str] | None, **more: Any) -> None:
        await self.write(self.chunk(delta, **more))


async def _until(due: float) -> float:
    """Chunks are due at times of the script, however late the one before was."""
    left = due - asyncio.get_running_loop().time()
    if left > 0:
        await asyncio.sleep(left)
    return due


def _usage(script: Script, served: Served) -> dict[str, Any]:
    details = None if script.cached_tokens is None else {"cached_tokens": script.cached_tokens}
    return {
        "usage": {
            "prompt_tokens": script.prompt_tokens,
            "completion_tokens": served.tokens,
            "total_tokens": script.prompt_tokens + served.tokens,
            "prompt_tokens_details": details,
        }
    }


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
            return rehearsal_script(number)
        return paced_script(number, chunks=options.chunks, chunk_s=options.chunk_s)

    with FakeServer(script, port=options.port) as server, contextlib.suppress(KeyboardInterrupt):
        print(f"fake server at {server.url} (Ctrl-C stops it)", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
