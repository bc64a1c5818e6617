"""Configurations and bytes of ``accept``; the protocol is in :mod:`benchmarks.report`.

In the example every request keeps ``(gamma + 1) // 2`` drafted tokens, the least that is half of them, and
rejects the next, so ``(gamma + 1) // 2 + 1`` rows are read. The floor counts each of these rows once, and the
drafted law at the rejecting row where it is dense. Formula bytes are an upper bound: the search for the final
token ends within its block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from benchmarks.report import Build, Case, Example
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
from dspark_kernels.accept.final import SEARCH
from dspark_kernels.accept.kernel import accept_kernel
from dspark_kernels.accept.plan import WARPS, constants
from dspark_kernels.accept.reference import judge

#: Tokens of a listed law, as serving's shortlist; tokens with an adjustment in the example.
LISTED = 128
ADJUSTED = 256
_CERTAIN, _DENSE, _LISTED = 0, 1, 2


class Shape(NamedTuple):
    """One configuration."""

    width: int
    gamma: int = 5
    bfloat16: bool = True
    law: int = _LISTED
    coupled: bool = False
    filtered: bool = False
    adjusted: bool = False
    joint: bool = False

    @property
    def name(self) -> str:
        """Readable id."""
        parts = [f"gamma{self.gamma}-V{self.width}", "bf16" if self.bfloat16 else "fp32"]
        parts.append(("certain", "dense", f"listed{LISTED}")[self.law])
        parts += [
            name for name in ("coupled", "filtered", "adjusted", "joint") if getattr(self, name)
        ]
        return "-".join(parts)

    @property
    def sizes(self) -> dict[str, int]:
        """Every size; the flags as 0 and 1."""
        return {key: int(value) for key, value in self._asdict().items()}


def _shape(case: Case) -> Shape:
    """The shape a case was made of."""
    return next(shape for shape in _SHAPES if shape.name == case.name)


_SHAPES = (
    *(Shape(width) for width in (32000, 49152, 129280, 151936, 262144)),
    Shape(151936, gamma=7),
    Shape(129280, bfloat16=False),
    Shape(129280, law=_DENSE),
    Shape(129280, bfloat16=False, law=_DENSE),
    Shape(262144, bfloat16=False, law=_DENSE),
    Shape(129280, law=_CERTAIN),
    Shape(129280, coupled=True),
    Shape(32000, filtered=True),
    Shape(129280, bfloat16=False, adjusted=True),
    Shape(129280, joint=True),
    Shape(129280, bfloat16=False, law=_DENSE, joint=True),
)


def signature(shape: Shape) -> dict[str, str]:
    """Triton types of the run-time parameters."""
    real = "*bf16" if shape.bfloat16 else "*fp32"
    long, short, single = "*i64", "*i32", "*fp32"
    return {
        "logits": real,
        "law": real if shape.law == _DENSE else single,
        **dict.fromkeys(("drafted", "listed", "seeds", "positions", "adjust_tokens"), long),
        **dict.fromkeys(("first", "lens", "top_k", "coupling", "adjust_counts"), short),
        **dict.fromkeys(("adjust_stops", "min_new", "lengths", "count_out", "flag_out"), short),
        **dict.fromkeys(("temperature", "top_p", "min_p", "lse", "adjust_bias"), single),
        **dict.fromkeys(("frequency", "presence", "repetition"), single),
        **dict.fromkeys(("rows", "width", "logits_stride", "law_size", "adjust_size"), "i32"),
        "uniforms": "*fp64",
        "token_out": long,
    }


def cases() -> list[Case]:
    """The configurations compiled and counted; one launch each."""
    found = []
    for shape in _SHAPES:
        flags = {
            name: getattr(shape, name) for name in ("coupled", "filtered", "adjusted", "joint")
        }
        build = Build(
            kernel=accept_kernel,
            signature=signature(shape),
            constants=constants(
                shape.width, shape.gamma, bfloat16=shape.bfloat16, law=shape.law, **flags
            ),
            num_warps=WARPS,
            aligned=("logits_stride", "width", "law_size"),
        )
        found.append(Case(shape.name, shape.sizes, (build,)))
    return found


def _read(sizes: Mapping[str, int]) -> tuple[int, int]:
    """Drafted tokens kept and rows read."""
    kept = (sizes["gamma"] + 1) // 2
    return kept, sizes["gamma"] + 1 if sizes["joint"] else kept + 1


def _element(sizes: Mapping[str, int]) -> int:
    return 2 if sizes["bfloat16"] else 4


def floor_bytes(case: Case, batch: int) -> int:
    """Rows up to the deciding one, the drafted laws that decide, tokens, uniforms and outcome."""
    s = case.sizes
    kept, rows = _read(s)
    each = rows * s["width"] * _element(s)
    laws = s["gamma"] if s["joint"] else 1
    if not s["coupled"]:
        each += {
            _CERTAIN: 0,
            _DENSE: laws * s["width"] * _element(s),
            _LISTED: (s["gamma"] if s["joint"] else kept + 1) * LISTED * 12,
        }[s["law"]]
    if s["adjusted"]:
        each += ADJUSTED * (8 + 4 + 4 + 4) + 20
    each += 8 * s["gamma"] + 8 * (kept + 2) + 12 + 16
    each += 12 * s["filtered"] + 20 * s["coupled"]
    return batch * each


def formula_bytes(case: Case, batch: int) -> int:
    """What the kernel moves at most; the passes of a search by bisection are about as many as bits / 2."""
    s = case.sizes
    kept, rows = _read(s)
    chosen = case.builds[0].constants
    element = _element(s)
    row = s["width"] * element
    passes = 0
    if s["filtered"]:
        # The search, its count, the sums; a seeded draw searches again for every record.
        passes = (16 - chosen["SHIFT"] // 2) + 3
        passes += 5 * (16 - chosen["SHIFT"] // 2) * s["coupled"]
    reads = rows * (1 + passes)
    if s["law"] == _DENSE:
        # A residual needs both laws; block verification one for every prefix that it tries.
        reads += 2 * (s["gamma"] - kept + 1 if s["joint"] else 1)
    each = reads * row + chosen["BLOCK"] * element * (2 if s["law"] == _DENSE else 1)
    if s["law"] == _LISTED:
        searches = max(1, chosen["BLOCK"] // SEARCH.value)
        each += (rows + 1 + searches) * LISTED * (12 + element)
    if s["adjusted"]:
        each += rows * (ADJUSTED * (20 + 2 * element) + 16 * s["gamma"])
    each += 8 * s["gamma"] + 96 * (rows + 1) + 28
    return int(batch * each)


def example(case: Case, batch: int) -> Example:
    """One request, ``batch`` times over: bytes are linear in the batch."""
    given = operands(_shape(case), batch)

    def run() -> Accepted:
        return accept(**given, backend="triton")

    def max_error(result: Accepted) -> float:
        # Made again: the kernel changes adjusted logits in place. The requests are all alike.
        expected = judge(**operands(_shape(case), 1)).outcome
        for mine, theirs in zip(result, expected, strict=True):
            if not torch.equal(mine, theirs.expand_as(mine)):
                raise ArithmeticError(f"{case.name}: {result} where the reference has {expected}")
        return 0.0

    return Example(run, max_error)


def operands(shape: Shape, batch: int) -> dict[str, Any]:
    """Operands of the example."""
    random = torch.Generator().manual_seed(7)
    gamma, width = shape.gamma, shape.width
    kept = (gamma + 1) // 2
    dtype = torch.bfloat16 if shape.bfloat16 else torch.float32
    logits = (2 * torch.randn(gamma + 1, width, generator=random)).to(dtype)
    drafted = logits[:gamma].float().argmax(-1)
    # The target's largest logit is drafted; from the rejection on it is likelier to the drafter.
    # Before the rejection the laws are equal, so that block verification keeps these tokens too.
    q_logits = logits[:gamma].float().clone()
    q_logits[torch.arange(kept, gamma), drafted[kept:]] += 3.0
    q_logits = q_logits.to(dtype)
    if shape.coupled:
        drafted = _coupled_draft(logits, shape, kept)
    uniforms = torch.full((gamma + 1,), 0.4321, dtype=torch.float64)
    uniforms[:kept] = 0.0
    uniforms[kept:gamma] = 0.999
    if shape.joint:
        # Prefix ``kept`` is the longest that passes: later ones would have to be below their chance.
        uniforms[:gamma] = 0.999999
        uniforms[kept - 1] = 0.0

    def many(one: torch.Tensor) -> torch.Tensor:
        return one.expand(batch, *one.shape).contiguous()

    draft: DenseDraft | ListedDraft | None = None
    if shape.law == _DENSE:
        draft = DenseDraft(many(q_logits), many(torch.logsumexp(q_logits.float(), -1)))
    elif shape.law == _LISTED:
        best, tokens = q_logits.float().topk(LISTED)
        if shape.coupled:
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
        "block": shape.joint,
    }
    if shape.filtered:
        given["filters"] = Filters(
            torch.full((batch,), 50, dtype=torch.int32),
            torch.full((batch,), 0.95),
            torch.zeros(batch),
        )
    if shape.coupled:
        given["keys"] = Keys(
            torch.full((batch,), 1234567),
            torch.full((batch,), 100),
            torch.ones(batch, dtype=torch.int32),
        )
    if shape.adjusted:
        given["adjustments"] = _adjustments(width, batch)
    return given


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


def _coupled_draft(logits: torch.Tensor, shape: Shape, kept: int) -> torch.Tensor:
    """Tokens of which the target's own draws keep ``kept``: found by drafting what it draws."""
    plain = operands(shape._replace(coupled=False, joint=False), 1)
    drafted = torch.zeros(1, shape.gamma, dtype=torch.int64)
    keys = Keys(torch.full((1,), 1234567), torch.full((1,), 100), torch.ones(1, dtype=torch.int32))
    for position in range(kept):
        rows = plain["rows"]._replace(drafted=drafted)
        drafted[0, position] = judge(**{**plain, "rows": rows, "keys": keys}).outcome.token[0]
    return drafted[0]
