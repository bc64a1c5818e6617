"""A running server, asked over HTTP what it is and what it counts."""

from __future__ import annotations

from typing import Any

import httpx

from dspark_sglang.config import authorization
from dspark_sglang.errors import ServerError

_TIMEOUT_S = 300.0


def client(url: str, key: str | None, *, connections: int | None = None) -> httpx.Client:
    """A client of one server.

    Args:
        key: its API key; None: it has none.
        connections: most at once; None: httpx's own limit.

    Raises:
        ServerError: the address is none.
    """
    limits = httpx.Limits(max_connections=connections)
    try:
        return httpx.Client(
            base_url=url, timeout=_TIMEOUT_S, headers=authorization(key), limits=limits
        )
    except httpx.InvalidURL as error:
        raise ServerError(
            f"{url} is no address: {error}.", expected="http://HOST:PORT", fix="Correct it."
        ) from error


def info(http: httpx.Client) -> dict[str, Any]:
    """``/server_info``.

    Raises:
        ServerError: there is none.
    """
    try:
        answer = http.get("/server_info")
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        found.get("internal_states")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, AttributeError) as error:
        raise ServerError(
            f"{str(http.base_url).rstrip('/')}/server_info gave no usable answer: {error!r}.",
            expected="a running SGLang server",
            fix="Check the address, and API_KEY where it has a key.",
        ) from error
    return found


def record(http: httpx.Client) -> dict[str, Any]:
    """What this plugin says of itself in a server.

    Raises:
        ServerError: the server cannot be asked, or does not run this plugin.
    """
    found = (info(http).get("internal_states") or [{}])[0].get("dspark_info_record")
    if not isinstance(found, dict) or not found.get("active"):
        raise ServerError(
            f"{str(http.base_url).rstrip('/')} does not run this plugin's DSPARK.",
            expected="its counters",
            fix="Start it with --speculative-algorithm DSPARK; `dspark doctor --url` says what it runs.",
        )
    return found
