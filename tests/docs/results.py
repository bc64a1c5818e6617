"""Write ``docs/results.md``: one page of what ``docs/results`` holds, and the prices computed from its frontiers.

``make results`` runs it. A figure is copied from its file, never typed: the page is ``results.md.jinja``, filled.
``tests/docs`` fails while the page is not current.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from dspark_loadtests import frontier
from dspark_sglang.errors import ArtifactError, DSparkError
from dspark_sglang.simulate import price
from tests.simulation import document

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"
#: Frontiers that are priced: the preset of prices, and tokens a second that every user gets.
PRICED = {
    "frontier-flash.json": ("v4-flash", 80.0),
    "frontier-pro.json": ("v4-pro", 35.0),
    "frontier-cpu.json": ("cpu", 10.0),
}


def read(folder: Path) -> dict[str, Any]:
    """Every JSON file of the folder and below it, by name without its ending.

    Raises:
        ArtifactError: one is damaged.
    """
    found = {}
    for path in sorted(folder.rglob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(
                f"{path} cannot be read: {error}.", expected="JSON", fix="Make it again."
            ) from error
    return found


def prices(folder: Path) -> list[dict[str, Any]]:
    """What a million tokens cost by the frontiers that are there."""
    found = [
        price.answer(frontier.read(folder / name), price.load(preset, None), sla=sla)
        for name, (preset, sla) in PRICED.items()
        if (folder / name).is_file()
    ]
    return [msgspec.to_builtins(one) for one in found]


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


def render(folder: Path, page: Path = PAGE) -> str:
    """The page's text.

    Args:
        folder: of the results; its figures are linked from where ``page`` will be.

    Raises:
        ArtifactError: a result is damaged, or lacks what the page shows of it.
    """
    found = read(folder)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "span": span, "short": short, "loads": loads}
    template = environment.from_string(Path(__file__).with_suffix(".md.jinja").read_text())
    figures = [Path(os.path.relpath(path, page.parent)) for path in sorted(folder.rglob("*.png"))]
    try:
        return template.render(r=found, prices=prices(folder), figures=figures, document=document)
    except (jinja2.UndefinedError, TypeError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"A result is not what the page shows: {error}.",
            expected="the files as this version's commands write them",
            fix="Make them again, or change tests/docs/results.md.jinja.",
        ) from error


def main() -> None:
    """Write the page."""
    try:
        PAGE.write_text(render(RESULTS), encoding="utf-8")
    except DSparkError as error:
        raise SystemExit(f"results: error: {error}") from None


if __name__ == "__main__":
    main()
