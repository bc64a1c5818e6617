"""A report as one HTML file: no script, nothing loaded from anywhere, readable on paper and in the dark."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import jinja2
import msgspec

from dspark_sglang.errors import DataError

TEMPLATE = "page.html.j2"
_PNG = b"\x89PNG\r\n\x1a\n"
#: An address that something could be loaded from, or that leads away.
_ADDRESS = re.compile(r"(?:https?:)?//[\w.-]+\.\w+", re.IGNORECASE)
#: Attributes and elements that load something.
_LOADING = ("src", "href", "srcset", "poster", "data", "action", "xlink:href")
_ACTIVE = ("script", "iframe", "object", "embed", "link")


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of text; columns of numbers, but for the first, are shown to the right."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Which columns are shown to the right."""
        columns = [[row[n] for row in self.rows] for n in range(len(self.headings))]
        return [n > 0 and all(map(is_number, column)) for n, column in enumerate(columns)]


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A PNG file and what it shows, in words for who cannot see it."""

    path: Path
    caption: str


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the report.

    Attributes:
        partial: why something is missing from it; empty where nothing is.
        label: what its figures are: "measured", "simulated" or "computed".
        details: long text that is folded away.
    """

    name: str
    title: str
    label: str = ""
    partial: Sequence[str] = ()
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    details: Sequence[tuple[str, str]] = ()


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """The whole report."""

    title: str
    subtitle: str
    partial: Sequence[str]
    sections: Sequence[Section]
    footer: str


def render(page: Page) -> str:
    """The page as HTML.

    Raises:
        DataError: a figure is missing or is no PNG, or something would be loaded from elsewhere.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["embedded"] = embedded
    template = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    html = environment.from_string(template).render(page=page)
    outside = addresses(html)
    if outside:
        raise DataError(
            f"The page refers to {', '.join(outside[:3])}.",
            expected="nothing outside itself",
            fix="Write sources without their scheme, and embed what is shown.",
        )
    return html


def embedded(path: Path) -> str:
    """A PNG file as a ``data:`` address.

    Raises:
        DataError: missing, or not a PNG.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"The figure {path} cannot be read: {error.strerror}.",
            expected="a PNG file",
            fix="Run `dspark report` again.",
        ) from error
    if not data.startswith(_PNG):
        raise DataError(
            f"The figure {path} is not a PNG.", expected="a PNG file", fix="Run `dspark report` again."
        )  # fmt: skip
    return "data:image/png;base64," + base64.b64encode(data).decode()


def is_number(text: str) -> bool:
    """Whether a cell is shown to the right: it begins with a number and is no text that does."""
    return (bool(re.match(r"^[-+−$]?[\d.,]+", text)) and len(text) <= 40) or text in ("-", "")


def addresses(html: str) -> list[str]:
    """Addresses outside the page, and elements that could load or run something."""
    found = _Outside()
    found.feed(html)
    return found.found


class _Outside(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _ACTIVE:
            self.found.append(f"<{tag}>")
        for name, value in attrs:
            inside = value is None or value.startswith(("data:", "#"))
            if name in _LOADING and not inside:
                self.found.append(f"{name}={value}")

    def handle_data(self, data: str) -> None:
        self.found += _ADDRESS.findall(data)
        if "@import" in data or "url(" in data:
            self.found.append("a style that loads something")
