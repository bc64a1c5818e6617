"""Penalties inside a verified block: what plain decoding would have applied at every position.

Plain decoding penalises each step by the output so far. In a block the output so far grows by one
drafted token a row, so row ``j`` counts the request's output and its first ``j`` drafted tokens.

:class:`OutputCounts` keeps the output of requests as counts on the device of their logits: where steps are launched
before the host knows the tokens of the last one, the device does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dspark_sglang.core.device import to_device


@dataclass(frozen=True, slots=True)
class Penalties:
    """One request's penalties, named and defined as in SGLang's sampling parameters.

    Attributes:
        frequency: subtracted once for every occurrence of a token in the output.
        presence: subtracted once for a token that occurs in the output.
        repetition: positive logits of tokens in the output are divided by it, others multiplied.
        min_new_tokens: stop tokens are excluded until the output has this many tokens.
        stop_tokens: the stop tokens.
    """

    frequency: float = 0.0
    presence: float = 0.0
    repetition: float = 1.0
    min_new_tokens: int = 0
    stop_tokens: tuple[int, ...] = ()

    @property
    def active(self) -> bool:
        """Whether anything would ever change."""
        return bool(
            self.frequency or self.presence or self.repetition != 1.0 or self.min_new_tokens
        )

    def apply(self, rows: torch.Tensor, output: Sequence[int], drafted: Sequence[int]) -> None:
        """Change the logits of one request's block in place.

        Args:
            rows: ``[1 + len(drafted), V]`` logits; row ``j`` follows the first ``j`` drafted tokens.
            output: tokens generated before the block.
            drafted: tokens of the block.
        """
        counts = OutputCounts(rows.shape[1], rows.device)
        counts.begin({0: output})
        place = torch.arange(len(rows), device=rows.device)
        block = torch.tensor([list(drafted)], dtype=torch.int64, device=rows.device)
        counts.penalise(
            rows, Terms.of([self], [0], rows.device), place.new_zeros(len(rows)), place, block
        )


class Terms(NamedTuple):
    """Penalties of ``R`` requests as tensors; a request without any has neutral ones."""

    #: ``[R]`` int64 rows of :class:`OutputCounts`; 0 where a request has no penalties.
    slot: torch.Tensor
    #: ``[R]`` bool: the others' rows are not theirs, and they add nothing to them.
    active: torch.Tensor
    #: ``[3, R]`` float64 frequency, presence and repetition.
    weights: torch.Tensor
    #: ``[R]`` int64.
    min_new_tokens: torch.Tensor
    #: ``[R, S]`` int64, padded with a request's first one, or with 0 where it has none.
    stops: torch.Tensor

    @classmethod
    def of(
        cls, penalties: Sequence[Penalties], slots: Sequence[int], device: torch.device
    ) -> Terms:
        """Args:
        slots: of each request; 0 where its penalties are not active.
        """
        width = max((len(own.stop_tokens) for own in penalties if own.min_new_tokens), default=0)
        stops = [
            (*own.stop_tokens, *(own.stop_tokens or (0,))[:1] * width)[:width] for own in penalties
        ]
        # Without a stop token there is nothing to exclude.
        least = [own.min_new_tokens if own.stop_tokens else 0 for own in penalties]
        integers = torch.tensor(
            [(slot, own.active, few, *some) for slot, own, few, some in zip(slots, penalties, least, stops, strict=True)],
            dtype=torch.int64,
        )  # fmt: skip
        weights = torch.tensor(
            [[own.frequency, own.presence, own.repetition] for own in penalties],
            dtype=torch.float64,
        ).T.contiguous()
        integers, weights = to_device(integers, device), to_device(weights, device)
        return cls(integers[:, 0], integers[:, 1].bool(), weights, integers[:, 2], integers[:, 3:])


class OutputCounts:
    """How often each token occurs in the output of requests, a row a request; grows when it has to."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        #: ``[P, V]`` int32 occurrences, and ``[P]`` int64 tokens of the output; others read them by :attr:`tensors`.
        self._counts = torch.zeros((0, vocabulary), dtype=torch.int32, device=device)
        self._length = torch.zeros(0, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return len(self._length)

    @property
    def device(self) -> torch.device:
        """Where the counts are."""
        return self._counts.device

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``[P, V]`` int32 occurrences and ``[P]`` int64 tokens of each output, as they are now."""
        return self._counts, self._length

    def begin(self, outputs: Mapping[int, Sequence[int]]) -> None:
        """Let rows stand for requests, each with its output; as many launches for many as for one."""
        missing = max(outputs, default=-1) + 1 - len(self)
        if missing > 0:
            missing = max(missing, len(self))
            self._counts = torch.cat(
                [self._counts, self._counts.new_zeros((missing, self._counts.shape[1]))]
            )
            self._length = torch.cat([self._length, self._length.new_zeros(missing)])
        width, device = self._counts.shape[1], self._counts.device
        rows = torch.tensor([(slot, len(output)) for slot, output in outputs.items()])
        slots, lengths = to_device(rows.view(-1, 2).T.contiguous(), device)
        self._counts.index_fill_(0, slots, 0)
        self._length.index_copy_(0, slots, lengths)
        places = [slot * width + token for slot, output in outputs.items() for token in output]
        if places:
            flat = to_device(torch.tensor(places), device)
            ones = torch.ones_like(flat, dtype=torch.int32)
            self._counts.view(-1).index_add_(0, flat, ones)

    def penalise(
        self,
        logits: torch.Tensor,
        terms: Terms,
        owner: torch.Tensor,
        place: torch.Tensor,
        block: torch.Tensor,
    ) -> None:
        """Change logits in place; nothing waits for the device.

        Args:
            logits: ``[N, V]`` rows of blocks.
            owner: ``[N]`` int64 request of each row.
            place: ``[N]`` int64 how many of the block's tokens come before the row.
            block: ``[R, W]`` int64 tokens that may become output.
        """
        # Neutral terms leave a row as it is, whatever is counted there.
        slot = terms.slot[owner]
        counts = self._counts[slot]
        before = torch.arange(block.shape[1], device=block.device) < place[:, None]
        counts.scatter_add_(1, block[owner], before.int())
        weights = terms.weights[:, owner, None].to(logits.dtype)
        frequency, presence, repetition = weights.unbind(0)
        lower = logits - (frequency * counts + presence)
        scaled = torch.where(lower > 0, lower / repetition, lower * repetition)
        logits.copy_(torch.where(counts > 0, scaled, logits))
        if terms.stops.shape[1]:
            length = self._length[slot] + place
            short = (length < terms.min_new_tokens[owner])[:, None]
            stops = terms.stops[owner]
            logits.scatter_(1, stops, torch.where(short, float("-inf"), logits.gather(1, stops)))

    def extend(self, terms: Terms, block: torch.Tensor, kept: torch.Tensor) -> None:
        """Add what a block has brought to the output.

        Args:
            block: ``[R, W]`` int64.
            kept: ``[R]`` int64 how many of its tokens, from the first.
        """
        new = torch.arange(block.shape[1], device=block.device) < kept[:, None]
        new &= terms.active[:, None]
        flat = terms.slot[:, None] * self._counts.shape[1] + block
        self._counts.view(-1).index_add_(0, flat.flatten(), new.int().flatten())
        self._length.index_add_(0, terms.slot, new.sum(1))
