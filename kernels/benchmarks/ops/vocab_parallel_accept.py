"""Configurations and bytes of one rank of ``vocab_parallel_accept``; the protocol is in ``support/report.py``.

Eight ranks. In the example rank 0 runs alone: what it would receive is its own record with seven ranks that
hold nothing, so it decides on its shard as if that were the vocabulary. Its loads and stores are those of a
real round in which it holds the final token. Every row of every request is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.ops import accept as bench
from benchmarks.report import Build, Case, Example
from dspark_kernels.accept import Accepted, accept
from dspark_kernels.vocab_parallel_accept import Shard, vocab_parallel_accept
from dspark_kernels.vocab_parallel_accept.steps import KERNELS, WARPS, configuration

RANKS = 8
LISTED = 128


class Shape(NamedTuple):
    """One configuration."""

    width: int
    gamma: int = 5
    bfloat16: bool = True
    coupled: bool = False
    filtered: bool = False

    @property
    def name(self) -> str:
        """Readable id."""
        parts = [f"tp{RANKS}-gamma{self.gamma}-V{self.width}", "bf16" if self.bfloat16 else "fp32"]
        return "-".join(parts + [n for n in ("coupled", "filtered") if getattr(self, n)])

    @property
    def shard(self) -> int:
        """Columns of a rank."""
        return self.width // RANKS


_SHAPES = (
    *(Shape(width) for width in (32000, 49152, 129280, 151936, 262144)),
    Shape(129280, bfloat16=False),
    Shape(129280, coupled=True),
    Shape(32000, filtered=True),
)

_LONG = ("drafted", "listed", "bounds", "bounds_out", "found", "found_out", "token", "token_out")
_SHORT = (
    "first", "lens", "top_k", "cuts", "cuts_out", "count", "flag", "count_out", "flag_out",
)  # fmt: skip
_DOUBLE = (
    "uniforms", "stats", "stats_out", "laws", "laws_out", "counts", "counts_out", "kept",
    "kept_out", "left", "left_out", "masses", "masses_out",
)  # fmt: skip
_WHOLE = (
    "logits_stride", "rows", "width", "base", "vocabulary", "requests", "ranks", "own_rank",
    "law_size", "adjust_size",
)  # fmt: skip


def _types(shape: Shape) -> dict[str, str]:
    """Triton types of run-time parameters; those of features not in use stand in as float32."""
    keys = ("seeds", "positions")
    return {
        **dict.fromkeys(_LONG, "*i64"),
        **dict.fromkeys(_SHORT, "*i32"),
        **dict.fromkeys(_DOUBLE, "*fp64"),
        **dict.fromkeys(_WHOLE, "i32"),
        **dict.fromkeys(keys, "*i64" if shape.coupled else "*fp32"),
        "coupling": "*i32" if shape.coupled else "*fp32",
        "logits": "*bf16" if shape.bfloat16 else "*fp32",
    }


def launches(shape: Shape) -> list[str]:
    """Kernels of a round in order."""
    names = ["stats", "combine"]
    if shape.filtered:
        names += ["narrow", "settle"] * (8 if shape.bfloat16 else 16) + ["narrow", "kept", "decide"]
    return [*names, "masses", "draw", "finish"]


def _build(shape: Shape, name: str) -> Build:
    kernel: Any = KERNELS[name]
    known = configuration(shape.shard, shape.gamma, RANKS, bfloat16=shape.bfloat16, law=2)
    known |= {
        "DENSE": False,
        "COUPLED": shape.coupled,
        "FILTERED": shape.filtered,
        "ADJUSTED": False,
        "CUTS": shape.filtered,
    }
    constants = {key: value for key, value in known.items() if key in kernel.arg_names}
    types = _types(shape)
    signature = {key: types.get(key, "*fp32") for key in kernel.arg_names if key not in constants}
    aligned = [key for key in ("logits_stride", "width", "law_size") if key in signature]
    if shape.shard % 16:
        aligned = aligned[2:]
    return Build(kernel, signature, constants, WARPS, aligned=tuple(aligned))


def cases() -> list[Case]:
    """The configurations compiled and counted."""
    return [
        Case(
            shape.name,
            {key: int(value) for key, value in shape._asdict().items()},
            tuple(_build(shape, name) for name in launches(shape)),
        )
        for shape in _SHAPES
    ]


def _row(case: Case) -> int:
    """Bytes of a row's shard."""
    return case.sizes["width"] // RANKS * (2 if case.sizes["bfloat16"] else 4)


def floor_bytes(case: Case, batch: int) -> int:
    """Every row's shard, the drafted laws, tokens and uniforms, and the outcome."""
    gamma = case.sizes["gamma"]
    each = (gamma + 1) * _row(case) + gamma * LISTED * 12 * (1 - case.sizes["coupled"])
    each += 8 * gamma + 8 * (gamma + 1) + 12 + 16
    return batch * (each + 12 * case.sizes["filtered"] + 20 * case.sizes["coupled"])


def formula_bytes(case: Case, batch: int) -> int:
    """At most: a block again for the token, records of all ranks, and the passes of a filter."""
    gamma, rows = case.sizes["gamma"], case.sizes["gamma"] + 1
    passes = 1 + case.sizes["filtered"] * ((8 if case.sizes["bfloat16"] else 16) + 2)
    known = case.builds[0].constants
    each = rows * (passes * _row(case) + known["SLOTS"] * 16)
    each += known["BLOCK"] * 4 + (gamma + 8) * LISTED * 16
    records = rows * 8 * (7 * (RANKS + 1) + 12)
    each += records + case.sizes["filtered"] * 10 * rows * 8 * (7 * (RANKS + 1) + 12)
    return int(batch * (each + known["SLOTS"] * 40 + 8 * 3 * (RANKS + 2) + 400 * rows))


def example(case: Case, batch: int) -> Example:
    """One request, ``batch`` times over."""
    shape = next(shape for shape in _SHAPES if shape.name == case.name)
    alone = bench.Shape(
        shape.shard,
        shape.gamma,
        bfloat16=shape.bfloat16,
        coupled=shape.coupled,
        filtered=shape.filtered,
    )
    given = bench.operands(alone, batch)
    del given["block"]
    shard = Shard(0, (shape.shard, *(0,) * (RANKS - 1)))

    def run() -> Accepted:
        return vocab_parallel_accept(shard=shard, gather=_alone(), backend="triton", **given)

    def max_error(result: Accepted) -> float:
        expected = accept(backend="torch", **bench.operands(alone, 1))
        for mine, theirs in zip(result, expected, strict=True):
            if not torch.equal(mine, theirs.expand_as(mine)):
                raise ArithmeticError(f"{case.name}: {result} where accept has {expected}")
        return 0.0

    return Example(run, max_error)


def _alone() -> Callable[[torch.Tensor], torch.Tensor]:
    """An exchange with ranks that hold no columns: no logit, no mass, no token."""
    exchanged = 0

    def gather(record: torch.Tensor) -> torch.Tensor:
        nonlocal exchanged
        empty = torch.zeros_like(record)
        if exchanged == 0:  # the first record is that of the rows
            empty[..., [0, 3, 5, 6]] = -torch.inf
        if record.dtype == torch.int64:  # the last is that of the tokens
            empty -= 1
        exchanged += 1
        return torch.stack([record] + [empty] * (RANKS - 1))

    return gather
