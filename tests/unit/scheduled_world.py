"""A server that costs nothing to run: a known machine, known acceptance, and our scheduling."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from dspark_sglang.config import COST_ONLINE
from dspark_sglang.core.schedule import lengths
from dspark_sglang.serving.control import COST_UNMEASURED, Budgeted, Control
from dspark_sglang.serving.running import StepPlan
from dspark_sglang.simulate.late import Late

GAMMA = 5


def request(*, sampled: bool = True, **options: Any) -> Any:
    """What scheduling reads of an SGLang request."""
    custom = {"dspark": options} if options else None
    params = SimpleNamespace(custom_params=custom, top_k=1 << 30 if sampled else 1)
    return SimpleNamespace(sampling_params=params)


class Taken(NamedTuple):
    """One step as it was scheduled."""

    plan: StepPlan
    given: Budgeted
    lens: np.ndarray
    counts: np.ndarray
    #: Tokens to expect of such a step, the requests' own included: less noisy than what came.
    tokens: float
    seconds: float


class World:
    """Serves the same requests over and over.

    Each drafted token is kept with chance ``acceptance`` given that those before it were;
    ``confidence`` is what the head says of it, None for the truth.
    """

    def __init__(
        self, control: Control, requests: list[Any], *, acceptance: float, seed: int = 0
    ) -> None:
        self.control, self.requests, self.acceptance = control, requests, acceptance
        self.confidence: float | None = None
        #: Decides ahead and learns late; None: as a server without overlap.
        self.late: Late | None = None
        #: Seconds of a round beyond a plain step, for each request and for each drafted token.
        self.draft, self.each, self.token = 0.004, 0.0002, 0.0006
        self.rng = np.random.default_rng(seed)
        self.noise = 0.02
        self.now = 0.0

    def cost(self, drafted: int, *, is_round: bool) -> float:
        count = len(self.requests)
        seconds = 0.010 + 0.0005 * count
        if is_round:
            seconds += self.draft + self.each * count + self.token * drafted
        return float(seconds * np.exp(self.noise * self.rng.standard_normal()))

    def step(self, confidence: np.ndarray | None = None) -> Taken:
        control, count, late = self.control, len(self.requests), self.late
        if late is not None:
            late.settle()
        plan = control.begin(self.requests, 100 * count)
        if confidence is None:
            stated = self.acceptance if self.confidence is None else self.confidence
            confidence = np.full((count, control.gamma), stated)
        drafted = np.arange(control.gamma) < plan.depth
        control.running.logits = torch.logit(
            torch.from_numpy(confidence[:, : plan.depth]), eps=1e-6
        )
        confidence = np.where(drafted, confidence, 0.0)
        if late is not None:
            late.decide(np.arange(count), np.zeros(count, dtype=np.int64), None)
        if late is not None and plan.draft:
            given = control.ranked(confidence)
        else:
            given = control.budget(confidence, None)
        lens = lengths(given.order, given.budget, requests=count)
        kept = self.rng.random((count, control.gamma)) < self.acceptance
        counts = np.minimum(kept.cumprod(axis=1).sum(axis=1), lens)
        if late is None:
            control.accepted(lens, counts)
        seconds = self.cost(int(lens.sum()), is_round=plan.draft)
        self.now += seconds
        if late is None:
            control.finished(seconds, self.now)
        else:
            late.over(lens, counts, seconds, self.now)
        chances = self.acceptance ** np.arange(1, control.gamma + 1)
        tokens = count + float((chances * (np.arange(control.gamma) < lens[:, None])).sum())
        return Taken(plan, given, lens, counts, tokens, seconds)

    def run(self, steps: int) -> list[Taken]:
        return [self.step() for _ in range(steps)]

    def measure(self) -> None:
        """The start-up measurement: both kinds of step at every depth."""
        own, self.control.cost_source = self.requests, COST_UNMEASURED
        self.requests = [request(profile=True) for _ in own]
        self.run(8 * (GAMMA + 1))
        self.requests, self.control.cost_source = own, COST_ONLINE


def world(
    requests: int, *, acceptance: float, seed: int = 0, lagged: bool = False, **options: Any
) -> World:
    """A measured server of requests that are all alike."""
    control = Control(gamma=GAMMA, adaptive=True)
    asked = [request(**options) for _ in range(requests)]
    made = World(control, asked, acceptance=acceptance, seed=seed)
    made.late = Late(control, slots=requests) if lagged else None
    made.measure()
    return made


def speed(steps: list[Taken]) -> float:
    """Tokens a second."""
    return sum(step.tokens for step in steps) / sum(step.seconds for step in steps)


def drafting_share(steps: list[Taken]) -> float:
    """Share of the steps that drafted."""
    return sum(step.plan.draft for step in steps) / len(steps)


def mean_budget(steps: list[Taken]) -> float:
    """Drafted tokens verified a request."""
    return sum(int(step.lens.sum()) for step in steps) / sum(len(step.lens) for step in steps)
