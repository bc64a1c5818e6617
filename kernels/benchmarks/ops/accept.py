"""Configurations of ``accept``.

In the example every request keeps ``(gamma + 1) // 2`` drafted tokens, the least that is half of them, and
rejects the next. Logits are float32, as they arrive; dense drafted laws bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from benchmarks import ops
from benchmarks.ops import CPU, FLOATS, LISTED, Example
from dspark_kernels.accept import (
    Accepted,
    Adjustments,
    DenseDraft,
    Filters,
    Keys,
    ListedDraft,
    Rows,
    accept,
)
from dspark_kernels.accept.reference import judge

#: Tokens with an adjustment in the example.
ADJUSTED = 256
#: What top-k keeps in the example.
TOP_K = 50


@dataclass(frozen=True)
class Case(ops.Case):
    """One configuration; ``law`` is how the drafted law is given."""

    width: int
    gamma: int = 5
    dtype: torch.dtype = torch.float32
    law: Literal["certain", "dense", "listed"] = "listed"
    coupled: bool = False
    filtered: bool = False
    adjusted: bool = False
    joint: bool = False

    @property
    def name(self) -> str:
        law = f"listed{LISTED}" if self.law == "listed" else self.law
        flags = [f for f in ("coupled", "filtered", "adjusted", "joint") if getattr(self, f)]
        return "-".join([f"gamma{self.gamma}-V{self.width}", FLOATS[self.dtype], law, *flags])

    @property
    def kept(self) -> int:
        """Drafted tokens that each request keeps."""
        return (self.gamma + 1) // 2

    def floor_bytes(self, batch: int) -> int:
        """Every row, the drafted laws that decide (of a filtered row what it keeps), tokens, uniforms, outcome."""
        each = (self.gamma + 1) * self.width * self.dtype.itemsize
        each += 8 * self.gamma + 8 * (self.kept + 2) + 12 + 16
        if not self.coupled and self.law == "dense":
            each += (self.gamma if self.joint else 1) * (TOP_K if self.filtered else self.width) * 2
        if not self.coupled and self.law == "listed":
            each += (self.gamma if self.joint else self.kept + 1) * LISTED * 12
        if self.adjusted:
            each += ADJUSTED * (8 + 4 + 4 + 4) + 20
        return batch * (each + 12 * self.filtered + 20 * self.coupled)

    def example(self, batch: int, device: torch.device = CPU) -> Example:
        """One request, ``batch`` times over."""
        given = ops.on(device, self.operands(batch))

        def run() -> Accepted:
            return accept(**given, backend="triton")

        def max_error(result: Accepted) -> float:
            # Made again: the kernel changes adjusted logits in place.
            once = ops.on(device, self.operands(1))
            ops.check_equal(result, judge(**once).outcome, self.name)
            return 0.0

        return Example(run, max_error)

    def operands(self, batch: int) -> dict[str, Any]:
        """Arguments of ``accept``, on the CPU."""
        random = torch.Generator().manual_seed(7)
        gamma, width, kept = self.gamma, self.width, self.kept
        logits = (2 * torch.randn(gamma + 1, width, generator=random)).to(self.dtype)
        drafted = logits[:gamma].float().argmax(-1)
        # The target's largest logit is drafted; from the rejection on it is likelier to the drafter.
        # Before the rejection the laws are equal, so that block verification keeps these tokens too.
        q_logits = logits[:gamma].float().clone()
        q_logits[torch.arange(kept, gamma), drafted[kept:]] += 3.0
        q_logits = q_logits.to(torch.bfloat16 if self.law == "dense" else self.dtype)
        if self.coupled:
            drafted = self._coupled_draft()
        uniforms = torch.full((gamma + 1,), 0.4321, dtype=torch.float64)
        uniforms[:kept] = 0.0
        uniforms[kept:gamma] = 0.999
        if self.joint:
            # Prefix ``kept`` is the longest that passes: later ones would have to be below their chance.
            uniforms[:gamma] = 0.999999
            uniforms[kept - 1] = 0.0

        def many(one: torch.Tensor) -> torch.Tensor:
            return one.expand(batch, *one.shape).contiguous()

        draft: DenseDraft | ListedDraft | None = None
        if self.law == "dense":
            draft = DenseDraft(many(q_logits), many(torch.logsumexp(q_logits.float(), -1)))
        elif self.law == "listed":
            best, tokens = q_logits.float().topk(LISTED)
            if self.coupled:
                tokens[:, 0] = drafted
            draft = ListedDraft(many(torch.softmax(best, -1)), many(tokens))
        given: dict[str, Any] = {
            "rows": Rows(
                logits.repeat(batch, 1),
                (torch.arange(batch) * (gamma + 1)).int(),
                torch.full((batch,), gamma, dtype=torch.int32),
                many(drafted),
            ),
            "temperature": torch.ones(batch),
            "uniforms": many(uniforms),
            "draft": draft,
            "block": self.joint,
        }
        if self.filtered:
            given["filters"] = Filters(
                torch.full((batch,), TOP_K, dtype=torch.int32),
                torch.full((batch,), 0.95),
                torch.zeros(batch),
            )
        if self.coupled:
            given["keys"] = _keys(batch)
        if self.adjusted:
            given["adjustments"] = _adjustments(width, batch)
        return given

    def _coupled_draft(self) -> torch.Tensor:
        """Tokens of which the target's own draws keep ``kept``: found by drafting what it draws."""
        plain = replace(self, coupled=False, joint=False).operands(1)
        drafted = torch.zeros(1, self.gamma, dtype=torch.int64)
        for position in range(self.kept):
            rows = plain["rows"]._replace(drafted=drafted)
            drawn = judge(**plain | {"rows": rows, "keys": _keys(1)}).outcome.token
            drafted[0, position] = drawn[0]
        return drafted[0]


def _keys(batch: int) -> Keys:
    return Keys(
        torch.full((batch,), 1234567),
        torch.full((batch,), 100),
        torch.ones(batch, dtype=torch.int32),
    )


def _adjustments(width: int, batch: int) -> Adjustments:
    tokens = torch.arange(ADJUSTED) * (width // ADJUSTED)
    none = torch.zeros(batch)
    return Adjustments(
        tokens.expand(batch, -1).contiguous(),
        torch.zeros(batch, ADJUSTED, dtype=torch.int32),
        torch.full((batch, ADJUSTED), 0.125),
        torch.zeros(batch, ADJUSTED, dtype=torch.int32),
        none,
        none,
        torch.ones(batch),
        torch.zeros(batch, dtype=torch.int32),
        torch.zeros(batch, dtype=torch.int32),
    )


VOCABULARIES = (32000, 49152, 129280, 151936, 262144)
CASES = (
    *map(Case, VOCABULARIES),
    Case(129280, dtype=torch.bfloat16),
    Case(129280, law="dense"),
    Case(151936, gamma=7, law="dense"),
    Case(151936, gamma=7, law="dense", filtered=True),
    Case(129280, law="certain"),
    Case(129280, law="certain", coupled=True),
    Case(32000, filtered=True),
    Case(32000, law="certain", coupled=True, filtered=True),
    Case(129280, adjusted=True),
    Case(129280, joint=True),
    Case(129280, law="dense", joint=True),
)
