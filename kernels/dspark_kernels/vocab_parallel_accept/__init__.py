"""Acceptance where every rank holds a part of the vocabulary: records are exchanged, never rows."""

from __future__ import annotations

import torch

from dspark_kernels.accept.operands import (
    Accepted,
    Adjustments,
    DenseDraft,
    Filters,
    Keys,
    ListedDraft,
    Rows,
)
from dspark_kernels.accept.plan import check
from dspark_kernels.support.backend import Backend, resolve
from dspark_kernels.support.errors import OperandError
from dspark_kernels.vocab_parallel_accept.reference import Gather, reference
from dspark_kernels.vocab_parallel_accept.steps import Operands, Shard, Steps, steps

__all__ = [
    "Accepted",
    "Adjustments",
    "DenseDraft",
    "Filters",
    "Gather",
    "Keys",
    "ListedDraft",
    "Rows",
    "Shard",
    "begin",
    "exchanged_bytes",
    "vocab_parallel_accept",
]


def vocab_parallel_accept(
    rows: Rows,
    shard: Shard,
    temperature: torch.Tensor,
    uniforms: torch.Tensor,
    gather: Gather,
    *,
    draft: DenseDraft | ListedDraft | None = None,
    filters: Filters | None = None,
    keys: Keys | None = None,
    adjustments: Adjustments | None = None,
    searched: bool = True,
    backend: Backend = "auto",
    out: Accepted | None = None,
) -> Accepted:
    """What :func:`dspark_kernels.accept.accept` decides on the whole rows, from their shards.

    Every rank calls it with equal operands but for its own columns, and gets the same outcome. Five
    launches and three exchanges; filters add launches and exchanges (a fixed number).

    Args:
        rows: logits ``[N, widths[rank]]``, this rank's columns; the rest as for ``accept``. Drafted
            tokens are tokens of the whole vocabulary.
        shard: which columns these are.
        temperature, uniforms: as for ``accept``; equal on every rank.
        gather: takes a contiguous tensor and returns ``[W, ...]``, that tensor of every rank in rank order.
            Called in the same order on every rank. See ``tests/kernels`` for one over
            ``torch.distributed.all_gather_into_tensor``.
        draft: a dense law is sharded like the rows (its ``lse`` is over the whole vocabulary), a
            listed law whole on every rank.
        filters: as for ``accept``.
        keys: as for ``accept``. Not together with ``filters``: the noise of a filtered row is keyed by
            its rank among all tokens, which no shard knows.
        adjustments: as for ``accept``, of the whole vocabulary; **every** row is changed in place.
        searched: False where no request filters by top-k or top-p, only by min-p: 16 fewer exchanges.
        backend: ``torch`` gathers whole rows and judges them with the reference.
        out: as for ``accept``.

    Returns:
        counts, tokens and flags as ``accept``. The drawn token can differ from ``accept``'s where
        ``u * total`` lies within about 1e-6 of a boundary. Block verification is not offered here.

    Raises:
        OperandError: as ``accept``; a shard that does not match; filters together with keys.
    """
    generator = begin(
        rows, shard, temperature, uniforms, draft=draft, filters=filters, keys=keys,
        adjustments=adjustments, searched=searched, out=out,
    )  # fmt: skip
    if resolve(backend, rows.logits) == "torch":
        generator.close()
        found = reference(
            rows, list(shard.widths), temperature, uniforms, gather, draft=draft,
            filters=filters, keys=keys, adjustments=adjustments,
        )  # fmt: skip
        if out is None:
            return found
        for mine, theirs in zip(out, found, strict=True):
            mine.copy_(theirs)
        return out
    record = next(generator)
    while True:
        try:
            record = generator.send(gather(record))
        except StopIteration as end:
            finished: Accepted = end.value
            return finished


def begin(
    rows: Rows,
    shard: Shard,
    temperature: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    draft: DenseDraft | ListedDraft | None = None,
    filters: Filters | None = None,
    keys: Keys | None = None,
    adjustments: Adjustments | None = None,
    searched: bool = True,
    out: Accepted | None = None,
) -> Steps:
    """The same as a generator: it yields records and is sent ``[W, ...]`` of every rank's.

    For callers whose exchange is not a function call, and to run several ranks in one process.
    """
    check(rows, temperature, uniforms, draft, filters, keys, adjustments, False, out)
    ranks, width = len(shard.widths), rows.logits.shape[1]
    if not 0 <= shard.rank < ranks or shard.widths[shard.rank] != width:
        raise OperandError(
            f"rows.logits has {width} columns and the shard is {shard}.",
            expected="widths[rank] columns, with the rank in range",
            fix="Give every rank's widths, without padded columns.",
        )
    if filters is not None and keys is not None:
        raise OperandError(
            "There are filters and keys.",
            expected="one of the two: a seeded draw of a filtered row is keyed by its rank among "
            "all tokens, which a shard does not know",
            fix="Call once for the seeded and once for the filtered requests, or gather the rows "
            "of seeded requests that filter and call accept.",
        )
    if out is None:
        requests, device = rows.drafted.shape[0], rows.logits.device
        out = Accepted(
            torch.empty(requests, dtype=torch.int32, device=device),
            torch.empty(requests, dtype=torch.int64, device=device),
            torch.empty(requests, dtype=torch.int32, device=device),
        )
    given = Operands(rows, shard, temperature, uniforms, draft, filters, keys, adjustments)
    return steps(given, out, searched=searched)


def exchanged_bytes(
    requests: int, gamma: int, ranks: int, *, filtered: bool = False, steps_searched: int = 0
) -> int:
    """Bytes that all ranks together send into the exchanges of one round.

    Args:
        filtered: whether filters are given; steps_searched: exchanges of their search (9 for
            bfloat16 logits, 17 for float32, 0 where only min-p filters).
    """
    rows = requests * (gamma + 1)
    plain = 8 * (7 * rows + 2 * requests + requests)
    return ranks * (plain + (8 * rows * (2 + 7 * steps_searched) if filtered else 0))
