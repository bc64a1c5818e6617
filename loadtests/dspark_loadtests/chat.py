"""The client that makes the load of ``dspark bench``."""

from __future__ import annotations

import asyncio

import aiohttp

from dspark_loadtests.client import CHAT_PATH, request_headers
from dspark_loadtests.stream import RequestRecord, StreamRecorder


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
