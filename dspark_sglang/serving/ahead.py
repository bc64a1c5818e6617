"""Scheduling while the device is busy: steps are decided before the last ones are known, and learned from late.

Under overlap scheduling the host launches a step while the one before still runs. So how much is verified
comes from confidences that have arrived (the paper's section 5.2: two steps old), which tokens those are is
decided on the device, and what a step cost and brought is learned when it is over. Nothing in a step waits
for one that runs; a command or a question to the server does (``settle(running=0)``).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dspark_sglang.core.schedule import History
from dspark_sglang.core.sts import BINS
from dspark_sglang.serving.control import ADMISSIBLE, Control, before_all
from dspark_sglang.serving.ranks import Ranks
from dspark_sglang.serving.running import Running, StepPlan
from dspark_sglang.serving.telemetry import Telemetry

Int64 = npt.NDArray[np.int64]

#: Steps that may run while another is decided.
_RUNNING = 1
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


class _Outcome(NamedTuple):
    """What a step that drafted has brought, on its way to the host."""

    #: ``[2, R]`` int64 drafted tokens verified and kept.
    round_: torch.Tensor
    #: ``[2, R, gamma]`` float32 calibrated confidences and their logits.
    confidence: torch.Tensor


class _Launched(NamedTuple):
    """A step that may still run."""

    step: Running
    slots: Int64
    generations: Int64
    outcome: _Outcome | None
    start: Any
    end: Any
    now: float


class Ahead:
    """Decides steps ahead and learns from them late; constant memory."""

    def __init__(self, control: Control, telemetry: Telemetry, device: torch.device) -> None:
        self._control = control
        self._telemetry = telemetry
        self._device = device
        self._moment: Callable[[], Any] = _Device if device.type == "cuda" else _Host
        self._history: History | None = None
        self._launched: deque[_Launched] = deque()
        #: ``[2, gamma, BINS]`` float32 correction of confidences on the device, and rounds learned from since it was copied.
        self._shift = torch.zeros((2, control.gamma, BINS), device=device)
        self._stale = 0
        self._position = torch.arange(control.gamma, device=device)
        self._before_all = torch.from_numpy(before_all(control.gamma)).to(device)
        self._slots = self._generations = np.zeros(0, dtype=np.int64)
        self._confidence: torch.Tensor | None = None
        self._outcome: _Outcome | None = None
        #: ``[R, gamma]`` float64 survival of the running step on the device, 0 where nothing may be verified.
        self.survival: torch.Tensor | None = None
        self._start: Any = None

    # -- before a step -----------------------------------------------------------------------

    def decide(self, slots: Int64, generations: Int64, *, pool: int, buckets: Int64 | None) -> None:
        """Decide how much of the running step is verified.

        Args:
            slots: ``[R]`` rows of the request pool and their generations.
            pool: rows of that pool.
            buckets: numbers of rows that forwards run with; None: any.
        """
        if self._history is None:
            self._history = History(slots=pool, gamma=self._control.gamma)
        self._slots, self._generations = slots, generations
        self._confidence = self._outcome = self.survival = None
        self._control.ahead(self._history.recall(slots, generations), buckets)

    def agree(self, ranks: Ranks) -> None:
        """Take over what rank 0 has decided."""
        if ranks.count == 1:
            return
        step = self._control.running
        first = torch.zeros(len(step.limits), dtype=torch.int64)
        first[torch.from_numpy(step.first)] = 1
        packed = torch.cat([torch.tensor([step.budget]), first, step.plan.packed("cpu")])
        budget, first, plan = ranks.broadcast_host(packed, "plan").split_with_sizes(
            [1, len(first), len(packed) - 1 - len(first)]
        )
        step.budget, step.first = int(budget), first.nonzero().view(-1).numpy()
        step.plan = StepPlan.unpacked(plan)

    def begin(self) -> None:
        """The step's work begins."""
        self._start = self._moment()

    # -- within a step -----------------------------------------------------------------------

    def survive(self, confidence: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Survival of what was drafted as it is admitted by, without a wait for the device.

        As :func:`dspark_sglang.core.survival.survival` of the corrected confidences; what is verified
        whole ranks before all.

        Args:
            confidence, logits: ``[R, gamma]`` float32, calibrated and uncalibrated.

        Returns:
            ``[R, gamma]`` float64.
        """
        self._confidence = torch.stack([confidence, logits])
        step = self._control.running
        known = np.stack([step.plan.limits, step.sampled, np.zeros_like(step.limits)])
        known[2, step.first] = 1
        limits, kind, first = torch.from_numpy(known).to(self._device, non_blocking=True)
        if self._stale >= _REFRESH:
            correction = torch.from_numpy(self._control.reliability.shift()).float()
            self._shift, self._stale = correction.to(self._device, non_blocking=True), 0
        bins = (confidence * BINS).long().clamp_(0, BINS - 1)
        shift = self._shift[kind[:, None], self._position, bins]
        # What is no confidence ranks last; the host finds out when it arrives.
        chances = (confidence.double() + shift).nan_to_num_(nan=0.0).clamp_(0.0, 1.0)
        # One product after the other: a scan in another order could rise along a request.
        columns = [chances[:, 0]]
        for column in chances.unbind(1)[1:]:
            columns.append(columns[-1] * column)
        values = torch.stack(columns, dim=1).clamp_(min=ADMISSIBLE)
        values = torch.where(first[:, None] > 0, self._before_all, values)
        self.survival = torch.where(self._position < limits[:, None], values, 0.0)
        return self.survival

    def outdate(self) -> None:
        """What is known of confidences has changed at once: the device gets it with the next round."""
        self._stale = _REFRESH

    def outcome(self, round_: torch.Tensor) -> None:
        """Take in what the running step has brought.

        Args:
            round_: ``[2, R]`` int64 drafted tokens verified and kept of each request.
        """
        assert self._confidence is not None
        self._outcome = _Outcome(_to_host(round_), _to_host(self._confidence))

    # -- after a step ------------------------------------------------------------------------

    def launched(self) -> None:
        """The running step is launched."""
        self._launched.append(
            _Launched(
                step=self._control.running,
                slots=self._slots,
                generations=self._generations,
                outcome=self._outcome,
                start=self._start,
                end=self._moment(),
                now=time.perf_counter(),
            )
        )

    def settle(self, running: int = _RUNNING) -> None:
        """Learn from all steps but the last ``running``.

        SGLang has read the others' tokens by now, so they are over.
        """
        while len(self._launched) > running:
            self._learn(self._launched.popleft())

    def _learn(self, launched: _Launched) -> None:
        launched.end.wait()
        step, outcome = launched.step, launched.outcome
        if outcome is not None:
            lens, counts = outcome.round_.numpy()
            confidence, step.logits = outcome.confidence
            step.confidence = confidence.double().numpy()
            self._telemetry.observe_round(lens, counts, step.plan.depth)
            with self._telemetry.timed("plan"):
                values = self._control.arrived(step, lens, counts)
                if not step.plan.profile:  # its limits are no property of the requests
                    assert self._history is not None
                    self._history.note(launched.slots, launched.generations, values)
            self._stale += 1
        seconds = launched.end.since(launched.start)
        self._telemetry.took(seconds, step.plan.draft)
        self._control.ended(step, seconds, launched.now)


def _to_host(values: torch.Tensor) -> torch.Tensor:
    """``values`` on the host, once the device has come so far."""
    if values.device.type == "cpu":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
