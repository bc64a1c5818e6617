"""A study: several loads on one simulated machine, each in several ways of serving."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from dspark_loadtests.frontier import Frontier, Series, draw_frontier
from dspark_sglang.artifacts import SCHEMA_VERSION, Provenance, write_json
from dspark_sglang.core.schedule.cost_model import CostModel
from dspark_sglang.errors import ConfigError
from dspark_sglang.provenance import machine, provenance
from dspark_sglang.simulate import acceptance, arrivals
from dspark_sglang.simulate.acceptance import Mixture
from dspark_sglang.simulate.arrivals import Lengths, Requests
from dspark_sglang.simulate.costs import Measured, Overheads, StepTimes, learned, read_cost
from dspark_sglang.simulate.engine import MODES, Mode, Setting
from dspark_sglang.simulate.options import Options, Router
from dspark_sglang.simulate.replicas import Job, spread
from dspark_sglang.simulate.replicas import run as run_jobs
from dspark_sglang.simulate.roofline import Assumptions, Roofline, sizes
from dspark_sglang.simulate.summary import Sla, Summary, point, summarise
from dspark_sglang.values import read_numbers

#: Told what runs, and the requests answered over all loads.
Tell = Callable[[str, int], None]


class Machine(NamedTuple):
    """What is simulated: step times, what the scheduler knows of them, what blocks are worth."""

    name: str
    model: str
    gpus: int
    times: StepTimes
    cost: CostModel | None
    blocks: Mixture | None


class Plan(NamedTuple):
    """A study, checked."""

    given: Options
    machine: Machine
    modes: tuple[Mode, ...]
    #: Closed loop: users of a replica; Poisson: requests a second over all; trace: its own rate.
    loads: tuple[float, ...]
    sla: Sla

    @property
    def total(self) -> int:
        """Requests of all loads and ways, as far as known."""
        return len(self.modes) * len(self.loads) * self.given.requests


class Study(msgspec.Struct, frozen=True, kw_only=True, tag="simulated_loads", tag_field="kind"):
    """What came out."""

    schema_version: int = SCHEMA_VERSION
    machine: str
    simulated_on: str
    setting: dict[str, str | float | int | bool | None]
    summaries: dict[str, list[Summary]]
    #: Simulated events for each second of this computer's time, by way of serving.
    events_s: dict[str, float]
    seconds: float
    interrupted: bool
    frontier: Frontier
    provenance: Provenance


def plan(given: Options) -> Plan:
    """Read and check everything before anything runs.

    Raises:
        ConfigError: none or several sources of arrivals or of step times, an unknown name, an impossible value.
    """
    for names, what in (
        (("concurrency", "rate", "trace"), "arrivals"),
        (("profile", "model"), "step times"),
    ):
        named = [name for name in names if getattr(given, name) is not None]
        if len(named) != 1:
            raise ConfigError(
                f"{' and '.join('--' + name for name in named) or 'Nothing'} given for {what}.",
                expected=f"one of {', '.join(f'--{name}' for name in names)}",
                fix="See `dspark simulate --help`.",
            )
    modes = tuple(given.modes.split(","))
    if wrong := [mode for mode in modes if mode not in MODES]:
        raise ConfigError(
            f"--modes names {', '.join(wrong)}.",
            expected=", ".join(MODES),
            fix="Use some of these.",
        )
    drafts = any(mode != "none" for mode in modes)
    made = _machine(given, drafts=drafts)
    sla = Sla(ttft_ms=given.sla_ttft_ms, tpot_ms=given.sla_tpot_ms)
    sla.check(made.times, context=round(given.prompt), drafts=drafts, sampled=given.temperature > 0)
    loads: tuple[float, ...] = (0.0,)
    for name, kind in (("concurrency", int), ("rate", float)):
        if getattr(given, name) is not None:
            loads = tuple(read_numbers(getattr(given, name), f"--{name}", kind))
    return Plan(given, made, modes, loads, sla)  # type: ignore[arg-type]


def _machine(given: Options, *, drafts: bool) -> Machine:
    blocks = None
    if given.evaluation is not None:
        blocks = acceptance.from_evaluation(given.evaluation, temperature=given.temperature)
    if given.model is not None:
        assumed = Assumptions()
        times = Roofline(sizes(given.model), assumed)
        cost = learned(times, requests=given.slots, context=round(given.prompt))
        blocks = blocks or assumed.dspark(times.gamma)
        return Machine(times.name, given.model, times.count, times, cost, blocks)
    assert given.profile is not None, "one of --profile and --model was given"
    known, found = read_cost(given.profile)
    truth = CostModel(gamma=known.gamma)
    truth.restore(known.state())
    if drafts and blocks is None:
        raise ConfigError(
            "Nothing says what drafted tokens are worth.",
            expected="--evaluation (from `dspark eval --json`)",
            fix="Name one, or simulate --modes none.",
        )
    device, target = (found.fingerprint.get(name, "unknown") for name in ("device", "target"))
    return Machine(device, target, 1, Measured(truth, _prefill(given)), known, blocks)


def _prefill(given: Options) -> Overheads:
    text = given.prefill_ms
    try:
        step, request, thousand = (float(part) for part in text.split(","))
    except ValueError:
        step = request = thousand = -1.0
    if not all(0 <= value < np.inf for value in (step, request, thousand)):
        raise ConfigError(
            f"--prefill-ms is {text!r}.",
            expected="three numbers of at least 0: a step, a request, 1000 tokens",
            fix="As in 20,5,150.",
        )
    return Overheads(
        prefill_step=step / 1e3, prefill_request=request / 1e3, prefill_token=thousand / 1e6
    )


def run(plan: Plan, tell: Tell) -> Study:
    """Simulate all loads in all ways. An interrupt keeps what is there and marks it."""
    found: dict[str, list[Summary]] = {mode: [] for mode in plan.modes}
    rates: dict[str, float] = {}
    done, interrupted, began = 0, False, time.perf_counter()
    workers = plan.given.workers or len(os.sched_getaffinity(0))
    for mode in plan.modes:
        started, events = time.perf_counter(), 0
        for load in plan.loads:
            label, before = f"{mode}, load {load:g}", done
            results = run_jobs(
                _jobs(plan, mode, load),
                workers=workers,
                progress=lambda answered, label=label, before=before: tell(
                    label, before + answered
                ),  # type: ignore[misc]
            )
            events += sum(result.events for result in results)
            done += plan.given.requests
            if any(len(result.number) for result in results):
                one = summarise(results, load=load, warm=plan.given.warm, sla=plan.sla)
                found[mode].append(one)
            interrupted = not results or any(result.interrupted for result in results)
            if interrupted:
                break
        rates[mode] = round(events / max(1e-9, time.perf_counter() - started), 1)
        if interrupted:
            break
    return _study(plan, found, rates, time.perf_counter() - began, interrupted)


def _jobs(plan: Plan, mode: Mode, load: float) -> list[Job]:
    given, made = plan.given, plan.machine
    rng = np.random.default_rng(given.seed)
    weights = made.blocks.weights if made.blocks is not None else np.ones(1)
    closed, count = given.concurrency is not None, given.replicas
    parts = _requests(given, load, weights, rng)
    router: Router = "round-robin" if closed else given.router
    # What one replica makes when it is full, for the router that weighs work.
    full = given.slots
    speed = full / made.times.plain(full, round(full * given.prompt), full)
    jobs = []
    for number, share in enumerate(spread(parts, count, router, speed=speed, rng=rng)):
        setting = Setting(
            mode=mode,
            speculation=given.speculation,
            slots=given.slots,
            pool=given.pool,
            prefill=given.model is None,
            sampled=given.temperature > 0,
            noise=given.noise,
            users=int(load) if closed else None,
            until=given.seconds if closed else None,
            warm=given.warm,
            seed=given.seed + number,
        )
        if len(share.at):
            jobs.append(Job(setting, share, made.times, made.blocks, made.cost))
    return jobs


def _requests(given: Options, load: float, weights: Any, rng: np.random.Generator) -> Requests:
    if given.trace is not None:
        found = arrivals.trace(
            given.trace, weights=weights, rng=rng, cached=given.cached, speed=given.speed
        )
        return found.take(np.arange(len(found.at)) < given.requests)
    lengths = Lengths(
        prompt=given.prompt,
        output=given.answer,
        variation=given.variation,
        cached=given.cached,
    )
    count = given.requests
    if given.rate is not None:
        return arrivals.poisson(load, count, lengths, weights=weights, rng=rng)
    found = arrivals.waiting(count, lengths, weights=weights, rng=rng)
    users = min(count, int(load) * given.replicas)
    # Users are not in step: the first answers end at any time.
    found.output[:users] = rng.integers(1, found.output[:users] + 1)
    return found


def _study(
    plan: Plan,
    found: dict[str, list[Summary]],
    rates: dict[str, float],
    seconds: float,
    interrupted: bool,
) -> Study:
    gpus = plan.machine.gpus * plan.given.replicas
    series = [
        Series(
            name=mode, gpus=gpus, points=[p for one in summaries if (p := point(one, gpus=gpus))]
        )
        for mode, summaries in found.items()
    ]
    setting = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in msgspec.structs.asdict(plan.given).items()
    }
    return Study(
        machine=plan.machine.name,
        simulated_on=machine(),
        setting=setting,
        summaries=found,
        events_s={mode: rates.get(mode, 0.0) for mode in found},
        seconds=round(seconds, 2),
        interrupted=interrupted,
        frontier=Frontier(
            source="simulated",
            model=plan.machine.model,
            hardware=plan.machine.name,
            assumptions={"interrupted": interrupted},
            series=series,
        ),
        provenance=provenance(["dspark", "simulate", *_flags(plan.given)]),
    )


def _flags(given: Options) -> list[str]:
    shown = []
    for name, value in msgspec.structs.asdict(given).items():
        if value is not None and name not in ("out", "workers"):
            shown += [f"--{name.replace('_', '-')}", str(value)]
    return shown


def write(found: Study, out: Path) -> None:
    """``simulation.json``, ``frontier.json`` and ``frontier.png`` in ``out``."""
    write_json(out / "simulation.json", found)
    write_json(out / "frontier.json", found.frontier)
    if any(series.points for series in found.frontier.series):
        ours = list(found.summaries)[-1]
        draw_frontier(found.frontier, out / "frontier.png", ours=ours)
