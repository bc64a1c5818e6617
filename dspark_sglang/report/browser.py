"""The page in a real browser, offline: does it show, in light, in the dark, on a phone and on paper?"""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from dspark_sglang.errors import DataError

#: Commands of browsers that this works with.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HINT = "Install one, for example with `apt-get install chromium`."
#: Name, width in CSS pixels, dark.
VIEWS = (("light", 1280, False), ("dark", 1280, True), ("narrow", 400, False))
#: Least contrast of text (WCAG 2, level AA).
CONTRAST = 4.5
_LIMIT_S = 120.0

# Appended to a copy of the page: what a reader would stumble on, written where --dump-dom shows it.
_PROBE = """<script>
addEventListener('load', () => {
  const rgb = (text) => { const p = text.match(/[\\d.]+/g).map(Number); return p.length > 3 && p[3] === 0 ? null : p; };
  const back = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c) return c; } return [255, 255, 255]; };
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const contrast = (e) => { const a = light(rgb(getComputedStyle(e).color)), b = light(back(e)); return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); };
  const text = [...document.querySelectorAll('h1,h2,p,td,th,caption,figcaption,a,footer,summary,.warn,.label')];
  const root = document.documentElement;
  root.dataset.probe = JSON.stringify({
    images: document.images.length,
    broken: [...document.images].filter((i) => !i.naturalWidth).length,
    sections: document.querySelectorAll('section').length,
    overflow: root.scrollWidth - root.clientWidth,
    contrast: Math.min(...text.map(contrast)),
    dark: matchMedia('(prefers-color-scheme: dark)').matches,
    height: root.scrollHeight,
  });
});
</script>"""


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What a browser found in one view."""

    name: str
    screenshot: Path
    images: int
    broken: int
    sections: int
    overflow: int
    contrast: float
    dark: bool
    height: int


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """All views, the pages that printing makes, and what is wrong (nothing, where all is well)."""

    browser: str
    views: list[View]
    printed_pages: int
    problems: list[str]


def find(name: str | None = None) -> str | None:
    """Path of a browser; None where there is none.

    Raises:
        DataError: ``name`` is given and is no command.
    """
    for candidate in (name,) if name else BROWSERS:
        path = shutil.which(candidate)
        if path is not None:
            return path
    if name:
        raise DataError(f"There is no browser {name!r}.", expected="a Chromium", fix=HINT)
    return None


def check(page: Path, out: Path, browser: str) -> Checked:
    """Open ``page`` in every view, take screenshots into ``out``, and print it.

    Raises:
        DataError: the browser failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    views = [_view(page, out, browser, *view) for view in VIEWS]
    pdf = out / "printed.pdf"
    _run(browser, page, ["--no-pdf-header-footer", f"--print-to-pdf={pdf}"])
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())) if pdf.is_file() else 0
    problems = [problem for view in views for problem in _problems(view)]
    if not pages:
        problems.append("printing made no page")
    return Checked(browser=browser, views=views, printed_pages=pages, problems=problems)


def _problems(view: View) -> list[str]:
    wrong = {
        f"{view.broken} of {view.images} figures do not show": view.broken > 0,
        "it has no section": view.sections == 0,
        f"it is {view.overflow} pixels too wide": view.overflow > 0,
        f"its faintest text has a contrast of {view.contrast:.1f}": view.contrast < CONTRAST,
        "it is not in the dark": view.name == "dark" and not view.dark,
        "its screenshot is missing": not view.screenshot.is_file(),
    }
    return [f"{view.name}: {what}" for what, found in wrong.items() if found]


def _view(page: Path, out: Path, browser: str, name: str, width: int, dark: bool) -> View:
    options = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "page.html"
        probe.write_text(page.read_text(encoding="utf-8") + _PROBE, encoding="utf-8")
        dom = _run(browser, probe, [*options, f"--window-size={width},900", "--dump-dom"])
    match = re.search(r'data-probe="([^"]*)"', dom)
    if match is None:
        raise DataError(
            f"{browser} showed nothing of {page}.", expected="a page", fix="Open it by hand, and see the log above."
        )  # fmt: skip
    found: dict[str, Any] = msgspec.json.decode(html.unescape(match[1]))
    screenshot = out / f"{name}.png"
    height = min(int(found["height"]), 16_000)
    size = f"--window-size={width},{height}"
    _run(browser, page, [*options, size, "--hide-scrollbars", f"--screenshot={screenshot}"])
    return msgspec.convert({"name": name, "screenshot": screenshot, **found}, View)


def _run(browser: str, page: Path, options: list[str]) -> str:
    """Run it once, with a profile of its own and without any network."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            "--headless=new",
            "--disable-gpu",
            "--no-first-run",
            "--hide-crash-restore-bubble",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={profile}",
            "--virtual-time-budget=5000",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            *options,
            page.resolve().as_uri(),
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_LIMIT_S, check=True
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired, OSError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise DataError(
                f"{browser} failed: {said[-1] if said else error}.",
                expected="a page shown without a screen",
                fix="Try it by hand, or pass --browser none.",
            ) from error
        return done.stdout
