"""How many modules one walks through to follow the folder of a drafter that is packaged.

``python -m tests.structure_package`` prints them. A module counts when one of its functions is called with the path
of the source, of the package that is made of it, or of a file in either, while ``dspark package SRC OUT`` packages a
tiny dense drafter.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGES = ("dspark_sglang", "dspark_kernels", "dspark_packaging", "dspark_loadtests")


def _given(frame: FrameType) -> list[object]:
    """The arguments of the function that a frame has just entered."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    found: list[object] = []
    for name in code.co_varnames[:count]:
        value = frame.f_locals.get(name)
        found += value if isinstance(value, tuple) else [value]
    return found


def modules_of_the_source_path(root: Path, *, only_source: bool = False) -> list[str]:
    """Modules of our packages whose functions are called with the drafter's path, in name order.

    Args:
        root: an empty folder; the drafter and its package are written there.
        only_source: count the source's own path only, not files in it or the package.

    Raises:
        DSparkError: the drafter could not be packaged.
    """
    from dspark_sglang.cli.package import package
    from tests.packaging.samples import write_drafter

    root = root.resolve()
    source = write_drafter(root / "source")
    found: set[str] = set()

    def follows(value: object) -> bool:
        if not isinstance(value, (str, Path)) or "\n" in str(value):
            return False
        path = Path(value)
        return path == source if only_source else root in path.parents

    def called(frame: FrameType, event: str, argument: Any) -> None:
        module = str(frame.f_globals.get("__name__", ""))
        if event != "call" or module.split(".")[0] not in PACKAGES or module in found:
            return
        if any(map(follows, _given(frame))):
            found.add(module)

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        package(source, root / "out")
    finally:
        sys.setprofile(before)
    return sorted(found)


def main() -> None:
    """Print the modules and how many there are."""
    for only_source in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            found = modules_of_the_source_path(Path(folder), only_source=only_source)
        print(*found, len(found), sep="\n")


if __name__ == "__main__":
    main()
