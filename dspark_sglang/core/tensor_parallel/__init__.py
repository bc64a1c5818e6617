"""Drafting and acceptance where every rank holds some columns of the vocabulary.

Ranks exchange records of a few numbers a row, never rows. Each function is a generator that yields
this rank's record and is sent ``[W, ...]``, that record of every rank in rank order; all ranks then
decide alike from equal numbers. So the exchange is the caller's, and a test runs all ranks in one process.

Draws do not depend on how the vocabulary is divided: a drafted token is the maximum of
``logit / T + g(seed, position, token)`` (:mod:`dspark_sglang.core.seeded`), the token after a rejection
inverts the cumulative sum in token order over all shards.
"""

from dspark_sglang.core.tensor_parallel.accept import Sampling, accept
from dspark_sglang.core.tensor_parallel.draft import (
    HeldHeads,
    Keys,
    confidence_logits,
    draft_block,
    held_heads,
)
from dspark_sglang.core.tensor_parallel.shard import Exchange, Shard, Sum

__all__ = [
    "Exchange",
    "HeldHeads",
    "Keys",
    "Sampling",
    "Shard",
    "Sum",
    "accept",
    "confidence_logits",
    "draft_block",
    "held_heads",
]
