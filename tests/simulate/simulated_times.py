"""Step times for tests of the simulator."""

from __future__ import annotations


class Fixed:
    """Steps of one length: what closed forms can be compared with."""

    def __init__(
        self, *, gamma: int, step: float, round_: float | None = None, prefill: float = 0.0
    ):
        self.gamma, self._step, self._prefill = gamma, step, prefill
        self._round = step if round_ is None else round_

    def plain(self, requests: int, context: int, sampled: int) -> float:
        return self._step

    def round(self, requests: int, drafted: int, context: int, sampled: int) -> float:
        return self._round

    def prefill(self, tokens: int, requests: int) -> float:
        return self._prefill

    def between(self, requests: int) -> float:
        return 0.0
