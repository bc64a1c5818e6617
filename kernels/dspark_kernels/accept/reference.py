"""Acceptance in plain torch: one request, one row, one token at a time, in float64.

Nothing here is shared with the kernel. Besides the outcome it says how far every decision that depends
on rounding was from going the other way, so a test can compare decisions exactly where that is fair.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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

_MASK = 0xFFFFFFFF


class Judged(NamedTuple):
    """An outcome and the margins of its decisions."""

    outcome: Accepted
    #: ``[R]`` float64 least distance, in probability, of a decision of the request from its boundary.
    margin: torch.Tensor


#: In place of a token where the deciding row has no law.
_UNDECIDED = -1


class _Margin:
    def __init__(self) -> None:
        self.least = math.inf

    def add(self, distance: float) -> None:
        # NaN is no distance: nothing is near to it.
        self.least = min(self.least, abs(distance))


class _Law(NamedTuple):
    """A row's filtered law."""

    probs: torch.Tensor
    #: Tokens in the order of the filters: descending logit, ascending token.
    order: torch.Tensor
    filtered: bool


def judge(
    rows: Rows,
    temperature: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    draft: DenseDraft | ListedDraft | None = None,
    filters: Filters | None = None,
    keys: Keys | None = None,
    adjustments: Adjustments | None = None,
    block: bool = False,
) -> Judged:
    """The outcome of every request; operands as in :func:`dspark_kernels.accept.accept`."""
    requests, gamma = rows.drafted.shape
    size, width = rows.logits.shape
    count, token, flag, margins = [], [], [], []
    for r in range(requests):
        length, start = int(rows.lens[r]), int(rows.first[r])
        margin = _Margin()
        outcome = (0, 0, 0)
        drafted = rows.drafted[r, : max(length, 0)].tolist()
        if length >= 0:
            if (
                length > gamma
                or start < 0
                or start + length >= size
                or any(not 0 <= x < width for x in drafted)
            ):
                outcome = (0, 0, 2)
            else:
                one = _Request(
                    r, rows.logits[start : start + length + 1], drafted, float(temperature[r]),
                    uniforms[r].double(), draft, filters, keys, adjustments, margin,
                )  # fmt: skip
                outcome = (*one.decide(block), 0)
        count.append(outcome[0])
        token.append(outcome[1])
        flag.append(outcome[2])
        margins.append(margin.least)
    device = rows.logits.device
    return Judged(
        Accepted(
            torch.tensor(count, dtype=torch.int32, device=device),
            torch.tensor(token, dtype=torch.int64, device=device),
            torch.tensor(flag, dtype=torch.int32, device=device),
        ),
        torch.tensor(margins, dtype=torch.float64, device=device),
    )


class _Request:
    """One request of a round."""

    def __init__(
        self,
        index: int,
        logits: torch.Tensor,
        drafted: list[int],
        temperature: float,
        uniforms: torch.Tensor,
        draft: DenseDraft | ListedDraft | None,
        filters: Filters | None,
        keys: Keys | None,
        adjustments: Adjustments | None,
        margin: _Margin,
    ) -> None:
        self.index, self.logits, self.drafted = index, logits, drafted
        self.temperature, self.uniforms, self.draft = temperature, uniforms, draft
        self.filters, self.keys, self.adjustments = filters, keys, adjustments
        self.margin = margin
        if adjustments is not None:
            # A copy: judging must not depend on how many rows were judged before.
            self.logits = logits.clone()

    def decide(self, block: bool) -> tuple[int, int]:
        """Drafted tokens kept and the token after them."""
        greedy = self.temperature <= 0
        coupled = self.keys is not None and int(self.keys.coupled[self.index]) != 0
        if not greedy and not coupled:
            return self._block() if block else self._rejection()
        for j, x in enumerate(self.drafted):
            choice = self._best(j) if greedy else self._draw(j)
            if choice != x:
                return j, choice
        j = len(self.drafted)
        return j, self._best(j) if greedy else self._draw(j)

    def _row(self, j: int) -> torch.Tensor:
        row = self.logits[j].double()
        if self.adjustments is not None:
            row = row.clone()
            _adjust(row, self.adjustments, self.index, self.drafted[:j])
        return row

    def _best(self, j: int) -> int:
        """The first NaN, or else the first of the largest: as ``torch.argmax``."""
        row = self._row(j)
        odd = row.isnan()
        return int((odd if bool(odd.any()) else row == row.max()).nonzero()[0])

    def _law(self, j: int) -> _Law | None:
        """The law of a row; None where it has none."""
        row = self._row(j)
        scaled = row / self.temperature
        probs = torch.softmax(scaled, dim=-1)
        if not (math.isfinite(float(row.max())) and math.isfinite(float(probs.sum()))):
            return None
        order = torch.sort(scaled, descending=True, stable=True).indices
        if self.filters is None:
            return _Law(probs, order, False)
        top_k = int(self.filters.top_k[self.index])
        top_p = float(self.filters.top_p[self.index])
        min_p = float(self.filters.min_p[self.index])
        filtered = top_k < len(probs) or top_p < 1 or min_p > 0
        kept = torch.zeros_like(probs)
        before, largest = 0.0, float(probs.max())
        for rank, x in enumerate(order.tolist()):
            p = float(probs[x])
            if rank >= top_k:
                break
            if top_p < 1:
                self.margin.add(before - top_p)
                if before > top_p:
                    break
            if min_p > 0:
                self.margin.add(p - min_p * largest if p != largest else 1.0)
                if p < min_p * largest:
                    break
            kept[x] = p
            before += p
        if not bool(kept.any()):
            return None
        return _Law(kept / kept.sum(), order, filtered)

    def _offered(self, j: int) -> torch.Tensor:
        """``[V]`` the law that drafted token ``j`` was drawn from; all NaN where one listed is.

        A dense law is all NaN where its log-sum-exp is not finite, as is that of a law with a NaN.
        """
        law = torch.zeros(self.logits.shape[1], dtype=torch.float64)
        if self.draft is None:
            law[self.drafted[j]] = 1.0
        elif isinstance(self.draft, DenseDraft):
            logits, lse = self.draft.logits[self.index, j].double(), self.draft.lse[self.index, j]
            law = (logits / self.temperature - lse.double()).exp()
            if not math.isfinite(float(lse)):
                law[:] = math.nan
        else:
            for x, q in zip(
                self.draft.tokens[self.index, j].tolist(),
                self.draft.probs[self.index, j].tolist(),
                strict=True,
            ):
                if x >= 0:
                    law[x] += q
            if bool(law.isnan().any()):
                law[:] = math.nan
        return law

    def _rejection(self) -> tuple[int, int]:
        for j, x in enumerate(self.drafted):
            law, q = self._law(j), self._offered(j)
            if law is None:
                return j, _UNDECIDED
            p = law.probs
            test = float(self.uniforms[j] * q[x] - p[x])
            self.margin.add(test)
            if not test < 0:
                return j, self._invert(_residual(p, q), p)
        return len(self.drafted), self._bonus(self._law(len(self.drafted)))

    def _bonus(self, law: _Law | None) -> int:
        """The token after a whole block."""
        return _UNDECIDED if law is None else self._invert(law.probs, law.probs)

    def _block(self) -> tuple[int, int]:
        laws: list[torch.Tensor] = []
        offers: list[torch.Tensor] = []
        survives = [1.0]
        last = self._law(0)
        # The block ends before the first row without a law, or drafted law that is NaN.
        while last is not None and len(laws) < len(self.drafted):
            x, offer = self.drafted[len(laws)], self._offered(len(laws))
            q = float(offer[x])
            if math.isnan(q):
                break
            weight = survives[-1]
            survives.append(min(1.0, weight * float(last.probs[x]) / q) if q > 0 else weight)
            laws.append(last.probs)
            offers.append(offer)
            last = self._law(len(laws))
        kept, length = 0, len(laws)
        for k in range(1, length + 1):
            chance = survives[k]
            if k < length:
                left = float(_residual(survives[k] * laws[k], offers[k]).sum())
                if not math.isnan(left):
                    chance = left / max(left + 1 - survives[k], 1e-300)
            self.margin.add(float(self.uniforms[k - 1]) - chance)
            if float(self.uniforms[k - 1]) < chance:
                kept = k
        if kept == length:
            return kept, self._bonus(last)
        p = laws[kept]
        return kept, self._invert(_residual(survives[kept] * p, offers[kept]), p)

    def _invert(self, weights: torch.Tensor, otherwise: torch.Tensor) -> int:
        """The first token whose cumulative weight exceeds ``u * total``.

        Weights that have no mass or are NaN give way to ``otherwise``.
        """
        if not float(weights.sum()) > 1e-12:
            weights = otherwise
        wanted = float(self.uniforms[-1]) * float(weights.sum())
        cumulative = 0.0
        token = -1
        for x, weight in enumerate(weights.tolist()):
            if weight > 0:
                cumulative += weight
                self.margin.add(cumulative - wanted)
                if token < 0 or cumulative - weight <= wanted:
                    token = x
        return token

    def _draw(self, j: int) -> int:
        assert self.keys is not None
        law = self._law(j)
        if law is None:
            return _UNDECIDED
        seed = int(self.keys.seeds[self.index])
        position = int(self.keys.positions[self.index]) + j
        tokens = law.order if law.filtered else torch.arange(len(law.probs))
        scores = noise(seed, position, torch.arange(len(tokens))) + law.probs[tokens].log()
        near = scores.sort(descending=True, stable=True)
        if len(tokens) > 1 and float(near.values[1]) > -math.inf:
            self.margin.add(float(near.values[0] - near.values[1]))
        return int(tokens[near.indices[0]])


def _residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``max(0, p - q)``; of a token without ``p`` nothing is left, whatever ``q`` says."""
    return torch.where(p > 0, (p - q).clamp(min=0), 0.0)


def _adjust(row: torch.Tensor, given: Adjustments, r: int, before: list[int]) -> None:
    """Penalise, exclude and bias one float64 row in place."""
    frequency, presence = float(given.frequency[r]), float(given.presence[r])
    repetition = float(given.repetition[r])
    listed = [(i, x) for i, x in enumerate(given.tokens[r].tolist()) if 0 <= x < len(row)]
    counts = {x: int(given.counts[r, i]) for i, x in listed}
    for x in before:
        counts[x] = counts.get(x, 0) + 1
    for x, times in counts.items():
        if times > 0:
            value = float(row[x]) - (frequency * times + presence)
            row[x] = value / repetition if value > 0 else value * repetition
    early = int(given.lengths[r]) + len(before) < int(given.min_new_tokens[r])
    for i, x in listed:
        if early and int(given.stops[r, i]):
            row[x] = -math.inf
        row[x] += float(given.bias[r, i])


def noise(seed: int, position: int, columns: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float64, hashed from its arguments (MurmurHash3, 32 bits).

    Args:
        columns: ``[n]`` int64 on the CPU.
    """
    state = torch.zeros_like(columns)
    for key in (seed & _MASK, (seed >> 32) & _MASK, position & _MASK, columns & _MASK):
        # Products wrap modulo 2^64, which keeps their low 32 bits.
        mixed = (torch.as_tensor(key) * 0xCC9E2D51) & _MASK
        mixed = ((mixed << 15) | (mixed >> 17)) & _MASK
        state = state ^ ((mixed * 0x1B873593) & _MASK)
        state = ((state << 13) | (state >> 19)) & _MASK
        state = (state * 5 + 0xE6546B64) & _MASK
    state = state ^ 16
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _MASK
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _MASK
    state = state ^ (state >> 16)
    negative = -(state.double() / _MASK).log()
    return -negative.clamp(min=2.0**-32, max=torch.finfo(torch.float64).max).log()
