"""SGLang's drafting and acceptance of one round, counted beside ours.

A round: ``B`` requests draft ``gamma`` tokens at temperature 1 with a vanilla head of rank ``r``, logits
in bfloat16, and keep ``k`` of them. Our parts of it are configurations of the ops (:data:`OURS`). Each
:class:`Part` here is one call of SGLang's. What it moves is counted at two batches and two vocabularies, and
is linear in each of them (a third place confirms it), so it is known for any batch and vocabulary.

Operands are made so that every request does the same: all share one row of base logits; target
distributions are flat but for the drafted token, which is certain to be kept, or certain not to be; uniforms
are one half. How many bytes move depends on these through nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import torch

from benchmarks import moved

#: The round that the targets are set for; three of its five drafts are kept, as in the ops' examples.
BATCH, GAMMA, VOCABULARY, RANK, KEPT = 64, 5, 129280, 256, 3
#: Our parts of it: op and configuration.
OURS = {
    "draft": ("markov_step", "full-vanilla-gamma5-V129280-r256-sampled"),
    "draft_shortlist": ("markov_step", "shortlist128+128-vanilla-gamma5-V129280-r256-sampled"),
    "accept": ("accept", "gamma5-V129280-bf16-dense"),
    "accept_shortlist": ("accept", "gamma5-V129280-bf16-listed128"),
}
#: Batches that everything is counted at, and the one that confirms the line through them.
COUNTED, CONFIRMING = (1, 4), 2
#: Largest relative difference between that and the line: the final draw searches a block of columns from
#: its start, so how much of it is read depends on where the half of the mass lies in it.
TOLERANCE = 5e-3


class Sizes(NamedTuple):
    """Sizes of a part apart from the batch and the vocabulary."""

    gamma: int = GAMMA
    rank: int = RANK
    kept: int = KEPT


class Call(NamedTuple):
    """A part on operands: run it, then hand its result to ``check``, which raises where it is wrong."""

    run: Callable[[], Any]
    check: Callable[[Any], None]


class Part(NamedTuple):
    """One call of a round."""

    make: Callable[[Sizes, int, int, torch.device], Call]
    #: Vocabularies it is counted at; the third confirms.
    columns: tuple[int, int, int]


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


def _judging(
    sizes: Sizes, columns: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The anchor and the drafted tokens; logits of the target ``[gamma + 1, V]``, of the draft ``[gamma, V]``."""
    gamma, steps = sizes.gamma, torch.arange(sizes.gamma)
    drafted = columns // 128 * (42 + steps)
    draft = torch.zeros(gamma, columns)
    draft[steps, drafted] = math.log(columns)
    target = torch.zeros(gamma + 1, columns)
    target[steps, drafted] = math.log(columns) + 4.0
    if sizes.kept < gamma:
        target[sizes.kept, drafted[sizes.kept]] = -1e4
    candidates = torch.cat([torch.zeros(1, dtype=torch.int64), drafted])
    return candidates.to(device), target.bfloat16().to(device), draft.bfloat16().to(device)


def _inside(tokens: torch.Tensor, columns: int) -> None:
    if not bool(((tokens >= 0) & (tokens < columns)).all()):
        raise RuntimeError(f"Drafted {tokens.tolist()}. Expected: tokens in 0..{columns - 1}.")


def _keeps(sizes: Sizes, count: torch.Tensor) -> None:
    if not bool((count == sizes.kept).all()):
        raise RuntimeError(f"Kept {count.tolist()} drafts. Expected: {sizes.kept} of each request.")


def _draft(sizes: Sizes, batch: int, columns: int, device: torch.device) -> Call:
    from benchmarks import builtin

    random = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).bfloat16().to(device)

    base = _spread(2 * normal(sizes.gamma, columns), batch)
    w1, w2 = normal(columns, sizes.rank), normal(columns, sizes.rank) / sizes.rank**0.5
    loop = builtin.MarkovLoop(w1, w2, batch)
    anchors, stored = torch.full((batch,), columns // 2, device=device), torch.empty_like(base)

    def run() -> Any:
        with builtin.path(device):
            return loop.run(base, anchors, stored)

    return Call(run, lambda draft: _inside(draft.tokens, columns))


def _accept(blockwise: bool) -> Callable[[Sizes, int, int, torch.device], Call]:
    def make(sizes: Sizes, batch: int, columns: int, device: torch.device) -> Call:
        from benchmarks import builtin

        candidates, target, draft = _judging(sizes, columns, device)
        acceptance = builtin.Acceptance(
            _spread(candidates, batch),
            _spread(target, batch).flatten(0, 1),
            _spread(draft, batch),
        )

        def run() -> Any:
            with builtin.path(device):
                return acceptance.run(blockwise=blockwise)

        return Call(run, lambda outcome: _keeps(sizes, outcome.kept))

    return make


#: Multiples of every block that SGLang's kernels work in; acceptance at a half, a quarter, three eighths.
_FEW = 8192, 24576, 16384
_PARTLY = VOCABULARY // 4, VOCABULARY // 2, 3 * VOCABULARY // 8
PARTS: dict[str, Part] = {
    "builtin_draft": Part(_draft, _FEW),
    "builtin_accept": Part(_accept(blockwise=False), _PARTLY),
    "builtin_accept_optin": Part(_accept(blockwise=True), _PARTLY),
}


def count(name: str) -> Counts:
    """Count a part in the interpreter.

    Raises:
        RuntimeError: it went wrong, reached outside its operands, or is not linear.
    """
    part, device = PARTS[name], torch.device("cpu")
    *columns, third = part.columns
    places = [(batch, v) for batch in COUNTED for v in columns]
    seen: dict[tuple[int, int], moved.Moved] = {}
    for batch, v in (*places, (CONFIRMING, third)):
        call = part.make(Sizes(), batch, v, device)
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


def count_part(name: str) -> Iterator[dict[str, Any]]:
    """Count a part in the interpreter, in a child process."""
    with torch.no_grad():
        counts = count(name)
    yield {
        "bytes": [[*place, total] for place, total in counts.bytes.items()],
        "launches": counts.launches,
        "operations": counts.operations,
    }


def read_counts(found: Mapping[str, Any]) -> Counts:
    """What :func:`count_part` yielded, back from JSON."""
    return Counts(
        {(batch, v): total for batch, v, total in found["bytes"]},
        found["launches"],
        found["operations"],
    )
