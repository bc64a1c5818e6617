"""What each step of the server does: whether it drafts, how deep, and how much it verifies.

One object holds all that is learned in service (step cost, gain, acceptance, depth) and everything an
operator can change while the server runs. Only the host side of scheduling is here.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dspark_sglang.config import COST_ONLINE
from dspark_sglang.core.cost import StepCost
from dspark_sglang.core.depth import DepthCaps, far_apart
from dspark_sglang.core.policy import Choice, DraftPolicy
from dspark_sglang.core.reliability import Reliability
from dspark_sglang.core.schedule import (
    admission_order,
    early_stop_budget,
    global_budget,
    lengths,
)
from dspark_sglang.core.steps import CostModel, Step
from dspark_sglang.core.survival import survival
from dspark_sglang.serving.copying import Copying
from dspark_sglang.serving.faults import Faults
from dspark_sglang.serving.options import RequestOptions, read_options
from dspark_sglang.serving.running import Running, StepPlan

logger = logging.getLogger(__name__)

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

#: Survival of a token that may be admitted is at least this: one that may not has 0.
ADMISSIBLE = 1e-300
#: Requests of a step whose blocks are verified whole to learn: more would cost more than they teach.
_WHOLE_REQUESTS = 4
#: While nothing is drafted, steps with copies before one without: it is timed.
_PLAIN_EVERY = 24
#: Steps of a start-up measurement below which it says nothing.
_FEWEST = 48
#: Sources of the step cost besides files: nothing is timed; it is being measured before the server
#: listens.
COST_OFF, COST_UNMEASURED, COST_UNKEPT = "off", "unmeasured", "measured, not kept"


def before_all(gamma: int) -> Float64:
    """``[gamma]`` survivals of blocks that are verified whole, above every real one."""
    return 2.0 - np.arange(gamma) / gamma


class Budgeted(NamedTuple):
    """How much of a drafted step is verified."""

    survival: Float64
    order: Int64
    budget: int


class Control:
    """Decides every step of one scheduler process."""

    def __init__(self, *, gamma: int, adaptive: bool) -> None:
        """Args:
        gamma: drafted tokens a request.
        adaptive: steps are timed and scheduled; otherwise everything is drafted and verified.
        """
        self.gamma = gamma
        self.adaptive = adaptive
        self.cost = CostModel(gamma=gamma)
        self.policy = DraftPolicy()
        self.reliability = Reliability(gamma=gamma)
        self.depths = DepthCaps(gamma=gamma)
        self.copying = Copying(self.cost, self.policy)
        self.faults = Faults()
        #: Where the step cost comes from, in words of the settings or as a file.
        self.cost_source = COST_OFF if not adaptive else COST_ONLINE
        #: Share of the drafted tokens to verify whatever pays; None: what pays.
        self.forced: float | None = None
        #: The step that is being made.
        self.running = Running(plan=StepPlan(np.zeros(0, dtype=np.int64), gamma))
        #: First of the requests whose blocks are verified whole next.
        self._whole_turn = 0
        self._profile_step = 0
        self._profile_began: float | None = None
        #: Steps of the measurement at start-up, so far, with their seconds.
        self._profiled: list[tuple[Step, float]] = []
        #: Wall seconds of the measurement at start-up, so far.
        self.profile_seconds = 0.0
        #: Counted over rounds that predicted: tokens expected and committed.
        self.expected_tokens = 0.0
        self.committed_tokens = 0
        self.plain_steps = 0
        #: Steps since one was plain.
        self._since_plain = 0
        #: Requests times rounds that copied, and copied tokens that were right.
        self.copied_rounds = self.copied_tokens = 0

    @property
    def measuring(self) -> bool:
        """Whether the measurement at start-up is still to end."""
        return self.cost_source == COST_UNMEASURED

    # -- before drafting ---------------------------------------------------------------------

    def begin(self, requests: Sequence[Any], context: int) -> StepPlan:
        """Decide what a step does.

        Args:
            requests: SGLang's requests of the batch.
            context: cached tokens of all of them.
        """
        options = [read_options(request) for request in requests]
        limits = np.array([_limit(o, self.gamma) for o in options], dtype=np.int64)
        sampled = np.array([r.sampling_params.top_k > 1 for r in requests], dtype=bool)
        self.running = running = Running(
            plan=StepPlan(limits, 0),
            requests=options,
            owners=tuple(requests),
            context=context,
            limits=limits,
            sampled=sampled,
            sampling=int(sampled.sum()),
            copied=np.zeros(len(options), dtype=bool),
            expected=float(len(options)),
        )
        running.plan = self._decide(running)
        return running.plan

    def _decide(self, running: Running) -> StepPlan:
        options, limits = running.requests, running.limits
        most = int(limits.max(initial=0))
        if self.faults.stopped:
            return StepPlan(limits, 0)
        if not self.adaptive:
            return StepPlan(limits, self.gamma, whole=True)
        if self.measuring and any(option.profile for option in options):
            return self._profile(limits)
        if not most or self.forced == 0.0:
            return StepPlan(limits, 0)
        decision = self.policy.decide(len(options), running.samples)
        if not decision.draft:
            free = self.policy.choice != "off" and self.forced is None and not decision.look
            return StepPlan(limits, 0, copies=free and self._since_plain < _PLAIN_EVERY)
        if decision.whole or self.forced is not None:
            # An operator's budget holds in steps that would verify everything to learn, too.
            return StepPlan(limits, most, whole=self.forced is None)
        known = {name: self.depths.cap(name) for name in {option.workload for option in options}}
        caps = np.array([known[option.workload] for option in options])
        limits = np.minimum(limits, caps)
        return StepPlan(limits, int(limits.max()))

    def copy(self, rows: Int64, depth: int) -> None:
        """Requests of the running step copy up to ``depth`` tokens, however many are drafted."""
        self.running.copied[rows], self.running.copied_depth = True, depth

    def copy_only(self, depth: int) -> None:
        """The running step drafts nothing, but requests of it copy up to ``depth`` tokens of their own text."""
        self.running.plan, self.running.undrafted = self.running.plan._replace(depth=depth), True

    def _profile(self, limits: Int64) -> StepPlan:
        """Every second step is plain, so that both kinds meet the same machine."""
        turn, plain = divmod(self._profile_step, 2)
        self._profile_step += 1
        if plain:
            return StepPlan(limits, 0, profile=True)
        depths = far_apart(self.gamma)
        own = np.minimum(limits, depths[turn % len(depths)])
        return StepPlan(own, self.gamma, whole=True, profile=True)

    def ahead(self, earlier: Float64, buckets: Int64 | None) -> None:
        """Decide before it drafts how much of the running step is verified.

        What is verified whole goes first: that says nothing of what was drafted.

        Args:
            earlier: ``[R, gamma]`` survival as it was steps ago.
            buckets: numbers of rows that forwards run with; None: any.
        """
        running, limits = self.running, self.running.plan.limits
        if not running.plan.draft:
            return
        budget = most = int(limits.sum())
        if not running.plan.profile:
            allowed = np.arange(self.gamma) < limits[:, None]
            paying = global_budget(np.where(allowed, earlier, 0.0), self._curve(), buckets)
            budget = running.paying = min(paying, most)
            if self.forced is not None:
                budget = int(self.forced * earlier.size)
            elif running.plan.whole:
                running.first = self._turn(len(limits))
                budget += int(limits[running.first].sum())
        running.budget = min(budget, most)

    def ranked(self, confidence: Float64) -> Budgeted:
        """The running step's drafted tokens in the order in which a budget decided :meth:`ahead` admits them.

        A server does this on the device.

        Args:
            confidence: ``[R, gamma]`` calibrated.
        """
        values = self._valued(confidence)
        first = values[self.running.first]
        values[self.running.first] = np.where(first > 0.0, before_all(self.gamma), 0.0)
        return Budgeted(values, admission_order(values), self.running.budget)

    # -- between drafting and verifying ------------------------------------------------------

    def budget(self, confidence: Float64, buckets: Int64 | None) -> Budgeted:
        """How many drafted tokens to verify, and in which order they are admitted.

        Args:
            confidence: ``[R, gamma]`` calibrated.
            buckets: numbers of rows that forwards run with; None: any.
        """
        running, requests = self.running, len(confidence)
        plan = running.plan
        if not plan.draft:
            values = np.zeros((requests, self.gamma))
            return Budgeted(values, admission_order(values), 0)
        values = self._valued(confidence)
        order, most = admission_order(values), int((values > 0.0).sum())
        if not self.adaptive:
            return Budgeted(values, order, most)
        if running.undrafted:
            return self._copy_budget(values, order)
        paying = min(early_stop_budget(values, order, self._curve(), buckets), most)
        self._learn_depth(order, paying)
        budget, found, paid = paying, values, order[:paying]
        if plan.profile:
            budget = most
        elif plan.whole:
            values = self._some_whole(values, paid)
            order, budget = admission_order(values), int((values > 0.0).sum())
        elif self.forced is not None:
            budget = min(int(self.forced * values.size), most)
        running.budget = budget
        admitted = values.T.reshape(-1)[order[:budget]]
        running.expected = requests + float(admitted.sum())
        if not plan.profile:
            self._learn_gain(found, paid, budget)
        return Budgeted(values, order, budget)

    def _valued(self, confidence: Float64) -> Float64:
        """Survival ``[R, gamma]`` of the running step, 0 where nothing may be verified."""
        running, confidence = self.running, self.faults.screened(self.running, confidence)
        running.confidence = confidence
        # What limits the depth of drafts is no reason to copy less.
        copied = np.minimum(running.limits, running.copied_depth)
        limits = np.where(running.copied, copied, running.plan.limits)
        allowed = np.arange(self.gamma) < limits[:, None]
        if running.undrafted:
            allowed &= running.copied[:, None]
        if running.unsound.any():
            allowed &= ~running.unsound[:, None]
        corrected = self.reliability.corrected(confidence, running.sampled)
        values = survival(np.where(running.copied[:, None], confidence, corrected))
        # One that may not be verified ranks behind all that may.
        return np.where(allowed, np.maximum(values, ADMISSIBLE), 0.0)

    def _curve(self) -> StepCost:
        """What the running step would last with any number of tokens."""
        running = self.running
        return self.cost.curve(len(running.requests), running.context, running.sampling)

    def _turn(self, requests: int) -> Int64:
        """The requests whose blocks are verified whole this time."""
        turn = self._whole_turn + np.arange(min(_WHOLE_REQUESTS, requests))
        self._whole_turn += _WHOLE_REQUESTS
        return turn % requests

    def _some_whole(self, values: Float64, paying: Int64) -> Float64:
        """Survival ``[R, gamma]`` of what pays and of the whole blocks of a few requests in turn, 0 elsewhere."""
        requests = len(values)
        chosen = np.zeros(values.shape, dtype=bool)
        chosen[self._turn(requests)] = True
        position, row = np.divmod(paying, requests)
        chosen[row, position] = True
        return np.where(chosen, values, 0.0)

    def _copy_budget(self, values: Float64, order: Int64) -> Budgeted:
        """The budget of a step with copies alone; with none that pays it is a plain step."""
        gains = values.T.reshape(-1)[order]
        found = self.copying.alone(self.running, gains[gains > ADMISSIBLE])
        if not found.tokens:
            self.running.abandon()
        admitted = values.T.reshape(-1)[order[: found.tokens]]
        self.running.budget = found.tokens
        self.running.expected = len(values) + float(admitted.sum())
        return Budgeted(values, order, found.tokens)

    def _learn_gain(self, values: Float64, paying: Int64, budget: int) -> None:
        """What drafting brings at the budget that pays, against not drafting.

        Copies are no merit of drafting: the requests that draft stand for all.

        Args:
            values: ``[R, gamma]`` survival.
            paying: tokens whose verification pays, position by position.
            budget: tokens that are verified.
        """
        own = ~self.running.copied
        if not self.cost.comparable or not own.any():
            return
        requests, load = len(values), (self.running.context, self.running.sampling)
        admitted = paying[own[paying % requests]]
        share = requests / int(own.sum())
        tokens = requests + share * float(values.T.reshape(-1)[admitted].sum())
        seconds = self.cost.round_seconds(requests, round(share * len(admitted)), *load)
        plain = self.cost.plain_seconds(requests, *load)
        gain = tokens / seconds / (requests / plain)
        lost = None
        if self.running.plan.whole:  # it verifies more than pays
            whole = self.cost.round_seconds(requests, budget, *load)
            lost = whole / plain - self.running.expected / requests
        self.policy.learn(requests, gain, seconds / plain, lost, self.running.samples)

    def _learn_depth(self, order: Int64, paying: int) -> None:
        if self.running.plan.depth < self.gamma or self.running.plan.profile:
            return
        wanted = lengths(order, paying, requests=len(self.running.requests))
        for workload in {option.workload for option in self.running.requests}:
            own = [
                row
                for row, option in enumerate(self.running.requests)
                if option.workload == workload and not self.running.copied[row]
            ]
            if own:
                self.depths.learn(workload, wanted[own])

    # -- after the step ----------------------------------------------------------------------

    def accepted(self, lens: Int64, counts: Int64) -> None:
        """Learn from what was accepted.

        Args:
            lens: ``[R]`` drafted tokens verified.
            counts: ``[R]`` drafted tokens kept.
        """
        running = self.running
        if not running.plan.draft:
            self.plain_steps += 1
            return
        if running.confidence is None or running.plan.profile or not self.adaptive:
            return
        logits = np.zeros_like(running.confidence)
        raw = running.logits.cpu().numpy()
        logits[:, : raw.shape[1]] = raw
        # What was copied says nothing of the drafter's confidences.
        drafted = np.where(running.copied, 0, lens)
        if running.unsound.any():
            logits[running.unsound], drafted = 0.0, np.where(running.unsound, 0, drafted)
        self.reliability.observe(running.confidence, logits, drafted, counts, running.sampled)
        self.copied_rounds += int(running.copied.sum())
        self.copied_tokens += int(counts[running.copied].sum())
        self.expected_tokens += running.expected
        self.committed_tokens += int(counts.sum()) + len(counts)

    def arrived(self, step: Running, lens: Int64, counts: Int64) -> Float64:
        """Learn from a step that was decided :meth:`ahead`, when others run already.

        Args:
            step: with its confidences and their logits.
            lens, counts: see :meth:`accepted`.

        Returns:
            ``[R, gamma]`` its survival, 0 where nothing could be verified.
        """
        assert step.confidence is not None
        with self._about(step):
            values = self._valued(step.confidence)
            if not step.plan.profile:
                sent = np.arange(self.gamma) < lens[:, None]
                step.expected = len(lens) + float(values[sent].sum())
                order = admission_order(values)
                self._learn_depth(order, step.paying)
                self._learn_gain(values, order[: step.paying], step.budget)
            self.accepted(lens, counts)
        return values

    def ended(self, step: Running, seconds: float, now: float) -> None:
        """:meth:`finished` of a step when others run already."""
        with self._about(step):
            self.finished(seconds, now)

    @contextlib.contextmanager
    def _about(self, step: Running) -> Iterator[None]:
        """Learn from ``step``, whichever is running."""
        now, self.running = self.running, step
        try:
            yield
        finally:
            self.running = now

    def finished(self, seconds: float, now: float) -> None:
        """Learn what the step cost.

        Args:
            seconds: from its beginning to its end.
            now: seconds of a monotonic clock.
        """
        running = self.running
        self._since_plain = 0 if not running.plan.draft else self._since_plain + 1
        if running.plan.profile:
            if self._profile_began is None:
                self._profile_began = now - seconds
            self.profile_seconds = now - self._profile_began
        # Without its draft forward a round is faster than the rounds whose cost is learned.
        if running.undrafted and self.cost.comparable:
            self.copying.learn(running, seconds)
        if self.adaptive and running.requests and not running.undrafted:
            step = Step(
                len(running.requests),
                running.budget,
                running.context,
                running.plan.draft,
                running.sampling,
            )
            self.cost.observe(step, seconds)
            if running.plan.profile:
                self._profiled.append((step, seconds))

    def measured(self) -> float:
        """The measurement at start-up is over: learn from all of its steps at once, or from none of a few.

        Returns:
            Wall seconds that it took; 0 where there was none.
        """
        steps, self._profiled = self._profiled, []
        if len(steps) < _FEWEST:
            logger.warning(
                "dspark: only %d steps ran in the %.0f s meant for measuring their cost. It is learned while serving. "
                "Did something else use the machine?",
                len(steps),
                self.profile_seconds,
            )
            self.cost.forget()
        else:
            self.cost.refit(steps)
        return self.profile_seconds

    # -- for people --------------------------------------------------------------------------

    def choose(self, choice: Choice) -> None:
        """Draft always, never, or where it pays; the first and the last in spite of a fault of the drafter."""
        self.policy.choice = choice
        if choice != "off":
            self.faults.resume()

    def snapshot(self) -> dict[str, Any]:
        """JSON-ready numbers for ``/server_info`` and metrics."""
        requests = max(1, len(self.running.requests))
        expected = self.expected_tokens
        return {
            "cost_source": self.cost_source,
            "speculation": self.policy.choice,
            "drafting": self.faults.stopped is None
            and (not self.adaptive or self.policy.drafting(requests, self.running.samples)),
            "gain": round(self.policy.gain(requests, self.running.samples), 4),
            "switches": self.policy.switches,
            "plain_steps": self.plain_steps,
            "copied_rounds": self.copied_rounds,
            "copied_tokens": self.copied_tokens,
            "forced_budget": self.forced,
            "faults": dict(self.faults.counts),
            "drafting_stopped": self.faults.stopped,
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


def _limit(options: RequestOptions, gamma: int) -> int:
    return gamma if options.max_draft_tokens is None else min(options.max_draft_tokens, gamma)
