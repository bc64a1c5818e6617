"""Requests whose whole text is known beforehand, and what became of each.

A reference is the same request without speculation, alone. It ends before the first token at which two tokens
are nearly tied, so rounding cannot change it in any batch: every other text is a fault.
"""

from __future__ import annotations

import asyncio
import enum
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx
import msgspec

from dspark_loadtests.stream import SSEDecoder
from dspark_sglang.canary.checks import TOLERANCES, parse
from dspark_sglang.canary.prompts import questions
from dspark_sglang.errors import ServerError

#: Fewer tokens than this before the first near-tie are no test.
SHORTEST = 4
_UNSPECULATED = {"dspark": {"max_draft_tokens": 0}}


class Reference(msgspec.Struct, frozen=True):
    """One request at temperature 0 and its answer."""

    prompt: str
    tokens: int
    ids: list[int]
    text: str


class End(enum.StrEnum):
    """How a request ended, as its client saw it."""

    EQUAL = "equal"
    #: It finished with another text, or what was received before it broke off is no part of the right one.
    WRONG = "wrong"
    #: It broke off without a finish; nothing wrong was received.
    CUT = "cut"
    #: Another status than 200.
    REFUSED = "refused"
    #: The client went away on purpose.
    ABORTED = "aborted"
    #: No end within its limit.
    HUNG = "hung"


class Result(msgspec.Struct, frozen=True):
    """What became of one request."""

    end: End
    #: Tokens lost, duplicated or changed in what the client received.
    lost: int = 0
    detail: str = ""


class Received:
    """What one client has of its answer so far."""

    def __init__(self, openai: bool) -> None:
        self.openai = openai
        self.text = ""
        self.ids: list[int] = []
        self.count = 0
        self.chunks = 0
        self.finished = False
        #: A chunk that does not go on where the one before ended.
        self.broken = ""

    def take(self, chunk: dict[str, Any]) -> None:
        """One server-sent event."""
        if "error" in chunk:
            self.broken = self.broken or str(chunk["error"])[:120]
            return
        self.chunks += 1
        if self.openai:
            for choice in chunk.get("choices") or []:
                self.text += choice.get("text") or ""
                self.finished |= bool(choice.get("finish_reason"))
            self.count = int((chunk.get("usage") or {}).get("completion_tokens") or self.count)
            return
        ids = chunk.get("output_ids") or []
        if ids[: len(self.ids)] != self.ids:
            self.broken = self.broken or f"tokens {self.ids} became {ids}"
        self.ids, self.text, self.count = ids, chunk.get("text") or "", len(ids)
        reason = (chunk.get("meta_info") or {}).get("finish_reason")
        self.finished |= bool(reason)
        if isinstance(reason, dict) and reason.get("type") == "abort":
            self.finished, self.broken = False, ""

    def judge(self, wanted: Reference) -> Result:
        """Compare with what should have come."""
        if self.broken:
            return Result(End.WRONG, 1, self.broken)
        if not self.finished:
            right = wanted.text.startswith(self.text) if self.openai else (
                wanted.ids[: len(self.ids)] == self.ids
            )  # fmt: skip
            said = f"received {self.count} of {wanted.tokens} tokens"
            return Result(End.CUT if right else End.WRONG, 0 if right else 1, said)
        lost = abs(self.count - wanted.tokens)
        if not self.openai:
            lost += sum(a != b for a, b in zip(self.ids, wanted.ids, strict=False))
        if lost or self.text != wanted.text:
            return Result(End.WRONG, max(1, lost), f"{self.text!r}, not {wanted.text!r}"[:300])
        return Result(End.EQUAL)


def body(wanted: Reference, openai: bool) -> tuple[str, dict[str, Any]]:
    """Path and body of a streamed request, of the native or of the OpenAI API."""
    if openai:
        return "/v1/completions", {
            "model": "default", "prompt": wanted.prompt, "max_tokens": wanted.tokens,
            "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
    parameters = {"temperature": 0, "max_new_tokens": wanted.tokens, "ignore_eos": True}
    return "/generate", {"text": wanted.prompt, "sampling_params": parameters, "stream": True}


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    decoder = SSEDecoder()
    async for data in response.aiter_raw():
        for _, event in decoder.feed(data):
            if event != b"[DONE]":
                yield json.loads(event)


async def ask(
    client: httpx.AsyncClient,
    wanted: Reference,
    *,
    openai: bool,
    limit_s: float,
    abort_after: int | None = None,
    began: Callable[[], None] = lambda: None,
) -> Result:
    """Stream one request and judge it.

    Args:
        limit_s: seconds after which a request without an end counts as hung.
        abort_after: go away after so many chunks.
        began: called at the first chunk.
    """
    path, sent = body(wanted, openai)
    received = Received(openai)

    async def stream() -> Result | None:
        async with client.stream("POST", path, json=sent) as response:
            if response.status_code != 200:
                said = (await response.aread()).decode("utf-8", "replace")[:200]
                return Result(End.REFUSED, detail=f"HTTP {response.status_code}: {said}")
            async for chunk in _events(response):
                received.take(chunk)
                if received.chunks == 1:
                    began()
                if abort_after is not None and received.chunks >= abort_after:
                    return Result(End.ABORTED)
        return None

    try:
        ended = await asyncio.wait_for(stream(), limit_s)
    except TimeoutError:
        return Result(End.HUNG, detail=f"no end in {limit_s:.0f} s; {received.count} tokens")
    except (httpx.HTTPError, ValueError) as error:
        judged = received.judge(wanted)
        return judged if judged.end is not End.CUT else Result(End.CUT, detail=repr(error)[:200])
    judged = received.judge(wanted)
    if ended is not None and judged.end is not End.WRONG:
        return ended
    return judged


def client(url: str, key: str | None = None) -> httpx.AsyncClient:
    """A client without limits of its own; :func:`ask` has one for each request."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=None, limits=limits)


async def _once(
    http: httpx.AsyncClient, prompt: str, tokens: int, *, logprobs: bool
) -> dict[str, Any]:
    parameters = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True,
                  "custom_params": _UNSPECULATED}  # fmt: skip
    asked: dict[str, Any] = {"text": prompt, "sampling_params": parameters}
    if logprobs:
        asked |= {"return_logprob": True, "top_logprobs_num": 2}
    try:
        answer = await http.post("/generate", json=asked, timeout=300.0)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ServerError(
            f"No reference could be taken: {error!r}.",
            expected="an SGLang server that answers /generate",
            fix="See its log, its address, and API_KEY where it has a key.",
        ) from error
    return found


async def references(
    http: httpx.AsyncClient, count: int, *, tokens: int, seed: int, dtype: str = "float32"
) -> list[Reference]:
    """Requests with their answers, taken one after the other and without speculation.

    Raises:
        ServerError: the server does not answer, or no prompt is free of near-ties long enough.
    """
    tie, found = TOLERANCES[dtype].tie, list[Reference]()
    for question in questions(4 * count, seed=seed, tokens=tokens, familiar=False):
        answer = parse(await _once(http, question.text, tokens, logprobs=True))
        leads = [best - second for best, second in answer.best]
        firm = next((i for i, lead in enumerate(leads) if lead < tie), len(leads))
        if firm < SHORTEST:
            continue
        kept = await _once(http, question.text, firm, logprobs=False)
        if kept["output_ids"] == answer.ids[:firm]:
            found.append(Reference(question.text, firm, kept["output_ids"], kept["text"]))
        if len(found) == count:
            return found
    raise ServerError(
        f"Only {len(found)} of {count} prompts have {SHORTEST} tokens before a near-tie.",
        expected="a model that is sure of its text, or float32",
        fix="Drill a server with --dtype float32.",
    )


async def ask_all(
    http: httpx.AsyncClient, wanted: Sequence[Reference], *, limit_s: float, at_once: int = 16
) -> list[Result]:
    """Ask each once, the two APIs in turn."""
    gate = asyncio.Semaphore(at_once)

    async def one(number: int, reference: Reference) -> Result:
        async with gate:
            return await ask(http, reference, openai=bool(number % 2), limit_s=limit_s)

    return list(await asyncio.gather(*(one(i, r) for i, r in enumerate(wanted))))
