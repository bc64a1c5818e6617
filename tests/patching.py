"""Changes modules right after they are imported, as a ``sitecustomize.py`` does in the processes of one server.

Only the standard library is imported here: it runs in every Python below that server.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

Change = Callable[[ModuleType], None]


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, changes: Mapping[str, Change]) -> None:
        self._left = dict(changes)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        change = self._left.pop(fullname, None)
        if not self._left and self in sys.meta_path:
            sys.meta_path.remove(self)
        if change is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def on_import(changes: Mapping[str, Change]) -> None:
    """Run a change on each named module as soon as its code has run in this process."""
    sys.meta_path.insert(0, _Finder(changes))
