"""What each step of a server does: whether it drafts, how deep, and how much of the draft is verified.

Three verbs, called once a step and in this order: :meth:`Scheduler.plan` before anything is drafted,
:meth:`Scheduler.admit` between drafting and verifying, :meth:`Scheduler.observe` when the step is over. Three
strategies behind them:

- :class:`VerifyAll`: everything is drafted and verified, nothing is learned;
- :class:`Synchronous`: the host has a step's confidences before it verifies (the paper's algorithm 1);
- :class:`Overlapped`: a step is decided while the one before still runs, from confidences two steps old (section 5.2).

Servers and the simulator run the same objects.
"""

from __future__ import annotations

import abc
import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from dspark_sglang.core.round import (
    Admission,
    Bool,
    Drafted,
    Float64,
    Int64,
    Load,
    StepPlan,
    StepResult,
)
from dspark_sglang.core.schedule.admission import admission_order, lengths, survival
from dspark_sglang.core.schedule.budget import History, early_stop_budget, global_budget
from dspark_sglang.core.schedule.correction import Reliability
from dspark_sglang.core.schedule.cost_model import CostModel, Step, StepCost
from dspark_sglang.core.schedule.depth import DepthCaps
from dspark_sglang.core.schedule.measurement import Measurement
from dspark_sglang.core.schedule.policy import Choice, DraftPolicy
from dspark_sglang.core.schedule.prompt_lookup import PromptLookup

#: Gives what came of a step; waits for its end where it has not ended.
Arriving = Callable[[], StepResult]

#: Survival of a token that may be admitted is at least this: one that may not has 0.
ADMISSIBLE = 1e-300
#: Requests of a step of whose blocks all is verified, to learn: more would cost more than they teach.
_FIRST_REQUESTS = 4
#: While nothing is drafted, steps of prompt lookup before one without: it is timed.
_DECODE_EVERY = 24
#: Steps that may run while another is decided.
_RUNNING = 1


def before_all(gamma: int) -> Float64:
    """``[gamma]`` survivals of blocks of which all is verified, above every real one."""
    return 2.0 - np.arange(gamma) / gamma


class Scheduler(abc.ABC):
    """All that is learned in service and all that an operator can change while a server runs; one a process."""

    #: As ``DSPARK_SCHEDULE`` calls the strategy.
    name: str

    def __init__(self, *, gamma: int) -> None:
        """Args:
        gamma: drafted tokens a request.
        """
        self.gamma = gamma
        self.cost = CostModel(gamma=gamma)
        self.policy = DraftPolicy()
        self.reliability = Reliability(gamma=gamma)
        self.depths = DepthCaps(gamma=gamma)
        self.lookup = PromptLookup(self.cost, self.policy)
        self.measurement = Measurement(gamma=gamma)
        #: Share of the drafted tokens to verify whatever pays; None: what pays.
        self.fixed_budget: float | None = None
        #: Counted over rounds that predicted: tokens expected and committed.
        self.expected_tokens = 0.0
        self.committed_tokens = 0
        self.plain_steps = 0
        #: Requests times rounds of prompt lookup, and tokens of it that were right.
        self.copied_rounds = self.copied_tokens = 0
        #: Requests of the last planned step, and whether most of them sampled.
        self._last = (1, False)

    @property
    def adaptive(self) -> bool:
        """Whether steps are timed and scheduled."""
        return True

    # -- the three verbs ---------------------------------------------------------------------

    @abc.abstractmethod
    def plan(self, load: Load) -> StepPlan:
        """Decide what a step does before anything is drafted."""

    @abc.abstractmethod
    def admit(self, plan: StepPlan, drafted: Drafted | None) -> Admission:
        """Decide which drafted tokens of a step are verified; of a decode step, none.

        A decision of the overlapped strategy is the plan's; only its order is this step's. A server that runs
        ahead of its device finds that order there.
        """

    @abc.abstractmethod
    def observe(self, arriving: Arriving) -> None:
        """Learn from a step, now or when others run already."""

    def catch_up(self) -> None:  # noqa: B027 - most strategies are never behind
        """Learn from every step there was, also from one that is still to end."""

    # -- for people --------------------------------------------------------------------------

    def choose(self, choice: Choice) -> None:
        """Draft always, never, or where it pays."""
        self.policy.choice = choice

    def fix_budget(self, share: float | None) -> None:
        """Verify a share of the drafted tokens, 0 to 1, whatever pays; None: what pays."""
        self.fixed_budget = share

    def recalibrated(self) -> None:
        """Confidences mean something else from now on: what was learned of them is void."""
        self.reliability.forget()

    def snapshot(self) -> dict[str, Any]:
        """JSON-ready numbers for ``/server_info`` and metrics."""
        expected = self.expected_tokens
        return {
            "speculation": self.policy.choice,
            "drafting": not self.adaptive or self.policy.drafting(*self._last),
            "gain": round(self.policy.gain(*self._last), 4),
            "switches": self.policy.switches,
            "plain_steps": self.plain_steps,
            "copied_rounds": self.copied_rounds,
            "copied_tokens": self.copied_tokens,
            "forced_budget": self.fixed_budget,
            "depth_caps": self.depths.caps(),
            "step_error": self.cost.error,
            "slowdown": round(self.cost.slowdown, 4),
            "observations": self.cost.observations,
            "expected_tokens": round(expected, 2),
            "observed_tokens": self.committed_tokens,
            "tau_error": None if not expected else abs(self.committed_tokens / expected - 1.0),
            "ece": self.reliability.error(),
            "ece_served": self.reliability.served_error(),
            "ece_by_position": self.reliability.errors().round(4).tolist(),
            "drift_alarm": bool(self.reliability.alarms.any()),
        }

    def clear(self) -> None:
        """Start counting again; what was learned stays."""
        self.expected_tokens, self.committed_tokens, self.plain_steps = 0.0, 0, 0
        self.copied_rounds = self.copied_tokens = 0


class VerifyAll(Scheduler):
    """Everything is drafted and verified; nothing is timed or learned."""

    name = "all"

    @property
    def adaptive(self) -> bool:
        return False

    def plan(self, load: Load) -> StepPlan:
        self._last = max(1, load.requests), load.samples
        depth = 0 if load.stopped else self.gamma
        return StepPlan(load=load, limits=load.limits, depth=depth, verify_all=True)

    def admit(self, plan: StepPlan, drafted: Drafted | None) -> Admission:
        requests = plan.load.requests
        if drafted is None:
            return Admission.nothing(requests, self.gamma)
        allowed = np.arange(self.gamma) < plan.limits[:, None]
        values = _admissible(survival(drafted.confidence), allowed)
        order, most = admission_order(values), int(allowed.sum())
        return Admission(
            survival=values,
            order=order,
            budget=most,
            expected=requests + float(values.sum()),
            valued=values,
            paying=order[:most],
        )

    def observe(self, arriving: Arriving) -> None:
        self.plain_steps += arriving().drafted is None


class Synchronous(Scheduler):
    """A step is decided when its confidences are known, and learned from when it ends."""

    name = "adaptive"

    def __init__(self, *, gamma: int) -> None:
        super().__init__(gamma=gamma)
        #: Steps since one was a decode step.
        self._since_decode = 0
        #: The first of the requests of whose blocks all is verified next.
        self._turn = 0

    # -- before drafting ---------------------------------------------------------------------

    def plan(self, load: Load) -> StepPlan:
        self._last = max(1, load.requests), load.samples
        return self._decide(load)

    def _decide(self, load: Load) -> StepPlan:
        limits = load.limits
        most = int(limits.max(initial=0))
        decode = StepPlan(load=load, limits=limits, depth=0)
        if load.stopped:
            return decode
        if load.profile and self.measurement.running:
            return self.measurement.plan(load)
        if not most or self.fixed_budget == 0.0:
            return decode
        decision = self.policy.decide(load.requests, load.samples)
        if not decision.draft:
            free = self.policy.choice != "off" and self.fixed_budget is None and not decision.look
            lookup = free and self._since_decode < _DECODE_EVERY
            return StepPlan(load=load, limits=limits, depth=0, prompt_lookup=lookup)
        if decision.verify_all or self.fixed_budget is not None:
            # An operator's budget holds in steps that would verify everything to learn, too.
            everything = self.fixed_budget is None
            return StepPlan(load=load, limits=limits, depth=most, verify_all=everything)
        known = {name: self.depths.cap(name) for name in set(load.workloads)}
        caps = np.array([known[name] for name in load.workloads])
        limits = np.minimum(limits, caps)
        return StepPlan(load=load, limits=limits, depth=int(limits.max()))

    # -- between drafting and verifying ------------------------------------------------------

    def admit(self, plan: StepPlan, drafted: Drafted | None) -> Admission:
        load = plan.load
        if drafted is None:
            return Admission.nothing(load.requests, self.gamma)
        values = self._valued(plan, drafted)
        order, most = admission_order(values), int((values > 0.0).sum())
        if drafted.alone:
            return self._looked_up(load, values, order)
        paying = min(early_stop_budget(values, order, self._curve(load), load.buckets), most)
        budget, valued, paid = paying, values, order[:paying]
        if plan.profile:
            budget = most
        elif plan.verify_all:
            values = self._verify_some(values, paid)
            order, budget = admission_order(values), int((values > 0.0).sum())
        elif self.fixed_budget is not None:
            budget = min(int(self.fixed_budget * values.size), most)
        return Admission(
            survival=values,
            order=order,
            budget=budget,
            expected=_expected(values, order[:budget]),
            valued=valued,
            paying=paid,
        )

    def _valued(self, plan: StepPlan, drafted: Drafted) -> Float64:
        """Survival ``[R, gamma]`` of a draft, 0 where nothing may be verified."""
        copied = drafted.copied
        # What limits the depth of drafts is no reason to copy less.
        most = np.minimum(plan.load.limits, drafted.copied_depth)
        allowed = np.arange(self.gamma) < np.where(copied, most, plan.limits)[:, None]
        allowed &= ~drafted.unsound[:, None]
        if drafted.alone:
            allowed &= copied[:, None]
        confidence = drafted.confidence
        corrected = self.reliability.corrected(confidence, plan.load.sampled)
        values = survival(np.where(copied[:, None], confidence, corrected))
        return _admissible(values, allowed)

    def _curve(self, load: Load) -> StepCost:
        """What a step would last with any number of tokens."""
        return self.cost.curve(load.requests, load.context, load.sampling)

    def _next(self, requests: int) -> Int64:
        """The requests of whose blocks all is verified this time."""
        turn = self._turn + np.arange(min(_FIRST_REQUESTS, requests))
        self._turn += _FIRST_REQUESTS
        return turn % requests

    def _verify_some(self, values: Float64, paying: Int64) -> Float64:
        """Survival ``[R, gamma]`` of what pays and of all of a few requests' blocks in turn, 0 elsewhere."""
        requests = len(values)
        chosen = np.zeros(values.shape, dtype=bool)
        chosen[self._next(requests)] = True
        position, row = np.divmod(paying, requests)
        chosen[row, position] = True
        return np.where(chosen, values, 0.0)

    def _looked_up(self, load: Load, values: Float64, order: Int64) -> Admission:
        """Of a step of prompt lookup alone; where none pays it becomes a decode step."""
        gains = values.T.reshape(-1)[order]
        budget = self.lookup.alone(load, gains[gains > ADMISSIBLE]).tokens
        return Admission(
            survival=values,
            order=order,
            budget=budget,
            expected=_expected(values, order[:budget]),
            valued=values,
            paying=order[:budget],
        )

    # -- after a step ------------------------------------------------------------------------

    def observe(self, arriving: Arriving) -> None:
        self._learn(arriving())

    def _learn(self, result: StepResult) -> None:
        """Learn from a step that is over."""
        drafted = result.drafted
        if drafted is None:
            self.plain_steps += 1
        elif not result.plan.profile:
            assert result.admission is not None
            if not drafted.alone:
                self._learn_depth(result.plan, drafted, result.admission)
                self._learn_gain(result.plan, drafted, result.admission)
            self._learn_acceptance(result, drafted, result.admission)
        self._learn_cost(result)

    def _learn_depth(self, plan: StepPlan, drafted: Drafted, admission: Admission) -> None:
        if drafted.depth < self.gamma:
            return
        wanted = lengths(admission.paying, len(admission.paying), requests=plan.load.requests)
        for workload in set(plan.load.workloads):
            own = [
                row
                for row, name in enumerate(plan.load.workloads)
                if name == workload and not drafted.copied[row]
            ]
            if own:
                self.depths.learn(workload, wanted[own])

    def _learn_gain(self, plan: StepPlan, drafted: Drafted, admission: Admission) -> None:
        """What drafting brings at the budget that pays, against not drafting.

        Prompt lookup is no merit of drafting: the requests that draft stand for all.
        """
        own, load = ~drafted.copied, plan.load
        if not self.cost.comparable or not own.any():
            return
        requests, at, paying = load.requests, (load.context, load.sampling), admission.paying
        admitted = paying[own[paying % requests]]
        share = requests / int(own.sum())
        tokens = requests + share * float(admission.valued.T.reshape(-1)[admitted].sum())
        seconds = self.cost.round_seconds(requests, round(share * len(admitted)), *at)
        decode = self.cost.plain_seconds(requests, *at)
        gain = tokens / seconds / (requests / decode)
        lost = None
        if plan.verify_all:  # it verifies more than pays
            whole = self.cost.round_seconds(requests, admission.budget, *at)
            lost = whole / decode - admission.expected / requests
        self.policy.learn(requests, gain, seconds / decode, lost, load.samples)

    def _learn_acceptance(self, result: StepResult, drafted: Drafted, admission: Admission) -> None:
        assert result.logits is not None
        copied, counts, logits = drafted.copied, result.counts, result.logits
        # Prompt lookup says nothing of the drafter's confidences.
        lens = np.where(copied, 0, result.lens)
        if drafted.unsound.any():
            logits = np.where(drafted.unsound[:, None], 0.0, logits)
            lens = np.where(drafted.unsound, 0, lens)
        sampled = result.plan.load.sampled
        self.reliability.observe(drafted.confidence, logits, lens, counts, sampled)
        self.copied_rounds += int(copied.sum())
        self.copied_tokens += int(counts[copied].sum())
        self.expected_tokens += admission.expected
        self.committed_tokens += int(counts.sum()) + len(counts)

    def _learn_cost(self, result: StepResult) -> None:
        plan, drafted, load = result.plan, result.drafted, result.plan.load
        self._since_decode = 0 if drafted is None else self._since_decode + 1
        budget = result.admission.budget if result.admission is not None else 0
        if drafted is not None and drafted.alone:
            # Without its draft forward a round is faster than the rounds whose cost is learned.
            if self.cost.comparable:
                self.lookup.learn(load, budget, result.seconds)
            return
        if not load.requests:
            return
        step = Step(load.requests, budget, load.context, drafted is not None, load.sampling)
        self.cost.observe(step, result.seconds)
        if plan.profile:
            self.measurement.observe(step, result.seconds, result.now)


class Overlapped(Synchronous):
    """A step is decided while the one before still runs, and learned from when it is over; constant memory.

    How much is verified comes from confidences that have arrived (the paper's section 5.2: two steps old). Which
    tokens those are is decided by this step's, where they are.
    """

    name = "lagged"

    def __init__(self, *, gamma: int) -> None:
        super().__init__(gamma=gamma)
        self.history = History(gamma=gamma)
        self._launched: deque[Arriving] = deque()

    def plan(self, load: Load) -> StepPlan:
        self._settle(_RUNNING)
        plan = super().plan(load)
        earlier = self.history.recall(load.slots, load.generations)
        if not plan.drafts:
            return plan
        budget = most = int(plan.limits.sum())
        paying, first = 0, plan.first
        if not plan.profile:
            allowed = np.arange(self.gamma) < plan.limits[:, None]
            known = np.where(allowed, earlier, 0.0)
            budget = paying = min(global_budget(known, self._curve(load), load.buckets), most)
            if self.fixed_budget is not None:
                budget = int(self.fixed_budget * earlier.size)
            elif plan.verify_all:
                first = self._next(load.requests)
                budget += int(plan.limits[first].sum())
        return dataclasses.replace(plan, budget=min(budget, most), paying=paying, first=first)

    def admit(self, plan: StepPlan, drafted: Drafted | None) -> Admission:
        if drafted is None:
            return Admission.nothing(plan.load.requests, self.gamma)
        values = self._valued(plan, drafted)
        first = values[plan.first]
        values[plan.first] = np.where(first > 0.0, before_all(self.gamma), 0.0)
        order = admission_order(values)
        # What it is worth is found when the step is over.
        return Admission(
            survival=values,
            order=order,
            budget=plan.budget,
            expected=float(len(values)),
            valued=values,
            paying=order[:0],
        )

    def observe(self, arriving: Arriving) -> None:
        self._launched.append(arriving)

    def catch_up(self) -> None:
        self._settle(0)

    def _settle(self, running: int) -> None:
        """Learn from all steps but the last ``running``: the server has read the others' tokens, so they are over."""
        while len(self._launched) > running:
            self._learn(self._launched.popleft()())

    def _learn(self, result: StepResult) -> None:
        """As of the other strategy, once it is known what the step's tokens were worth."""
        plan, drafted = result.plan, result.drafted
        if drafted is None:
            super()._learn(result)
            return
        values = self._valued(plan, drafted)
        sent = np.arange(self.gamma) < result.lens[:, None]
        order = admission_order(values)
        known = Admission(
            survival=values,
            order=order,
            budget=plan.budget,
            expected=len(result.lens) + float(values[sent].sum()),
            valued=values,
            paying=order[: plan.paying],
        )
        super()._learn(dataclasses.replace(result, admission=known))
        if not plan.profile:  # its limits are no property of the requests
            self.history.note(plan.load.slots, plan.load.generations, values)


def _admissible(values: Float64, allowed: Bool) -> Float64:
    """Survivals ``[R, gamma]``, 0 where a token may not be verified: it ranks behind all that may."""
    return np.where(allowed, np.maximum(values, ADMISSIBLE), 0.0)


def _expected(values: Float64, admitted: Int64) -> float:
    """Tokens expected of a round that verifies these candidates of ``[R, gamma]`` survivals."""
    return len(values) + float(values.T.reshape(-1)[admitted].sum())


#: By their names in ``DSPARK_SCHEDULE``.
STRATEGIES: dict[str, type[Scheduler]] = {
    kind.name: kind for kind in (VerifyAll, Synchronous, Overlapped)
}
