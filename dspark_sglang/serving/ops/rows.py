"""What the parts of a round hand to each other."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import torch

from dspark_sglang.core.sampling import Filters
from dspark_sglang.core.seeded import Noise
from dspark_sglang.serving.sglang_types import SamplingBatchInfo


class SampledRows(msgspec.Struct, frozen=True):
    """The rows of a batch that sample, and their parameters."""

    #: ``[S]`` int64 indices into the batch.
    index: torch.Tensor
    #: ``[S]`` float32 temperatures.
    temperatures: torch.Tensor
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None
    #: ``[S]`` int64 where SGLang samples by seed (``--enable-deterministic-inference``), else None.
    seeds: torch.Tensor | None = None

    @classmethod
    def of(cls, info: SamplingBatchInfo | None) -> SampledRows | None:
        """The sampled rows of SGLang's sampling information; None when every row is greedy."""
        if info is None or info.is_all_greedy:
            return None
        # SGLang expresses temperature 0 as top_k = 1.
        index = (info.top_ks.view(-1) > 1).nonzero().view(-1)

        def rows(values: torch.Tensor) -> torch.Tensor:
            return values.view(-1)[index]

        return cls(
            index=index,
            temperatures=rows(info.temperatures).float(),
            top_k=rows(info.top_ks) if info.need_top_k_sampling else None,
            top_p=rows(info.top_ps) if info.need_top_p_sampling else None,
            min_p=rows(info.min_ps) if info.need_min_p_sampling else None,
            seeds=None if info.sampling_seed is None else rows(info.sampling_seed),
        )

    @property
    def filters(self) -> bool:
        """Whether some row filters its law."""
        return not (self.top_k is None and self.top_p is None and self.min_p is None)

    def noise(
        self, like: torch.Tensor, positions: torch.Tensor, owner: torch.Tensor | None = None
    ) -> Noise | None:
        """Keys of seeded draws; None where SGLang does not sample by seed.

        Args:
            like: ``[N, M]`` logits of the rows that draw.
            positions: ``[N]`` position of each row's input token.
            owner: ``[N]`` int64 sampled row that each belongs to; None: each its own.
        """
        if self.seeds is None:
            return None

        def spread(values: torch.Tensor | None) -> torch.Tensor | None:
            return values if values is None or owner is None else values[owner]

        seeds = self.seeds if owner is None else self.seeds[owner]
        filters = Filters.of(like, spread(self.top_k), spread(self.top_p), spread(self.min_p))
        return Noise(seeds, positions.to(torch.int64), filters)


class Admitted(NamedTuple):
    """What is sent to verification."""

    #: ``[R]`` int32 drafted tokens of each request.
    lens: torch.Tensor
    #: ``[R + budget]`` int64 cells ``r * (gamma + 1) + j`` of the ``[R, gamma + 1]`` window, request
    #: after request.
    rows: torch.Tensor


class Verified(NamedTuple):
    """A drafted block after the target has run over it."""

    #: ``[N, V]`` target logits, adjusted as plain decoding would have.
    logits: torch.Tensor
    #: ``[R, gamma]`` int64 drafted tokens.
    drafted: torch.Tensor
    #: The requests that sample; None: all are greedy.
    rows: SampledRows | None
    #: Drafted laws and the tokens they are over (None: every token in order), as the same operations
    #: gave them in the :class:`~dspark_sglang.core.draft.DraftBlock`; None where no law was drawn from.
    laws: torch.Tensor | None
    support: torch.Tensor | None
    lse: torch.Tensor | None
    #: ``[R]`` int64 drafted tokens that were sent, and logits row of each request's anchor.
    lens: torch.Tensor
    first: torch.Tensor
    #: ``[R]`` int64 position of each request's anchor.
    anchors: torch.Tensor
