"""Sharded acceptance in plain torch: put the shards together and judge whole rows.

This is what the exchange of records must equal. It moves whole rows, which the kernels never do.
"""

from __future__ import annotations

from collections.abc import Callable

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
from dspark_kernels.accept.reference import judge

Gather = Callable[[torch.Tensor], torch.Tensor]


def reference(
    rows: Rows,
    widths: list[int],
    temperature: torch.Tensor,
    uniforms: torch.Tensor,
    gather: Gather,
    *,
    draft: DenseDraft | ListedDraft | None = None,
    filters: Filters | None = None,
    keys: Keys | None = None,
    adjustments: Adjustments | None = None,
) -> Accepted:
    """The outcome on the whole vocabulary.

    Args:
        rows: as in :func:`dspark_kernels.accept.accept`, this rank's columns of the logits.
        widths: columns of every rank.
        gather: ``[...]`` of every rank to ``[W, ...]``.
    """

    def whole(shard: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(shard, (0, max(widths) - shard.shape[-1]))
        parts = gather(padded.contiguous())
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], -1)

    if isinstance(draft, DenseDraft):
        draft = draft._replace(logits=whole(draft.logits))
    return judge(
        rows._replace(logits=whole(rows.logits)),
        temperature,
        uniforms,
        draft=draft,
        filters=filters,
        keys=keys,
        adjustments=adjustments,
    ).outcome
