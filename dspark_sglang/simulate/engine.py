"""One replica: requests queue, are prefilled, and take part in steps until they are answered.

As in SGLang without overlap: what waits is prefilled before anything decodes, and all running requests take
part in every step. Steps are decided by the server's own scheduler
(:mod:`dspark_sglang.core.schedule.scheduler`), asked and told in the order in which the worker does that, and learn
as in the server. Only the models are simulated: how long a step takes, what the confidences are, what is accepted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec
import numpy as np

from dspark_sglang.core.round import Drafted, Float64, Int64, Load, StepResult
from dspark_sglang.core.schedule import lengths
from dspark_sglang.core.schedule.cost_model import CostModel
from dspark_sglang.core.schedule.policy import Choice
from dspark_sglang.core.schedule.scheduler import Overlapped, Scheduler, Synchronous, VerifyAll
from dspark_sglang.errors import ConfigError
from dspark_sglang.simulate.acceptance import Mixture
from dspark_sglang.simulate.arrivals import Requests
from dspark_sglang.simulate.costs import StepTimes

#: ``none``: no drafter; ``fixed``: every drafted token is verified; ``adaptive`` and ``lagged``: the
#: scheduler decides from this step's confidences or from those two steps old.
Mode = Literal["none", "fixed", "adaptive", "lagged"]
MODES: tuple[Mode, ...] = ("none", "fixed", "adaptive", "lagged")
_STRATEGIES: dict[Mode, type[Scheduler]] = {
    "fixed": VerifyAll,
    "adaptive": Synchronous,
    "lagged": Overlapped,
}
#: Steps between two calls of ``progress``.
_TELL_EVERY = 512


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """How a replica serves."""

    mode: Mode = "adaptive"
    #: Draft where it pays, always, or never.
    speculation: Choice = "auto"
    #: Most requests at once, and most tokens of context over all of them (None: no limit).
    slots: int = 256
    pool: int | None = None
    #: Most tokens of a prefill step.
    chunk: int = 8192
    #: Whether the server prefills; otherwise prompts come computed, as to a decoding node.
    prefill: bool = True
    #: Whether requests sample (temperature above 0).
    sampled: bool = True
    #: Spread of step times around the model's (of their logarithm).
    noise: float = 0.0
    #: Closed loop: requests that are always there; None: requests come when they come.
    users: int | None = None
    #: Seconds after which it stops; None: when all requests are answered.
    until: float | None = None
    #: Seconds from which tokens and steps are counted.
    warm: float = 0.0
    #: Tokens of the captured graphs are multiples of this (lagged budgets fill them); 0: none.
    bucket: int = 0
    seed: int = 0


class Counts(msgspec.Struct, kw_only=True):
    """What happened from ``warm`` on; a round counts once for each request, as the server counts."""

    steps: int = 0
    rounds: int = 0
    plain_rounds: int = 0
    verified: int = 0
    committed: int = 0
    tokens: int = 0
    prefills: int = 0
    #: Seconds of prefill, and in all.
    prefill_s: float = 0.0
    seconds: float = 0.0


class Result(msgspec.Struct, kw_only=True):
    """One replica's run. Arrays have one entry a request that was answered, in order of their end."""

    counts: Counts
    #: Seconds: when it came, got its first token, its last one.
    came: Float64
    first: Float64
    ended: Float64
    #: Tokens of its answer.
    output: Int64
    #: Which of the given requests.
    number: Int64
    #: Requests that came, and that were running or waiting at the end.
    arrived: int
    left: int
    #: Steps, prefills, arrivals and ends in all.
    events: int
    interrupted: bool = False


class Replica:
    """Serves some requests; :meth:`run` once."""

    def __init__(
        self,
        setting: Setting,
        requests: Requests,
        *,
        times: StepTimes,
        blocks: Mixture | None = None,
        cost: CostModel | None = None,
    ) -> None:
        """Args:
            times: how long steps really take.
            blocks: what drafted blocks are worth; needed unless nothing is drafted.
            cost: what the scheduler knows of step times at the start; it learns on.

        Raises:
            ConfigError: a setting that no server has, or a request that no pool holds.
        """
        _check(setting, requests, times, blocks)
        self.setting, self.requests, self.times = setting, requests, times
        self.rng = np.random.default_rng(setting.seed)
        self.now = 0.0
        self.counts = Counts()
        self.events = 0
        self._steps = 0
        self._next = 0
        self._waiting: deque[int] = deque()
        self._context_left = np.inf if setting.pool is None else float(setting.pool)
        self._free = list(range(setting.slots - 1, -1, -1))
        self._generation = np.zeros(setting.slots, dtype=np.int64)
        #: Of running requests: number, slot, tokens still to make, cached tokens.
        self._number = np.zeros(0, dtype=np.int64)
        self._slot = np.zeros(0, dtype=np.int64)
        self._remaining = np.zeros(0, dtype=np.int64)
        self._cached = np.zeros(0, dtype=np.int64)
        self._came = np.array(requests.at, dtype=np.float64)
        self._first = np.full(len(requests.at), np.nan)
        self._ended: list[tuple[Int64, float]] = []
        self._blocks = blocks
        self.scheduler: Scheduler | None = None
        if setting.mode != "none":
            self.scheduler = _STRATEGIES[setting.mode](gamma=times.gamma)
            self.scheduler.choose(setting.speculation)
            if cost is not None:
                self.scheduler.cost.restore(cost.state())

    # -- the loop ----------------------------------------------------------------------------

    def run(self, progress: Callable[[int, float], None] = lambda answered, now: None) -> Result:
        """Serve until all are answered, or the setting's time is up.

        Args:
            progress: told how many requests were answered and the simulated time, now and then.

        An interrupt ends the run early and leaves what happened so far.
        """
        interrupted = False
        try:
            self._serve(progress)
        except KeyboardInterrupt:
            interrupted = True
        self.counts.seconds = max(0.0, self.now - self.setting.warm)
        return self._result(interrupted)

    def _serve(self, progress: Callable[[int, float], None]) -> None:
        setting = self.setting
        until = np.inf if setting.until is None else setting.until
        for _ in range(min(setting.users or 0, len(self._came))):
            self._arrive(0.0)
        answered = 0
        while self.now < until:
            if setting.users is None:
                self._take_arrivals()
            if self._waiting and self._free and self._fits(self._waiting[0]):
                self._prefill()
            elif len(self._number):
                self._step()
            elif setting.users is None and self._next < len(self._came):
                self.now = float(self._came[self._next])
                continue
            else:
                return
            self._steps += 1
            if self._steps % _TELL_EVERY == 0:
                answered = sum(len(ended) for ended, _ in self._ended)
                progress(answered, self.now)

    def _take_arrivals(self) -> None:
        behind = int(np.searchsorted(self._came, self.now, side="right"))
        if behind > self._next:
            self._waiting.extend(range(self._next, behind))
            self.events += behind - self._next
            self._next = behind

    def _arrive(self, now: float) -> None:
        """A user of the closed loop sends the next request."""
        if self._next < len(self._came):
            self._came[self._next] = now
            self._waiting.append(self._next)
            self._next += 1
            self.events += 1

    def _fits(self, number: int) -> bool:
        return self._needs(number) <= self._context_left

    def _needs(self, number: int) -> float:
        return float(self.requests.prompt[number] + self.requests.output[number])

    # -- prefill -----------------------------------------------------------------------------

    def _prefill(self) -> None:
        """One batch of waiting prompts, the oldest first; their first tokens come at its end."""
        setting, tokens = self.setting, 0
        chosen: list[tuple[int, int]] = []
        while self._waiting and self._free and self._fits(self._waiting[0]):
            number = self._waiting[0]
            fresh = int(self.requests.fresh[number])
            if chosen and setting.prefill and tokens + fresh > setting.chunk:
                break
            self._waiting.popleft()
            self._context_left -= self._needs(number)
            chosen.append((number, self._free.pop()))
            tokens += fresh
        if setting.prefill:
            # A prompt beyond the limit takes steps of its own, before anything decodes.
            pieces = [min(setting.chunk, tokens - at) for at in range(0, tokens, setting.chunk)]
            seconds = sum(self.times.prefill(piece, len(chosen)) for piece in pieces)
            seconds = self._noisy(seconds) + self.times.between(len(chosen))
            self.now += seconds
            self.events += len(pieces)
            if self.now >= setting.warm:
                self.counts.prefills += len(pieces)
                self.counts.prefill_s += seconds
                self.counts.tokens += len(chosen)
        numbers = np.array([number for number, _ in chosen], dtype=np.int64)
        slots = np.array([slot for _, slot in chosen], dtype=np.int64)
        self._generation[slots] += 1
        self._number = np.concatenate([self._number, numbers])
        self._slot = np.concatenate([self._slot, slots])
        self._cached = np.concatenate([self._cached, self.requests.prompt[numbers]])
        left = self.requests.output[numbers]
        if setting.prefill:
            left = left - 1
            self._first[numbers] = self.now
        self._remaining = np.concatenate([self._remaining, left])
        self._finish()

    # -- decoding ----------------------------------------------------------------------------

    def _step(self) -> None:
        count, context = len(self._number), int(self._cached.sum())
        if self.scheduler is None:
            seconds = self._noisy(self.times.plain(count, context, self._sampled(count)))
            made: Int64 = np.ones(count, dtype=np.int64)
            lens, drafted = made * 0, False
        else:
            made, lens, seconds, drafted = self._scheduled(self.scheduler, count, context)
        committed, verified = int(made.sum()), int(lens.sum())
        np.minimum(made, self._remaining, out=made)
        self.now += seconds + self.times.between(count)
        if not self.setting.prefill:
            new = np.isnan(self._first[self._number])
            self._first[self._number[new]] = self.now
        self._remaining -= made
        self._cached += made
        self.events += 1
        if self.now >= self.setting.warm:
            own = self.counts
            own.steps += 1
            own.tokens += int(made.sum())
            if drafted:
                own.rounds += count
                own.verified += verified
                own.committed += committed
            else:
                own.plain_rounds += count
        self._finish()

    def _scheduled(
        self, scheduler: Scheduler, count: int, context: int
    ) -> tuple[Int64, Int64, float, bool]:
        """One step as the worker runs it: tokens made ``[R]``, drafted tokens verified ``[R]``, seconds."""
        assert self._blocks is not None
        gamma = scheduler.gamma
        load = Load(
            limits=np.full(count, gamma, dtype=np.int64),
            sampled=np.full(count, self.setting.sampled),
            workloads=("",) * count,
            context=context,
            buckets=self._buckets(count),
            slots=self._slot,
            generations=self._generation[self._slot],
        )
        plan = scheduler.plan(load)
        drafted, logits, depth = None, np.zeros((count, gamma)), plan.depth
        if plan.drafts:
            confidence = np.zeros((count, gamma))
            rows = self._blocks.rows(self.rng, self.requests.domain[self._number])
            confidence[:, :depth] = self._blocks.confidence[rows, :depth]
            logits[:, :depth] = self._blocks.logits[rows, :depth]
            drafted = Drafted.of(confidence, depth)
        admission = scheduler.admit(plan, drafted)
        lens = lengths(admission.order, admission.budget, requests=count)
        counts = lens
        if plan.drafts:
            kept = self.rng.random((count, gamma)) < self._blocks.chance[rows]
            counts = np.minimum(np.logical_and.accumulate(kept, axis=1).sum(axis=1), lens)
        sampled = self._sampled(count)
        if plan.drafts:
            seconds = self.times.round(count, int(lens.sum()), context, sampled)
        else:
            seconds = self.times.plain(count, context, sampled)
        seconds = self._noisy(seconds)
        result = StepResult(
            plan=plan,
            drafted=drafted,
            admission=admission,
            lens=lens,
            counts=counts,
            logits=logits,
            seconds=seconds,
            now=self.now + seconds,
        )
        scheduler.observe(lambda: result)
        return counts + 1, lens, seconds, plan.drafts

    def _buckets(self, count: int) -> Int64 | None:
        bucket = self.setting.bucket
        if not bucket:
            return None
        most = count * (1 + self.times.gamma)
        return np.arange(bucket, most + 2 * bucket, bucket)

    def _sampled(self, count: int) -> int:
        return count if self.setting.sampled else 0

    def _noisy(self, seconds: float) -> float:
        if not self.setting.noise:
            return seconds
        return seconds * float(np.exp(self.setting.noise * self.rng.standard_normal()))

    def _finish(self) -> None:
        over = self._remaining <= 0
        if not over.any():
            return
        ended = self._number[over]
        self._ended.append((ended, self.now))
        self._free += self._slot[over].tolist()
        self._context_left += float(
            (self.requests.prompt[ended] + self.requests.output[ended]).sum()
        )
        self.events += len(ended)
        stay = ~over
        self._number, self._slot = self._number[stay], self._slot[stay]
        self._remaining, self._cached = self._remaining[stay], self._cached[stay]
        if self.setting.users is not None:
            for _ in range(len(ended)):
                self._arrive(self.now)

    def _result(self, interrupted: bool) -> Result:
        number = np.concatenate([np.zeros(0, np.int64), *(ended for ended, _ in self._ended)])
        times = [np.full(len(ended), now) for ended, now in self._ended]
        return Result(
            counts=self.counts,
            came=self._came[number],
            first=self._first[number],
            ended=np.concatenate([np.zeros(0), *times]),
            output=self.requests.output[number],
            number=number,
            arrived=self._next,
            left=len(self._waiting) + len(self._number),
            events=self.events,
            interrupted=interrupted,
        )


def _check(setting: Setting, requests: Requests, times: StepTimes, blocks: Mixture | None) -> None:
    for name, value, least in (
        ("slots", setting.slots, 1),
        ("chunk", setting.chunk, 1),
        ("users", setting.users, 1),
        ("noise", setting.noise, 0),
        ("warm", setting.warm, 0),
        ("bucket", setting.bucket, 0),
    ):
        if value is not None and not least <= value < np.inf:
            raise ConfigError(f"{name} is {value}.", expected=f"at least {least}", fix="Raise it.")
    if not len(requests.at):
        raise ConfigError(
            "There are no requests.", expected="at least one", fix="Raise --requests."
        )
    if setting.users is not None and setting.until is not None and setting.until <= setting.warm:
        raise ConfigError(
            f"The run ends after {setting.until:g} s, before counting begins at {setting.warm:g} s.",
            expected="a longer run",
            fix="Raise --seconds.",
        )
    if setting.mode != "none" and (blocks is None or blocks.gamma != times.gamma):
        raise ConfigError(
            f"Blocks of {blocks.gamma if blocks else 'no'} tokens, steps of gamma {times.gamma}.",
            expected="the same drafter for acceptance and step cost",
            fix="Take --cost and --evaluation of one drafter.",
        )
    if setting.pool is not None:
        largest = int((requests.prompt + requests.output).max())
        if largest > setting.pool:
            raise ConfigError(
                f"A request needs {largest} tokens of context, the pool has {setting.pool}.",
                expected="a pool that holds every request",
                fix="Raise --pool or shorten requests.",
            )
