"""What is served while a trace is recorded: requests, when they arrive, what the clock says, what an operator sets.

The same for a dense model and for DeepSeek-V4: tokens are below the smaller vocabulary. Times are decode steps, since
nothing else is the same in every run.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

#: Prefix of the ids of requests, which tells them from those of a server's own.
PREFIX = "golden-"
#: Tokens of prompts: ordinary ones of both vocabularies.
_LOW, _HIGH = 4, 190
REGEX = "([a-h][0-9]?|[A-Z][0-9])+"


class Case(NamedTuple):
    """One recording from a server."""

    name: str
    about: str
    family: str
    overlapped: bool
    #: Whether sampled requests have seeds of their own, which SGLang offers to all or to none.
    seeded: bool = False


CASES = {
    case.name: case
    for case in (
        Case("dense-synchronous", "a tiny Llama, synchronous", "dense", False),
        Case("dense-overlapped", "a tiny Llama, overlapped, seeded", "dense", True, seeded=True),
        Case("v4-synchronous", "a tiny DeepSeek-V4, synchronous", "v4", False),
        Case("v4-overlapped", "a tiny DeepSeek-V4, overlapped", "v4", True),
    )
}


class Moment(NamedTuple):
    """A decode step, counted from the beginning of a phase; a phase begins when all before it has ended."""

    phase: int
    step: int


class Request(NamedTuple):
    """One request of the scenario."""

    name: str
    arrives: Moment
    prompt: list[int]
    params: dict[str, Any]


def _prompt(seed: int, length: int) -> list[int]:
    chosen = random.Random(seed)
    return [chosen.randrange(_LOW, _HIGH) for _ in range(length)]


def _options(**options: Any) -> dict[str, Any]:
    return {"custom_params": {"dspark": options}}


#: Phases, by what happens in them.
LONG, MIXED, OPERATED, GREEDY, PAIR, UNDRAFTED = range(6)


def requests(case: Case) -> list[Request]:
    """The requests, in the order in which those of the same step arrive."""
    # Under overlap penalties are refused.
    penalty = {} if case.overlapped else {"frequency_penalty": 0.8, "repetition_penalty": 1.2}
    adjusted = {"logit_bias": {"40": 2.0, "77": -5.0}} | penalty
    filtered = {"top_k": 6, "top_p": 0.8, "min_p": 0.05}
    stops = {"stop_token_ids": [9, 23, 40, 68], "ignore_eos": False}
    grammar = {"regex": REGEX, "ignore_eos": False}
    long = 180 if case.family == "dense" else 150
    rows: list[tuple[str, int, int, list[int], int, float, dict[str, Any]]] = [
        *((f"long-{n}", LONG, 0, _prompt(20 + n, 8), long, 1.0 + n / 5, {}) for n in range(4)),
        ("greedy", MIXED, 0, _prompt(1, 12), 24, 0.0, {}),
        ("sampled", MIXED, 0, _prompt(2, 9), 40, 1.0, {}),
        ("filtered", MIXED, 0, _prompt(3, 17), 30, 1.3, filtered),
        ("repeats", MIXED, 3, _prompt(4, 6) * 5, 36, 0.0, {}),
        ("grammar", MIXED, 6, _prompt(5, 8), 16, 1.0, grammar),
        ("adjusted", MIXED, 6, _prompt(6, 11), 28, 0.0, adjusted),
        ("undrafted", MIXED, 9, _prompt(7, 10), 12, 0.0, _options(max_draft_tokens=0)),
        ("shallow", MIXED, 9, _prompt(8, 14), 30, 1.5, _options(max_draft_tokens=1, workload="code")),
        ("waits", MIXED, 9, _prompt(9, 20), 24, 0.7, {}),
        ("named", MIXED, 12, _prompt(10, 5) * 6, 30, 0.0, _options(workload="code")),
        ("ends", MIXED, 12, _prompt(11, 7), 40, 1.0, stops),
        *((f"operated-{n}", OPERATED, 0, _prompt(30 + n, 8), 60, 1.2, {}) for n in range(3)),
        ("operated-greedy", OPERATED, 0, _prompt(33, 8), 50, 0.0, adjusted),
        ("alone", GREEDY, 0, _prompt(12, 16), 32, 0.0, {}),
        ("pair", PAIR, 0, _prompt(13, 10), 24, 1.0, {}),
        ("pair-greedy", PAIR, 0, _prompt(14, 10), 24, 0.0, {}),
        ("only-undrafted", UNDRAFTED, 0, _prompt(15, 6), 5, 1.0, _options(max_draft_tokens=0)),
    ]  # fmt: skip
    found = []
    for number, (name, phase, step, prompt, new, temperature, more) in enumerate(rows):
        params = {"temperature": temperature, "max_new_tokens": new, "ignore_eos": True} | more
        if case.seeded and temperature:
            params["sampling_seed"] = 100 + number
        found.append(Request(name, Moment(phase, step), prompt, params))
    return found


#: What an operator sets before a decode step: the key of ``/set_internal_state`` and its value.
COMMANDS: Mapping[Moment, tuple[str, float]] = {
    Moment(OPERATED, 3): ("dspark_budget", 0.4),
    Moment(OPERATED, 9): ("dspark_budget", -1),
    Moment(OPERATED, 11): ("dspark_speculation", 0),
    Moment(OPERATED, 15): ("dspark_speculation", 1),
    Moment(OPERATED, 19): ("dspark_speculation", -1),
}
#: Steps of the longest phase in which a draft forward is dearer than before, and by how much.
_DEAR_FROM, _DEAR_TO, _DEARER = 40, 60, 3
#: How much longer than by the clock a round lasts by what is known at the start: drafting seems not to pay, is
#: stopped, tried again, and goes on.
_FEARED = 2.0


def microseconds(
    *, draft: bool, mode: str, requests: int, rows: int, context: int, now: Moment
) -> int:
    """How long a forward takes by the clock of a recording.

    Args:
        draft: the draft model's forward; otherwise the target's.
        mode: SGLang's word for the kind of forward.
        requests: of the forward.
        rows: its tokens.
        context: cached tokens of all requests.
        now: the decode step.
    """
    if draft:
        dear = now.phase == LONG and _DEAR_FROM <= now.step < _DEAR_TO
        return (1500 + 90 * requests) * (_DEARER if dear else 1)
    if mode == "EXTEND":
        return 2000 + 20 * rows
    base = 4000 + 120 * requests + context // 16
    if mode == "DECODE":
        return base
    # Few rows cost what one does; then the kernels' stairs.
    return base + 400 + 60 * rows + 700 * (rows // 8)


def known_seconds(*, requests: int, drafted: int, context: int) -> float:
    """Seconds of a step as a server knows them at its start; 0 drafted tokens: of a decode step."""
    given: Any = {"requests": requests, "context": context, "now": Moment(MIXED, 0)}
    if not drafted:
        return microseconds(draft=False, mode="DECODE", rows=requests, **given) * 1e-6
    rows = requests + drafted
    target = microseconds(draft=False, mode="TARGET_VERIFY", rows=rows, **given)
    return (microseconds(draft=True, mode="", rows=0, **given) + target) * _FEARED * 1e-6


def confidence(previous: int, position: int) -> float:
    """The confidence that a recording gives a drafted token; exact in float32.

    It stands in place of the drafter's own, whose last digits depend on the processor.

    Args:
        previous: the token before it.
        position: its place in the block, from 0.
    """
    mixed = ((previous + 1) * 2654435761 + (position + 1) * 40503) % (1 << 32)
    return (64 + (mixed >> 12) % 920) / 1024
