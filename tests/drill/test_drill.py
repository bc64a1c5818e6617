"""The drill's judgement: what counts as right, lost, cut or hung, and memory that grows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from dspark_sglang.artifacts import write_bytes
from dspark_sglang.errors import ConfigError
from tests.drill import __main__ as command
from tests.drill import run as runs
from tests.drill.clients import cases
from tests.drill.disk import small_disk
from tests.drill.requests import End, Received, Reference, Result, ask
from tests.drill.section import Findings, Section, Tell
from tests.drill.soak import growth

WANTED = Reference("a", 4, [1, 2, 3, 4], "wxyz")


def native(ids: list[int], text: str, reason: dict[str, str] | None = None) -> dict[str, Any]:
    return {"output_ids": ids, "text": text, "meta_info": {"finish_reason": reason}}


def openai(text: str, reason: str | None = None, count: int | None = None) -> dict[str, Any]:
    usage = {} if count is None else {"usage": {"completion_tokens": count}}
    return {"choices": [{"text": text, "finish_reason": reason}], **usage}


STOP = {"type": "length"}
STREAMS: dict[str, tuple[bool, list[dict[str, Any]], End]] = {
    "whole": (False, [native([1, 2], "wx"), native([1, 2, 3, 4], "wxyz", STOP)], End.EQUAL),
    "a token lost": (False, [native([1, 2], "wx"), native([1, 2, 4], "wxz", STOP)], End.WRONG),
    "a token twice": (False, [native([1, 2, 2, 3, 4], "wxxyz", STOP)], End.WRONG),
    "a token changed later": (False, [native([1, 3], "wy"), native([1, 2, 3, 4], "wxyz", STOP)],
                              End.WRONG),
    "text only": (False, [native([1, 2, 3, 4], "wxyzz", STOP)], End.WRONG),
    "cut": (False, [native([1, 2], "wx")], End.CUT),
    "cut behind a wrong token": (False, [native([1, 9], "w?")], End.WRONG),
    "aborted by the server": (False, [native([1], "w", {"type": "abort"})], End.CUT),
    "an error": (False, [{"error": {"message": "no"}}], End.WRONG),
    "pieces": (True, [openai("wx"), openai("yz", "length", 4)], End.EQUAL),
    "a piece lost": (True, [openai("wx"), openai("z", "length", 4)], End.WRONG),
    "a piece twice": (True, [openai("wx"), openai("wx"), openai("yz", "length", 4)], End.WRONG),
    "fewer counted": (True, [openai("wxyz", "length", 3)], End.WRONG),
    "pieces cut": (True, [openai("wx")], End.CUT),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_what_a_client_received_is_judged(name: str) -> None:
    api, chunks, end = STREAMS[name]
    received = Received(api)
    for chunk in chunks:
        received.take(chunk)
    result = received.judge(WANTED)
    assert result.end is end
    assert (result.lost > 0) == (end is End.WRONG)


def _asked(answer: Callable[[httpx.Request], httpx.Response], **more: Any) -> Result:
    async def run() -> Result:
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            return await ask(http, WANTED, openai=False, limit_s=0.3, **more)

    return asyncio.run(run())


def _stream(*chunks: dict[str, Any], then: float = 0.0) -> httpx.Response:
    class Body(httpx.AsyncByteStream):
        async def __aiter__(self) -> Any:
            for chunk in chunks:
                yield f"data: {json.dumps(chunk)}\n\n".encode()
            await asyncio.sleep(then)

    return httpx.Response(200, stream=Body())


def test_a_request_ends_in_one_of_six_ways() -> None:
    whole, half = native([1, 2, 3, 4], "wxyz", STOP), native([1, 2], "wx")

    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("reset")

    assert _asked(lambda _: _stream(half, whole)).end is End.EQUAL
    assert _asked(lambda _: _stream(half)).end is End.CUT
    assert _asked(broken).end is End.CUT
    assert _asked(lambda _: _stream(half, then=5.0)).end is End.HUNG
    assert _asked(lambda _: httpx.Response(503)).end is End.REFUSED
    assert _asked(lambda _: _stream(half, whole), abort_after=1).end is End.ABORTED
    wrong = native([9], "?")
    assert _asked(lambda _: _stream(wrong, whole), abort_after=1).end is End.WRONG


def test_memory_that_grows_is_told_from_noise() -> None:
    rng = np.random.default_rng(0)
    done = np.arange(1000, 10_000, 150)

    def readings(per_thousand: float) -> list[tuple[int, int]]:
        size = 2e9 * (1 + per_thousand / 100 * done / 1000) + rng.normal(0, 2e6, len(done))
        return [(int(n), int(s)) for n, s in zip(done, size, strict=True)]

    flat, error = growth(readings(0.0))
    assert abs(flat) < 4 * error < 0.1
    assert type(flat) is type(error) is float  # what JSON can hold
    grown, _ = growth(readings(2.0))
    assert grown == pytest.approx(2.0 / 1.11, rel=0.05)  # of the mean size, not of the first


def _section(name: str, **more: Any) -> Section:
    return Section(key="k", name=name, seconds=1.0, **{"faults": [], **more})


def test_the_summary_adds_up() -> None:
    found = runs.summary(
        [
            _section("kill-tiny", figures={"restart_s": {"server": 20.0, "scheduler": 31.0}}),
            _section("drain", figures={"drain_lost": 0}, lost_tokens=2, faults=["x"]),
            _section("soak-tiny", hangs=1,
                     figures={"requests": 100, "rss_growth_pct_per_1000": 0.1}),
            _section("soak-real", figures={"requests": 20, "rss_growth_pct_per_1000": 0.3}),
            _section("disk", skipped="no mount"),
            _section("canary", figures={"canary": {"faults": 4, "found": 4}}),
        ], "make drill", 9.0,
    )  # fmt: skip
    assert (found["drain_lost"], found["lost_tokens"], found["restart_s"]) == (0, 2, 31.0)
    assert (found["soak_requests"], found["rss_growth_pct_per_1000"], found["hangs"]) == (
        120,
        0.3,
        1,
    )
    assert found["canary"]["found"] == 4 and not found["passed"]
    assert found["skipped"] == {"disk": "no mount"}


def test_a_drill_goes_on_where_it_stopped(tmp_path: Path) -> None:
    ran: list[str] = []

    def part(name: str, fault: str = "") -> Callable[[Tell], Findings]:
        def run(tell: Tell) -> Findings:
            tell("at work")
            ran.append(name)
            found = Findings()
            found.expect(not fault, fault)
            return found

        return run

    options = runs.Options(out=tmp_path, drafter=tmp_path)
    sections = {"one": part("one"), "two": part("two", "broken")}
    assert not command.show(sections, options, fresh=False)["passed"]
    command.show(sections, options, fresh=False)
    assert ran == ["one", "two", "two"]  # what passed is kept, what did not is run again
    command.show(sections, options, fresh=True)
    assert ran[-2:] == ["one", "two"]
    other = runs.Options(out=tmp_path, drafter=tmp_path, seed=1)
    command.show({"one": part("one")}, other, fresh=False)
    assert ran[-1] == "one"
    assert json.loads((tmp_path / "drill.json").read_text())["passed"]


def test_sections_are_chosen_by_name(tmp_path: Path) -> None:
    known = runs.remote(runs.Options(out=tmp_path, drafter=tmp_path, url="http://x"))
    assert list(runs.choose(known, "soak, slow")) == ["soak", "slow"]
    with pytest.raises(ConfigError, match="no section drain"):
        runs.choose(known, "drain")


def test_cases_have_names_of_their_own() -> None:
    names = [case.name for case in cases()]
    assert len(names) == len(set(names)) > 50


def test_a_small_disk_is_small_or_said_to_be_impossible(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        if disk is None:
            pytest.skip("this user may not mount")
        with pytest.raises(OSError, match="No space"):
            (disk / "file").write_bytes(b"x" * (1 << 20))
        with pytest.raises(OSError, match=r"artifact\.json"):
            write_bytes(disk / "artifact.json", b"x" * (1 << 20))
        assert [path.name for path in disk.iterdir()] == ["file"]
    assert not (tmp_path / "disk" / "file").exists()
