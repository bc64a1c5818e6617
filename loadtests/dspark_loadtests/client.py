"""How the load test talks to a server: its control endpoints, and hundreds of streamed chats."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import httpx
import msgspec

from dspark_loadtests.prompts import Prompt
from dspark_loadtests.stream import STREAM_OPTIONS, RequestRecord, StreamRecorder
from dspark_sglang.errors import ConfigError, ServerError

CHAT_PATH = "/v1/chat/completions"


class RequestSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What every request of a run has in common."""

    model: str
    temperature: float
    max_tokens: int


def chat_payload(prompt: Prompt, settings: RequestSettings) -> dict[str, Any]:
    """The body of one streaming chat completion."""
    return {
        "model": settings.model,
        "messages": prompt.messages(),
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "stream": True,
        "stream_options": STREAM_OPTIONS,
        # SGLang then ends the stream with the request's verify rounds.
        "return_spec_tokens_details": True,
    }


def request_headers(api_key: str | None) -> dict[str, str]:
    """Headers for every request.

    Compression is declined: a compressing proxy would hold chunks back to fill its window
    and the times measured would be the proxy's.
    """
    headers = {"Accept-Encoding": "identity", "Accept": "text/event-stream, application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    return headers


def read_api_key(path: Path | None) -> str | None:
    """The key in ``path``; a file, because a command line is visible to every local user."""
    if path is None:
        return None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"Cannot read the API key file {path}: {error}.",
            expected="a readable file that holds the server's API key",
            fix="Point the option at it, or leave it out.",
        ) from error
    if not key:
        raise ConfigError(
            f"The API key file {path} is empty.",
            expected="a file that holds the server's API key",
            fix="Write the key into it, or leave the option out.",
        )
    return key


class _Model(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_Model]


class ServerApi:
    """The server's control endpoints.

    Args:
        host: base URL, such as ``http://127.0.0.1:30000``.
        api_key: sent as a bearer token when given.
        timeout_s: for each call.
    """

    def __init__(self, host: str, *, api_key: str | None = None, timeout_s: float = 15.0) -> None:
        self.host = host.rstrip("/")
        # One client: each new one loads the system's certificates again, and the run's
        # clock already ticks. No kept connection: the calls are a whole run apart, and the
        # server may drop an idle one at the moment of its use.
        headers = request_headers(api_key) | {"Connection": "close"}
        self._client = httpx.Client(headers=headers, timeout=timeout_s)

    def get(self, path: str) -> bytes:
        """GET ``path``.

        Raises:
            ServerError: nothing answered, or the status was not 200.
        """
        url = self.host + path
        expected = f"200 from a running SGLang server at {self.host}"
        try:
            response = self._client.get(url)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(
                f"GET {url} failed: {error}.",
                expected=expected,
                fix="Start the server or correct its address.",
            ) from error
        if response.status_code != 200:
            raise ServerError(
                f"GET {url} answered {response.status_code}: {response.text[:200]}.",
                expected=expected,
                fix="If it wants a key, give the file that holds it; otherwise check the address.",
            )
        return response.content

    def model(self) -> str:
        """The first model the server serves.

        Raises:
            ServerError: the server is not there, or lists no model.
        """
        body = self.get("/v1/models")
        try:
            models = msgspec.json.decode(body, type=_ModelList).data
        except msgspec.DecodeError:
            models = []
        if not models:
            raise ServerError(
                f"{self.host}/v1/models lists no model: {body[:200]!r}.",
                expected='{"data": [{"id": ...}]}',
                fix="Name the model.",
            )
        return models[0].id

    def alive(self) -> bool:
        """Whether anything listens; what it answers does not matter, a full server may refuse."""
        try:
            self._client.get(f"{self.host}/v1/models", timeout=3.0)
        except httpx.TransportError:
            return False
        return True


class Endpoint(NamedTuple):
    """A server and how it is reached."""

    url: str
    model: str
    api: ServerApi
    api_key: str | None = None


def connect(url: str, *, model: str | None = None, api_key: str | None = None) -> Endpoint:
    """Reach a server and ask which model it serves.

    Raises:
        ConfigError: the address is none.
        ServerError: it does not answer.
    """
    url = url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(
            f"The server's address is {url!r}.",
            expected="a base URL",
            fix="As in http://127.0.0.1:30000.",
        )
    api = ServerApi(url, api_key=api_key)
    return Endpoint(url, model or api.model(), api, api_key)


class ChatClient:
    """Streams chats from one server, hundreds at a time: aiohttp, whose parser is in C.

    Args:
        host: base URL.
        api_key: sent as a bearer token when given.
        read_s: longest wait for the next bytes of an answer.
    """

    def __init__(self, host: str, *, api_key: str | None = None, read_s: float = 300.0) -> None:
        self._url = host.rstrip("/") + CHAT_PATH
        self._session = aiohttp.ClientSession(
            # Servers drop idle connections after 5 s (uvicorn); a request must not meet that.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=read_s),
            headers=request_headers(api_key),
            auto_decompress=False,
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    async def stream(self, payload: bytes, recorder: StreamRecorder) -> RequestRecord:
        """Send one chat and record it; cancelled, it is recorded as unfinished."""
        try:
            headers = {"Content-Type": "application/json"}
            async with self._session.post(self._url, data=payload, headers=headers) as response:
                if response.status != 200:
                    text = (await response.content.read(200)).decode("utf-8", "replace")
                    return recorder.fail(f"HTTP {response.status}: {text}")
                # What the socket had, as it had it.
                async for data in response.content.iter_any():
                    recorder.feed(data)
        except asyncio.CancelledError:
            return recorder.abandon()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return recorder.fail(f"{type(error).__name__}: {error}")
        return recorder.finish()
