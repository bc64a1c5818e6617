"""The collectives of a running server's ranks, counted where SGLang starts them.

A benchmark writes a ``sitecustomize.py`` (:func:`customization`) and puts its folder first on the
``PYTHONPATH`` of a server. Every rank then wraps the collectives of SGLang's group coordinator as that
module loads, whether our DSPARK or the builtin runs, and keeps its counts in a file. Nothing
of this is in a server that was not started so.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from tests.patching import on_import

_MODULE = "sglang.srt.distributed.parallel_state"
#: What a collective is for, by the innermost of these functions that it runs in. All but ``target`` is
#: drafting and acceptance: with a sharded LM head, gathering logits is how the builtin accepts.
_PURPOSES = {
    "_get_logits": "target_logits",
    "_forward_prepared_verify": "target",
    "propose": "drafting",
    "_forward_decode": "deciding",
}
_FACTORS: dict[str, Callable[[Any], int]] = {
    "all_reduce": lambda group: 1,
    "broadcast": lambda group: 1,
    "all_gather": lambda group: int(group.world_size),
}


def customization(folder: Path) -> str:
    """Text of a ``sitecustomize.py`` whose process counts into ``folder``."""
    return f"from {__name__} import count_into\n\ncount_into({str(folder)!r})\n"


def purpose(frame: FrameType | None) -> str | None:
    """What a collective is for; None outside decode steps."""
    found, decoding = None, False
    while frame is not None:
        name = frame.f_code.co_name
        found = found or _PURPOSES.get(name)
        decoding |= name == "_forward_decode"
        frame = frame.f_back
    return found if decoding else None


class Counts:
    """Collectives and bytes by purpose, kept in a file of this process."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{os.getpid()}.json"
        self._counts: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    def add(self, what: str, size: int) -> None:
        """Count one of ``size`` bytes and write all counts, since ranks are ended without notice."""
        self._counts[what] += 1
        self._bytes[what] += size
        text = json.dumps({"count": self._counts, "bytes": self._bytes})
        whole = self._path.with_suffix(".tmp")
        whole.write_text(text, encoding="utf-8")
        whole.replace(self._path)


def read(folder: Path) -> dict[str, dict[str, int]]:
    """Counts of the rank that counted most: ``{"count": {purpose: n}, "bytes": {purpose: n}}``."""
    known = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    most: dict[str, dict[str, int]] = max(
        known, key=lambda found: sum(found["bytes"].values()), default={"count": {}, "bytes": {}}
    )
    return most


def _counted(name: str, original: Callable[..., Any], counts: Counts) -> Callable[..., Any]:
    @functools.wraps(original)
    def collective(self: Any, input_: Any, *args: Any, **kwargs: Any) -> Any:
        if self.world_size > 1:
            what = purpose(sys._getframe(1))
            if what is not None:
                size = input_.numel() * input_.element_size() * _FACTORS[name](self)
                counts.add(what, size)
        return original(self, input_, *args, **kwargs)

    return collective


def count_into(folder: str) -> None:
    """Count the collectives of this process into a file of ``folder``."""
    counts = Counts(Path(folder))

    def wrap(module: ModuleType) -> None:
        group: Any = module.GroupCoordinator
        for method in _FACTORS:
            setattr(group, method, _counted(method, getattr(group, method), counts))

    on_import({_MODULE: wrap})
