"""What is asked of servers that must never end, and what they say of it."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Sequence
from typing import Any

import httpx

from dspark_sglang.server import Server
from tests.net.generate import PROMPTS
from tests.net.run import Answer, ask

BYSTANDER = {
    "text": PROMPTS[5],
    "sampling_params": {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True},
}


def body(text: str = PROMPTS[0], **given: Any) -> dict[str, Any]:
    return {"text": text, "sampling_params": {"temperature": 0.0, "max_new_tokens": 12, **given}}


def together(server: Server, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    """Answers to requests sent at once."""
    with (
        httpx.Client(base_url=server.url, timeout=300.0) as http,
        concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool,
    ):
        return list(pool.map(lambda one: ask(http, one), bodies))


def drafting(server: Server, choice: int) -> None:
    server.update(dspark_speculation=choice)


def wait_for(server: Server, requests: int) -> None:
    """Until that many requests run or wait."""
    deadline = time.monotonic() + 60.0
    while server.requests() != requests:
        assert time.monotonic() < deadline, "the requests did not come, or did not go"
        time.sleep(0.05)


def faults(server: Server) -> dict[str, int]:
    record = server.dspark()
    assert record is not None
    return dict(record["faults"])


def accept_length(server: Server) -> float:
    """Of a few greedy requests, everything drafted being verified."""
    drafting(server, 1)
    server.update(dspark_budget=1, dspark_clear_info_records=1)
    together(server, [body(text, max_new_tokens=40, ignore_eos=True) for text in PROMPTS])
    record = server.dspark()
    server.update(dspark_budget=-1, dspark_speculation=-1)
    assert record is not None
    return float(record["accept_length"])
