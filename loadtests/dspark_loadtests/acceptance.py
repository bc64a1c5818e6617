"""The accepted length over a run, from the server's own counters.

A client cannot see it: a chunk is what the detokenizer and the network made of one or more
verify rounds. The server counts, so it is asked before and after, and the difference belongs
to the run (and to whoever else used the server meanwhile).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from dspark_loadtests.client import ServerApi
from dspark_loadtests.stream import RequestRecord
from dspark_sglang.errors import ServerError

Source = Literal["window", "requests", "lifetime_average", "none"]
_SECRET = re.compile(r"(^|_)(key|password|secret|credential)s?($|_)|(^|_)token$|^ssl_")


class Counters(msgspec.Struct, frozen=True):
    """The plugin's counters since the server started; all grow only."""

    #: Verify rounds times the requests in each.
    rounds: int
    #: Tokens these rounds committed, the bonus token included.
    committed_tokens: int
    active: bool = True
    #: Steps that did not draft, times the requests in each.
    plain_rounds: int = 0
    #: Drafted tokens that were verified; None where the server does not count them.
    verified_tokens: int | None = None


class ServerIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured."""

    version: str | None = None
    model_path: str | None = None
    speculative_algorithm: str | None = None
    speculative_draft_model_path: str | None = None
    speculative_num_draft_tokens: int | None = None
    tp_size: int | None = None
    dp_size: int | None = None
    #: Every argument of the server that is a number, a text or a switch; none that may hold a secret.
    arguments: dict[str, str | float | bool | None] = {}


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The server's counters at one instant, or why there are none."""

    identity: ServerIdentity = ServerIdentity()
    counters: Counters | None = None
    lifetime_average: float | None = None
    problem: str | None = None


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens committed for each verify round of a request, the bonus token included.

    ``source`` says what the number means: ``window`` is this run by the plugin's counters, ``requests`` what
    the measured requests' own streams said, ``lifetime_average`` everything since the server started, ``none``
    is no number and ``note`` says why.
    """

    accepted_length: float | None
    source: Source
    note: str
    rounds: int | None = None
    committed_tokens: int | None = None
    #: Drafted tokens verified a request and step, and the share of steps that drafted.
    budget: float | None = None
    drafting_share: float | None = None


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
    named = {name: getattr(info, name) for name in ServerIdentity.__struct_fields__}
    identity = ServerIdentity(**named | {"arguments": _arguments(msgspec.json.decode(body))})
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


def _arguments(info: dict[str, Any]) -> dict[str, str | float | bool | None]:
    return {
        name: value
        for name, value in info.items()
        if isinstance(value, str | int | float | bool | None) and not _SECRET.search(name)
    }


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
        plain_rounds=sum(one.plain_rounds for one in found),
        verified_tokens=None
        if any(one.verified_tokens is None for one in found)
        else sum(one.verified_tokens or 0 for one in found),
    )


def accepted_length(
    before: Snapshot, after: Snapshot, records: Sequence[RequestRecord] = ()
) -> Acceptance:
    """The accepted length between two snapshots, or that of the records where these tell nothing."""
    if before.counters is not None and after.counters is not None:
        return _window(before.counters, after.counters)
    told = [r for r in records if r.rounds and r.completion_tokens is not None]
    if told:
        return _of_requests(told)
    problem = before.problem or after.problem
    if problem is not None:
        return _nothing(problem)
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
        return Acceptance(
            accepted_length=None,
            source="none",
            note=f"no verify round during the run (DSpark is {state})",
            budget=0.0 if after.plain_rounds > before.plain_rounds else None,
            drafting_share=0.0 if after.plain_rounds > before.plain_rounds else None,
        )
    every = rounds + after.plain_rounds - before.plain_rounds
    verified = None
    if before.verified_tokens is not None and after.verified_tokens is not None:
        verified = after.verified_tokens - before.verified_tokens
    return Acceptance(
        accepted_length=committed / rounds,
        source="window",
        note="this run's rounds, and those of any other client of the server meanwhile",
        rounds=rounds,
        committed_tokens=committed,
        budget=None if verified is None else verified / every,
        drafting_share=rounds / every,
    )


def _of_requests(records: Sequence[RequestRecord]) -> Acceptance:
    # The first token is the prefill's, not a round's.
    committed = sum((record.completion_tokens or 1) - 1 for record in records)
    rounds = sum(record.rounds or 0 for record in records)
    return Acceptance(
        accepted_length=committed / rounds,
        source="requests",
        note="what the streams of the measured requests said of themselves",
        rounds=rounds,
        committed_tokens=committed,
    )


def _nothing(reason: str) -> Acceptance:
    return Acceptance(accepted_length=None, source="none", note=reason)
