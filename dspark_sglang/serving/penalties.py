"""Penalties of running requests, exact also where a step is launched before the last one's tokens are known.

Plain decoding's penalties depend on every token of the output. The device has them: counts of each request's output
are kept there, and grow by what a step commits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dspark_sglang.core.penalties import OutputCounts, Terms
from dspark_sglang.serving.requests import request_penalties
from dspark_sglang.serving.sglang_types import Req

#: Where a request keeps the output that its prefill was given.
_PREFILLED = "_dspark_prefilled_output"


class RunningPenalties:
    """Terms and output counts of the requests that a scheduler process runs."""

    def __init__(self) -> None:
        self._counts: OutputCounts | None = None
        #: Requests whose output is counted, by identity, and their rows; rows to be used again.
        self._slots: dict[int, tuple[Req, int]] = {}
        self._free: list[int] = []
        self._requests: list[Req] = []
        self._terms: Terms | None = None
        #: ``[R, W]`` int64 anchors and drafted tokens of the running step.
        self._block: torch.Tensor | None = None

    def prefilled(self, requests: Sequence[Req]) -> None:
        """A prefill of these requests is launched: each has its output so far in its KV, and draws one token more."""
        for request in requests:
            if request_penalties(request).active:
                setattr(request, _PREFILLED, list(request.output_ids))
                self._forget(request)
                self._requests = []

    def apply(
        self,
        requests: Sequence[Req],
        logits: torch.Tensor,
        block: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> None:
        """What plain decoding's penalties do to the logits of a step, in place.

        Args:
            logits: ``[N, V]`` float32.
            block: ``[R, W]`` int64 anchors, and the tokens drafted after them.
            rows: ``[N]`` int64 places of the rows in the flattened block; None: all of it.
        """
        if self._counts is None:
            self._counts = OutputCounts(logits.shape[1], logits.device)
        if requests != self._requests:
            self._requests, self._terms = list(requests), self._renewed(requests, logits.device)
        self._block = None
        if self._terms is None:
            return
        self._block = block
        if rows is None:
            rows = torch.arange(len(logits), device=logits.device)
        owner = torch.div(rows, block.shape[1], rounding_mode="floor")
        # The anchor comes before every row.
        place = rows - owner * block.shape[1] + 1
        self._counts.penalise(logits, self._terms, owner, place, block)

    def extend(self, count: torch.Tensor) -> None:
        """The running step keeps its anchors and ``[R]`` int64 drafted tokens; what it draws is the next one's anchor."""
        if self._block is not None and self._terms is not None and self._counts is not None:
            self._counts.extend(self._terms, self._block, count + 1)
        self._block = None

    def _renewed(self, requests: Sequence[Req], device: torch.device) -> Terms | None:
        penalties = [request_penalties(request) for request in requests]
        here = {id(request) for request in requests}
        for request, _ in list(self._slots.values()):
            if id(request) not in here:
                self._forget(request)
        if not any(own.active for own in penalties):
            return None
        slots = [
            self._slot(request) if own.active else 0
            for request, own in zip(requests, penalties, strict=True)
        ]
        return Terms.of(penalties, slots, device)

    def _slot(self, request: Req) -> int:
        known = self._slots.get(id(request))
        if known is not None:
            return known[1]
        assert self._counts is not None
        slot = self._free.pop() if self._free else len(self._slots)
        # Only the first step after a prefill may be launched before the host knows the anchor.
        output = getattr(request, _PREFILLED, None)
        setattr(request, _PREFILLED, None)
        self._counts.begin(slot, request.output_ids[:-1] if output is None else output)
        self._slots[id(request)] = (request, slot)
        return slot

    def _forget(self, request: Req) -> None:
        known = self._slots.pop(id(request), None)
        if known is not None:
            self._free.append(known[1])
