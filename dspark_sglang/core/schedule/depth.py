"""How deep to draft: the positions that the scheduler really uses, learned for each workload."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from dspark_sglang.core.round import Int64

#: A position is drafted while more than this share of a workload's requests would verify it.
_USED = 0.02
#: Weight of the newest step, and steps looked at before anything is cut.
_RATE, _ENOUGH = 0.05, 32
#: Workloads told apart; the one not seen for longest makes room.
WORKLOADS = 32


class _Workload:
    def __init__(self, gamma: int) -> None:
        self.used = np.ones(gamma)
        self.steps = 0


class DepthCaps:
    """The depth worth drafting for each workload; constant memory.

    What a scheduler would verify is only seen on steps that draft in full, so some must be.
    """

    def __init__(self, *, gamma: int) -> None:
        self.gamma = gamma
        self._known: OrderedDict[str, _Workload] = OrderedDict()

    def cap(self, workload: str) -> int:
        """Tokens to draft for its requests, 1 to gamma."""
        known = self._known.get(workload)
        if known is None or known.steps < _ENOUGH:
            return self.gamma
        used = (known.used > _USED).nonzero()[0]
        return int(used[-1]) + 1 if used.size else 1

    def learn(self, workload: str, wanted: Int64) -> None:
        """Take in a step that drafted in full.

        Args:
            wanted: ``[n]`` tokens that the scheduler would verify of each of its requests.
        """
        known = self._known.pop(workload, None) or _Workload(self.gamma)
        self._known[workload] = known
        if len(self._known) > WORKLOADS:
            self._known.popitem(last=False)
        share = (wanted[:, None] > np.arange(self.gamma)).mean(axis=0)
        known.steps += 1
        known.used += max(_RATE, 1.0 / known.steps) * (share - known.used)

    def caps(self) -> dict[str, int]:
        """The cap of every workload seen lately."""
        return {name: self.cap(name) for name in self._known}
