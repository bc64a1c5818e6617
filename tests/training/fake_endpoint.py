"""A stand-in for an OpenAI-compatible server: answers as it is told, and keeps count."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Body = dict[str, Any]


class Request(NamedTuple):
    """One request as it arrived."""

    path: str
    body: Body
    headers: dict[str, str]

    @property
    def chat(self) -> bool:
        """Whether it asks for an answer, not for a prompt to be continued."""
        return self.path == "/v1/chat/completions"

    @property
    def asked(self) -> str:
        """The last user turn, or the prompt."""
        return str(self.body["messages"][-1]["content"] if self.chat else self.body["prompt"])


#: Status and JSON (or raw) body for a request.
Response = tuple[int, Any]


def chat(content: str | None, *, finish: str = "stop", tokens: int = 10, **more: Any) -> Response:
    """An answer; ``more`` goes into its message."""
    choice = {
        "index": 0,
        "finish_reason": finish,
        "message": {"role": "assistant", "content": content} | more,
    }
    usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": tokens + 5}
    return 200, {"object": "chat.completion", "choices": [choice], "usage": usage}


def completion(text: str, *, finish: str = "stop") -> Response:
    """A continuation of a prompt."""
    choice = {"index": 0, "finish_reason": finish, "text": text}
    return 200, {"object": "text_completion", "choices": [choice], "usage": {}}


class FakeEndpoint:
    """What it answers (``reply``), and what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[Request] = []
        self.reply: Callable[[Request], Response] = self.usual
        #: Seconds each request takes; most of them that were under way together.
        self.delay = 0.0
        self.peak = 0
        self._under_way = 0
        self._lock = threading.Lock()

    def usual(self, request: Request) -> Response:
        """Answers that tell their question; continuations that differ."""
        if request.chat:
            return chat(f"About {request.asked}: yes.")
        return completion(f" number {request.body['seed']}, please?")

    @property
    def asked(self) -> list[str]:
        """The questions that answers were wanted for, in order of arrival."""
        return [request.asked for request in self.requests if request.chat]

    def handle(self, request: Request) -> Response:
        """Answer one request and take note of it."""
        with self._lock:
            self.requests.append(request)
            self._under_way += 1
            self.peak = max(self.peak, self._under_way)
        try:
            time.sleep(self.delay)
            return self.reply(request)
        finally:
            with self._lock:
                self._under_way -= 1


@contextmanager
def running_endpoint() -> Iterator[FakeEndpoint]:
    """Serve on a free port of this machine."""
    endpoint = FakeEndpoint()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # one packet an answer: two would wait for each other 40 ms

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = endpoint.handle(Request(self.path, body, dict(self.headers)))
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: object) -> None:
            pass  # clients that were killed or cancelled

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
