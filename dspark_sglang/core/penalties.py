"""Penalties inside a verified block: what plain decoding would have applied at every position.

Plain decoding penalises each step by the output so far. In a block the output so far grows by one
drafted token a row, so row ``j`` counts the request's output and its first ``j`` drafted tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch


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
        counts = Counter(output)
        for position in range(rows.shape[0]):
            if position:
                counts[drafted[position - 1]] += 1
            self._apply_row(rows[position], counts, len(output) + position)

    def _apply_row(self, row: torch.Tensor, counts: Counter[int], length: int) -> None:
        if counts and (self.frequency or self.presence or self.repetition != 1.0):
            tokens = torch.tensor(list(counts), device=row.device)
            times = torch.tensor(list(counts.values()), device=row.device, dtype=row.dtype)
            values = row[tokens] - (self.frequency * times + self.presence)
            scaled = torch.where(values > 0, values / self.repetition, values * self.repetition)
            row[tokens] = scaled
        if length < self.min_new_tokens and self.stop_tokens:
            row[torch.tensor(self.stop_tokens, device=row.device)] = float("-inf")
