"""With an API key set, nothing but health, readiness and metrics answers without it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from dspark_sglang.errors import ServerError
from tests.drill.clients import Address
from tests.drill.requests import ask_all, client, references
from tests.drill.section import Findings, Tell
from tests.drill.world import World, started

KEY = "drill-key-of-one-run"
#: What probes and Prometheus read.
OPEN = ("/health", "/health_generate", "/ready", "/metrics", "/metrics/")
#: Paths that FastAPI adds without listing them, and ways to spell a path differently.
_MORE = ("/openapi.json", "/docs", "/redoc", "/docs/oauth2-redirect", "//generate", "/generate/",
         "/./generate", "/v1/../generate", "/generate?x=/health", "/v1/responses/health",
         "/%67enerate")  # fmt: skip
_METHODS = ("get", "post", "put", "patch", "delete", "head")
_CLOSED = (401, 403)
#: Starlette's answer where a path exists and the method does not, and where nothing exists.
_NOTHING = (404, 405, 307)
_LIMIT_S = 30.0


def _headers() -> dict[str, dict[str, str]]:
    """Ways to come without the key."""
    return {
        "no key": {},
        "another key": {"Authorization": "Bearer other"},
        "a part of the key": {"Authorization": f"Bearer {KEY[:-1]}"},
        "the key as Basic": {"Authorization": f"Basic {KEY}"},
        "the key elsewhere": {"X-API-Key": KEY},
    }


async def _routes(http: httpx.AsyncClient) -> list[tuple[str, str]]:
    answer = await http.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"})
    if answer.status_code != 200:
        raise ServerError(
            f"/openapi.json answered {answer.status_code} with the key.",
            expected="the list of routes",
            fix="See the server's log.",
        )
    paths: dict[str, dict[str, Any]] = answer.json()["paths"]
    listed = [(method, path) for path, methods in paths.items() for method in methods]
    hidden = [(method, path) for path in _MORE for method in ("get", "post")]
    return listed + hidden + [("get", path) for path in OPEN]


async def _try(
    http: httpx.AsyncClient, method: str, path: str, headers: dict[str, str]
) -> int | None:
    """The status of one request; None where it did not end in time."""
    plain = path.replace("{", "").replace("}", "")
    try:
        request = http.build_request(method.upper(), plain, headers=headers, json={})
        # As it stands: httpx would resolve dots itself.
        request.url = request.url.copy_with(raw_path=plain.encode())
        return (await asyncio.wait_for(http.send(request), _LIMIT_S)).status_code
    except TimeoutError:
        return None


async def _check(url: str, found: Findings, tell: Tell, seed: int) -> None:
    async with client(url) as http:
        routes = await _routes(http)
        tried, answered = 0, dict[str, int]()
        for method, path in routes:
            tell(f"{method} {path}")
            for how, headers in _headers().items():
                status = await _try(http, method, path, headers)
                tried += 1
                if path in OPEN:
                    answered[path] = status or 0
                elif status is None or status not in (*_CLOSED, *_NOTHING):
                    found.faults.append(f"{method.upper()} {path} answers {status} with {how}")
        for path in OPEN:
            status = answered.get(path)  # /metrics sends on to /metrics/
            found.expect(status in (200, 307), f"{path} answers {status}")
        for method in _METHODS:  # methods that no route lists
            status = await _try(http, method, "/generate", {})
            found.expect(status in (*_CLOSED, 405), f"{method} /generate answers {status}")
    async with client(url, KEY) as http:
        wanted = await references(http, 8, tokens=16, seed=seed)
        found.take("with the key", await ask_all(http, wanted, limit_s=60.0), allowed=())
    found.figures = {"routes": len(routes), "requests": tried, "open": answered}


def key(world: World, tell: Tell) -> Findings:
    """Try every route without the key."""
    found = Findings()
    tell("starting a server with a key")
    server = world.server("key", flags=("--api-key", KEY))
    with started(server):
        asyncio.run(_check(Address(server.url).url, found, tell, world.seed + 4))
        found.expect(server.alive(), "the server stopped")
    return found
