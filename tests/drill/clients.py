"""Clients that behave badly: one that reads a byte a second, and ones that send what makes no sense."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx

from tests.drill.requests import (
    End,
    Reference,
    Result,
    ask_all,
    body,
    client,
    references,
)
from tests.drill.section import Findings, Tell

LIMIT_S = 120.0
#: Seconds a slow client reads, in which its neighbours are asked again and again.
SLOW_S = 20.0
#: Most seconds for a request that makes no sense; some of them do (they ask for much).
REFUSE_S = 60.0


class Address(NamedTuple):
    """A server that is up."""

    url: str
    key: str | None = None

    @property
    def where(self) -> tuple[str, int]:
        """Host and port."""
        url = httpx.URL(self.url)
        return url.host, url.port or (443 if url.scheme == "https" else 80)

    @property
    def headers(self) -> dict[str, str]:
        """What its key needs."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


async def busy(http: httpx.AsyncClient) -> int:
    """Requests that run or wait."""
    answer = await http.get("/v1/loads", params={"include": "core"}, timeout=30.0)
    return sum(
        int(load["num_running_reqs"] + load["num_waiting_reqs"]) for load in answer.json()["loads"]
    )


def _raw(address: Address, path: str, sent: dict[str, Any]) -> bytes:
    host, port = address.where
    content = json.dumps(sent).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}:{port}", "Content-Type: application/json",
             f"Content-Length: {len(content)}", "Connection: close"]  # fmt: skip
    lines += [f"{name}: {value}" for name, value in address.headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + content


def _slow_reader(address: Address, wanted: Reference, seconds: float) -> tuple[int, bool]:
    """Read a byte a second through a small buffer; bytes read, and whether the server cut it."""
    path, sent = body(wanted, openai=False)
    sent["sampling_params"]["max_new_tokens"] = 4 * wanted.tokens
    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        wire.settimeout(seconds)
        wire.connect(address.where)
        wire.sendall(_raw(address, path, sent))
        count, deadline = 0, time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not wire.recv(1):
                return count, True
            count += 1
            time.sleep(1.0)
    return count, False


async def _slow(address: Address, found: Findings, seed: int, tell: Tell, seconds: float) -> None:
    async with client(address.url, address.key) as http:
        wanted = await references(http, 12, tokens=64, seed=seed)
        tell("neighbours without slow clients")
        began = time.monotonic()
        found.take("before slow clients", await ask_all(http, wanted, limit_s=LIMIT_S), allowed=())
        usual = time.monotonic() - began
        tell(f"4 clients read a byte a second for {seconds:.0f} s")
        readers = [
            asyncio.create_task(asyncio.to_thread(_slow_reader, address, reference, seconds))
            for reference in wanted[:4]
        ]
        took = []
        while not all(reader.done() for reader in readers):
            began = time.monotonic()
            results = await ask_all(http, wanted, limit_s=LIMIT_S)
            took.append(time.monotonic() - began)
            found.take("beside slow clients", results, allowed=())
        read = [await reader for reader in readers]
        found.expect(not any(cut for _, cut in read), "the server cut a slow client off")
        for _ in range(60):
            left = await busy(http)
            if not left:
                break
            await asyncio.sleep(0.5)
        found.expect(not left, f"{left} requests of clients that left still run")
        found.figures = {
            "clients": len(read), "bytes_read": [count for count, _ in read],
            "neighbours_s": {"before": round(usual, 2), "beside": [round(s, 2) for s in took]},
        }  # fmt: skip


def slow(address: Address, tell: Tell, *, seed: int, seconds: float = SLOW_S) -> Findings:
    """Four clients that hardly read: the texts of others stay right and are not held up."""
    found = Findings()
    asyncio.run(_slow(address, found, seed, tell, seconds))
    return found


class Case(NamedTuple):
    """A request that cannot be served as it is."""

    name: str
    path: str
    content: bytes
    #: Statuses a server may answer.
    statuses: tuple[int, ...]
    content_type: str = "application/json"


_REFUSED = (400, 413, 422)
#: Refused, or taken for what it can mean.
_EITHER = (200, *_REFUSED)


def _generate(name: str, statuses: tuple[int, ...] = _REFUSED, **fields: Any) -> Case:
    sent = {"text": "a1 b2 c3", "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
    given = fields.pop("sampling", None)
    if given is not None:
        sent["sampling_params"] = {**sent["sampling_params"], **given}  # type: ignore[dict-item]
    return Case(name, "/generate", json.dumps({**sent, **fields}).encode(), statuses)


def _chat(name: str, statuses: tuple[int, ...] = _REFUSED, **fields: Any) -> Case:
    sent: dict[str, Any] = {"model": "default", "max_tokens": 4,
                            "messages": [{"role": "user", "content": "a1"}]}  # fmt: skip
    return Case(name, "/v1/chat/completions", json.dumps({**sent, **fields}).encode(), statuses)


def cases() -> Iterator[Case]:
    """What is sent, by what is wrong with it."""
    for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
        yield Case(f"{path}: no JSON", path, b"{", _REFUSED)
        yield Case(f"{path}: empty", path, b"", _REFUSED)
        # SGLang's own schema stumbles over these: a 500, and nothing worse.
        yield Case(f"{path}: a list", path, b"[1, 2]", (*_REFUSED, 500))
        yield Case(f"{path}: null", path, b"null", (*_REFUSED, 500))
        yield Case(f"{path}: not UTF-8", path, b'{"text": "\xff\xfe"}', _REFUSED)
        yield Case(f"{path}: a form", path, b"a=b", (*_REFUSED, 415), "text/plain")
        yield Case(f"{path}: deep", path, b'{"a":' * 2000 + b"1" + b"}" * 2000, _REFUSED)
    yield _generate("text is a number", text=5)
    yield _generate("text is empty", _EITHER, text="")
    yield _generate("text and ids", _EITHER, input_ids=[5, 6])
    yield _generate("ids beyond the vocabulary", text=None, input_ids=[10**9])
    yield _generate("negative ids", text=None, input_ids=[-1])
    yield _generate("ids that are words", text=None, input_ids=["a"])
    yield _generate("no ids", _EITHER, text=None, input_ids=[])
    yield _generate("8 MB of text", text="a1 " * (8 << 20 >> 1))
    yield _generate("longer than the context", text="a1 " * 40_000)
    for name, value in {
        "temperature": -1, "top_p": 2, "top_k": -7, "min_p": 3, "frequency_penalty": 99,
        "repetition_penalty": -1, "max_new_tokens": -4, "min_new_tokens": 99, "n": 0,
        "stop_token_ids": ["x"], "logit_bias": {"999999999": 5}, "regex": "(", "json_schema": "{",
        "ebnf": "root ::=",
    }.items():  # fmt: skip
        yield _generate(f"{name} {value!r}", _EITHER, sampling={name: value})
    yield _generate("temperature NaN", _EITHER, sampling={"temperature": float("nan")})
    yield _generate("temperature infinite", _EITHER, sampling={"temperature": float("inf")})
    yield _generate("most tokens a number can say", _EITHER, sampling={"max_new_tokens": 2**62})
    yield _generate("10,000 top log-probabilities", _EITHER,
                    return_logprob=True, top_logprobs_num=10_000)  # fmt: skip
    yield _generate("log-probabilities of no token", _EITHER,
                    return_logprob=True, token_ids_logprob=[10**9, -3])  # fmt: skip
    yield _generate("a log-probability from the far end", _EITHER,
                    return_logprob=True, logprob_start_len=10**6)  # fmt: skip
    for name, value in {
        "max_draft_tokens -1": {"max_draft_tokens": -1}, "a misspelt option": {"max_drafts": 1},
        "options as a list": [1], "a workload of 1 MB": {"workload": "x" * (1 << 20)},
        "a profile": {"profile": True},
    }.items():  # fmt: skip
        yield _generate(f"dspark: {name}", sampling={"custom_params": {"dspark": value}})
    yield _generate("custom_params as text", _EITHER, sampling={"custom_params": "dspark"})
    yield _chat("no messages", messages=[])
    yield _chat("a role that does not exist", _EITHER, messages=[{"role": "king", "content": "a"}])
    yield _chat("messages as text", messages="a")
    yield _chat("max_tokens -1", max_tokens=-1)
    yield _chat("max_tokens as text", max_tokens="many")
    yield _chat("an answer format that does not exist", response_format={"type": "poem"})
    yield _chat("another model", (200, 400, 404, 422), model="other")
    yield Case("no such path", "/v2/anything", b"{}", (404,))


async def _malformed(address: Address, found: Findings, seed: int, tell: Tell) -> None:
    async with client(address.url, address.key) as http:
        wanted = await references(http, 8, tokens=16, seed=seed)
        everything = list(cases())
        statuses: dict[str, int] = {}
        for number, case in enumerate(everything):
            tell(case.name)
            result = await _send(http, case, statuses)
            found.take(case.name, [result], allowed={End.REFUSED})
            if result.end is End.CUT and not await _up(http):
                found.faults.append(f"{case.name}: the server is gone")
                return
            if number % 10 == 9:
                found.take(f"after {case.name}", await ask_all(http, wanted, limit_s=LIMIT_S), allowed=())  # fmt: skip
        await _broken_requests(address, found)
        found.take("after all of them", await ask_all(http, wanted, limit_s=LIMIT_S), allowed=())
        found.figures = {"cases": len(everything), "statuses": statuses}


async def _up(http: httpx.AsyncClient) -> bool:
    await asyncio.sleep(3.0)
    try:
        return (await http.get("/ready", timeout=10.0)).status_code == 200
    except httpx.HTTPError:
        return False


async def _send(http: httpx.AsyncClient, case: Case, statuses: dict[str, int]) -> Result:
    """One case: refused, or a fault."""
    try:
        answer = await http.post(
            case.path, content=case.content,
            # After a 500 the connection ends, which the next case must not meet.
            headers={"Content-Type": case.content_type, "Connection": "close"},
            timeout=REFUSE_S,
        )  # fmt: skip
    except httpx.TimeoutException:
        return Result(End.HUNG, detail=f"{case.name}: no answer in {REFUSE_S:.0f} s")
    except httpx.HTTPError as error:
        return Result(End.CUT, detail=f"{case.name}: {error!r}")
    statuses[case.name] = answer.status_code
    if answer.status_code not in case.statuses:
        return Result(End.WRONG, 0, f"HTTP {answer.status_code}: {answer.text[:160]}")
    return Result(End.REFUSED)


async def _broken_requests(address: Address, found: Findings) -> None:
    """Bytes that are no request: a body that never comes, garbage, a header of a megabyte."""
    whole = _raw(address, "/generate", {"text": "a1", "sampling_params": {"max_new_tokens": 4}})
    pieces = {
        "half a body": whole[:-8],
        "garbage": b"\x16\x03\x01\x00\xff" * 400,
        "a header of 1 MB": b"GET / HTTP/1.1\r\nX: " + b"x" * (1 << 20) + b"\r\n\r\n",
    }
    for name, content in pieces.items():
        try:
            reader, writer = await asyncio.open_connection(*address.where)
            writer.write(content)
            await asyncio.wait_for(writer.drain(), 10.0)
            await asyncio.wait_for(reader.read(4096), 2.0)
            writer.close()
        except (TimeoutError, OSError):
            continue  # it waits for the rest, or hung up: both are right
        finally:
            found.figures[name] = "sent"


def malformed(address: Address, tell: Tell, *, seed: int) -> Findings:
    """Requests that make no sense are refused one by one, and the others' texts stay right."""
    found = Findings()
    asyncio.run(_malformed(address, found, seed, tell))
    return found
