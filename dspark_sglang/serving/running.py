"""A step on its way: what was decided of it, and what is learned from it once it is over."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dspark_sglang.serving.options import RequestOptions

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


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


def _no_numbers() -> Int64:
    return np.zeros(0, dtype=np.int64)


def _no_flags() -> Bool:
    return np.zeros(0, dtype=np.bool_)


@dataclasses.dataclass(slots=True, kw_only=True)
class Running:
    """One step of ``R`` requests."""

    plan: StepPlan
    requests: Sequence[RequestOptions] = ()
    #: SGLang's requests, in the same order.
    owners: Sequence[Any] = ()
    #: Cached tokens of all of them.
    context: int = 0
    #: ``[R]`` most drafted tokens that each request allows.
    limits: Int64 = dataclasses.field(default_factory=_no_numbers)
    #: ``[R]`` requests that sample, how many do, and ``[R]`` those that copy their own text.
    sampled: Bool = dataclasses.field(default_factory=_no_flags)
    sampling: int = 0
    copied: Bool = dataclasses.field(default_factory=_no_flags)
    #: Most tokens that a request copies.
    copied_depth: int = 0
    #: Whether it has only copies: no draft forward.
    undrafted: bool = False
    #: ``[R, gamma]`` calibrated confidences, and the logits ``[R, depth]`` they come from.
    confidence: Float64 | None = None
    logits: Any = None
    #: ``[R]`` requests whose confidences cannot be used; empty: none.
    unsound: Bool = dataclasses.field(default_factory=_no_flags)
    #: Drafted tokens to verify, and tokens expected of the step.
    budget: int = 0
    expected: float = 0.0
    #: Drafted tokens whose verification pays, as decided ahead.
    paying: int = 0
    #: ``[n]`` requests whose blocks are verified whole, whatever pays.
    first: Int64 = dataclasses.field(default_factory=_no_numbers)

    def abandon(self) -> None:
        """Nothing is drafted or copied after all: only anchors are verified."""
        self.plan, self.undrafted, self.budget = self.plan._replace(depth=0), False, 0
        self.copied[:], self.copied_depth = False, 0

    @property
    def samples(self) -> bool:
        """Whether most requests sample."""
        return 2 * self.sampling > len(self.requests)

    @property
    def width(self) -> int:
        """Drafted or copied tokens of a request that may be verified."""
        return max(self.plan.depth, self.copied_depth)
