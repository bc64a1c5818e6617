"""A chat server with no model behind it, whose timing and token counts are known.

It rehearses a load test without a GPU, and it is the truth the tests compare with: it speaks
SGLang's streaming dialect over real sockets and notes when it wrote each chunk.

    python -m dspark_loadtests.fake_server --port 30000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import msgspec

Ending = Literal["done", "error", "truncate", "hang", "http_500"]
Usage = Literal["continuous", "last"]
Speculation = Literal["counters", "lifetime", "off"]


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
    #: Before each content chunk's last write: no client can have read it earlier.
    chunk_times: list[float] = []
    tokens: int = 0


class FakeServer:
    """Serves scripts on 127.0.0.1 in background threads while the ``with`` block runs.

    Args:
        script_for: chooses the script of the n-th request, counted from 0.
        speculation: what ``/server_info`` tells of it.
        port: 0 takes a free one.
    """

    def __init__(
        self,
        script_for: Callable[[int], Script],
        *,
        speculation: Speculation = "counters",
        port: int = 0,
    ) -> None:
        self.script_for = script_for
        self.speculation = speculation
        self.served: list[Served] = []
        # Not zero: a run must use the difference, not the totals.
        self.rounds, self.committed_tokens = 1000, 1500
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self._http = _Server(("127.0.0.1", port), _Handler)
        self._http.fake = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()

    def server_info(self) -> dict[str, Any]:
        """The body of ``/server_info``."""
        state: dict[str, Any] = {}
        if self.speculation != "off":
            state["avg_spec_accept_length"] = self.committed_tokens / self.rounds
        if self.speculation == "counters":
            state["dspark_info_record"] = {
                "active": True,
                "rounds": self.rounds,
                "committed_tokens": self.committed_tokens,
            }
        return {
            "version": "fake",
            "model_path": "fake-model",
            "speculative_algorithm": None if self.speculation == "off" else "DSPARK",
            "api_key": "must-not-be-reported",
            "internal_states": [state],
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    fake: FakeServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Nagle's algorithm would merge the writes whose separation is the point.
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        fake = self.server.fake
        if self.path == "/server_info":
            with fake.lock:
                self._json(200, fake.server_info())
        elif self.path == "/v1/models":
            self._json(200, {"object": "list", "data": [{"id": "fake-model"}]})
        else:
            self._json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        fake = self.server.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with fake.lock:
            script = fake.script_for(len(fake.served))
            served = Served(body=body)
            fake.served.append(served)
        if script.ending == "http_500":
            self._json(500, {"object": "error", "message": "out of luck"})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        # A client that stops early is part of a load test.
        with contextlib.suppress(ConnectionError):
            self._stream(script, served)

    def _stream(self, script: Script, served: Served) -> None:
        self._event(_chunk({"role": "assistant", "content": ""}))
        for index, chunk in enumerate(script.chunks):
            if self.server.fake.stopping.wait(chunk.delay_s):
                self.close_connection = True
                return
            self._content(script, chunk, served)
            if index > 0:
                with self.server.fake.lock:
                    self.server.fake.rounds += 1
                    self.server.fake.committed_tokens += chunk.tokens
        self._end(script, served)

    def _content(self, script: Script, chunk: Chunk, served: Served) -> None:
        served.tokens += chunk.tokens
        event = _chunk({"content": "word " * chunk.tokens})
        if script.usage == "continuous":
            event["usage"] = _usage(script, served.tokens)
        data = _encode(event)
        if chunk.split_s > 0:
            self._write(data[: len(data) // 2])
            time.sleep(chunk.split_s)
            data = data[len(data) // 2 :]
        served.chunk_times.append(time.perf_counter())
        self._write(data)

    def _end(self, script: Script, served: Served) -> None:
        if script.ending == "hang":
            self.server.fake.stopping.wait()
        if script.ending in ("hang", "truncate"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if script.ending == "error":
            error = {"object": "error", "message": "no memory left", "type": "X", "code": 503}
            self._event({"error": error})
        else:
            self._event(_chunk({}, finish_reason="stop"))
            self._event(
                {
                    "object": "chat.completion.chunk",
                    "choices": [],
                    "usage": _usage(script, served.tokens),
                }
            )
        # SGLang says [DONE] after an error too.
        self._write(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, event: dict[str, Any]) -> None:
        self._write(_encode(event))

    def _write(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _json(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _encode(event: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(event)}\n\n".encode()


def _chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"object": "chat.completion.chunk", "model": "fake-model", "choices": [choice]}


def _usage(script: Script, completion_tokens: int) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "prompt_tokens": script.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": script.prompt_tokens + completion_tokens,
        "prompt_tokens_details": None,
    }
    if script.cached_tokens is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": script.cached_tokens}
    return usage


def rehearsal_script() -> Script:
    """A plausible answer: 80 ms to the first token, then 20 rounds of 1 to 6 tokens."""
    rounds = (3, 6, 1, 4, 2) * 4
    return Script(chunks=(Chunk(0.08, 1), *(Chunk(0.02, tokens) for tokens in rounds)))


def main() -> None:
    """Serve :func:`rehearsal_script` until interrupted."""
    parser = argparse.ArgumentParser(description="A chat server with no model, for rehearsals.")
    parser.add_argument("--port", type=int, default=30000)
    server = FakeServer(lambda _: rehearsal_script(), port=parser.parse_args().port)
    with server, contextlib.suppress(KeyboardInterrupt):
        print(f"fake server at {server.url} (Ctrl-C stops it)", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
