"""The real server under the loads that the simulator is fitted to and compared at."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from dspark_loadtests.client import RequestSettings
from dspark_loadtests.closed_loop import (
    Delivered,
    difference,
    make_server,
    mode,
    run_block,
    wait_idle,
)
from dspark_loadtests.generator import Load
from dspark_loadtests.prompts import Prompt, load_prompts
from dspark_sglang.artifacts import CostArtifact, read_artifact
from dspark_sglang.errors import ServerError
from dspark_sglang.layouts.base import weights_digest
from dspark_sglang.provenance import machine, provenance
from dspark_sglang.server import Server, free_port
from tests.simulation.twin import Observed, Parameters, overheads

#: Tokens of the plain request by which the machine's speed is known.
_REFERENCE_TOKENS = 96
#: Users of the block that learns what drafted tokens are worth, everything verified.
_LEARN_USERS = 8
Tell = Callable[[str], None]


class Plan(NamedTuple):
    """Blocks of load: how long, of what."""

    temperature: float
    max_tokens: int
    warm_s: float
    window_s: float
    blocks: int

    def load(self, users: int, seed: int) -> Load:
        """One block."""
        return Load(
            settings=RequestSettings(
                model="default", temperature=self.temperature, max_tokens=self.max_tokens
            ),
            users=users,
            warm_s=self.warm_s,
            window_s=self.window_s,
            seed=seed,
        )


@contextlib.contextmanager
def serving(
    *, target: Path, drafter: Path, dtype: str, slots: int, out: Path, cost: Path | None = None
) -> Iterator[Server]:
    """A server of ours, up for the length of a ``with`` block.

    Args:
        slots: most requests at once.
        out: its log and cache go there.
        cost: step cost to serve with; None: measured at the start.
    """
    environment = {"DSPARK_CACHE_DIR": str(out / "cache")}
    if cost is not None:
        environment["DSPARK_COST"] = str(cost)
    server = make_server(
        mode("dspark")._replace(environment=environment),
        target=target,
        drafter=drafter,
        dtype=dtype,
        port=free_port(),
        requests=slots,
        log=out / "server.log",
    )
    with server:
        server.wait_ready()
        yield server


def observe(
    server: Server, prompts: Sequence[Prompt], load: Load
) -> tuple[Observed, Delivered, dict[str, Any]]:
    """One block, what it delivered and what the server counted in it.

    Raises:
        ServerError: requests failed, or no answer ended in the block.
    """
    before, began = _state(server), time.perf_counter()
    delivered = run_block(server.url, prompts, load)
    wall = time.perf_counter() - began
    wait_idle(server)
    after = _state(server)
    counted = difference(before, after)
    if delivered.tpot_s is None or delivered.ttft_s is None:
        raise ServerError(
            f"No answer ended within {load.warm_s + load.window_s:.0f} s at {load.users} requests.",
            expected="some that did",
            fix="Raise --window-s, or lower --max-tokens.",
        )
    observed = Observed(
        users=load.users or 0,
        tok_s=delivered.tok_s,
        tpot_s=delivered.tpot_s,
        ttft_s=delivered.ttft_s,
        budget=counted["mean_budget"],
        accept_length=counted["accept_length"],
        drafting=counted["drafting_share"],
        wall_s=min(wall, load.warm_s + load.window_s),
        step_s=counted["s_step"],
        steps=int(counted["steps"]),
        began=delivered.requests + (load.users or 0),
    )
    return observed, delivered, after


class Pace:
    """How fast the machine is: a lone request without drafting, asked before and after every block.

    Machines that are shared are faster and slower for minutes; a block is held against what a plain token took around it.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._take()
        #: Seconds a token of the last request.
        self.last = self._take()

    def around(self) -> float:
        """Seconds a token before and after what has just run, their geometric mean."""
        before, self.last = self.last, self._take()
        return math.sqrt(before * self.last)

    def _take(self) -> float:
        parameters = {
            "temperature": 0.0,
            "max_new_tokens": _REFERENCE_TOKENS,
            "ignore_eos": True,
            "custom_params": {"dspark": {"max_draft_tokens": 0}},
        }
        body = {"text": "Once upon a time", "sampling_params": parameters}
        began = time.perf_counter()
        answer = self._server.http.post("/generate", json=body, timeout=120.0)
        if answer.status_code != 200:
            raise ServerError(
                f"The plain request between blocks failed: {answer.text[:200]}.",
                expected="an answer",
                fix=f"The reason is in {self._server.log}.",
            )
        return (time.perf_counter() - began) / _REFERENCE_TOKENS


def _state(server: Server) -> dict[str, Any]:
    state: dict[str, Any] = server.info()["internal_states"][0]
    return state


def fit(
    server: Server,
    plan: Plan,
    *,
    loads: Sequence[int],
    target: Path,
    drafter: Path,
    dtype: str,
    slots: int,
    speculation: str,
    tell: Tell,
    given: Sequence[str],
) -> Parameters:
    """Learn all that the simulator needs of a server.

    Args:
        loads: concurrent requests to fit at.
        speculation: ``on``: always draft; ``auto``: where it pays.
        given: the command line, for provenance.
    """
    prompts = list(load_prompts())
    server.update(dspark_speculation=1, dspark_budget=1.0)
    tell(f"acceptance, {_LEARN_USERS} requests")
    learn = plan.load(_LEARN_USERS, 99)
    _, learned, state = observe(server, prompts, _longer(learn, 2.0))
    table = state["dspark_info_record"]["reliability"]
    server.update(dspark_speculation=1 if speculation == "on" else -1, dspark_budget=-1)
    answers, asked, seen = list(learned.answer_tokens), list(learned.prompt_tokens), []
    pace, slower = Pace(server), []
    for number in range(plan.blocks):
        for users in loads:
            tell(f"{users} requests, block {number + 1} of {plan.blocks}")
            observed, delivered, _ = observe(server, prompts, plan.load(users, number))
            seen.append(msgspec.structs.replace(observed, reference_s=pace.around()))
            slowdown = float((server.dspark() or {})["slowdown"])
            slower.append(math.log(slowdown / pace.last))
            answers += delivered.answer_tokens
            asked += delivered.prompt_tokens
    server.update(dspark_cost=2)
    path = Path(str((server.dspark() or {}).get("cost_source", "")))
    cost = read_artifact(path, CostArtifact, "the server's step cost", f"See {server.log}.")
    # The cost is that of a machine on which a plain token takes as long as it did between these blocks.
    reference = float(np.median([block.reference_s for block in seen]))
    at_reference = {"slower": float(np.mean(slower)) + math.log(reference)}
    return Parameters(
        machine=machine(),
        target=target.name,
        drafter_sha256=weights_digest(drafter),
        dtype=dtype,
        temperature=plan.temperature,
        speculation=speculation,
        slots=slots,
        max_tokens=plan.max_tokens,
        cost=cost.model | at_reference,
        fingerprint=cost.fingerprint,
        reliability=table,
        overheads=overheads([block.on(reference) for block in seen]),
        reference_s=reference,
        answer_tokens=answers,
        prompt_tokens=asked,
        fitted=seen,
        provenance=provenance(given, data=f"{len(answers)} answers"),
    )


def _longer(load: Load, factor: float) -> Load:
    return msgspec.structs.replace(load, window_s=math.ceil(load.window_s * factor))
