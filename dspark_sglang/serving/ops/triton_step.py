"""The rest of a step as Triton kernels: one launch an operation."""

from __future__ import annotations

import torch

from dspark_kernels import penalise, step
from dspark_sglang.core.accept import Accepted
from dspark_sglang.core.penalties import OutputCounts, Terms
from dspark_sglang.core.schedule.scheduler import ADMISSIBLE
from dspark_sglang.core.step import Finished, Step, Window


class TritonStep(Step):
    """By :mod:`dspark_kernels`."""

    def survival(
        self,
        confidence: torch.Tensor,
        known: torch.Tensor,
        shift: torch.Tensor,
        whole: torch.Tensor,
    ) -> torch.Tensor:
        return step.survival(confidence.contiguous(), known, shift, whole, least=ADMISSIBLE)

    def window(
        self,
        cells: torch.Tensor,
        anchors: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        *,
        rows: int,
    ) -> Window:
        slots, rows = slots.to(torch.int64), max(rows, len(cells))
        return Window(*step.window(cells, anchors, tokens, positions, slots, rows=rows))

    def finish(
        self,
        outcome: Accepted,
        drafted: torch.Tensor,
        stops: torch.Tensor | None,
        lens: torch.Tensor,
        before: torch.Tensor,
    ) -> Finished:
        drafted, before = drafted.contiguous(), before.to(torch.int64)
        count, token = outcome.count, outcome.token
        return Finished(*step.finish(count, token, drafted, stops, lens.to(torch.int32), before))

    def kept(
        self,
        cells: torch.Tensor,
        committed: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return step.kept(cells, committed, slots.to(torch.int64), positions)

    def penalise(
        self,
        logits: torch.Tensor,
        counts: OutputCounts,
        terms: Terms,
        cells: torch.Tensor,
        block: torch.Tensor,
    ) -> None:
        if logits.dtype != torch.float32 or not logits.is_contiguous():
            super().penalise(logits, counts, terms, cells, block)
            return
        given = penalise.Counts(*counts.tensors), penalise.Terms(*terms)
        penalise.penalise(logits, cells, *given, block)

    def extend(
        self, counts: OutputCounts, terms: Terms, block: torch.Tensor, kept: torch.Tensor
    ) -> None:
        given = penalise.Counts(*counts.tensors), penalise.Terms(*terms)
        penalise.extend(*given, block, kept.contiguous())
