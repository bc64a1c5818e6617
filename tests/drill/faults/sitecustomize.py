"""Faults that a canary has to find, in a real server's scheduler process.

Imported first by every Python under PYTHONPATH; ``CANARY_FAULT`` names the fault, and it is on
while the file ``CANARY_SWITCH`` is there: the gate at start, which would find it too, has to be passed. Nothing of this is in
the product.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.patching import on_import

NAME = os.environ.get("CANARY_FAULT", "")
SWITCH = Path(os.environ.get("CANARY_SWITCH", "/nowhere"))
#: One step of so many, where a fault is not at full rate.
EVERY = 100


class Due:
    """Every ``EVERY``-th step in which something is verified; says so in the log the first time."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self) -> bool:
        if not SWITCH.exists():
            return False
        self.steps += 1
        if self.steps % EVERY != EVERY // 2:
            return False
        say()
        return True


def say() -> None:
    """The line by which a drill knows that the fault really ran."""
    if not said:
        said.append(NAME)
        print(f"canary fault {NAME} ran", file=sys.stderr, flush=True)


said: list[str] = []


def acceptance(module: ModuleType) -> None:
    """The first drafted token that is to be rejected is kept."""
    original, due = module.accept_greedy, Due()

    def changed(choice: Any, drafted: Any, lens: Any, first: Any) -> Any:
        outcome = original(choice, drafted, lens, first)
        if not bool((lens > 0).any()) or not due():
            return outcome
        count = outcome.count + (outcome.count < lens).long()
        return module.Accepted(count=count, token=choice[first + count])

    module.accept_greedy = changed


def position(module: ModuleType) -> None:
    """Rows that verify something are one position off."""
    import msgspec

    original, due = module.Verifier.run_compact, Due()

    def changed(self: Any, *, layout: Any, verify_window: Any, bs: int, **others: Any) -> Any:
        drafted = layout.verify_lens[:bs] > 1
        if bool(drafted.any()) and due():
            moved = verify_window.positions_2d.clone()
            moved[:bs] += drafted.to(moved.dtype)[:, None]
            verify_window = msgspec.structs.replace(verify_window, positions_2d=moved)
        return original(self, layout=layout, verify_window=verify_window, bs=bs, **others)

    module.Verifier.run_compact = changed


def stale(module: ModuleType) -> None:
    """Accepted tokens never reach the draft's KV, whichever way their states come back."""
    original = module.Verifier.commit_hidden

    def changed(self: Any, **given: Any) -> None:
        if SWITCH.exists():
            say()
        else:
            original(self, **given)

    module.Verifier.commit_hidden = changed


CHANGES: dict[str, tuple[str, Callable[[ModuleType], None]]] = {
    "acceptance": ("dspark_sglang.core.accept", acceptance),
    "position": ("dspark_sglang.serving.verifier", position),
    "stale": ("dspark_sglang.serving.verifier", stale),
}


if NAME:
    on_import(dict([CHANGES[NAME]]))
