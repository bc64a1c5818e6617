"""Write one page of what ``docs/results`` holds: ``runs/report/report.md``, with the figures that are there.

``make report`` runs it once the files are there. A figure is copied from its file, never typed: the page is
``tests/report.md.jinja``, filled.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from dspark_sglang.errors import ArtifactError, DSparkError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "runs" / "report" / "report.md"


def read(folders: Sequence[Path]) -> dict[str, Any]:
    """Every JSON file of the folders and below them, by name without its ending.

    Raises:
        ArtifactError: one is damaged.
    """
    found = {}
    for path in sorted(path for folder in folders for path in folder.rglob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(
                f"{path} cannot be read: {error}.", expected="JSON", fix="Make it again."
            ) from error
    return found


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many digits after the point; ``-`` where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def span(value: Any, digits: int = 2) -> str:
    """A number, or the lowest and highest of several."""
    if isinstance(value, list) and None not in value:
        return f"{number(min(value), digits)} to {number(max(value), digits)}"
    return "-" if isinstance(value, list) else number(value, digits)


def short(value: float) -> str:
    """Three digits, and no power of ten."""
    return number(value, 0) if abs(value) >= 1000 else f"{value:.3g}"


def loads(cells: dict[str, Any]) -> list[tuple[str, int, dict[str, Any]]]:
    """Temperature, requests at once and figures of the cells of ``make bench-load``."""
    parts = [(re.match(r"T([\d.]+)-c(\d+)", name), cell) for name, cell in cells.items()]
    return [(found[1], int(found[2]), cell) for found, cell in parts if found]


def render(folders: Sequence[Path], page: Path) -> str:
    """The page's text.

    Args:
        folders: of the results; their figures are linked from where ``page`` will be.

    Raises:
        ArtifactError: a result is damaged, or lacks what the page shows of it.
    """
    found = read(folders)
    figures = sorted(path for folder in folders for path in folder.rglob("*.png"))
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "span": span, "short": short, "loads": loads}
    template = environment.from_string(Path(__file__).with_suffix(".md.jinja").read_text())
    try:
        return template.render(
            r=found, figures=[Path(os.path.relpath(path, page.parent)) for path in figures]
        )
    except (jinja2.UndefinedError, TypeError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"A result is not what the page shows: {error}.",
            expected="the files as this version's commands write them",
            fix="Make them again, or change tests/report.md.jinja.",
        ) from error


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="*", default=[RESULTS, PAGE.parent])
    parser.add_argument("--out", type=Path, default=PAGE)
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        text = render([folder.resolve() for folder in given.folders], given.out.resolve())
    except DSparkError as error:
        raise SystemExit(f"report: error: {error}") from None
    given.out.write_text(text, encoding="utf-8")
    print(f"Written: {given.out}")


if __name__ == "__main__":
    main()
