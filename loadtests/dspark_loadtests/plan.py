"""From what a user asks for to the stages that are run, and from these to a result on disk."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from dspark_loadtests import arrivals
from dspark_loadtests.acceptance import Snapshot
from dspark_loadtests.bench import Endpoint, Stage, run_stage, summarize_part
from dspark_loadtests.client import RequestSettings
from dspark_loadtests.generator import Load
from dspark_loadtests.prompts import Prompt
from dspark_loadtests.schema import PatternName, Slo, Summary
from dspark_loadtests.session import LoadSession
from dspark_sglang.errors import ConfigError

#: Equal parts a ramp is reported in.
RAMP_PARTS = 5


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What to load a server with.

    Attributes:
        concurrency: users of each stage of a closed loop.
        rates: requests a second: of each stage (poisson), of each step (step), or first and last (ramp).
        requests: measured ones of a stage; None: as many as ``duration_s`` holds.
        warmup_s: seconds before each window.
    """

    pattern: PatternName = "closed"
    concurrency: tuple[int, ...] = (1,)
    rates: tuple[float, ...] = (1.0,)
    requests: int | None = None
    duration_s: float = 30.0
    warmup_s: float = 5.0
    drain_s: float = 60.0
    temperature: float = 1.0
    max_tokens: int = 128
    seed: int = 0
    slo: Slo = Slo(ttft_ms=1000.0, tpot_ms=50.0)


class _Planned(NamedTuple):
    name: str
    users: int | None
    segments: list[arrivals.Segment]


def check(request: Request, prompts: Sequence[Prompt]) -> None:
    """Refuse what cannot be run, before anything is sent.

    Raises:
        ConfigError: no prompts, limits nobody can meet, or a load that is none.
    """
    if not prompts:
        raise ConfigError(
            "There is no prompt.",
            expected="at least one",
            fix="Name another file with --prompts, or leave it out for the packaged ones.",
        )
    numbers = {
        "--sla-ttft-ms": request.slo.ttft_ms,
        "--sla-tpot-ms": request.slo.tpot_ms,
        "--duration": request.duration_s,
    }
    for name, value in numbers.items():
        if not value > 0 or not math.isfinite(value):
            raise ConfigError(
                f"{name} is {value:g}.",
                expected="a number above 0" + (", or nothing can be good" if "sla" in name else ""),
                fix=f"Correct {name}.",
            )
    if request.pattern == "ramp" and len(request.rates) != 2:
        raise ConfigError(
            f"A ramp with {len(request.rates)} rates.",
            expected="the first and the last one",
            fix="As in --rate 1,20.",
        )
    if request.pattern == "trace" and any(prompt.at_s is None for prompt in prompts):
        raise ConfigError(
            "These prompts have no times.",
            expected="a trace",
            fix="Give --prompts a Mooncake trace, or choose another --pattern.",
        )
    if request.pattern == "closed" and min(request.concurrency) < 1:
        raise ConfigError(
            f"A concurrency of {min(request.concurrency)}.",
            expected="at least 1",
            fix="Correct --concurrency.",
        )
    for planned in _planned(request):
        arrivals.check(planned.segments)


def _planned(request: Request) -> list[_Planned]:
    seconds = request.duration_s
    if request.pattern == "closed":
        return [_Planned(f"c{users}", users, []) for users in request.concurrency]
    if request.pattern == "poisson":
        return [
            _Planned(f"r{rate:g}", None, arrivals.steps([rate], seconds)) for rate in request.rates
        ]
    if request.pattern == "ramp":
        return [_Planned("ramp", None, arrivals.ramp(request.rates[0], request.rates[-1], seconds))]
    if request.pattern == "step":
        return [_Planned("steps", None, arrivals.steps(request.rates, seconds))]
    return [_Planned("trace", None, [])]


def stages(request: Request) -> list[str]:
    """Names of the stages, in order."""
    return [planned.name for planned in _planned(request)]


def run(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    request: Request,
    *,
    source: str = "packaged",
    told: Callable[[str, LoadSession], None] = lambda *_: None,
) -> Iterator[tuple[Stage, list[Summary]]]:
    """Run one stage after the other; each comes with its parts (those of a ramp, the steps).

    A server that dies ends the run after the stage it died in.

    Args:
        told: called about fifty times a second with the running stage's name.
    """
    check(request, prompts)
    for planned in _planned(request):
        stage = _run_one(endpoint, prompts, request, planned, source, told)
        yield stage, _parts(stage, request, planned)
        if not stage.ran.complete:
            return


def _run_one(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    request: Request,
    planned: _Planned,
    source: str,
    told: Callable[[str, LoadSession], None],
) -> Stage:
    settings = RequestSettings(
        model=endpoint.model, temperature=request.temperature, max_tokens=request.max_tokens
    )
    trace = request.pattern == "trace"
    load = Load(
        settings=settings,
        users=planned.users,
        warm_s=0.0 if trace else request.warmup_s,
        window_s=request.duration_s if request.requests is None else math.inf,
        requests=request.requests,
        drain_s=request.drain_s,
        seed=request.seed,
    )
    instants, rate = None, None
    if trace:
        instants = iter([prompt.at_s for prompt in prompts if prompt.at_s is not None])
    elif planned.users is None:
        instants = _instants(request, planned.segments)
        total = sum(segment.seconds for segment in planned.segments)
        rate = sum(segment.mean * segment.seconds for segment in planned.segments) / total
    return run_stage(
        endpoint,
        prompts,
        load,
        slo=request.slo,
        name=planned.name,
        instants=instants,
        rate=rate,
        source=source,
        told=lambda session: told(planned.name, session),
    )


def _instants(request: Request, segments: list[arrivals.Segment]) -> Iterator[float]:
    """The load's, with the first rate before it as a warm-up and the last one after it while it drains."""
    before = [arrivals.Segment(request.warmup_s, *[max(segments[0].begin, 1e-9)] * 2)]
    after = [arrivals.Segment(math.inf, *[max(segments[-1].end, 1e-9)] * 2)]
    if request.requests is not None:
        segments = []  # a count of requests ends the window, not a time
    lead = before if request.warmup_s > 0 else []
    return arrivals.instants([*lead, *segments, *after], random.Random(request.seed + 1))


def _parts(stage: Stage, request: Request, planned: _Planned) -> list[Summary]:
    """Of a ramp and of steps: what happened to the requests sent in each part."""
    if request.requests is not None or request.pattern not in ("ramp", "step"):
        return []
    segments = planned.segments
    if request.pattern == "ramp":
        (whole,) = segments
        edges = [whole.begin + (whole.end - whole.begin) * i / RAMP_PARTS for i in range(RAMP_PARTS + 1)]  # fmt: skip
        segments = [
            arrivals.Segment(whole.seconds / RAMP_PARTS, edges[i], edges[i + 1])
            for i in range(RAMP_PARTS)
        ]
    found, begin = [], stage.ran.begin
    for segment in segments:
        end = min(begin + segment.seconds, stage.ran.closed)
        if end > begin:
            settings = msgspec.structs.replace(stage.summary.settings, rate=segment.mean)
            found.append(
                summarize_part(
                    stage.ran,
                    (begin, end, end),
                    settings=settings,
                    name=f"{planned.name} {segment.begin:g}"
                    + (f" to {segment.end:g}/s" if segment.end != segment.begin else "/s"),
                    started_at=stage.summary.started_at,
                    acceptance=None,
                    server=Snapshot(identity=stage.summary.server),
                )
            )
        begin = end
    return found
