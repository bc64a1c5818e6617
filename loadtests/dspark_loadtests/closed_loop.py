"""Servers that this machine starts for one target, and a closed loop against each: what it delivered and counted."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec
import uvloop

from dspark_loadtests.client import ChatClient
from dspark_loadtests.generator import Generator, Load
from dspark_loadtests.prompts import Prompt
from dspark_loadtests.report import tokens_in
from dspark_loadtests.stream import Clock, Outcome
from dspark_sglang.errors import ServerError
from dspark_sglang.server import Server, serve_command

K = TypeVar("K")
V = TypeVar("V")
ModeName = Literal["none", "fixed", "builtin_static", "dspark"]
MODES: tuple[ModeName, ...] = ("none", "fixed", "builtin_static", "dspark")
#: What runs is published at every step, not every 15: a block ends when nothing does.
_TELLS_ITS_LOAD = ("--load-snapshot-publish-interval", "1")
#: Most of a window's requests that may fail before its numbers are thrown away.
_TOLERATED_FAILURES = 0.02
#: Seconds a server may take to end the requests whose connections were closed.
_DRAIN_S = 20.0
#: Looks in a row that must find nothing running.
_QUIET = 2

# --- the servers -----------------------------------------------------------------------------------------


class Mode(NamedTuple):
    """One way of serving."""

    name: ModeName
    speculates: bool
    environment: Mapping[str, str]


_KNOWN: dict[ModeName, Mode] = {
    "none": Mode("none", False, {}),
    # Every drafted token is verified.
    "fixed": Mode("fixed", True, {"DSPARK_SCHEDULE": "all"}),
    # SGLang's own DSPARK, on the same CPU platform.
    "builtin_static": Mode(
        "builtin_static", True, {"DSPARK_PLUGIN": "off", "SGLANG_RAGGED_VERIFY_MODE": "static"}
    ),
    # This plugin as it comes.
    "dspark": Mode("dspark", True, {}),
}


def mode(name: ModeName) -> Mode:
    """The mode of that name."""
    return _KNOWN[name]


def make_server(
    chosen: Mode,
    *,
    target: Path,
    drafter: Path,
    dtype: str,
    port: int,
    requests: int,
    log: Path,
    extra: Sequence[str] = (),
) -> Server:
    """A server of that mode, not started yet.

    Args:
        requests: most requests that will run at once.
        extra: more flags of SGLang.
    """
    flags = ("--max-running-requests", str(requests), *_TELLS_ITS_LOAD, *extra)
    command = serve_command(
        target, port, dtype=dtype, drafter=drafter if chosen.speculates else None, extra=flags
    )
    return Server(command, port=port, log=log, environment=chosen.environment)


# --- one block of load -----------------------------------------------------------------------------------


class Delivered(msgspec.Struct, frozen=True, kw_only=True):
    """What one block brought."""

    tok_s: float
    tokens: int
    window_s: float
    requests: int
    #: Median seconds from sending to the first token, and a token after it, of finished requests.
    ttft_s: float | None
    tpot_s: float | None
    #: Tokens of the finished answers and of their prompts, one entry each.
    answer_tokens: list[int] = []
    prompt_tokens: list[int] = []


def run_block(url: str, prompts: Sequence[Prompt], load: Load) -> Delivered:
    """:func:`deliver` alone, on an event loop of its own."""
    return uvloop.run(deliver(url, prompts, load))


async def deliver(
    url: str, prompts: Sequence[Prompt], load: Load, clock: Clock = time.perf_counter
) -> Delivered:
    """Keep a closed loop running and count the tokens that arrive in its window.

    Chats still running at its end are cut off by closing their connections.

    Args:
        clock: of the warm-up, the window and every latency.

    Raises:
        ServerError: too many requests failed.
    """
    client = ChatClient(url)
    try:
        load = msgspec.structs.replace(load, drain_s=0.0)
        ran = await Generator(client, prompts, load, clock=clock).run()
    finally:
        await client.close()
    records, begin = ran.records, ran.begin
    failed = [record for record in records if record.outcome is Outcome.FAILED]
    if len(failed) > _TOLERATED_FAILURES * len(records):
        raise ServerError(
            f"{len(failed)} of {len(records)} requests failed, the first one: {failed[0].error}.",
            expected="a server that answers under this load",
            fix="See the server's log.",
        )
    tokens = round(sum(tokens_in(record, begin, begin + load.window_s) for record in records))
    whole = [record for record in records if record.outcome is Outcome.COMPLETED]
    return Delivered(
        tok_s=tokens / load.window_s,
        tokens=tokens,
        window_s=load.window_s,
        requests=len(whole),
        ttft_s=_median([r.ttft_s for r in whole]),
        tpot_s=_median([r.tpot_s for r in whole]),
        answer_tokens=[r.completion_tokens for r in whole if r.completion_tokens],
        prompt_tokens=[r.prompt_tokens for r in whole if r.prompt_tokens],
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


# --- what the server counted ------------------------------------------------------------------------------


def state(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.info()["internal_states"][0]
    return found


def wait_idle(server: Server, seconds: float = _DRAIN_S) -> None:
    """Wait until nothing runs any more: what does would run on in the server's next turn.

    Twice in a row, since a request is published only once its prefill is over.

    Raises:
        ServerError: something still runs after that many seconds.
    """
    deadline = time.monotonic() + seconds
    quiet = 0
    while quiet < _QUIET:
        left = server.requests()
        quiet = 0 if left else quiet + 1
        if left and time.monotonic() > deadline:
            raise ServerError(
                f"{left} requests still run {seconds:.0f} s after their connections were closed.",
                expected="a server that ends them",
                fix=f"See its log in {server.log}.",
            )
        time.sleep(0.2)


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """What the plugin counted between two states of a server."""
    old, new = before.get("dspark_info_record") or {}, after.get("dspark_info_record") or {}
    if not new.get("active"):
        length = after.get("avg_spec_accept_length")
        return {"accept_length": float(length)} if length else {}
    found = {
        name: float(new[name] - old.get(name, 0))
        for name in ("steps", "rounds", "plain_rounds", "verified_tokens", "committed_tokens")
    }
    for part, seconds in new["seconds"].items():
        found[f"s_{part}"] = float(seconds - old.get("seconds", {}).get(part, 0.0))
    if found["rounds"]:
        found["accept_length"] = found["committed_tokens"] / found["rounds"]
    every = max(1.0, found["rounds"] + found["plain_rounds"])
    found["mean_budget"] = found["verified_tokens"] / every
    found["drafting_share"] = found["rounds"] / every
    return found
