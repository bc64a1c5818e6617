"""The order of launches and exchanges of sharded acceptance, as a generator."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

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
from dspark_kernels.accept.plan import LISTED_TYPES, power
from dspark_kernels.support.backend import launched
from dspark_kernels.vocab_parallel_accept import kernel as kernels
from dspark_kernels.vocab_parallel_accept import search

#: A local record goes out, every rank's come back: ``[...]`` to ``[W, ...]``.
Steps = Generator[torch.Tensor, torch.Tensor, Accepted]
WARPS = 8


KERNELS: dict[str, Any] = {
    "stats": kernels.stats_kernel,
    "combine": kernels.combine_kernel,
    "narrow": search.narrow_kernel,
    "settle": search.settle_kernel,
    "kept": search.kept_kernel,
    "decide": kernels.decide_kernel,
    "masses": kernels.masses_kernel,
    "draw": kernels.draw_kernel,
    "finish": kernels.finish_kernel,
}


class Shard(NamedTuple):
    """Which columns of the vocabulary a rank holds; ranks hold them in rank order."""

    rank: int
    #: Columns of every rank; their sum is the vocabulary.
    widths: tuple[int, ...]

    @property
    def base(self) -> int:
        """The token of this rank's first column."""
        return sum(self.widths[: self.rank])


class Operands(NamedTuple):
    """Everything one rank brings to a round."""

    rows: Rows
    shard: Shard
    temperature: torch.Tensor
    uniforms: torch.Tensor
    draft: DenseDraft | ListedDraft | None
    filters: Filters | None
    keys: Keys | None
    adjustments: Adjustments | None


def configuration(
    width: int, gamma: int, ranks: int, *, bfloat16: bool, law: int
) -> dict[str, Any]:
    """Compile-time constants of all kernels; each takes those it has."""
    block = min(2048, max(64, power(width) // 4))
    return {
        # Every step of up to 7 drafted tokens runs the same kernels.
        "PLACES": max(8, power(gamma + 1)),
        "RANKS": power(ranks),
        "BLOCK": block,
        "SLOTS": power(-(-width // block)),
        "TILE": min(1024, block),
        "STAGES": 3,
        "SHIFT": 16 if bfloat16 else 0,
        "LAW": law,
    }


class _Round:
    """Named arguments of the kernels of one round, and their launches."""

    def __init__(self, given: Operands, out: Accepted) -> None:
        rows, shard, draft = given.rows, given.shard, given.draft
        requests, gamma = rows.drafted.shape
        width = rows.logits.shape[1]
        idle = given.temperature
        law, lse, listed, size, kind = idle, idle, rows.drafted, 1, 0
        if isinstance(draft, DenseDraft):
            law, lse, size, kind = draft.logits, draft.lse, width, 1
        elif isinstance(draft, ListedDraft):
            law, listed, size, kind = draft.probs, draft.tokens, draft.probs.shape[2], 2
        self.grid = (requests, gamma + 1)
        self.known: dict[str, Any] = {
            "logits": rows.logits,
            "logits_stride": rows.logits.stride(0),
            "rows": rows.logits.shape[0],
            "width": width,
            "base": shard.base,
            "vocabulary": sum(shard.widths),
            "requests": requests,
            "ranks": len(shard.widths),
            "own_rank": shard.rank,
            "first": rows.first,
            "lens": rows.lens,
            "drafted": rows.drafted,
            "temperature": given.temperature,
            "uniforms": given.uniforms,
            "law": law,
            "lse": lse,
            "listed": listed,
            "law_size": size,
            "gamma": gamma,
            "count_out": out.count,
            "token_out": out.token,
            "flag_out": out.flag,
            "count": out.count,
            "token": out.token,
            "flag": out.flag,
        }
        self.known |= configuration(
            width, gamma, len(shard.widths), bfloat16=rows.logits.dtype == torch.bfloat16, law=kind
        )
        self.known |= {
            "DENSE": kind == 1,
            "COUPLED": given.keys is not None,
            "FILTERED": given.filters is not None,
            "ADJUSTED": given.adjustments is not None,
        }
        names = ("top_k", "top_p", "min_p")
        self.known |= dict(zip(names, given.filters or (idle,) * 3, strict=True))
        names = ("seeds", "positions", "coupling")
        self.known |= dict(zip(names, given.keys or (idle,) * 3, strict=True))
        fields = [f"adjust_{name}" for name in LISTED_TYPES]
        fields += ["frequency", "presence", "repetition", "min_new", "lengths"]
        self.known |= dict(zip(fields, given.adjustments or (idle,) * len(fields), strict=True))
        listing = given.adjustments
        self.known["adjust_size"] = 0 if listing is None else listing.tokens.shape[1]

    def empty(self, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.known["logits"].device)

    def launch(self, name: str, grid: tuple[int, ...], **more: Any) -> None:
        kernel = KERNELS[name]
        launched(f"vocab_parallel_accept.{name}")
        self.known |= more
        taken = {key: self.known[key] for key in kernel.arg_names}
        kernel[grid](**taken, num_warps=WARPS)


def steps(given: Operands, out: Accepted, *, searched: bool) -> Steps:
    """One round of one rank; the caller exchanges what is yielded.

    Args:
        searched: whether top-k or top-p may filter; else only min-p is looked at.
    """
    run = _Round(given, out)
    requests, rows = run.grid
    slots = run.known["SLOTS"]
    each, whole = (requests,), run.grid
    sums = run.empty(requests, rows, slots, dtype=torch.float32)
    stats = run.empty(requests, rows, kernels.STATS.value)
    laws = run.empty(requests, rows, kernels.LAW_FIELDS.value)
    bounds = run.empty(requests, rows, 2, dtype=torch.int64)
    cuts = run.empty(requests, rows, 2, dtype=torch.int32)
    own = {"sums_out": sums, "sums": sums, "laws_out": laws, "laws": laws}
    run.launch("stats", whole, stats_out=stats, **own)
    run.launch("combine", each, stats=(yield stats), bounds_out=bounds)
    if given.filters is not None:
        counts = run.empty(requests, rows, kernels.COUNTS.value)
        all_counts = counts
        if searched:
            # A quarter of the interval is left a step; one more pass counts at the key found.
            halves = (32 - run.known["SHIFT"]) // 2
            for step in range(halves + 1):
                run.launch("narrow", whole, counts_out=counts, bounds=bounds)
                all_counts = yield counts
                if step < halves:
                    run.launch("settle", each, counts=all_counts)
        kept = run.empty(requests, rows, 2)
        run.launch(
            "kept", whole, counts=all_counts, bounds=bounds, stats=stats, cuts_out=cuts,
            kept_out=kept, CUTS=searched,
        )  # fmt: skip
        run.launch("decide", each, kept=(yield kept))
    left = run.empty(requests, 2, slots)
    masses = run.empty(requests, 2)
    run.launch("masses", each, stats=stats, cuts=cuts, left_out=left, masses_out=masses)
    found = run.empty(requests, dtype=torch.int64)
    run.launch("draw", each, masses=(yield masses), left=left, found_out=found)
    run.launch("finish", each, found=(yield found))
    return out
