"""The values of a round, in the order in which they come to be; each is written once.

``Load -> StepPlan -> Drafted -> Admission -> StepResult``: what runs, what is decided before it drafts, what
scheduling sees of the draft, what is verified, and what came of it. ``R`` is the number of running requests and
``gamma`` the number of drafted tokens a request.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


def _nobody() -> Int64:
    return np.zeros(0, dtype=np.int64)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Load:
    """What a step is planned for."""

    #: ``[R]`` most drafted tokens that each request allows, 0 to gamma.
    limits: Int64
    #: ``[R]`` requests that sample (temperature above 0).
    sampled: Bool
    #: Names of ``R`` workloads; requests that behave alike share one.
    workloads: tuple[str, ...]
    #: Cached tokens of all requests.
    context: int
    #: Ascending numbers of rows that forwards run with; None: any.
    buckets: Int64 | None = None
    #: ``[R]`` rows of the request pool, and which of its owners each is; the overlapped strategy needs them.
    slots: Int64 = dataclasses.field(default_factory=_nobody)
    generations: Int64 = dataclasses.field(default_factory=_nobody)
    #: Whether the requests are the measurement at start-up.
    profile: bool = False
    #: Whether nothing may be drafted: the drafter is at fault.
    stopped: bool = False

    @property
    def requests(self) -> int:
        """R."""
        return len(self.limits)

    @property
    def sampling(self) -> int:
        """Requests that sample."""
        return int(self.sampled.sum())

    @property
    def samples(self) -> bool:
        """Whether most requests sample."""
        return 2 * self.sampling > self.requests


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepPlan:
    """A step as it is decided before it drafts."""

    load: Load
    #: ``[R]`` most drafted tokens of each request to verify.
    limits: Int64
    #: Tokens to draft a request; 0: a decode step, without a draft forward.
    depth: int
    #: Verify everything that may be.
    verify_all: bool = False
    #: A step of the measurement at start-up: nothing is learned from it but its cost.
    profile: bool = False
    #: Whether requests may repeat their own text although nothing is drafted.
    prompt_lookup: bool = False
    #: The overlapped strategy decides here already how many drafted tokens are verified, of which so many pay, and
    #: ``[n]`` of which requests all is verified, and first.
    budget: int = 0
    paying: int = 0
    first: Int64 = dataclasses.field(default_factory=_nobody)

    @property
    def drafts(self) -> bool:
        """Whether the draft forward runs."""
        return self.depth > 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drafted:
    """What scheduling sees of a draft: never which tokens."""

    #: ``[R, gamma]`` calibrated, 0 beyond the depth; of copied tokens their chance.
    confidence: Float64
    #: Tokens drafted a request; of prompt lookup alone, those it is counted as.
    depth: int
    #: ``[R]`` requests whose block repeats their own text, and how many tokens of it.
    copied: Bool
    copied_depth: int = 0
    #: Whether there is only prompt lookup: no draft forward ran.
    alone: bool = False
    #: ``[R]`` requests whose confidences cannot be used.
    unsound: Bool

    @classmethod
    def of(cls, confidence: Float64, depth: int) -> Drafted:
        """A draft without prompt lookup, all of it sound."""
        none = np.zeros(len(confidence), dtype=bool)
        return cls(confidence=confidence, depth=depth, copied=none, unsound=none)

    @property
    def width(self) -> int:
        """Drafted or copied tokens of a request that may be verified."""
        return max(self.depth, self.copied_depth)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Admission:
    """How much of a round is verified, and which tokens."""

    #: ``[R, gamma]`` survival by which tokens are admitted, 0 where one may not be.
    survival: Float64
    #: ``[R * gamma]`` candidates ``position * R + request``, the likeliest first; the first ``budget`` are verified.
    order: Int64
    budget: int
    #: Tokens expected of the round, the requests' own included.
    expected: float
    #: ``[R, gamma]`` survival as it was before anything was put first, and the candidates whose verification pays.
    valued: Float64
    paying: Int64

    @classmethod
    def nothing(cls, requests: int, gamma: int) -> Admission:
        """Of a decode step: only anchors are verified."""
        values, order = np.zeros((requests, gamma)), np.arange(requests * gamma)
        return cls(
            survival=values,
            order=order,
            budget=0,
            expected=float(requests),
            valued=values,
            paying=order[:0],
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepResult:
    """A step that is over."""

    plan: StepPlan
    #: What it drafted; None: a decode step, whatever was planned.
    drafted: Drafted | None = None
    #: What was verified of it; None where that was decided on the device.
    admission: Admission | None = None
    #: ``[R]`` drafted tokens verified and kept of each request.
    lens: Int64
    counts: Int64
    #: ``[R, gamma]`` logits of the confidences before calibration.
    logits: Float64 | None = None
    #: Seconds from its beginning to its end, which is at ``now`` of a monotonic clock.
    seconds: float
    now: float
