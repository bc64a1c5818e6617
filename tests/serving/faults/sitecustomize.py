"""Faults in a real server's scheduler process: imported first by every Python under PYTHONPATH.

``FAULT_FILE`` names a file that says which fault is on: empty or missing, none. It is looked at once a
step, so a fault begins and ends while the server runs. Nothing of this is in the product.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.patching import on_import

FILE = os.environ.get("FAULT_FILE", "")
STALL_EVERY, STALLED_FOR = 10, 10
HOUR = 3600.0


def fault() -> str:
    """The fault that is on."""
    try:
        return Path(FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


class Clock:
    """``time`` as the rounds see it."""

    def __init__(self) -> None:
        self.readings = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def perf_counter(self) -> float:
        """Jumps an hour on and back again at every fourth reading while that fault is on."""
        self.readings += 1
        jump = HOUR if self.readings % 4 == 0 and fault() == "clock" else 0.0
        return time.perf_counter() + jump


def change_rounds(module: ModuleType) -> None:
    """Time of steps, confidences, and steps that stall."""
    module.time = Clock()  # type: ignore[attr-defined]
    original = module.Rounds.take
    steps, usual, last = 0, 0.05, 0.0

    def changed(self: Any, block: Any) -> Any:
        nonlocal steps, usual, last
        now = time.perf_counter()
        if 0.0 < now - last < 1.0:
            usual += 0.1 * (now - last - usual)
        last, steps, what = now, steps + 1, fault()
        if what == "confident":
            block = block._replace(confidence=block.confidence * 0.0 + 1.0)
        elif what == "doubtful":
            block = block._replace(confidence=block.confidence * 0.0)
        elif what == "stall" and steps % STALL_EVERY == 0:
            time.sleep(STALLED_FOR * usual)
            last = 0.0
        return original(self, block)

    module.Rounds.take = changed


def change_proposer(module: ModuleType) -> None:
    """Draft states that are NaN, a law that is, and a draft forward that raises."""
    forward, block = module.Proposer._run_forward, module.Proposer._block

    def run(self: Any, **given: Any) -> Any:
        if fault() == "exception":
            raise RuntimeError("planted in the draft forward")
        found = forward(self, **given)
        if fault() == "states":
            import torch

            with torch.inference_mode():  # as the forward that made them
                found.raw_hidden.fill_(float("nan"))
        return found

    def drafted(self: Any, *given: Any) -> Any:
        found = block(self, *given)
        if fault() == "law" and found.probs is not None:
            found = found._replace(probs=found.probs * float("nan"))
        return found

    module.Proposer._run_forward, module.Proposer._block = run, drafted


def change_verifier(module: ModuleType) -> None:
    """Writing the draft's KV raises; the target's logits of requests of one workload are NaN."""
    put, accept = module.Verifier._put, module.Verifier.accept_and_finalize

    def written(self: Any, *given: Any) -> None:
        if fault() == "kv":
            raise RuntimeError("planted where the draft's KV is written")
        put(self, *given)

    def accepted(self: Any, *, layout: Any, bs: int, target_logits: Any, **given: Any) -> Any:
        if fault() == "target":
            lens, first = self._sent(layout, bs, target_logits.device)
            for row, request in enumerate(self._requests):
                if module.read_options(request).workload == "spoilt":
                    target_logits[first[row] : first[row] + lens[row] + 1] = float("nan")
        return accept(self, layout=layout, bs=bs, target_logits=target_logits, **given)

    module.Verifier._put, module.Verifier.accept_and_finalize = written, accepted
    from dspark_sglang.serving.options import read_options

    module.read_options = read_options  # type: ignore[attr-defined]


CHANGES = {
    "dspark_sglang.serving.rounds": change_rounds,
    "dspark_sglang.serving.proposer": change_proposer,
    "dspark_sglang.serving.verifier": change_verifier,
}


if FILE:
    on_import(CHANGES)
