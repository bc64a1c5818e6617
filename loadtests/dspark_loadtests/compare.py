"""Ways of serving compared in turn, over HTTP alone: several servers, or one of ours switched while it serves.

Every block gives each way one window under the same load and prompts, and rotates who goes first, so that drift of the
machine hits all alike. Ratios are bootstrapped over blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import httpx
import msgspec
import numpy as np

from dspark_loadtests import bench
from dspark_loadtests.client import Endpoint, request_headers
from dspark_loadtests.frontier import Frontier, frontier_of
from dspark_loadtests.generator import Load
from dspark_loadtests.prompts import Source
from dspark_loadtests.schema import Estimate, Slo, Summary
from dspark_sglang.artifacts import SCHEMA_VERSION, Provenance
from dspark_sglang.errors import ConfigError, ServerError

#: Of a server of ours (docs/explanation/scheduling.md). ``none`` still writes the draft's context, ``fixed`` verifies all it drafts.
SWITCHES: Mapping[str, Mapping[str, float]] = {
    "dspark": {"dspark_speculation": -1, "dspark_budget": -1},
    "none": {"dspark_speculation": 0, "dspark_budget": -1},
    "fixed": {"dspark_speculation": 1, "dspark_budget": 1},
}
_SETTLE_S = 20.0


def ratio(ours: np.ndarray, theirs: np.ndarray, *, draws: int = 4000, seed: int = 0) -> Estimate:
    """The sum of one way's blocks over another's, bootstrapped over their common blocks.

    Args:
        ours, theirs: ``[blocks]``, in the same order.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(ours), (draws, len(ours)))
    drawn = ours[chosen].sum(axis=1) / theirs[chosen].sum(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(low=float(low), value=float(ours.sum() / theirs.sum()), high=float(high))


class Way(NamedTuple):
    """One way of serving: a server, and what it is switched to before its turn."""

    name: str
    endpoint: Endpoint
    state: Mapping[str, float] | None = None
    gpus: int = 1


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One way's window in one block."""

    way: str
    block: int
    summary: Summary


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """All turns at one concurrency.

    Attributes:
        ratios: by the other way and the metric, ``[low, mid, high]`` of the first way over it: ``tok_s`` (throughput a
            GPU), ``user_tok_s`` (1 / TPOT) and ``ttft`` (below 1 is faster).
    """

    concurrency: int
    turns: list[Turn]
    ratios: dict[str, dict[str, list[float]]]


class Versus(msgspec.Struct, frozen=True, kw_only=True, tag="bench-compare", tag_field="kind"):
    """A comparison; the first way is ours."""

    schema_version: int = SCHEMA_VERSION
    ways: list[str]
    gpus: dict[str, int]
    machine: str
    cells: list[Cell]
    complete: bool
    incidents: list[str]
    provenance: Provenance


def switch(endpoint: Endpoint, state: Mapping[str, float]) -> None:
    """Change a running server of ours.

    Raises:
        ServerError: it refuses.
    """
    url = endpoint.url + "/set_internal_state"
    try:
        answer = httpx.post(
            url,
            json={"server_args": dict(state)},
            headers=request_headers(endpoint.api_key),
            timeout=30.0,
        )
        answers = answer.json() if answer.status_code == 200 else answer.text[:200]
    except (httpx.HTTPError, ValueError) as error:
        answers = repr(error)
    taken = answers if isinstance(answers, list) else [answers]
    if not all(each is True for each in taken):
        raise ServerError(
            f"{url} with {dict(state)} answered {answers}.",
            expected="[true] from a server with this plugin and DSPARK_SCHEDULE other than all",
            fix="See the reason in its log, or compare two servers: dspark bench compare ours=URL other=URL.",
        )


def settle(endpoint: Endpoint) -> None:
    """Wait until a server runs nothing: what a turn cut off would go on in the next one."""
    deadline, quiet = time.monotonic() + _SETTLE_S, 0
    while quiet < 2 and time.monotonic() < deadline:
        try:
            loads = msgspec.json.decode(endpoint.api.get("/v1/loads?include=core"))["loads"]
            busy = sum(each["num_running_reqs"] + each["num_waiting_reqs"] for each in loads)
        except (ServerError, msgspec.DecodeError, KeyError, TypeError):
            time.sleep(1.0)  # not SGLang, or an old one
            return
        quiet = 0 if busy else quiet + 1
        time.sleep(0.2)


def compare(
    ways: Sequence[Way],
    source: Source,
    loads: Sequence[Load],
    *,
    blocks: int,
    slo: Slo,
    told: Callable[[int, int, str], None] = lambda *_: None,
    finished: Callable[[Cell], None] = lambda _: None,
) -> list[Cell]:
    """Every load in turn; switched servers are switched back.

    Args:
        loads: closed loops.
        blocks: turns of each way.
        told: of the concurrency, the block and the way about to be measured.
        finished: called with every finished cell, to be kept should the rest fail.

    Raises:
        ServerError: a server stopped or refuses to be switched.
    """
    if len(ways) < 2 or len({way.name for way in ways}) < len(ways) or blocks < 2:
        raise ConfigError(
            f"{blocks} blocks of {', '.join(way.name for way in ways) or 'nothing'}.",
            expected="two ways or more with different names, in two blocks or more",
            fix="As in: dspark bench compare ours=http://127.0.0.1:30000 plain=http://127.0.0.1:30001.",
        )
    cells = []
    try:
        for load in loads:
            assert load.users is not None, "a closed loop"
            turns: list[Turn] = []
            for block in range(blocks):
                own = msgspec.structs.replace(load, seed=load.seed + block)
                for way in [*ways[block % len(ways) :], *ways[: block % len(ways)]]:
                    told(load.users, block, way.name)
                    summary = _turn(way, source, own, slo)
                    turns.append(Turn(way=way.name, block=block, summary=summary))
            cells.append(Cell(concurrency=load.users, turns=turns, ratios=_ratios(ways, turns)))
            finished(cells[-1])
    finally:
        for endpoint in {way.endpoint for way in ways if way.state is not None}:
            switch(endpoint, SWITCHES["dspark"])
    return cells


def _turn(way: Way, source: Source, load: Load, slo: Slo) -> Summary:
    if way.state is not None:
        switch(way.endpoint, way.state)
    summary = bench.run(way.endpoint, source, load, slo=slo, name=way.name).summary
    settle(way.endpoint)
    # Without a request that began and ended in the window there is still a throughput.
    if not summary.complete or not summary.throughput.output_tok_s:
        reason = summary.errors[0].message if summary.errors else "no token came in the window"
        raise ServerError(
            f"{way.name} at {way.endpoint.url}: {'; '.join(summary.incidents) or reason}.",
            expected="a server that answers under this load",
            fix="See its log, or give more --duration.",
        )
    return summary


def _metrics(summary: Summary, gpus: int) -> dict[str, float]:
    latency = summary.latency
    return {
        "tok_s": summary.throughput.output_tok_s / gpus,
        "user_tok_s": 1e3 / latency.tpot_ms.mean if latency.tpot_ms else np.nan,
        "ttft": latency.ttft_ms.mean if latency.ttft_ms else np.nan,
    }


def _ratios(ways: Sequence[Way], turns: Sequence[Turn]) -> dict[str, dict[str, list[float]]]:
    """Turns are in the order of blocks for every way."""
    series = {
        way.name: [_metrics(turn.summary, way.gpus) for turn in turns if turn.way == way.name]
        for way in ways
    }
    ours, *others = (way.name for way in ways)
    found: dict[str, dict[str, list[float]]] = {}
    for other in others:
        found[other] = {}
        for metric in ("tok_s", "user_tok_s", "ttft"):
            mine, theirs = (np.array([one[metric] for one in series[n]]) for n in (ours, other))
            if np.isfinite(mine).all() and np.isfinite(theirs).all() and (theirs > 0).all():
                found[other][metric] = ratio(mine, theirs).rounded()
    return found


def frontier(found: Versus) -> Frontier:
    """A series for each way, a point for each concurrency."""
    ways = {
        way: [[turn.summary for turn in cell.turns if turn.way == way] for cell in found.cells]
        for way in found.ways
    }
    return frontier_of(ways, gpus=found.gpus[found.ways[0]], hardware=found.machine)
