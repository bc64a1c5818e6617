"""What each step of the server does: whether it drafts, how deep, and how much it verifies.

One object holds all that is learned in service (step cost, gain, acceptance, depth) and everything an
operator can change while the server runs. Only the host side of scheduling is here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dspark_sglang.config import COST_ONLINE
from dspark_sglang.core.depth import DepthCaps, far_apart
from dspark_sglang.core.lookup import CopyBudget, copy_budget
from dspark_sglang.core.policy import Choice, DraftPolicy
from dspark_sglang.core.reliability import Reliability
from dspark_sglang.core.schedule import (
    History,
    admission_order,
    early_stop_budget,
    global_budget,
    lengths,
)
from dspark_sglang.core.steps import CostModel, Step
from dspark_sglang.core.survival import check, survival
from dspark_sglang.serving.options import RequestOptions, read_options

logger = logging.getLogger(__name__)

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

#: Survival of a token that may be admitted is at least this: one that may not has 0.
_ADMISSIBLE = 1e-300
#: Requests of a step whose blocks are verified whole to learn: more would cost more than they teach.
_WHOLE_REQUESTS = 4
#: Weight of the newest step with copies alone, and the most it may last over those before.
_COPY_RATE, _STALLED = 0.05, 1.3
#: While nothing is drafted, steps with copies before one without: it is timed.
_PLAIN_EVERY = 24
#: Steps of a start-up measurement below which it says nothing.
_FEWEST = 48
#: Sources of the step cost besides files: nothing is timed; it is being measured before the server
#: listens.
COST_OFF, COST_UNMEASURED, COST_UNKEPT = "off", "unmeasured", "measured, not kept"


class StepPlan(NamedTuple):
    """One step, decided before it drafts."""

    #: ``[R]`` most drafted tokens of each request.
    limits: Int64
    #: Tokens to draft a request; 0: the draft forward is skipped.
    depth: int
    #: Verify everything that may be.
    whole: bool = False
    #: A step of the start-up measurement: nothing is learned from it but its cost.
    profile: bool = False
    #: Whether requests may copy their own text although nothing is drafted.
    copies: bool = False

    @property
    def draft(self) -> bool:
        """Whether anything is drafted."""
        return self.depth > 0

    def packed(self, device: Any) -> torch.Tensor:
        """``[4 + R]`` int64: what ranks have to agree on."""
        head = [self.depth, int(self.whole), int(self.profile), int(self.copies)]
        return torch.tensor([*head, *self.limits.tolist()], device=device)

    @classmethod
    def unpacked(cls, packed: torch.Tensor) -> StepPlan:
        """The plan that :meth:`packed` was made of."""
        depth, whole, profile, copies, *limits = packed.tolist()
        flags = bool(whole), bool(profile), bool(copies)
        return cls(np.array(limits, dtype=np.int64), depth, *flags)


class Budgeted(NamedTuple):
    """How much of a drafted step is verified."""

    survival: Float64
    order: Int64
    budget: int


class Control:
    """Decides every step of one scheduler process."""

    def __init__(self, *, gamma: int, adaptive: bool, lagged: bool = False) -> None:
        """Args:
        gamma: drafted tokens a request.
        adaptive: steps are timed and scheduled; otherwise everything is drafted and verified.
        lagged: budgets come from confidences two steps old, not from the current ones.
        """
        self.gamma = gamma
        self.adaptive = adaptive
        self.cost = CostModel(gamma=gamma)
        self.policy = DraftPolicy()
        self.reliability = Reliability(gamma=gamma)
        self.depths = DepthCaps(gamma=gamma)
        #: Where the step cost comes from, in words of the settings or as a file.
        self.cost_source = COST_OFF if not adaptive else COST_ONLINE
        #: Share of the drafted tokens to verify whatever pays; None: what pays.
        self.forced: float | None = None
        #: Whether budgets come from confidences two steps old.
        self.lagged = lagged
        self._history: History | None = None
        self._requests: Sequence[RequestOptions] = ()
        self._context = 0
        #: ``[R]`` requests of the running step that sample, and that copy their own text.
        self.sampled = np.zeros(0, dtype=bool)
        self.copied = np.zeros(0, dtype=bool)
        #: Whether the running step has only copies: it has no draft forward.
        self.undrafted = False
        self._copied_depth = 0
        #: Seconds of a step with copies alone over those of a plain step and of what verifying more
        #: adds to a round: a verification costs more than decoding.
        self._dearer = 1.1
        #: ``[R]`` most drafted tokens that each request of the running step allows.
        self._limits = np.zeros(0, dtype=np.int64)
        #: How many requests of the running step sample, and whether most do.
        self._sampling, self._samples = 0, False
        #: First of the requests whose blocks are verified whole next.
        self._whole_turn = 0
        self._profile_step = 0
        self._profile_began: float | None = None
        #: Steps of the measurement at start-up, so far, with their seconds.
        self._profiled: list[tuple[Step, float]] = []
        #: Wall seconds of the measurement at start-up, so far.
        self.profile_seconds = 0.0
        #: Confidence logits of the running step, from the proposer.
        self.logits: Any = None
        self._confidence: Float64 | None = None
        self._budget = 0
        #: Expected tokens of the running step.
        self.expected = 0.0
        self.plan = StepPlan(np.zeros(0, dtype=np.int64), gamma)
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
        self._requests, self._context = options, context
        self.sampled = np.array([r.sampling_params.top_k > 1 for r in requests], dtype=bool)
        self._sampling = int(self.sampled.sum())
        self._samples = 2 * self._sampling > len(options)
        self.copied, self.undrafted = np.zeros(len(options), dtype=bool), False
        self._confidence, self.expected, self._budget = None, float(len(options)), 0
        self._limits = limits = np.array([_limit(o, self.gamma) for o in options], dtype=np.int64)
        self._copied_depth = 0
        self.plan = self._decide(options, limits)
        return self.plan

    def _decide(self, options: Sequence[RequestOptions], limits: Int64) -> StepPlan:
        most = int(limits.max(initial=0))
        if not self.adaptive:
            return StepPlan(limits, self.gamma, whole=True)
        if self.measuring and any(option.profile for option in options):
            return self._profile(limits)
        if not most or self.forced == 0.0:
            return StepPlan(limits, 0)
        decision = self.policy.decide(len(options), self._samples)
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

    @property
    def width(self) -> int:
        """Drafted or copied tokens of a request that may be verified in the running step."""
        return max(self.plan.depth, self._copied_depth)

    def copy(self, rows: Int64, depth: int) -> None:
        """Requests of the running step copy up to ``depth`` tokens, however many are drafted."""
        self.copied[rows], self._copied_depth = True, depth

    def copy_only(self, depth: int) -> None:
        """The running step drafts nothing, but requests of it copy up to ``depth`` tokens of their own text."""
        self.plan, self.undrafted = self.plan._replace(depth=depth), True

    def _profile(self, limits: Int64) -> StepPlan:
        """Every second step is plain, so that both kinds meet the same machine."""
        turn, plain = divmod(self._profile_step, 2)
        self._profile_step += 1
        if plain:
            return StepPlan(limits, 0, profile=True)
        depths = far_apart(self.gamma)
        own = np.minimum(limits, depths[turn % len(depths)])
        return StepPlan(own, self.gamma, whole=True, profile=True)

    # -- between drafting and verifying ------------------------------------------------------

    def budget(
        self,
        confidence: Float64,
        *,
        slots: Int64,
        generations: Int64,
        pool: int,
        buckets: Int64 | None,
    ) -> Budgeted:
        """How many drafted tokens to verify, and in which order they are admitted.

        Args:
            confidence: ``[R, gamma]`` calibrated.
            slots: ``[R]`` rows of the request pool and their generations.
            pool: rows of that pool.
            buckets: numbers of rows that forwards run with; None: any.
        """
        plan, requests = self.plan, len(confidence)
        if not plan.draft:
            values = np.zeros((requests, self.gamma))
            return Budgeted(values, admission_order(values), 0)
        self._confidence = confidence
        # What limits the depth of drafts is no reason to copy less.
        copied = np.minimum(self._limits, self._copied_depth)
        limits = np.where(self.copied, copied, plan.limits)
        allowed = np.arange(self.gamma) < limits[:, None]
        if self.undrafted:
            allowed &= self.copied[:, None]
        check(confidence)  # before a correction hides what is wrong with them
        corrected = self.reliability.corrected(confidence, self.sampled)
        values = survival(np.where(self.copied[:, None], confidence, corrected))
        # One that may not be verified ranks behind all that may.
        values = np.where(allowed, np.maximum(values, _ADMISSIBLE), 0.0)
        order, most = admission_order(values), int(allowed.sum())
        if not self.adaptive:
            return Budgeted(values, order, most)
        if self.undrafted:
            return self._copy_budget(values, order)
        curve = self.cost.curve(requests, self._context, self._sampling)
        if self.lagged and self._history is None:
            self._history = History(slots=pool, gamma=self.gamma)
        if self._history is None:
            paying = early_stop_budget(values, order, curve, buckets)
        else:
            earlier = self._history.advance(slots, generations, values)
            paying = global_budget(earlier, curve, buckets)
        paying = min(paying, most)
        self._learn_depth(order, paying)
        budget, found, paid = paying, values, order[:paying]
        if plan.profile:
            budget = most
        elif plan.whole:
            values = self._some_whole(values, paid)
            order, budget = admission_order(values), int((values > 0.0).sum())
        elif self.forced is not None:
            budget = min(int(self.forced * values.size), most)
        self._budget = budget
        admitted = values.T.reshape(-1)[order[:budget]]
        self.expected = requests + float(admitted.sum())
        if not plan.profile:
            self._learn_gain(found, paid, budget)
        return Budgeted(values, order, budget)

    def _some_whole(self, values: Float64, paying: Int64) -> Float64:
        """Survival ``[R, gamma]`` of what pays and of the whole blocks of a few requests in turn, 0 elsewhere."""
        requests = len(values)
        turn = self._whole_turn + np.arange(min(_WHOLE_REQUESTS, requests))
        self._whole_turn += _WHOLE_REQUESTS
        chosen = np.zeros(values.shape, dtype=bool)
        chosen[turn % requests] = True
        position, row = np.divmod(paying, requests)
        chosen[row, position] = True
        return np.where(chosen, values, 0.0)

    def _copy_budget(self, values: Float64, order: Int64) -> Budgeted:
        """The budget of a step with copies alone; with none that pays it is a plain step."""
        gains = values.T.reshape(-1)[order]
        found = self._copies_alone(gains[gains > _ADMISSIBLE])
        if not found.tokens:
            self.plan, self.undrafted = self.plan._replace(depth=0), False
            self.copied[:], self._copied_depth = False, 0
        admitted = values.T.reshape(-1)[order[: found.tokens]]
        self._budget = found.tokens
        self.expected = len(values) + float(admitted.sum())
        return Budgeted(values, order, found.tokens)

    def _copies_alone(self, gains: Float64) -> CopyBudget:
        requests, load = len(self._requests), (self._context, self._sampling)
        if not self.cost.comparable:
            return CopyBudget(0, 0.0)
        plain = self.cost.plain_seconds(requests, *load)
        return copy_budget(gains, requests, plain, self.cost.curve(requests, *load), self._dearer)

    def skips_draft(self, rows: Int64, chances: Float64) -> bool | None:
        """Whether copies alone are expected to bring more tokens a second than a draft beside them.

        Args:
            rows: ``[n]`` requests of the running step that can copy.
            chances: ``[n, depth]`` of each copied token, given those before it.

        Returns:
            None where too little is known to tell; never where drafting is the operator's choice.
        """
        if self.policy.choice == "on":
            return False
        requests = len(self._requests)
        known = self.policy.learned(requests, self._samples)
        if not self.cost.comparable or known is None:
            return None
        if self.plan.whole:
            return False
        within = np.arange(chances.shape[1]) < self._limits[rows][:, None]
        survives = np.where(within, chances.cumprod(axis=1), 0.0)
        alone = self._copies_alone(-np.sort(-survives[within])).rate
        # A request that copies keeps the better of both; the others what drafts usually bring.
        drafted = max(0.0, known.gain * known.length - 1.0)
        best = np.maximum(survives.sum(axis=1), drafted).sum() + (requests - len(rows)) * drafted
        plain = self.cost.plain_seconds(requests, self._context, self._sampling)
        return alone >= (requests + float(best)) / (known.length * plain)

    def _learn_gain(self, values: Float64, paying: Int64, budget: int) -> None:
        """What drafting brings at the budget that pays, against not drafting.

        Copies are no merit of drafting: the requests that draft stand for all.

        Args:
            values: ``[R, gamma]`` survival.
            paying: tokens whose verification pays, position by position.
            budget: tokens that are verified.
        """
        own = ~self.copied
        if not self.cost.comparable or not own.any():
            return
        requests, load = len(values), (self._context, self._sampling)
        admitted = paying[own[paying % requests]]
        share = requests / int(own.sum())
        tokens = requests + share * float(values.T.reshape(-1)[admitted].sum())
        seconds = self.cost.round_seconds(requests, round(share * len(admitted)), *load)
        plain = self.cost.plain_seconds(requests, *load)
        gain = tokens / seconds / (requests / plain)
        lost = None
        if self.plan.whole:  # it verifies more than pays
            whole = self.cost.round_seconds(requests, budget, *load)
            lost = whole / plain - self.expected / requests
        self.policy.learn(requests, gain, seconds / plain, lost, self._samples)

    def _learn_depth(self, order: Int64, paying: int) -> None:
        if self.plan.depth < self.gamma or self.plan.profile:
            return
        wanted = lengths(order, paying, requests=len(self._requests))
        for workload in {option.workload for option in self._requests}:
            own = [
                row
                for row, option in enumerate(self._requests)
                if option.workload == workload and not self.copied[row]
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
        if not self.plan.draft:
            self.plain_steps += 1
            return
        if self._confidence is None or self.plan.profile or not self.adaptive:
            return
        logits = np.zeros_like(self._confidence)
        raw = self.logits.cpu().numpy()
        logits[:, : raw.shape[1]] = raw
        # What was copied says nothing of the drafter's confidences.
        drafted = np.where(self.copied, 0, lens)
        self.reliability.observe(self._confidence, logits, drafted, counts, self.sampled)
        self.copied_rounds += int(self.copied.sum())
        self.copied_tokens += int(counts[self.copied].sum())
        self.expected_tokens += self.expected
        self.committed_tokens += int(counts.sum()) + len(counts)

    def finished(self, seconds: float, now: float) -> None:
        """Learn what the step cost.

        Args:
            seconds: from its beginning to its end.
            now: seconds of a monotonic clock.
        """
        self._since_plain = 0 if not self.plan.draft else self._since_plain + 1
        if self.plan.profile:
            if self._profile_began is None:
                self._profile_began = now - seconds
            self.profile_seconds = now - self._profile_began
        # Without its draft forward a round is faster than the rounds whose cost is learned.
        if self.undrafted and self.cost.comparable:
            self._learn_copies(seconds)
        if self.adaptive and self._requests and not self.undrafted:
            count = len(self._requests)
            step = Step(count, self._budget, self._context, self.plan.draft, self._sampling)
            self.cost.observe(step, seconds)
            if self.plan.profile:
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

    def _learn_copies(self, seconds: float) -> None:
        requests, load = len(self._requests), (self._context, self._sampling)
        curve = self.cost.curve(requests, *load)
        none, some = curve.seconds(np.array([requests, requests + self._budget]))
        dearer = seconds / (self.cost.plain_seconds(requests, *load) + some - none)
        if 0.0 < dearer < np.inf:  # one step teaches little, a stalled one no more
            self._dearer += _COPY_RATE * (min(dearer, _STALLED * self._dearer) - self._dearer)

    # -- for people --------------------------------------------------------------------------

    def choose(self, choice: Choice) -> None:
        """Draft always, never, or where it pays."""
        self.policy.choice = choice

    def snapshot(self) -> dict[str, Any]:
        """JSON-ready numbers for ``/server_info`` and metrics."""
        requests = max(1, len(self._requests))
        expected = self.expected_tokens
        return {
            "cost_source": self.cost_source,
            "speculation": self.policy.choice,
            "drafting": self.policy.drafting(requests, self._samples) if self.adaptive else True,
            "gain": round(self.policy.gain(requests, self._samples), 4),
            "switches": self.policy.switches,
            "plain_steps": self.plain_steps,
            "copied_rounds": self.copied_rounds,
            "copied_tokens": self.copied_tokens,
            "forced_budget": self.forced,
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
