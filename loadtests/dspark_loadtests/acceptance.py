"""The accepted length over a run, from the server's own counters.

A client cannot see it: a chunk is what the detokenizer and the network made of one or more
verify rounds. The server counts, so it is asked before and after, and the difference belongs
to the run (and to whoever else used the server meanwhile).
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from dspark_loadtests.client import ServerApi
from dspark_sglang.errors import ServerError

Source = Literal["window", "lifetime_average", "none"]


class Counters(msgspec.Struct, frozen=True):
    """The plugin's counters since the server started; all grow only."""

    #: Verify rounds times the requests in each.
    rounds: int
    #: Tokens these rounds committed, the bonus token included.
    committed_tokens: int
    active: bool = True


class ServerIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured. A whitelist: the full answer holds keys and paths."""

    version: str | None = None
    model_path: str | None = None
    speculative_algorithm: str | None = None
    speculative_draft_model_path: str | None = None
    speculative_num_draft_tokens: int | None = None
    tp_size: int | None = None
    dp_size: int | None = None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The server's counters at one instant, or why there are none."""

    identity: ServerIdentity = ServerIdentity()
    counters: Counters | None = None
    lifetime_average: float | None = None
    problem: str | None = None


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens committed for each verify round of a request, the bonus token included.

    ``source`` says what the number means: ``window`` is this run, ``lifetime_average`` is
    everything since the server started, ``none`` is no number and ``note`` says why.
    """

    accepted_length: float | None
    source: Source
    note: str
    rounds: int | None = None
    committed_tokens: int | None = None


class _State(msgspec.Struct):
    dspark_info_record: Any = None
    avg_spec_accept_length: float | None = None


class _Info(ServerIdentity, frozen=True):
    internal_states: list[_State] = []


def take_snapshot(api: ServerApi) -> Snapshot:
    """Ask the server now. A server that does not answer gives a snapshot that says so."""
    try:
        body = api.get("/server_info")
    except ServerError as error:
        return Snapshot(problem=error.found)
    return read_snapshot(body)


def read_snapshot(body: bytes) -> Snapshot:
    """Interpret the body of ``/server_info``."""
    try:
        info = msgspec.json.decode(body, type=_Info)
    except msgspec.DecodeError as error:
        return Snapshot(problem=f"/server_info is not SGLang's: {error}")
    names = ServerIdentity.__struct_fields__
    identity = ServerIdentity(**{name: getattr(info, name) for name in names})
    averages = [
        state.avg_spec_accept_length
        for state in info.internal_states
        if state.avg_spec_accept_length is not None
    ]
    return Snapshot(
        identity=identity,
        counters=_sum_counters(info.internal_states),
        lifetime_average=sum(averages) / len(averages) if averages else None,
    )


def _sum_counters(states: list[_State]) -> Counters | None:
    # One state for each data-parallel rank; requests are spread over all of them.
    found: list[Counters] = []
    for state in states:
        try:
            found.append(msgspec.convert(state.dspark_info_record, Counters))
        except msgspec.ValidationError:
            # SGLang's own DSPARK worker uses the same key for another record.
            return None
    if not found:
        return None
    return Counters(
        rounds=sum(one.rounds for one in found),
        committed_tokens=sum(one.committed_tokens for one in found),
        active=any(one.active for one in found),
    )


def accepted_length(before: Snapshot, after: Snapshot) -> Acceptance:
    """The accepted length between two snapshots."""
    problem = before.problem or after.problem
    if problem is not None:
        return _nothing(problem)
    if before.counters is not None and after.counters is not None:
        return _window(before.counters, after.counters)
    if after.lifetime_average is not None:
        return Acceptance(
            accepted_length=after.lifetime_average,
            source="lifetime_average",
            note="average since the server started, not of this run: the server has no DSpark counters",
        )
    algorithm = after.identity.speculative_algorithm
    if algorithm is None:
        return _nothing("the server runs without speculation")
    return _nothing(f"the server speculates ({algorithm}) but reports no acceptance")


def _window(before: Counters, after: Counters) -> Acceptance:
    rounds = after.rounds - before.rounds
    committed = after.committed_tokens - before.committed_tokens
    if rounds < 0 or committed < 0:
        return _nothing("the counters went down: the server restarted or was reset during the run")
    if rounds == 0:
        state = "active" if after.active else "inactive"
        return _nothing(f"no verify round during the run (DSpark is {state})")
    return Acceptance(
        accepted_length=committed / rounds,
        source="window",
        note="this run's rounds, and those of any other client of the server meanwhile",
        rounds=rounds,
        committed_tokens=committed,
    )


def _nothing(reason: str) -> Acceptance:
    return Acceptance(accepted_length=None, source="none", note=reason)
