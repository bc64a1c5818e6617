"""A server that costs nothing to run: a known machine, known acceptance, and our scheduling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dspark_sglang.core.round import Admission, Drafted, Load, StepPlan, StepResult
from dspark_sglang.core.schedule import lengths
from dspark_sglang.core.schedule.scheduler import Overlapped, Scheduler, Synchronous

GAMMA = 5


class Asked(NamedTuple):
    """What scheduling knows of a request."""

    sampled: bool = True
    max_draft_tokens: int = GAMMA
    workload: str = ""
    profile: bool = False


def load(
    requests: Sequence[Asked], context: int = 0, *, gamma: int = GAMMA, stopped: bool = False
) -> Load:
    """A step of these requests, the first in slot 0."""
    count = len(requests)
    return Load(
        limits=np.array([min(gamma, r.max_draft_tokens) for r in requests], dtype=np.int64),
        sampled=np.array([r.sampled for r in requests], dtype=bool),
        workloads=tuple(r.workload for r in requests),
        context=context,
        slots=np.arange(count),
        generations=np.ones(count, dtype=np.int64),
        profile=any(r.profile for r in requests),
        stopped=stopped,
    )


def admitted(scheduler: Scheduler, plan: StepPlan, confidence: np.ndarray) -> Admission:
    """What is verified of a draft with these confidences ``[R, gamma]``."""
    return scheduler.admit(plan, Drafted.of(confidence, plan.depth) if plan.drafts else None)


def over(
    scheduler: Scheduler,
    plan: StepPlan,
    given: Admission,
    confidence: np.ndarray,
    lens: np.ndarray,
    counts: np.ndarray,
    *,
    seconds: float = 0.02,
    now: float = 1.0,
    logits: np.ndarray | None = None,
) -> None:
    """A step of :func:`admitted` has ended."""
    if logits is None:
        logits = np.zeros(confidence.shape)
    result = StepResult(
        plan=plan,
        drafted=Drafted.of(confidence, plan.depth) if plan.drafts else None,
        admission=given,
        lens=lens,
        counts=counts,
        logits=logits,
        seconds=seconds,
        now=now,
    )
    scheduler.observe(lambda: result)


class Taken(NamedTuple):
    """One step as it was scheduled."""

    plan: StepPlan
    given: Admission
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
        self, scheduler: Scheduler, requests: list[Asked], *, acceptance: float, seed: int = 0
    ) -> None:
        self.scheduler, self.requests, self.acceptance = scheduler, requests, acceptance
        self.confidence: float | None = None
        #: Seconds of a round beyond a decode step, for each request and for each drafted token.
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
        scheduler, count = self.scheduler, len(self.requests)
        gamma = scheduler.gamma
        plan = scheduler.plan(load(self.requests, 100 * count, gamma=gamma))
        if confidence is None:
            stated = self.acceptance if self.confidence is None else self.confidence
            confidence = np.full((count, gamma), stated)
        drafted = np.arange(gamma) < plan.depth
        near = np.clip(confidence, 1e-6, 1.0 - 1e-6)
        logits = np.where(drafted, np.log(near / (1.0 - near)), 0.0)
        confidence = np.where(drafted, confidence, 0.0)
        given = admitted(scheduler, plan, confidence)
        lens = lengths(given.order, given.budget, requests=count)
        kept = self.rng.random((count, gamma)) < self.acceptance
        counts = np.minimum(kept.cumprod(axis=1).sum(axis=1), lens)
        seconds = self.cost(int(lens.sum()), is_round=plan.drafts)
        self.now += seconds
        over(
            scheduler, plan, given, confidence, lens, counts,
            seconds=seconds, now=self.now, logits=logits,
        )  # fmt: skip
        chances = self.acceptance ** np.arange(1, gamma + 1)
        tokens = count + float((chances * (np.arange(gamma) < lens[:, None])).sum())
        return Taken(plan, given, lens, counts, tokens, seconds)

    def run(self, steps: int) -> list[Taken]:
        return [self.step() for _ in range(steps)]

    def measure(self) -> None:
        """The start-up measurement: both kinds of step at every depth."""
        own, measurement = self.requests, self.scheduler.measurement
        measurement.begin()
        self.requests = [Asked(profile=True) for _ in own]
        self.run(8 * (GAMMA + 1))
        self.requests, measurement.running = own, False


def world(requests: int, *, acceptance: float, seed: int = 0, overlapped: bool = False) -> World:
    """A measured server of requests that are all alike."""
    scheduler = (Overlapped if overlapped else Synchronous)(gamma=GAMMA)
    made = World(scheduler, [Asked()] * requests, acceptance=acceptance, seed=seed)
    made.measure()
    return made


def speed(steps: list[Taken]) -> float:
    """Tokens a second."""
    return sum(step.tokens for step in steps) / sum(step.seconds for step in steps)


def drafting_share(steps: list[Taken]) -> float:
    """Share of the steps that drafted."""
    return sum(step.plan.drafts for step in steps) / len(steps)


def mean_budget(steps: list[Taken]) -> float:
    """Drafted tokens verified a request."""
    return sum(int(step.lens.sum()) for step in steps) / sum(len(step.lens) for step in steps)
