"""Rounds while the device is busy: the host launches a step while the one before still runs.

So how much is verified is decided from confidences that have arrived, which tokens those are is decided on the
device, and what a step cost and brought is learned when it is over. Nothing in a step waits for one that runs; a
command or a question to the server does (:meth:`Rounds.catch_up`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from dspark_sglang.core.device import to_device, to_host
from dspark_sglang.core.round import Drafted, Load, StepPlan, StepResult
from dspark_sglang.core.schedule.scheduler import Scheduler, before_all
from dspark_sglang.core.step import Step
from dspark_sglang.core.sts import BINS
from dspark_sglang.serving.ops import Admitted
from dspark_sglang.serving.rounds import Block, Round, Rounds, pack, unpack
from dspark_sglang.serving.sglang_types import ScheduleBatch

#: Rounds between copies of the correction of confidences to the device.
_REFRESH = 16


class _Host:
    """A moment where the host does the work: every step is over when the next is decided."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def wait(self) -> None:
        """It has passed."""

    def since(self, earlier: _Host) -> float:
        return self.at - earlier.at


class _Device:
    """A moment of the device's current stream."""

    def __init__(self) -> None:
        self._event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()

    def since(self, earlier: _Device) -> float:
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds / 1e3


class DeviceSurvival:
    """Survivals of a draft as tokens are admitted by, without a wait for the device; constant memory."""

    def __init__(self, scheduler: Scheduler, step: Step, device: torch.device) -> None:
        self._step = step
        self._reliability = scheduler.reliability
        self._device = device
        #: ``[2, gamma, BINS]`` float32 correction of confidences on the device, and rounds since it was copied.
        self._shift = torch.zeros((2, scheduler.gamma, BINS), device=device)
        self._age = 0
        self._before_all = torch.from_numpy(before_all(scheduler.gamma)).to(device)

    def of(self, confidence: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """As :func:`dspark_sglang.core.schedule.admission.survival` of corrected confidences; whole blocks rank before all.

        Args:
            confidence: ``[R, gamma]`` float32, calibrated.

        Returns:
            ``[R, gamma]`` float64, 0 where nothing may be verified.
        """
        of = np.stack([plan.limits, plan.load.sampled, np.zeros_like(plan.limits)])
        of[2, plan.first] = 1
        known = to_device(torch.from_numpy(of), self._device)
        if self._age >= _REFRESH:
            correction = torch.from_numpy(self._reliability.shift()).float()
            self._shift, self._age = to_device(correction, self._device), 0
        return self._step.survival(confidence, known, self._shift, self._before_all)

    def learned(self) -> None:
        """One more round was learned from."""
        self._age += 1

    def outdate(self) -> None:
        """What is known of confidences has changed at once: the device gets it with the next round."""
        self._age = _REFRESH


class _Arriving(NamedTuple):
    """A step that may still run."""

    rounds: OverlappedRounds
    running: Round
    #: ``[2, R]`` int64 drafted tokens verified and kept, and ``[2, R, gamma]`` float32 calibrated confidences and
    #: their logits, on their way to the host; None: a decode step.
    pair: torch.Tensor | None
    scores: torch.Tensor | None
    start: Any
    end: Any
    now: float

    def result(self) -> StepResult:
        """What came of the step, once it is over."""
        self.end.wait()
        return self.rounds.arrived(self)


class OverlappedRounds(Rounds):
    """Steps are decided before the last ones are known, and learned from late."""

    form = "ahead"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.device_survival = DeviceSurvival(self.scheduler, self._ops.step, self._device)
        self._moment: Callable[[], Any] = _Device if self._device.type == "cuda" else _Host
        self._began: Any = None
        #: ``[R, gamma]`` float64 on the device: survival by which the running step admits.
        self.survival: torch.Tensor | None = None
        self._scores: torch.Tensor | None = None
        self._pair: torch.Tensor | None = None

    def begin(self, batch: ScheduleBatch) -> StepPlan:
        self.survival = self._scores = self._pair = None
        return super().begin(batch)

    def started(self) -> None:
        self._began = self._moment()

    @property
    def budget(self) -> int | None:
        return self.running.plan.budget if self.running.depth else 0

    def admitted(self, device: torch.device) -> Admitted | None:
        running = self.running
        if self.survival is not None and running.depth:
            return self._ops.admit_there(self.survival, running.plan.budget)
        return self._ops.anchors(len(running.requests), device)  # nothing was drafted

    def outcome(self, pair: torch.Tensor) -> None:
        if not self.running.depth:
            self.decoded(pair.shape[1])
            return
        assert self._scores is not None
        self._pair, self._scores = to_host(pair), to_host(self._scores)

    def ended(self) -> None:
        drafted = self._pair is not None
        arriving = _Arriving(
            rounds=self,
            running=self.running,
            pair=self._pair,
            scores=self._scores if drafted else None,
            start=self._began,
            end=self._moment(),
            now=time.perf_counter(),
        )
        self.scheduler.observe(arriving.result)

    def arrived(self, step: _Arriving) -> StepResult:
        """What came of a step that is over."""
        running = step.running
        seconds = step.end.since(step.start)
        self.telemetry.took(seconds, running.depth > 0)
        if step.pair is None or step.scores is None:
            return StepResult(
                plan=running.plan,
                lens=running.lens,
                counts=running.counts,
                seconds=seconds,
                now=step.now,
            )
        lens, counts = step.pair.numpy()
        self.telemetry.observe_round(lens, counts, running.depth)
        self.device_survival.learned()
        everybody = np.ones(len(lens), dtype=bool)
        confidence, unsound = self.faults.screened(
            step.scores[0].double().numpy(), everybody, running.requests
        )
        return StepResult(
            plan=running.plan,
            drafted=Drafted(
                confidence=confidence, depth=running.depth, copied=~everybody, unsound=unsound
            ),
            lens=lens,
            counts=counts,
            logits=step.scores[1].numpy(),
            seconds=seconds,
            now=step.now,
        )

    def recalibrated(self) -> None:
        super().recalibrated()
        self.device_survival.outdate()

    def _load(self, batch: ScheduleBatch) -> Load:
        pool = batch.req_to_token_pool
        slots = batch.req_pool_indices_cpu.long()
        return dataclasses.replace(
            super()._load(batch),
            slots=slots.numpy(),
            generations=pool.req_generation[slots].numpy(),
        )

    def _agreed(self, plan: StepPlan) -> StepPlan:
        if self._ranks.count == 1:
            return plan
        return unpack(self._ranks.broadcast_host(pack(plan), "plan"), plan)

    def _taken(self, running: Round, block: Block) -> torch.Tensor:
        self._scores = block.scores
        self.survival = self.device_survival.of(block.scores[0], running.plan)
        if self._ranks.count == 1:
            return block.tokens
        # Rank 0's survivals are what every rank admits by.
        packed = torch.cat([self.survival.view(torch.int64).flatten(), block.tokens.flatten()])
        packed = self._ranks.broadcast(packed, "block").view(2, *block.tokens.shape)
        self.survival = packed[0].view(torch.float64)
        return packed[1]

    def _over(self, running: Round, seconds: float, now: float) -> None:
        raise AssertionError("an overlapped step is over when it arrives")
