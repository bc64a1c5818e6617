"""Where a server's steps meet the scheduler: the running round, and how its values get where they are needed.

One object a scheduler process. SGLang calls our proposer, planner and verifier one after the other; each gives what it
has found to :class:`Rounds` and asks it for what the others have, and none knows which strategy it serves.
"""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from dspark_sglang.core.round import (
    Admission,
    Bool,
    Drafted,
    Int64,
    Load,
    StepPlan,
    StepResult,
)
from dspark_sglang.core.schedule import admission_order
from dspark_sglang.core.schedule.scheduler import Scheduler
from dspark_sglang.serving.faults import Faults
from dspark_sglang.serving.ops import Admitted, Ops
from dspark_sglang.serving.options import read_options
from dspark_sglang.serving.prompt_lookup import Copies
from dspark_sglang.serving.sglang_types import Req, ScheduleBatch
from dspark_sglang.serving.telemetry import Telemetry

if TYPE_CHECKING:
    from dspark_sglang.serving.tensor_parallel import Ranks


class Block(NamedTuple):
    """A drafted block as the proposer has it."""

    #: ``[R, gamma]`` int64.
    tokens: torch.Tensor
    #: ``[2, R, gamma]`` float32: calibrated confidences, and their logits; 0 beyond the depth.
    scores: torch.Tensor
    #: Tokens drafted a request.
    depth: int
    #: Requests whose block repeats their own text, and whether there are only those: no draft forward ran.
    copies: Copies | None = None
    alone: bool = False

    @property
    def copied(self) -> Bool:
        """``[R]`` requests whose block repeats their own text."""
        found = np.zeros(len(self.tokens), dtype=bool)
        if self.copies is not None:
            found[self.copies.rows] = True
        return found

    @property
    def copied_depth(self) -> int:
        """Most tokens that a request repeats."""
        return 0 if self.copies is None else self.copies.tokens.shape[1]


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class Round:
    """The running round; each value is set by the part that finds it."""

    plan: StepPlan
    #: SGLang's requests.
    requests: Sequence[Req]
    #: Tokens drafted a request, and those of one that may be verified; 0: a decode step, whatever was planned.
    depth: int = 0
    width: int = 0
    #: Whether there is only prompt lookup: no draft forward ran.
    alone: bool = False
    drafted: Drafted | None = None
    admission: Admission | None = None
    #: ``[R, gamma]`` logits of the confidences.
    logits: torch.Tensor | None = None
    #: ``[R]`` drafted tokens verified and kept.
    lens: Int64 = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    counts: Int64 = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def decodes(self) -> None:
        """Nothing is drafted or looked up after all: only anchors are verified."""
        self.depth = self.width = 0
        self.alone, self.drafted, self.admission = False, None, None


class Rounds(abc.ABC):
    """Runs the rounds of one scheduler process by a strategy."""

    #: How what is verified was decided, in the counters of what ran.
    form = "early-stop"

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        faults: Faults,
        telemetry: Telemetry,
        ops: Ops,
        ranks: Ranks,
        device: torch.device,
        buckets: Callable[[int], Int64 | None],
    ) -> None:
        """Args:
        device: the target's.
        buckets: numbers of rows that verify forwards of so many requests run with; None: any.
        """
        self.scheduler = scheduler
        self.faults = faults
        self.telemetry = telemetry
        self.gamma = scheduler.gamma
        self._ops = ops
        self._ranks = ranks
        self._device = device
        self._buckets = buckets
        self._start = 0.0
        nobody = np.zeros(0, dtype=np.int64)
        load = Load(limits=nobody, sampled=nobody > 0, workloads=(), context=0)
        #: The running round.
        self.running = Round(plan=StepPlan(load=load, limits=nobody, depth=0), requests=())

    # -- in the order of a step --------------------------------------------------------------

    def begin(self, batch: ScheduleBatch) -> StepPlan:
        """Decide what the step of an SGLang ``ScheduleBatch`` does, the same on every rank."""
        load = self._load(batch)
        with self.telemetry.timed("plan"):
            plan = self.scheduler.plan(load)
        plan = self._agreed(plan)
        self.running = Round(plan=plan, requests=list(batch.reqs))
        return plan

    def started(self) -> None:
        """The step's work begins."""
        self._start = time.perf_counter()

    def take(self, block: Block) -> torch.Tensor:
        """Take in a block and decide how much of it is verified.

        Returns:
            ``[R, gamma]`` int64 tokens, the same on every rank.
        """
        running = self.running
        running.depth, running.alone = block.depth, block.alone
        running.width = max(block.depth, block.copied_depth)
        return self._taken(running, block)

    @property
    def budget(self) -> int | None:
        """Drafted tokens that the running step verifies; None: all."""
        return self._admission().budget

    def admitted(self, device: torch.device) -> Admitted | None:
        """Which tokens those are; None: all."""
        found = self._admission()
        return self._ops.admit(found.survival, found.order, found.budget, device)

    def outcome(self, pair: torch.Tensor) -> None:
        """Take in ``[2, R]`` int64 drafted tokens verified and kept of each request."""
        running = self.running
        if not running.depth:
            self.decoded(pair.shape[1])
            return
        self.telemetry.observe_later(pair, running.depth)
        running.lens, running.counts = pair.cpu().numpy()

    def decoded(self, requests: int) -> None:
        """Count a step that verified nothing: what it brought is known without asking the device."""
        none = np.zeros(requests, dtype=np.int64)
        self.telemetry.observe_round(none, none, 0)
        self.running.lens = self.running.counts = none

    def ended(self) -> None:
        """The step's work is done, or on its way; learn from what is over."""
        now = time.perf_counter()
        self.telemetry.took(now - self._start, self.running.depth > 0)
        self._over(self.running, now - self._start, now)

    def catch_up(self) -> None:
        """Learn from every step there was, also from one that is still to end."""
        self.scheduler.catch_up()

    def recalibrated(self) -> None:
        """Confidences mean something else from now on."""
        self.scheduler.recalibrated()

    def snapshot(self) -> dict[str, Any]:
        """JSON-ready numbers for ``/server_info`` and metrics."""
        known, stopped = self.scheduler.snapshot(), self.faults.stopped
        return known | {
            "drafting": known["drafting"] and stopped is None,
            "faults": dict(self.faults.counts),
            "drafting_stopped": stopped,
        }

    # -- of a strategy -----------------------------------------------------------------------

    def _load(self, batch: ScheduleBatch) -> Load:
        known = batch.seq_lens_cpu
        lens = [r.kv.kv_committed_len for r in batch.reqs] if known is None else known.tolist()
        options = [read_options(request) for request in batch.reqs]
        most = [self.gamma if o.max_draft_tokens is None else o.max_draft_tokens for o in options]
        return Load(
            limits=np.minimum(np.array(most, dtype=np.int64), self.gamma),
            # SGLang expresses temperature 0 as top_k = 1.
            sampled=np.array([r.sampling_params.top_k > 1 for r in batch.reqs], dtype=bool),
            workloads=tuple(o.workload for o in options),
            context=sum(lens),
            buckets=self._buckets(len(options)),
            profile=any(o.profile for o in options),
            stopped=self.faults.stopped is not None,
        )

    def _agreed(self, plan: StepPlan) -> StepPlan:
        """Rank 0's plan: all ranks run the same forwards, whatever their clocks say."""
        if self._ranks.count == 1:
            return plan
        packed = pack(plan).to(self._device)
        return unpack(self._ranks.broadcast(packed, "plan").cpu(), plan)

    @abc.abstractmethod
    def _taken(self, running: Round, block: Block) -> torch.Tensor:
        """See :meth:`take`."""

    @abc.abstractmethod
    def _over(self, running: Round, seconds: float, now: float) -> None:
        """Learn from the step that has ended."""

    def _admission(self) -> Admission:
        running = self.running
        if running.admission is not None:
            return running.admission
        return Admission.nothing(len(running.requests), self.gamma)


class VerifyAllRounds(Rounds):
    """Every block is verified to its end, and nothing is learned: SGLang's own layout serves them."""

    @property
    def budget(self) -> int | None:
        return None

    def admitted(self, device: torch.device) -> Admitted | None:
        return None

    def outcome(self, pair: torch.Tensor) -> None:
        self.telemetry.observe_later(pair, self.running.depth)

    def _agreed(self, plan: StepPlan) -> StepPlan:
        return plan

    def _taken(self, running: Round, block: Block) -> torch.Tensor:
        running.width = self.gamma
        return self._ranks.broadcast(block.tokens, "block")

    def _over(self, running: Round, seconds: float, now: float) -> None:
        pass


class SynchronousRounds(Rounds):
    """The host has a step's confidences before it verifies, and its outcome before the next step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Seconds that learning from the last round and from the last decode step has taken: a part of such a step.
        self._learning = {True: 0.0, False: 0.0}

    def _taken(self, running: Round, block: Block) -> torch.Tensor:
        running.logits = block.scores[1]
        with self.telemetry.timed("plan"):
            running.drafted = drafted = self._seen(running, block)
            running.admission = admission = self.scheduler.admit(running.plan, drafted)
        if drafted.alone and not admission.budget:
            running.decodes()
            return block.tokens
        if self._ranks.count == 1:
            return block.tokens
        # Rank 0's block on every rank, and how much of it is verified: one broadcast for both.
        survival = torch.from_numpy(np.ascontiguousarray(admission.survival))
        head = torch.cat([torch.tensor([admission.budget]), survival.view(torch.int64).flatten()])
        packed = torch.cat([head.to(block.tokens.device), block.tokens.flatten()])
        packed = self._ranks.broadcast(packed, "block")
        planned = packed[: len(head)].cpu()
        values = planned[1:].view(torch.float64).view(survival.shape).numpy()
        running.admission = dataclasses.replace(
            admission, survival=values, order=admission_order(values), budget=int(planned[0])
        )
        return packed[len(head) :].view(block.tokens.shape)

    def _seen(self, running: Round, block: Block) -> Drafted:
        copied = block.copied
        own = np.zeros_like(copied) if block.alone else ~copied
        confidence, unsound = self.faults.screened(
            block.scores[0].cpu().numpy(), own, running.requests
        )
        return Drafted(
            confidence=confidence,
            depth=block.depth,
            copied=copied,
            copied_depth=block.copied_depth,
            alone=block.alone,
            unsound=unsound,
        )

    def _over(self, running: Round, seconds: float, now: float) -> None:
        drafts = running.drafted is not None
        result = StepResult(
            plan=running.plan,
            drafted=running.drafted,
            admission=running.admission,
            lens=running.lens,
            counts=running.counts,
            logits=None if running.logits is None else running.logits.cpu().numpy(),
            seconds=seconds + self._learning[drafts],
            now=now,
        )
        self.scheduler.observe(lambda: result)
        # Whatever the clock does, learning is a small part of a step.
        self._learning[drafts] = min(max(0.0, time.perf_counter() - now), max(0.0, seconds))


def pack(plan: StepPlan) -> torch.Tensor:
    """``[5 + 2R]`` int64 on the host: what ranks have to agree on."""
    first = np.zeros(len(plan.limits), dtype=np.int64)
    first[plan.first] = 1
    flags = [plan.depth, plan.verify_all, plan.profile, plan.prompt_lookup, plan.budget]
    return torch.from_numpy(np.concatenate([np.array(flags, dtype=np.int64), first, plan.limits]))


def unpack(packed: torch.Tensor, own: StepPlan) -> StepPlan:
    """The plan that :func:`pack` was given, of the same load as a rank's own."""
    depth, verify_all, profile, lookup, budget = packed[:5].tolist()
    first, limits = packed[5:].numpy().reshape(2, -1)
    return dataclasses.replace(
        own,
        limits=limits,
        depth=depth,
        verify_all=bool(verify_all),
        profile=bool(profile),
        prompt_lookup=bool(lookup),
        budget=budget,
        first=np.flatnonzero(first),
    )
