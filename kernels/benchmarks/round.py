"""Drafting and acceptance of one round, ours and SGLang's, on the same operands.

A round: ``B`` requests draft ``gamma`` tokens at temperature 1 with a vanilla head of rank ``r``, logits
in bfloat16, and keep ``k`` of them. A :class:`Part` is one call of it. What a part moves is counted at
two batches and two vocabularies, and is linear in each of them (a third place confirms it), so
it is known for any batch and vocabulary.

Operands are made so that every request of a part does the same: all share one row of base logits, and
those of the shortlist are so flat that every step draws from the base tail, which costs the most;
target laws are flat but for the drafted token, which is certain to be kept, or certain not to be;
uniforms are one half. How many bytes move depends on these through nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from fractions import Fraction
from typing import Any, NamedTuple

import torch

from benchmarks import moved
from dspark_kernels.accept import Accepted, DenseDraft, ListedDraft, Rows, accept
from dspark_kernels.markov_step import (
    Head,
    Sampling,
    ShortlistDraft,
    draft_block,
    draft_shortlist,
    launch,
    plan,
)
from dspark_sglang.core.draft import FOLLOWING, SHORTLIST

#: The round that the targets are set for.
BATCH, GAMMA, VOCABULARY, RANK = 64, 5, 129280, 256
#: Drafts kept: half of the requests keep two of five, half of them three.
KEPT = (2, 3)
#: Batches that everything is counted at, and the one that confirms the line through them.
COUNTED, CONFIRMING = (1, 4), 2
#: Largest relative difference between that and the line: the final draw searches a block of columns from
#: its start, so how much of it is read depends on where the half of the mass lies in it.
TOLERANCE = 5e-3
#: Columns of a tile of ``scan`` on a GPU; the interpreter takes several at once.
_TILE = 64


class Sizes(NamedTuple):
    """Sizes of a part apart from the batch and the vocabulary."""

    gamma: int = GAMMA
    rank: int = RANK
    kept: int = KEPT[0]


class Call(NamedTuple):
    """A part on operands: run it, then hand its result to ``check``, which raises where it is wrong."""

    run: Callable[[], Any]
    check: Callable[[Any], None]


class Part(NamedTuple):
    """One call of a round."""

    make: Callable[[Sizes, int, int, torch.device], Call]
    #: Vocabularies it is counted at, for sizes; the third confirms.
    columns: Callable[[Sizes], tuple[int, int, int]]
    builtin: bool = False


class Counts(NamedTuple):
    """What a part moves, and how it grows."""

    #: Bytes by ``(batch, vocabulary)``, four of them.
    bytes: Mapping[tuple[int, int], int]
    #: Launches of Triton kernels, and torch operations that move anything.
    launches: int
    operations: int

    def at(self, batch: int, columns: int) -> int:
        """Bytes for a batch and a vocabulary: linear in each."""
        (low, high), (narrow, wide) = (sorted({key[i] for key in self.bytes}) for i in (0, 1))
        by_columns = [
            self.bytes[low, v]
            + Fraction(self.bytes[high, v] - self.bytes[low, v], high - low) * (batch - low)
            for v in (narrow, wide)
        ]
        slope = (by_columns[1] - by_columns[0]) / (wide - narrow)
        return round(by_columns[0] + slope * (columns - narrow))


# --- operands ----------------------------------------------------------------------------------


def _spread(row: torch.Tensor, batch: int) -> torch.Tensor:
    """One request's tensor for every request of a batch, in memory of its own."""
    return row.expand(batch, *row.shape).contiguous()


class _Drafting(NamedTuple):
    base: torch.Tensor
    anchors: torch.Tensor
    head: Head
    sampling: Sampling


def _drafting(sizes: Sizes, batch: int, columns: int, device: torch.device) -> _Drafting:
    random = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).bfloat16().to(device)

    ints = torch.arange(batch, device=device)
    return _Drafting(
        base=_spread(2 * normal(sizes.gamma, columns), batch),
        anchors=torch.full((batch,), columns // 2, device=device),
        head=Head(normal(columns, sizes.rank), normal(columns, sizes.rank) / sizes.rank**0.5),
        sampling=Sampling(torch.ones(batch, device=device), ints + 1, ints + 100),
    )


class _Judging(NamedTuple):
    #: ``[gamma + 1]`` the anchor and the drafted tokens.
    candidates: torch.Tensor
    #: ``[gamma + 1, V]`` and ``[gamma, V]`` logits of the target and of the draft.
    target: torch.Tensor
    draft: torch.Tensor
    #: ``[gamma, M]`` tokens of a shortlist, and their chances in it.
    listed: torch.Tensor
    chances: torch.Tensor


def _judging(sizes: Sizes, columns: int, device: torch.device) -> _Judging:
    gamma, steps = sizes.gamma, torch.arange(sizes.gamma)
    # Every drafted token is on its row's list, and its drafted chance is about one half.
    pitch, lane = columns // SHORTLIST, SHORTLIST // 3 + steps
    drafted = pitch * lane
    draft = torch.zeros(gamma, columns)
    draft[steps, drafted] = math.log(columns)
    target = torch.zeros(gamma + 1, columns)
    target[steps, drafted] = math.log(columns) + 4.0
    if sizes.kept < gamma:
        target[sizes.kept, drafted[sizes.kept]] = -1e4
    chances = torch.full((gamma, SHORTLIST), 0.5 / (SHORTLIST - 1))
    chances[steps, lane] = 0.5
    return _Judging(
        candidates=torch.cat([torch.zeros(1, dtype=torch.int64), drafted]).to(device),
        target=target.bfloat16().to(device),
        draft=draft.bfloat16().to(device),
        listed=(pitch * torch.arange(SHORTLIST)).expand(gamma, -1).contiguous().to(device),
        chances=chances.to(device),
    )


# --- ours --------------------------------------------------------------------------------------


def _draft_full(sizes: Sizes, batch: int, columns: int, device: torch.device) -> Call:
    """Every token can be drafted; step logits are stored over the base logits."""
    given = _drafting(sizes, batch, columns, device)

    def run() -> Any:
        if device.type == "cuda":
            return draft_block(
                given.base, given.anchors, given.head, sampling=given.sampling, out=given.base
            )
        cut = _cut(columns, sizes.rank)
        block = launch.Block(
            given.base, given.anchors, given.head, given.sampling, None, given.base, cut
        )
        return block.run(None)[0]

    return Call(run, lambda draft: _inside(draft.tokens, columns))


def _cut(columns: int, rank: int) -> plan.Plan:
    """As many programs as for the whole vocabulary, each with its part of the columns.

    What every program reads again then stays the same, and bytes grow with the columns alone.
    """
    served = plan.plan(VOCABULARY, rank, 2)
    tiles = -(-columns // (served.chunks * _TILE))
    wider = tiles & -tiles
    return plan.Plan(_TILE * wider, tiles // wider, served.chunks)


def _successors(columns: int, device: torch.device) -> torch.Tensor:
    """``[columns, FOLLOWING]`` distinct columns for each token; what is read does not depend on which."""
    lanes = torch.arange(FOLLOWING, dtype=torch.int32, device=device) * (columns // FOLLOWING)
    tokens = torch.arange(columns, dtype=torch.int32, device=device)
    return (tokens[:, None] * 31 + lanes) % columns


def _draft_short(sizes: Sizes, batch: int, columns: int, device: torch.device) -> Call:
    """As serving drafts: the law is stored for dense acceptance, over a copy of the base logits.

    Serving stores it over the logits themselves, which moves the same bytes; a copy can be drafted
    from again with the same result, as timing does.
    """
    given = _drafting(sizes, batch, columns, device)
    given = given._replace(base=given.base / 32)
    stored = given.base.clone()
    successors = _successors(columns, device)

    def run() -> ShortlistDraft:
        return draft_shortlist(
            given.base,
            given.anchors,
            given.head,
            size=SHORTLIST,
            sampling=given.sampling,
            successors=successors,
            out=stored,
            backend="triton",
        )

    return Call(run, lambda draft: _from_the_tail(draft, columns))


def _from_the_tail(draft: ShortlistDraft, columns: int) -> None:
    _inside(draft.tokens, columns)
    if bool((draft.support == draft.tokens[..., None]).any()):
        raise RuntimeError(
            f"Drafted {draft.tokens.tolist()}, of which some are candidates. Expected: none, so that "
            "every step reads a span again."
        )


def _inside(tokens: torch.Tensor, columns: int) -> None:
    if not bool(((tokens >= 0) & (tokens < columns)).all()):
        raise RuntimeError(f"Drafted {tokens.tolist()}. Expected: tokens in 0..{columns - 1}.")


def _keeps(sizes: Sizes, count: torch.Tensor) -> None:
    if not bool((count == sizes.kept).all()):
        raise RuntimeError(f"Kept {count.tolist()} drafts. Expected: {sizes.kept} of each request.")


def _accept(dense: bool) -> Callable[[Sizes, int, int, torch.device], Call]:
    def make(sizes: Sizes, batch: int, columns: int, device: torch.device) -> Call:
        given = _judging(sizes, columns, device)
        draft: DenseDraft | ListedDraft
        if dense:
            lse = given.draft.float().logsumexp(-1)
            draft = DenseDraft(_spread(given.draft, batch), _spread(lse, batch))
        else:
            draft = ListedDraft(_spread(given.chances, batch), _spread(given.listed, batch))
        ints = torch.arange(batch, dtype=torch.int32, device=device)
        rows = Rows(
            _spread(given.target, batch).flatten(0, 1),
            ints * (sizes.gamma + 1),
            torch.full_like(ints, sizes.gamma),
            _spread(given.candidates[1:], batch),
        )
        temperature = torch.ones(batch, device=device)
        uniforms = torch.full(
            (batch, sizes.gamma + 1), moved.UNIFORM, dtype=torch.float64, device=device
        )

        def run() -> Accepted:
            return accept(rows, temperature, uniforms, draft=draft, backend="triton")

        return Call(run, lambda outcome: _keeps(sizes, outcome.count))

    return make


# --- SGLang's ----------------------------------------------------------------------------------


def _builtin_draft(sizes: Sizes, batch: int, columns: int, device: torch.device) -> Call:
    from benchmarks import builtin

    given = _drafting(sizes, batch, columns, device)
    loop = builtin.MarkovLoop(given.head.w1, given.head.w2, batch)
    stored = torch.empty_like(given.base)

    def run() -> Any:
        with builtin.path(device):
            return loop.run(given.base, given.anchors, stored)

    return Call(run, lambda draft: _inside(draft.tokens, columns))


def _builtin_accept(blockwise: bool) -> Callable[[Sizes, int, int, torch.device], Call]:
    def make(sizes: Sizes, batch: int, columns: int, device: torch.device) -> Call:
        from benchmarks import builtin

        given = _judging(sizes, columns, device)
        acceptance = builtin.Acceptance(
            _spread(given.candidates, batch),
            _spread(given.target, batch).flatten(0, 1),
            _spread(given.draft, batch),
        )

        def run() -> Any:
            with builtin.path(device):
                return acceptance.run(blockwise=blockwise)

        return Call(run, lambda outcome: _keeps(sizes, outcome.kept))

    return make


# --- floors ------------------------------------------------------------------------------------


def floor(name: str, sizes: Sizes, batch: int, columns: int) -> int:
    """Bytes of one of our parts if each needed input were read once and each output written once."""
    gamma, rank, kept = sizes
    draws = 8 + 20  # anchor; temperature, seed, position
    if name == "draft":
        row = draws + gamma * (4 * columns + 2 * rank + 24)
        return 2 * gamma * columns * rank + batch * row
    if name == "draft_shortlist":
        # A candidate: its row of W2, token, base logit, logit stored; a successor also its column.
        listed = (SHORTLIST + FOLLOWING) * (2 * rank + 8) + 4 * FOLLOWING
        return batch * (draws + gamma * (2 * columns + 2 * rank + 20 + listed))
    rows = 2 * columns * (kept + 1)
    law = SHORTLIST * 12 * (kept + 1) if name == "accept_shortlist" else 2 * columns + 6 * kept + 4
    return batch * (rows + law + 8 * gamma + 12 + 8 * (kept + 2) + 16)


# --- the parts ---------------------------------------------------------------------------------


def _whole(sizes: Sizes) -> tuple[int, int, int]:
    return VOCABULARY // 2, VOCABULARY, 3 * VOCABULARY // 4


def _half(sizes: Sizes) -> tuple[int, int, int]:
    return VOCABULARY // 4, VOCABULARY // 2, 3 * VOCABULARY // 8


def _tiles(sizes: Sizes) -> tuple[int, int, int]:
    """One tile for every program, of three widths: a tile costs the interpreter the same at any."""
    one = _TILE * plan.plan(VOCABULARY, sizes.rank, 2).chunks
    return 2 * one, 4 * one, 8 * one


def _few(sizes: Sizes) -> tuple[int, int, int]:
    """Multiples of every block that SGLang's kernels work in."""
    return 8192, 24576, 16384


PARTS: dict[str, Part] = {
    "draft": Part(_draft_full, _tiles),
    "draft_shortlist": Part(_draft_short, _whole),
    "accept": Part(_accept(dense=True), _whole),
    "accept_shortlist": Part(_accept(dense=False), _whole),
    "builtin_draft": Part(_builtin_draft, _few, builtin=True),
    "builtin_accept": Part(_builtin_accept(blockwise=False), _half, builtin=True),
    "builtin_accept_optin": Part(_builtin_accept(blockwise=True), _half, builtin=True),
}


def count(name: str, sizes: Sizes, *, confirm: bool = True) -> Counts:
    """Count a part in the interpreter.

    Args:
        name: of :data:`PARTS`.
        sizes: of the round.
        confirm: count it once more, at a third batch and vocabulary, and compare.

    Raises:
        RuntimeError: it went wrong, reached outside its operands, or is not linear.
    """
    part, device = PARTS[name], torch.device("cpu")
    *columns, third = part.columns(sizes)
    places = [(batch, v) for batch in COUNTED for v in columns]
    seen: dict[tuple[int, int], moved.Moved] = {}
    for batch, v in [*places, (CONFIRMING, third)] if confirm else places:
        call = part.make(sizes, batch, v, device)
        seen[batch, v] = _counted(call)
        if seen[batch, v].outside:
            raise RuntimeError(
                f"{name}: {seen[batch, v].outside} bytes outside every operand. Expected: 0. "
                "Check the kernel's masks."
            )
    last = seen[places[-1]]
    counts = Counts(
        {place: seen[place].total for place in places},
        last.launches,
        sum(last.operations.values()),
    )
    if confirm:
        found, line = seen[CONFIRMING, third].total, counts.at(CONFIRMING, third)
        if abs(found - line) > TOLERANCE * found:
            raise RuntimeError(
                f"{name}: {found} bytes at batch {CONFIRMING}, V {third}. Expected: about {line}, from "
                f"a line through batches {COUNTED} and V {columns}. Count it at more places."
            )
    return counts


def _counted(call: Call) -> moved.Moved:
    kept: list[Any] = []
    found = moved.count(lambda: kept.append(call.run()))
    call.check(kept[0])
    return found


def count_parts(*wanted: str) -> Iterator[dict[str, Any]]:
    """Count parts in the interpreter, in a child process.

    Args:
        wanted: ``name:gamma:rank:kept`` of each; one of :data:`PARTS`.
    """
    for text in wanted:
        name, *numbers = text.split(":")
        sizes = Sizes(*map(int, numbers))
        with torch.no_grad() if PARTS[name].builtin else nullcontext():
            counts = count(name, sizes)
        yield {
            "part": text,
            "bytes": [[*place, total] for place, total in counts.bytes.items()],
            "launches": counts.launches,
            "operations": counts.operations,
        }


def read_counts(found: Mapping[str, Any]) -> Counts:
    """What :func:`count_parts` yielded, back from JSON."""
    return Counts(
        {(batch, v): total for batch, v, total in found["bytes"]},
        found["launches"],
        found["operations"],
    )
