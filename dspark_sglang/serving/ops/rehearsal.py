"""Every kernel that serving launches, launched once before the first request: what is compiled is compiled at start.

Triton compiles a kernel when it is first asked for a combination of dtypes, constants and alignments. That takes
seconds, and the scheduler stands still. The operations of a step are run here on operands that stand for every batch
there can be, through the very calls that a step makes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch

from dspark_sglang.core.penalties import OutputCounts, Penalties, Terms
from dspark_sglang.core.sts import BINS
from dspark_sglang.serving.ops import Ops, SampledRows, Verified

#: Requests that admission takes at once.
MOST = 1024
Kind = Literal["greedy", "sampled", "filtered", "min_p"]
KINDS: tuple[Kind, ...] = ("greedy", "sampled", "filtered", "min_p")
#: Base logits ``[N, M]`` of draft states ``[N, d]``.
Base = Callable[[torch.Tensor], torch.Tensor]


class Sizes(NamedTuple):
    """What a server's kernels depend on, beside its batches."""

    gamma: int
    #: Width of draft states, and their dtype.
    hidden: int
    dtype: torch.dtype
    #: Columns of the target's logits, which are float32: of this rank's, and of whole rows.
    columns: int
    whole: int
    #: Most requests of a batch, those beyond :data:`MOST` left out.
    requests: int
    #: Whether requests draw by seeds of their own.
    seeded: bool
    device: torch.device


def rehearse(ops: Ops, sizes: Sizes, base: Base, vocabulary: torch.Tensor | None) -> None:
    """Launch what steps of every kind launch; every rank has to.

    Args:
        base: the parallel stage's logits.
        vocabulary: the draft vocabulary ``[M]``; None: every token.
    """
    for kind in KINDS:
        for requests, depth in itertools.product((1, 2), (sizes.gamma, 1, 0)):
            rows = _rows(kind, requests, sizes)
            _step(ops, sizes, rows, requests, base, vocabulary, depth)
    for requests in _powers(min(sizes.requests, MOST)):
        _admission(ops, sizes, requests)
    _penalties(ops, sizes)


def _powers(most: int) -> Iterator[int]:
    """Admission has a kernel for every power of two of requests."""
    return itertools.takewhile(lambda n: n < 2 * most, (1 << k for k in itertools.count()))


def _rows(kind: Kind, requests: int, sizes: Sizes) -> SampledRows | None:
    if kind == "greedy":
        return None
    index = torch.arange(requests, device=sizes.device)
    filtered = kind == "filtered"
    ones = torch.ones(requests, device=sizes.device)
    return SampledRows(
        index=index,
        temperatures=ones,
        top_k=torch.full_like(index, 20, dtype=torch.int32) if filtered else None,
        top_p=ones if filtered else None,
        min_p=ones if kind == "min_p" else None,
        seeds=index if sizes.seeded else None,
    )


def _admission(ops: Ops, sizes: Sizes, requests: int) -> None:
    confidence = torch.full((requests, sizes.gamma), 0.5, device=sizes.device)
    known = torch.ones((3, requests), dtype=torch.int64, device=sizes.device)
    shift = torch.zeros((2, sizes.gamma, BINS), device=sizes.device)
    whole = torch.ones(sizes.gamma, dtype=torch.float64, device=sizes.device)
    ops.admit_there(ops.step.survival(confidence, known, shift, whole), requests)


def _step(
    ops: Ops,
    sizes: Sizes,
    rows: SampledRows | None,
    requests: int,
    base: Base,
    vocabulary: torch.Tensor | None,
    depth: int,
) -> None:
    gamma, device = sizes.gamma, sizes.device
    places = torch.arange(requests * (gamma + 1), device=device)
    anchors = torch.zeros(requests, dtype=torch.int64, device=device)
    tokens = torch.zeros((requests, gamma), dtype=torch.int64, device=device)
    if depth:
        hidden = torch.zeros((requests, gamma, sizes.hidden), dtype=sizes.dtype, device=device)
        hidden = hidden[:, :depth]
        logits = base(hidden.flatten(0, 1)).view(requests, depth, -1)
        block = ops.draft(logits, hidden, anchors, anchors, rows, vocabulary)
        ops.confidence(hidden, block.previous)
    else:
        block = ops.nothing(rows, requests)
    admitted = ops.anchors(requests, device)
    ops.step.window(admitted.rows, anchors, tokens, places, places, rows=len(places))
    # Draws by a request's own seed are made from whole rows where they filter.
    gathered = rows is not None and rows.seeds is not None and rows.filters
    columns = sizes.whole if gathered else sizes.columns
    outcome = ops.accept(
        Verified(
            logits=torch.zeros((requests, columns), device=device),
            drafted=tokens[:, : max(1, depth)],
            rows=rows,
            probs=block.probs,
            support=block.support,
            lse=block.lse,
            lens=admitted.lens,
            first=admitted.first,
            anchors=anchors,
        )
    )
    for stops in (None, tokens[:, :1].contiguous()):
        done = ops.step.finish(outcome, tokens, stops, admitted.lens, anchors)
    ops.step.kept(admitted.rows, done.committed, places, places)


def _penalties(ops: Ops, sizes: Sizes) -> None:
    counts = OutputCounts(sizes.whole, sizes.device)
    counts.begin({0: []})
    terms = Terms.of([Penalties(0.5, min_new_tokens=1, stop_tokens=(0,))], [0], sizes.device)
    logits = torch.zeros((1, sizes.whole), device=sizes.device)
    block = torch.zeros((1, sizes.gamma + 1), dtype=torch.int64, device=sizes.device)
    ops.step.penalise(logits, counts, terms, block[0, :1], block)
    ops.step.extend(counts, terms, block, block[0, :1])
