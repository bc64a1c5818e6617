"""Paired blocks: in every block all modes run by turns, so that drift of the machine hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import uvloop

from dspark_loadtests.prompts import Prompt
from dspark_sglang.demo.measure import running
from dspark_sglang.demo.server import Server
from dspark_sglang.errors import ServerError
from dspark_sglang.load.closed_loop import Delivered, Load, deliver
from dspark_sglang.load.modes import ModeName
from dspark_sglang.load.slices import Turns, release

#: Seconds a server may take to end the requests whose connections were closed.
_DRAIN_S = 20.0
#: Looks in a row that must find nothing running.
_QUIET = 2


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """One mode's turn."""

    mode: ModeName
    number: int
    delivered: Delivered
    #: The plugin's counters over the block; empty where it does not run.
    counted: dict[str, float]


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """A ratio of throughputs with its 95% interval over blocks."""

    low: float
    mid: float
    high: float

    def rounded(self) -> list[float]:
        """``[low, mid, high]`` for the summary."""
        return [round(self.low, 4), round(self.mid, 4), round(self.high, 4)]


def _state(server: Server) -> dict[str, Any]:
    state: dict[str, Any] = server.info()["internal_states"][0]
    return state


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


def run_cell(
    servers: Mapping[ModeName, Server],
    prompts: Sequence[Prompt],
    load: Load,
    *,
    blocks: int,
    slice_s: float,
    each: Callable[[int], None] = lambda number: None,
) -> list[Block]:
    """Measure all servers at one concurrency and temperature; they are paused when not measured.

    In a block every mode gets the same prompts in the same order, and they take turns in slices
    (:class:`dspark_sglang.load.slices.Turns`).

    Args:
        load: of a block; its seed is counted on from the first one's.
        slice_s: seconds a mode runs at a time.
        each: told before every block.

    Raises:
        ServerError: a server failed.
    """
    found = []
    for number in range(blocks):
        each(number)
        own = msgspec.structs.replace(load, seed=load.seed + number)
        before = {name: _settled(server) for name, server in servers.items()}
        delivered = uvloop.run(_together(servers, prompts, own, slice_s))
        for name, server in servers.items():
            release(server)
            counted = difference(before[name], _settled(server))
            found.append(
                Block(mode=name, number=number, delivered=delivered[name], counted=counted)
            )
    return found


async def _together(
    servers: Mapping[ModeName, Server], prompts: Sequence[Prompt], load: Load, slice_s: float
) -> dict[ModeName, Delivered]:
    turns = Turns(servers, slice_s)
    return await turns.run(
        {
            name: deliver(server.url, prompts, load, clock=turns.clocks[name])
            for name, server in servers.items()
        }
    )


def _settled(server: Server) -> dict[str, Any]:
    """The state of a paused server once nothing runs any more."""
    with running(server):
        wait_idle(server)
        return _state(server)


def rates(blocks: Sequence[Block], mode: ModeName) -> np.ndarray:
    """Tokens a second of a mode in each block, in order."""
    own = sorted((b for b in blocks if b.mode == mode), key=lambda b: b.number)
    return np.array([block.delivered.tok_s for block in own])


def ratio(ours: np.ndarray, theirs: np.ndarray, *, draws: int = 4000, seed: int = 0) -> Interval:
    """Throughput of one mode over another's, bootstrapped over their common blocks."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(ours), (draws, len(ours)))
    drawn = ours[chosen].sum(axis=1) / theirs[chosen].sum(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(low=float(low), mid=float(ours.sum() / theirs.sum()), high=float(high))
