"""What a step does between its forwards beside drafting and acceptance: survival, the rows to verify, the outcome.

Nothing here waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dspark_sglang.core.accept import Accepted, stop_at
from dspark_sglang.core.penalties import OutputCounts, Terms
from dspark_sglang.core.schedule.scheduler import ADMISSIBLE


class Window(NamedTuple):
    """Packed rows of a verification, padding last; every tensor ``[N]`` int64."""

    #: Absolute positions; 0: padding, as of the next two.
    positions: torch.Tensor
    slots: torch.Tensor
    ids: torch.Tensor
    #: The cell ``r * (gamma + 1) + j`` of each row; -1: padding.
    cells: torch.Tensor


class Finished(NamedTuple):
    """What a round brought, of ``R`` requests."""

    #: ``[2, R]`` int64 drafted tokens verified, and kept.
    pair: torch.Tensor
    #: ``[R]`` int32 drafted tokens kept, and all tokens committed.
    correct: torch.Tensor
    committed: torch.Tensor
    #: ``[R]`` int64 the token after them, 0 where there is none, and the length of each request after this round.
    bonus: torch.Tensor
    lens: torch.Tensor
    #: ``[R, gamma + 1]`` int64: the drafted tokens with ``bonus`` in its place, and with the token as it was decided.
    tokens: torch.Tensor
    reported: torch.Tensor


class Step:
    """In PyTorch, on any device; kernels take the place of single operations."""

    def survival(
        self,
        confidence: torch.Tensor,
        known: torch.Tensor,
        shift: torch.Tensor,
        whole: torch.Tensor,
    ) -> torch.Tensor:
        """Survivals ``[R, gamma]`` float64 by which drafted tokens are admitted: :data:`ADMISSIBLE` at least, 0 where none may be.

        Args:
            confidence: ``[R, gamma]`` float32; NaN counts as 0.
            known: ``[3, R]`` int64: tokens that may be verified, the request's kind (0 greedy, 1 sampled), and whether its
                block ranks before all.
            shift: ``[2, gamma, bins]`` float32 correction by kind, position and ``confidence * bins``.
            whole: ``[gamma]`` float64 survivals of a block that ranks before all.
        """
        limits, kind, first = known
        position = torch.arange(confidence.shape[1], device=confidence.device)
        bins = (confidence * shift.shape[2]).long().clamp_(0, shift.shape[2] - 1)
        # What is no confidence ranks last; the host finds out when it arrives.
        corrected = confidence.double() + shift[kind[:, None], position, bins]
        chances = corrected.nan_to_num_(nan=0.0).clamp_(0.0, 1.0)
        # One product after the other: a scan in another order could rise along a request.
        columns = [chances[:, 0]]
        for column in chances.unbind(1)[1:]:
            columns.append(columns[-1] * column)
        values = torch.stack(columns, dim=1).clamp_(min=ADMISSIBLE)
        values = torch.where(first[:, None] > 0, whole, values)
        return torch.where(position < limits[:, None], values, 0.0)

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
        """The packed rows of a verification, padded to ``rows``.

        Args:
            cells: ``[n]`` int64 cells ``r * (gamma + 1) + j`` that are verified.
            anchors: ``[R]`` int64.
            tokens: ``[R, gamma]`` int64 drafted.
            positions, slots: ``[R * (gamma + 1)]`` int64 of every cell.
        """
        ids = torch.cat([anchors[:, None], tokens], dim=1).view(-1)
        found = Window(positions[cells], slots[cells], ids[cells], cells)
        missing = rows - len(cells)
        if missing <= 0:
            return found
        pad = torch.nn.functional.pad
        positions, slots, ids = (pad(part, (0, missing)) for part in found[:3])
        return Window(positions, slots, ids, pad(cells, (0, missing), value=-1))

    def finish(
        self,
        outcome: Accepted,
        drafted: torch.Tensor,
        stops: torch.Tensor | None,
        lens: torch.Tensor,
        before: torch.Tensor,
    ) -> Finished:
        """End each run at its first stop token and lay out what the round brought.

        Args:
            outcome: of acceptance.
            drafted: ``[R, gamma]`` int64.
            stops: ``[R, S]`` int64 stop tokens, padded with -1; None: nothing ends a run.
            lens: ``[R]`` integer drafted tokens verified.
            before: ``[R]`` integer length of each request before the round.
        """
        if stops is not None:
            outcome = stop_at(outcome, drafted, stops)
        count, token = outcome.count, outcome.token
        committed = (count + 1).to(torch.int32)
        out = torch.nn.functional.pad(drafted, (0, 1))
        bonus = token.clamp(min=0)
        return Finished(
            pair=torch.stack([lens.to(count.dtype), count]),
            correct=count.to(torch.int32),
            committed=committed,
            bonus=bonus,
            lens=before + committed.to(before.dtype),
            tokens=out.scatter(1, count[:, None], bonus[:, None]),
            reported=out.scatter_(1, count[:, None], token[:, None]),
        )

    def kept(
        self,
        cells: torch.Tensor,
        committed: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[n]`` int64 slots of packed rows, -1 of those that were not kept, and their positions.

        Args:
            cells: ``[n]`` int64 cells ``r * width + j`` that were verified.
            committed: ``[R]`` int32 cells of each request that were kept.
            slots, positions: ``[R * width]`` int64 of every cell.
        """
        width = len(slots) // len(committed)
        row = torch.div(cells, width, rounding_mode="floor")
        inside = cells - row * width < committed[row]
        return torch.where(inside, slots[cells], -1), positions[cells]

    def penalise(
        self,
        logits: torch.Tensor,
        counts: OutputCounts,
        terms: Terms,
        cells: torch.Tensor,
        block: torch.Tensor,
    ) -> None:
        """Change logits ``[N, V]`` float32 in place as plain decoding's penalties do.

        Args:
            counts: of the outputs that ``terms`` name.
            cells: ``[N]`` int64 place of each row in the flattened block.
            block: ``[R, W]`` int64 anchors, and the tokens drafted after them.
        """
        owner = torch.div(cells, block.shape[1], rounding_mode="floor")
        # The anchor comes before every row.
        place = cells - owner * block.shape[1] + 1
        counts.penalise(logits, terms, owner, place, block)

    def extend(
        self, counts: OutputCounts, terms: Terms, block: torch.Tensor, kept: torch.Tensor
    ) -> None:
        """Add anchors and ``[R]`` int64 kept drafted tokens of a block to the outputs."""
        counts.extend(terms, block, kept + 1)
