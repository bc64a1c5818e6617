"""Where scheduling is read: the only module of these tests that knows the plugin's classes.

A change of structure changes this module, and neither the format of a trace nor a stored one. It is asked for

- :class:`Serving`: the plugin in a server's scheduler process, one decode step after the other,
- :func:`simulator`: a replica of the simulator, the same,
- :func:`read_clock_from`: whose ``time`` is replaced,
- :func:`models`: the tiny models that are served.

It changes three things, so that a trace is the same in every run: the clock (which the caller has), the step cost
known at the start, and what the drafter's confidence head says.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from dspark_sglang.core.schedule import History, admission_order
from dspark_sglang.core.schedule.cost_model import CostModel, Step
from dspark_sglang.core.schedule.prompt_lookup import LONGEST
from tests.golden.trace import SHORT, Line, number, numbers

#: Told each step: what :mod:`tests.golden.trace` calls a line, without its number, its seconds and its changes;
#: and all that is known after it, by name.
Told = Callable[[Line, dict[str, Any]], None]


# --- what is learned, by name ---------------------------------------------------------------------


def _cost_model(model: CostModel) -> Iterator[tuple[str, Any]]:
    yield "slower", model._slower
    yield "drift", model._drift
    yield "since_switch", model._since_switch
    for name, kind in (("round", model._round), ("decode", model._plain)):
        yield f"{name}.observations", kind.observations
        if not kind.observations:
            continue
        for part in ("theta", "level"):
            for at, value in enumerate(getattr(kind, part)):
                yield f"{name}.{part}.{at}", float(value)
        for row, column in zip(*np.nonzero(kind.grid), strict=True):
            yield f"{name}.grid.{row}.{column}", float(kind.grid[row, column])
        yield f"{name}.seen", float(kind.seen.sum())
        yield f"{name}.moments", float(kind.moments.trace())
        yield f"{name}.products", float(kind.products.sum())


def _gain(policy: Any) -> Iterator[tuple[str, Any]]:
    yield "choice", policy.choice
    yield "switches", policy.switches
    for (bits, sampled), state in policy._states.items():
        load = f"{1 << max(0, bits - 1)}-{(1 << bits) - 1}.{'sampled' if sampled else 'greedy'}"
        for name in ("drafting", "rounds", "since", "probing", "wait"):
            yield f"{load}.{name}", getattr(state, name)
        for name in ("gain", "length", "lost"):
            yield f"{load}.{name}", float(getattr(state, name))


def _correction(known: Any) -> Iterator[tuple[str, Any]]:
    shift, seen = known.shift(), known._slow[0]
    for kind, word in enumerate(("greedy", "sampled")):
        for position in range(known.gamma):
            place = f"{word}.{position}"
            yield f"{place}.seen", float(seen[kind, position].sum())
            yield f"{place}.shift", float(shift[kind, position].sum())
            yield f"{place}.alarm", bool(known.alarms[kind, position])
    yield "blocks", known._blocks


def _depth(depths: Any) -> Iterator[tuple[str, Any]]:
    for workload, known in depths._known.items():
        name = workload or "(none)"
        yield f"{name}.cap", depths.cap(workload)
        yield f"{name}.steps", known.steps
        for at, used in enumerate(known.used):
            yield f"{name}.used.{at}", float(used)


def _history(history: History | None) -> Iterator[tuple[str, Any]]:
    if history is None:
        return
    yield "requests", int((history._generations >= 0).sum())
    for at, value in enumerate(history._mean):
        yield f"mean.{at}", float(value)
        yield f"sum.{at}", float(history._values[:, at].sum())


def _scheduler(control: Any, faults: int) -> Iterator[tuple[str, Any]]:
    yield "fixed_budget", control.fixed_budget
    yield "since_decode_step", control._since_decode
    yield "verify_all_turn", control._turn
    yield "decode_steps", control.plain_steps
    yield "expected_tokens", float(control.expected_tokens)
    yield "committed_tokens", control.committed_tokens
    yield "copied_rounds", control.copied_rounds
    yield "copied_tokens", control.copied_tokens
    yield "faults", faults


def _learned(control: Any, rates: Any, faults: int = 0) -> dict[str, Any]:
    """All that scheduling has learned, by names that stay."""
    history = getattr(control, "history", None)
    parts: list[tuple[str, Iterator[tuple[str, Any]]]] = [
        ("scheduler", _scheduler(control, faults)),
        ("cost_model", _cost_model(control.cost)),
        ("gain", _gain(control.policy)),
        ("correction", _correction(control.reliability)),
        ("depth", _depth(control.depths)),
        ("history", _history(history)),
    ]
    found = {f"{part}.{name}": value for part, values in parts for name, value in values}
    found["prompt_lookup.factor"] = float(control.lookup._dearer)
    if rates is not None:
        for m in range(2, LONGEST + 1):
            found[f"prompt_lookup.rate.{m}"] = rates.rate(m)
    return {k: number(v) if isinstance(v, float) else v for k, v in found.items()}


def _plan(plan: Any) -> Line:
    """The plan as it was decided before anything was drafted."""
    return {
        "draft": plan.drafts,
        "depth": int(plan.depth),
        "limits": [int(limit) for limit in plan.limits],
        "verify_all": plan.verify_all,
        "profile": plan.profile,
        "prompt_lookup": plan.prompt_lookup,
    }


def _admitted(survival: Any, order: Any, budget: int) -> list[str]:
    """``request:position`` of the admitted tokens, the first admitted first."""
    requests = len(survival)
    return [f"{cell % requests}:{cell // requests}" for cell in map(int, order[:budget])]


# --- a server -------------------------------------------------------------------------------------


class Serving:
    """The plugin in a scheduler process, from its worker."""

    def __init__(
        self,
        worker: Any,
        *,
        confidence: Callable[[int, int], float],
        began: Callable[[], None],
        told: Told,
    ) -> None:
        """Args:
        worker: SGLang's ``scheduler.draft_worker``.
        confidence: of a drafted token, by the token before it and its position.
        began: called before each decode step.
        told: called after it.
        """
        self._worker, self._confidence = worker, confidence
        self._rounds, self._scheduler = worker._rounds, worker.scheduler
        self._head: Any = None
        self._proposal: Any = None
        step, propose = worker._forward_decode, worker._proposer.propose
        self._head_of = worker._ops.confidence

        def forward_decode(batch: Any, *args: Any, **kwargs: Any) -> Any:
            if not batch.reqs or batch.forward_mode.is_idle():
                return step(batch, *args, **kwargs)
            self._head = self._proposal = None
            requests = list(batch.reqs)
            began()
            result = step(batch, *args, **kwargs)
            told(self._line(requests, result), self.learned())
            return result

        def proposed(*args: Any, **kwargs: Any) -> Any:
            self._proposal = propose(*args, **kwargs)
            return self._proposal

        worker._forward_decode, worker._proposer.propose = forward_decode, proposed
        worker._ops.confidence = self._stated

    def _stated(self, features: torch.Tensor, previous: torch.Tensor) -> Any:
        """In place of the confidence head, which is asked all the same."""
        self._head, _ = self._head_of(features, previous)
        rows = [[self._confidence(t, j) for j, t in enumerate(row)] for row in previous.tolist()]
        stated = torch.tensor(rows, dtype=torch.float64)
        return torch.stack([stated.float(), torch.logit(stated).float()])

    def know(self, steps: list[tuple[int, int, int, float]]) -> None:
        """Start with this step cost: requests, drafted tokens (0: a decode step), context and seconds of steps."""
        known = [(Step(r, d, c, d > 0), seconds) for r, d, c, seconds in steps]
        self._scheduler.cost.refit(known)

    def command(self, key: str, value: float) -> None:
        """What an operator's ``/set_internal_state`` does."""
        self._worker.commands.catch_up()
        self._worker.commands.prepare(key, value)()

    def learned(self) -> dict[str, Any]:
        """All that is known now."""
        lookup, faults = self._worker._lookup, self._worker.faults.counts
        rates = None if lookup is None else lookup.rates
        return _learned(self._scheduler, rates, sum(faults.values()))

    def end(self) -> tuple[Line, dict[str, Any]]:
        """Counts of all steps, once the last is over; and all that is known then."""
        self._worker.catch_up()
        counts = self._worker.telemetry.snapshot()
        names = (
            "steps",
            "rounds",
            "plain_rounds",
            "drafted_tokens",
            "verified_tokens",
            "committed_tokens",
        )
        return {name: counts[name] for name in names}, self.learned()

    def _line(self, requests: list[Any], result: Any) -> Line:
        running, count = self._rounds.running, len(requests)
        survival, order, budget, lens = self._admission(count)
        committed = [int(value) for value in result.accept_lens.tolist()]
        tokens = result.next_token_ids.view(count, -1).tolist()
        proposal, drafted = self._proposal, running.drafted
        drafts = self._head is not None
        copied = [] if drafted is None else [int(row) for row in np.flatnonzero(drafted.copied)]
        return {
            "requests": [request.rid for request in requests],
            "context": int(running.plan.load.context),
            "plan": _plan(running.plan),
            "draft": {
                "copied": copied,
                "tokens": proposal.draft_block.draft_tokens.tolist() if drafts or copied else [],
                "head": numbers(self._head.tolist(), 3) if drafts else [],
                "survival": numbers(np.asarray(survival).tolist(), SHORT)
                if budget or drafts
                else [],
            },
            "admission": {
                "budget": budget,
                "order": _admitted(survival, order, budget),
                "lens": lens,
            },
            "outcome": {
                "kept": [value - 1 for value in committed],
                "committed": committed,
                "tokens": [row[:n] for row, n in zip(tokens, committed, strict=True)],
            },
        }

    def _admission(self, requests: int) -> tuple[Any, Any, int, list[int]]:
        """Survivals, admission order, budget and verified lengths of the step."""
        rounds, running = self._rounds, self._rounds.running
        survival = getattr(rounds, "survival", None)
        if survival is not None:
            survival = survival.cpu().numpy()
            order, budget = admission_order(survival), rounds.budget
        elif running.admission is not None:
            found = running.admission
            survival, order, budget = found.survival, found.order, found.budget
        else:
            return np.zeros((requests, 0)), [], 0, [0] * requests
        return survival, order, int(budget), self._worker._verify_planner.admitted.lens.tolist()


# --- the simulator --------------------------------------------------------------------------------


class Simulated:
    """A replica of the simulator, made and not yet run."""

    def __init__(self, replica: Any, *, told: Told) -> None:
        """Args:
        replica: of :mod:`dspark_sglang.simulate.engine`, with a scheduler.
        told: called after each decode step, with its seconds in the line.
        """
        self._replica, self._scheduler = replica, replica.scheduler
        self._plan: Any = None
        self._given: Any = None
        step, plan, admit = replica._scheduled, self._scheduler.plan, self._scheduler.admit

        def scheduled(scheduler: Any, count: int, context: int) -> Any:
            numbers_ = [int(number_) for number_ in replica._number]
            made, lens, seconds, drafts = step(scheduler, count, context)
            told(self._line(numbers_, context, made, lens, seconds), self.learned())
            return made, lens, seconds, drafts

        def planned(load: Any) -> Any:
            self._plan = plan(load)
            return self._plan

        def admitted(*args: Any) -> Any:
            self._given = admit(*args)
            return self._given

        replica._scheduled = scheduled
        self._scheduler.plan, self._scheduler.admit = planned, admitted

    def learned(self) -> dict[str, Any]:
        """All that is known now."""
        return _learned(self._scheduler, None)

    def run(self) -> Line:
        """Serve to the end; counts of all steps."""
        counts = self._replica.run().counts
        names = ("steps", "rounds", "plain_rounds", "verified", "committed", "tokens", "prefills")
        return {name: int(getattr(counts, name)) for name in names} | {
            "seconds": number(counts.seconds)
        }

    def _line(
        self, requests: list[int], context: int, made: Any, lens: Any, seconds: float
    ) -> Line:
        given = self._given
        survival, order, budget = given.survival, given.order, given.budget
        return {
            "requests": requests,
            "context": context,
            "plan": _plan(self._plan),
            "draft": {
                "forward": self._plan.drafts,
                "copied": [],
                "survival": numbers(survival.tolist(), SHORT) if budget else [],
            },
            "admission": {
                "budget": int(budget),
                "order": _admitted(survival, order, int(budget)),
                "lens": [int(value) for value in lens],
                "rows": len(requests) + int(lens.sum()),
            },
            "outcome": {
                "kept": [int(value) - 1 for value in made],
                "committed": [int(value) for value in made],
            },
            "seconds": number(seconds),
        }


def simulator(
    *, overlapped: bool, times: Any, feared: Any, requests: int, slots: int, seed: int, told: Told
) -> Simulated:
    """A replica that serves drawn requests of two kinds, greedy-like and sampled-like.

    Args:
        overlapped: budgets come from confidences two steps old, and fill captured graphs.
        times: how long steps last, and ``feared`` what is known of that at the start.
        requests: to serve.
        slots: most at once.
        seed: of everything drawn.
    """
    from dspark_sglang.simulate.acceptance import Mixture, fitted
    from dspark_sglang.simulate.arrivals import Lengths, poisson
    from dspark_sglang.simulate.costs import learned
    from dspark_sglang.simulate.engine import Replica, Setting

    sure, unsure = (0.9, 0.85, 0.8, 0.75, 0.7), (0.6, 0.5, 0.4, 0.35, 0.3)
    laws = [
        # The second kind's confidences are too high: there is something to correct.
        fitted("sure", sure, spread=4.0, seed=seed),
        fitted("unsure", sure, spread=3.0, shift=unsure, seed=seed + 1),
    ]
    blocks, rng = Mixture(laws, (0.7, 0.3)), np.random.default_rng(seed)
    lengths = Lengths(prompt=120.0, output=40.0, variation=0.6)
    asked = poisson(11.0, requests, lengths, weights=blocks.weights, rng=rng)
    setting = Setting(
        mode="lagged" if overlapped else "adaptive",
        slots=slots,
        noise=0.03,
        bucket=4 if overlapped else 0,
        seed=seed,
    )
    cost = learned(feared, requests=slots, context=140)
    return Simulated(Replica(setting, asked, times=times, blocks=blocks, cost=cost), told=told)


# --- the clock and the models ---------------------------------------------------------------------


def _modules() -> list[ModuleType]:
    found = [module for name, module in sys.modules.items() if name.startswith("dspark_sglang.")]
    return [module for module in found if module is not None]


def read_clock_from(clock: Any) -> None:
    """Give every module of the plugin that reads ``time`` this object in its place."""
    for module in _modules():
        if getattr(module, "time", None) is time:
            module.time = clock  # type: ignore[attr-defined]


def models(folder: Path, family: str) -> tuple[Path, Path | None]:
    """Target and drafter of a family, made below ``folder``; None: the target holds its drafter."""
    if family == "dense":
        from tests.tiny_models import ensure_models

        return ensure_models(folder, 3)
    from dspark_sglang.layouts.v4 import tiny

    if not (folder / "config.json").exists():  # a server may be reading it
        tiny.write(folder, dtype=torch.float32)
    return folder, None
