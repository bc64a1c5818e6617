"""Configurations and bytes of ``markov_step``; the protocol is in :mod:`benchmarks.report`.

Formula bytes follow the launches: what a step's programs read again beyond the floor is their own
copy of the latents and the best score of every chunk of the step before; ``select`` and ``merge`` pass
candidates through memory. For more than 64 rows the formula reads W2 once for every 64. A shortlist of a gated or
rnn head reads the joint weight once a request and step: from cache on a GPU, but counted.

With successors the base logits of the example are flat, so that every step of every request draws from the base
tail and reads one span again: the most that can be read. A model's logits seldom ask for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.report import Build, Case, Example
from dspark_kernels.markov_step import (
    Draft,
    Head,
    Sampling,
    ShortlistDraft,
    chain,
    draft_block,
    draft_shortlist,
    heads,
    kernel,
    plan,
    reference,
    shortlist,
)

#: M, K, and rows that kernels are compiled for.
SIZE = 128
FOLLOW = 128
ROWS = 64
BF16 = 2
#: Candidates of a span, about: the columns above a bound that depends on the logits, M at least.
#: Of random float32 logits ``1024 * -ln(1 - M / 1024) = 137`` pass, of bfloat16 ones, which tie, fewer.
PASSING = 131


class Shape(NamedTuple):
    """One configuration; all in bfloat16."""

    kind: str
    columns: int
    rank: int
    gamma: int
    #: Every row sampled and its step logits stored over the base logits; False: every row greedy.
    sampled: bool
    shortlist: bool = False
    width: int = 0
    #: K of a shortlist; sampled rows then draw from the base tail too.
    follow: int = 0

    @property
    def tail(self) -> bool:
        """Whether a law over every column is stored by a shortlist."""
        return self.sampled and self.follow > 0

    @property
    def name(self) -> str:
        """Readable id."""
        mode = f"shortlist{SIZE}" if self.shortlist else "full"
        mode += f"+{self.follow}" if self.follow else ""
        law = "sampled" if self.sampled else "greedy"
        return f"{mode}-{self.kind}-gamma{self.gamma}-V{self.columns}-r{self.rank}-{law}"


#: V4 Flash, Pro, Qwen3, Gemma, SmolLM2 and Llama vocabularies; one step of each but the first, since
#: a step costs the same whichever it is.
SHAPES = (
    Shape("vanilla", 129280, 256, 5, True),
    Shape("vanilla", 129280, 512, 1, False),
    Shape("gated", 151936, 256, 1, True, width=4096),
    Shape("vanilla", 262144, 64, 1, True),
    Shape("rnn", 49152, 256, 1, True, width=960),
    Shape("vanilla", 32000, 512, 1, True),
    Shape("vanilla", 129280, 256, 5, True, shortlist=True),
    Shape("gated", 49152, 256, 5, True, shortlist=True, width=960),
    Shape("rnn", 32000, 512, 1, True, shortlist=True, width=1024),
    Shape("vanilla", 262144, 256, 1, False, shortlist=True),
    Shape("vanilla", 129280, 256, 5, True, shortlist=True, follow=FOLLOW),
    Shape("vanilla", 32000, 512, 1, True, shortlist=True, follow=FOLLOW),
    Shape("vanilla", 49152, 256, 1, False, shortlist=True, follow=FOLLOW),
    Shape("vanilla", 151936, 256, 1, True, shortlist=True, follow=FOLLOW),
    Shape("vanilla", 262144, 256, 1, True, shortlist=True, follow=FOLLOW),
)
_BY_NAME = {shape.name: shape for shape in SHAPES}

_POINTERS = {
    "anchors": "*i64",
    "vocabulary": "*i64",
    "temperatures": "*fp32",
    "seeds": "*i64",
    "positions": "*i64",
    "recorded": "*u8",
    "stats": "*fp32",
    "chosen": "*i32",
    "tokens": "*i64",
    "previous": "*i64",
    "logits": "*fp32",
    "lses": "*fp32",
    "context": "*fp32",
    "state": "*fp32",
    "states": "*fp32",
    "lanes": "*i16",
    "counts": "*i32",
    "support": "*i32",
    "probs": "*fp32",
    "places": "*i32",
    "successors": "*i32",
    "tops": "*fp32",
    "masses": "*fp32",
}
_FLOATING = (
    "base", "out", "w1", "w2", "table", "hidden", "weight", "bias", "weight_state",
    "weight_embedded", "latents", "values", "best",
)  # fmt: skip
_ALIGNED = (
    "columns", "base_stride", "out_stride", "base_row", "base_step", "out_row", "out_step", "weight_stride", "width",
    "outputs", "context_stride",
)  # fmt: skip


def build(launched: Any, constants: dict[str, Any], warps: int, dtype: str = "bf16") -> Build:
    """A build of one of the folder's kernels with weights and logits of one type."""
    names = [name for name in launched.arg_names if name not in constants]
    types = _POINTERS | dict.fromkeys(_FLOATING, f"*{dtype}")
    stages = plan.STAGES if launched is kernel.scan else 3
    return Build(
        kernel=launched,
        signature={name: types.get(name, "i32") for name in names},
        constants=constants,
        num_warps=warps,
        num_stages=stages,
        aligned=tuple(name for name in _ALIGNED if name in names),
    )


def _shortlist_builds(
    shape: Shape, dtype: str, bytes_: int, record: int | None, *, mapped: bool = False
) -> list[Build]:
    """``select``, ``merge`` and ``chain``."""
    tail = record or 0 if shape.tail else 0
    select = plan.select_constants(SIZE, bytes_, record=tail)
    merge = plan.merge_constants(
        SIZE, bytes_, shape.columns, follow=shape.follow, mapped=mapped and not shape.follow,
        record=tail,
    )  # fmt: skip
    steps = plan.chain_constants(
        shape.rank, SIZE, bytes_, shape.columns, kind=shape.kind, record=record,
        follow=shape.follow, tail=shape.tail, mapped=mapped,
    )  # fmt: skip
    return [
        build(shortlist.select, select, plan.WARPS, dtype),
        build(shortlist.merge, merge, plan.WARPS, dtype),
        build(chain.chain, steps, plan.WARPS, dtype),
    ]


def builds(shape: Shape, rows: int = ROWS, bytes_: int = BF16) -> tuple[Build, ...]:
    """The launches of a configuration, in order."""
    dtype = "fp32" if bytes_ == 4 else "bf16"
    record = 1 if shape.sampled else None
    sizes = shape.rank, bytes_, rows
    found = []
    if shape.kind != "vanilla":
        found.append(build(heads.project, plan.project_constants(bytes_), plan.SMALL_WARPS, dtype))
    if shape.shortlist:
        return (*found, *_shortlist_builds(shape, dtype, bytes_, record))
    vanilla = shape.kind == "vanilla"
    step = [
        build(
            kernel.scan,
            plan.scan_constants(*sizes, gather=vanilla, record=record, mapped=False),
            plan.WARPS,
            dtype,
        )
    ]
    if not vanilla:
        latent = plan.latent_constants(*sizes, recurrent=shape.kind == "rnn")
        step.insert(0, build(heads.latent, latent, plan.SMALL_WARPS, dtype))
    finish = plan.finish_constants(*sizes, sampled=shape.sampled)
    return (*found, *step * shape.gamma, build(kernel.finish, finish, plan.SMALL_WARPS))


def cases() -> list[Case]:
    """The configurations served."""
    found = []
    for shape in SHAPES:
        sizes = {"gamma": shape.gamma, "V": shape.columns, "r": shape.rank, "d": shape.width}
        found.append(Case(shape.name, sizes, builds(shape)))
    return found


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def variants() -> list[Build]:
    """What other dtypes, batches and options compile: the extremes of each kernel."""
    whole = Shape("vanilla", 129280, 512, 1, True)
    named = plan.scan_constants(512, BF16, ROWS, gather=False, record=2, mapped=True)
    wide = build(kernel.scan, named, plan.WARPS)
    # Base logits in float32 over a head in bfloat16: the most shared memory.
    wide = wide._replace(signature={**wide.signature, "base": "*fp32", "out": "*fp32"})
    rnn = Shape("rnn", 129280, 512, 1, True, width=4096)
    tail = Shape("vanilla", 262144, 512, 1, True, shortlist=True, follow=128)
    return [
        wide,
        builds(whole, rows=1)[0],
        builds(whole, rows=32)[0],
        builds(whole, bytes_=4)[0],
        *builds(rnn, bytes_=4)[:2],
        *builds(rnn._replace(columns=262144, shortlist=True), bytes_=4)[1:],
        *_shortlist_builds(tail, "bf16", BF16, 2, mapped=True),
        *_shortlist_builds(tail, "fp16", BF16, 2),
        *_shortlist_builds(tail, "fp32", 4, 2, mapped=True),
        # Successors without the tail.
        *_shortlist_builds(tail._replace(sampled=False), "bf16", BF16, None)[1:],
    ]


def _joint(shape: Shape) -> tuple[int, int]:
    """Outputs and columns of the joint weight."""
    if shape.kind == "vanilla":
        return 0, 0
    parts = 1 if shape.kind == "gated" else 3
    state = 0 if shape.kind == "gated" else shape.rank
    return parts * shape.rank, shape.width + shape.rank + state


def floor_bytes(case: Case, batch: int) -> int:
    """Base logits, W2 once a step (or the candidates' rows), the joint weight once; outputs once."""
    shape = _BY_NAME[case.name]
    gamma, rank, columns = shape.gamma, shape.rank, shape.columns
    outputs, inputs = _joint(shape)
    weights = (outputs * inputs + outputs) * BF16
    states = gamma * shape.width * BF16
    keys = 8 + (20 if shape.sampled else 0)
    row = keys + states + gamma * (columns * BF16 + rank * BF16 + 16)
    if shape.shortlist:
        law = BF16 if shape.tail else 4 if shape.sampled else 0
        listed = (SIZE + shape.follow) * (4 + BF16 + rank * BF16 + law)
        listed += shape.follow * 4 + (4 if shape.tail else 0)
        return weights + batch * (row + gamma * listed)
    stored = gamma * columns * BF16 if shape.sampled else 0
    return weights + gamma * columns * rank * BF16 + batch * (row + stored + gamma * 8)


def formula_bytes(case: Case, batch: int) -> int:
    """What the launches move; see the module."""
    shape = _BY_NAME[case.name]
    gamma, rank, columns = shape.gamma, shape.rank, shape.columns
    floor = floor_bytes(case, batch)
    outputs, inputs = _joint(shape)
    parts = outputs // rank
    if shape.shortlist:
        spans = _cdiv(columns, plan.SPAN)
        # Candidates written, read, and named; support and base logits read again by chain.
        passed = 2 * spans * (PASSING * (BF16 + 2) + 4)
        again = gamma * (passed + SIZE * (4 + BF16))
        if shape.follow:
            # Columns of the best are written, and successors' base logits read, by themselves.
            again += gamma * (SIZE * 4 + shape.follow * BF16)
        if shape.tail:
            # Masses from select to merge to chain, temperatures, and the span that is drawn from.
            again += gamma * (spans * (4 * 8 + 4) + 4 + min(plan.SPAN, columns) * BF16)
        if parts:
            # Every request's program reads the joint weight, the state's part from step 2 on.
            blocks = _cdiv(outputs, plan.PROJECT)
            again += gamma * (8 * outputs + (blocks - 1) * shape.width * BF16)
            again += gamma * outputs * rank * BF16
            again += (gamma - 1) * outputs * rank * BF16 if parts > 1 else 0
            floor -= outputs * (inputs - shape.width) * BF16
        return floor + batch * again
    chunks = plan.plan(columns, rank, BF16).chunks
    blocks = _cdiv(batch, ROWS)
    w2 = gamma * columns * rank * BF16 * (blocks - 1)
    # Latents once a chunk, not once a row; the chunks' scores and tokens from the second step on.
    copies = gamma * (chunks - 1) * rank * BF16 + (gamma - 1) * chunks * (4 * chunks + 4)
    left = gamma * chunks * (12 + (8 if shape.sampled else 0))
    reduced = gamma * chunks * (4 + (8 if shape.sampled else 0)) + gamma * 16
    keys = gamma * chunks * (8 + (20 if shape.sampled else 0))
    extra = batch * (copies + left + reduced + keys)
    if parts:
        # Every block of outputs reads the embeddings (once a part) and the hidden states again.
        tiles, blocks = _cdiv(rank, plan.LATENT), _cdiv(outputs, plan.PROJECT)
        again = tiles * (rank * BF16 * parts + 8) + (blocks - 1) * shape.width * BF16
        written = 2 * 4 * outputs + rank * BF16 + (4 * rank if parts > 1 else 0)
        extra += batch * gamma * (again + written)
    return floor + w2 + extra


def _operands(shape: Shape, batch: int) -> dict[str, Any]:
    """Random operands; the first rows of a larger batch are those of a smaller one."""
    random = torch.Generator().manual_seed(11)
    outputs, inputs = _joint(shape)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float32)

    def each(make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if shape.follow:
            # Which span is drawn from, and so what is read, is then the same for all.
            return make().expand(batch, -1, -1).contiguous()
        return torch.stack([make() for _ in range(batch)])

    w1 = normal(shape.columns, shape.rank).bfloat16()
    w2 = (normal(shape.columns, shape.rank) / shape.rank**0.5).bfloat16()
    joint = (normal(outputs, inputs) / inputs**0.5).bfloat16() if outputs else None
    bias = normal(outputs).bfloat16() if outputs else None
    scale = 1 / 16 if shape.follow else 2
    base = each(lambda: (scale * normal(shape.gamma, shape.columns)).bfloat16())
    hidden = each(lambda: normal(shape.gamma, shape.width).bfloat16()) if outputs else None
    anchors = torch.arange(batch) * (0 if shape.follow else 7) + 1
    sampling = None
    if shape.sampled:
        sampling = Sampling(torch.full((batch,), 0.9), anchors * 12345678901, anchors + 100)
    given = {
        "base": base,
        "anchors": anchors,
        "head": Head(w1, w2, joint, bias),
        "hidden": hidden,
        "sampling": sampling,
    }
    if shape.follow:
        given["successors"] = scattered(shape.columns, shape.follow)
    return given


def scattered(columns: int, follow: int) -> torch.Tensor:
    """``[columns, follow]`` int32, distinct columns for each token: a table of no head, but at no cost."""
    lanes = torch.arange(follow, dtype=torch.int32) * (columns // follow)
    tokens = torch.arange(columns, dtype=torch.int32)
    return (tokens[:, None] * 31 + lanes) % columns


def example(case: Case, batch: int) -> Example:
    """One call at the configuration's true sizes."""
    shape = _BY_NAME[case.name]
    operands = _operands(shape, batch)
    out = torch.full_like(operands["base"], float("nan")) if shape.sampled else None
    if shape.shortlist:
        out = operands["base"].clone() if shape.tail else None

    def run() -> Draft | ShortlistDraft:
        if shape.shortlist:
            return draft_shortlist(**operands, size=SIZE, out=out, backend="triton")
        return draft_block(**operands, out=out, backend="triton")

    def max_error(result: Draft | ShortlistDraft) -> float:
        wanted = {**operands, "vocabulary": None}
        if isinstance(result, ShortlistDraft):
            stored = operands["base"].clone() if shape.tail else None
            listed = reference.draft_shortlist(**wanted, size=SIZE, out=stored, dtype=torch.float64)
            _same(result.support, listed.support, "support")
            pairs = [(result.probs, listed.probs)] if shape.sampled else []
            pairs = [(result.lse, listed.lse)] if shape.tail else pairs
            tokens = listed.tokens
        else:
            stored = torch.empty_like(operands["base"]) if shape.sampled else None
            block, _ = reference.draft(**wanted, out=stored, dtype=torch.float64)
            pairs = [(result.logit, block.logit), (result.lse, block.lse)]
            tokens = block.tokens
        _same(result.tokens, tokens, "tokens")
        errors = [float((a.double() - b.double()).abs().max()) for a, b in pairs]  # type: ignore[union-attr]
        return max(errors, default=0.0)

    return Example(run, max_error)


def _same(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    if not torch.equal(found, wanted):
        raise RuntimeError(
            f"{what} differ from the reference's: {found.tolist()} and {wanted.tolist()}. "
            "Expected: equal. Run tests/kernels/test_markov_step.py."
        )
