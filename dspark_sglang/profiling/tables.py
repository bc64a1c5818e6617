"""The summary of the kernels as tables: on the terminal and in ``docs/kernels.md``."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from dspark_sglang.errors import ConfigError
from dspark_sglang.profiling.kernels import BATCH, Config, PartBytes, Summary

BEGIN, END = "<!-- generated: kernels -->", "<!-- end -->"
_PARTS = {
    "draft": "draft, whole vocabulary",
    "draft_shortlist": "draft, 128 best + 64 successors, base tail (served)",
    "accept": "acceptance, dense drafted law (served)",
    "accept_shortlist": "acceptance, listed drafted law of 128",
    "builtin_draft": "SGLang: Markov loop",
    "builtin_accept": "SGLang: acceptance, default",
    "builtin_accept_optin": "SGLang: acceptance, blockwise (opt-in)",
}
#: Fields of the summary that are targets, with what each must not exceed.
_REACH = {
    "accept_gb": ("acceptance, GB", 0.20),
    "accept_shortlist_gb": ("acceptance of a listed law, GB", 0.20),
    "draft_accept_gb": ("draft and acceptance, whole vocabulary, GB", 0.65),
    "draft_accept_shortlist_gb": ("draft and acceptance, shortlist, GB", 0.40),
    "shortlist_tau_loss_pct": ("accepted length the shortlist loses, %", 1.0),
    "launches_per_step": ("launches of our kernels a step, outside the models (gamma 5)", 9),
}


def _megabytes(bytes_: int | None) -> str:
    if bytes_ is None:
        return "–"
    return f"{bytes_ / 1e6:,.3f}" if bytes_ < 1e6 else f"{bytes_ / 1e6:,.1f}"


def _number(value: float | None, form: str = "{:g}") -> str:
    return "not measured" if value is None else form.format(value)


def headline_rows(summary: Summary) -> list[tuple[str, str, str]]:
    """What was reached: name, value, target."""
    rows = [
        (name, _number(getattr(summary, field)), f"≤ {most:g}")
        for field, (name, most) in _REACH.items()
    ]
    around = _number(summary.torch_operations_per_step)
    return [*rows, ("PyTorch operations around them, a launch or more each", around, "")]


def round_headings(summary: Summary) -> list[str]:
    """Headings of :func:`round_rows`."""
    timed = ["timed, µs"] if summary.device else []
    return ["part", "counted, MB", "÷ floor", "launches", "at 3.35 TB/s, µs (computed)", *timed]


def round_rows(summary: Summary) -> list[list[str]]:
    """The parts of the round."""
    return [
        _part_row(_PARTS[name], part, timed=bool(summary.device))
        for name, part in summary.round.items()
    ]


def _part_row(name: str, part: PartBytes, *, timed: bool) -> list[str]:
    over = f"{part.counted_bytes / part.floor_bytes:.2f}" if part.floor_bytes else ""
    others = f" + {part.torch_operations} torch" if part.torch_operations else ""
    row = [name, _megabytes(part.counted_bytes), over, f"{part.launches}{others}"]
    row.append(f"{part.roofline_us:,.0f}")
    return [*row, _number(part.timed_us, "{:,.0f}")] if timed else row


def config_headings(summary: Summary) -> list[str]:
    """Headings of :func:`config_rows`."""
    timed = ["timed, µs"] if summary.device else []
    return [
        *(
            "configuration",
            "registers",
            "spills",
            "shared, kB",
            "launches",
            "counted, MB",
            "÷ floor",
        ),
        *("SGLang, MB", "opt-in, MB", "largest error", "µs (computed)", *timed),
    ]


def config_rows(summary: Summary, op: str) -> list[list[str]]:
    """The configurations of an op, bytes at batch 64."""
    return [
        _config_row(name, config, timed=bool(summary.device))
        for name, config in summary.ops[op].items()
    ]


def _config_row(name: str, config: Config, *, timed: bool) -> list[str]:
    key = str(BATCH)
    counted, floor = config.counted_bytes[key], config.floor_bytes[key]
    others = (config.builtin_bytes, config.builtin_optin_bytes)
    row = [name, str(config.registers), str(config.spills), f"{config.shared_bytes / 1e3:.1f}"]
    row += [str(config.launches), _megabytes(counted), f"{counted / floor:.2f}"]
    row += [_megabytes(None if other is None else other[key]) for other in others]
    row += [f"{config.max_error:.1e}" if config.max_error else "0", f"{config.roofline_us:,.1f}"]
    return [*row, _number(config.timed_us, "{:,.1f}")] if timed else row


# --- terminal ----------------------------------------------------------------------------------


def views(summary: Summary) -> list[Table]:
    """Tables for the terminal."""
    found = []
    if summary.round:
        found.append(
            _view(
                f"A round of {BATCH} requests: bytes counted, not timed",
                round_headings(summary),
                round_rows(summary),
            )
        )
        rows = [list(row) for row in headline_rows(summary)]
        found.append(_view("Reached", ["", "value", "target"], rows))
    for op in summary.ops:
        headings, *rows = _brief([config_headings(summary), *config_rows(summary, op)])
        found.append(_view(f"{op}, bytes at batch {BATCH}", headings, rows))
    return found


def _brief(rows: list[list[str]]) -> list[list[str]]:
    """What fits a terminal; the rest is in summary.json."""
    kept = (0, 1, 2, 4, 5, 6, 7, *range(11, len(rows[0]) if rows else 0))
    return [[row[i] for i in kept] for row in rows]


def _view(title: str, headings: list[str], rows: list[list[str]]) -> Table:
    view = Table(title=title)
    view.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        view.add_column(heading, justify="right")
    for row in rows:
        view.add_row(*row)
    return view


# --- documents ---------------------------------------------------------------------------------


def markdown(summary: Summary) -> str:
    """The generated part of ``docs/kernels.md``, between the markers."""
    timed = (
        f"Timed on {summary.device}." if summary.device else "Nothing was timed: no CUDA device."
    )
    lines = [
        f"{timed} Commit {summary.commit or 'unknown'}, {summary.machine}; "
        f"`{summary.provenance.command}`, {summary.provenance.created}; "
        f"torch {summary.provenance.versions.get('torch', '?')}, triton {summary.triton}, "
        f"SGLang {summary.provenance.versions.get('sglang', '?')}.",
        "",
    ]
    if summary.round:
        lines += _grid(["reached", "value", "target"], [list(r) for r in headline_rows(summary)])
        lines += ["", *_grid(round_headings(summary), round_rows(summary))]
    for op in summary.ops:
        lines += ["", f"### `{op}`", "", *_grid(config_headings(summary), config_rows(summary, op))]
        notes = sorted({c.note for c in summary.ops[op].values() if c.note})
        lines += ["", f"SGLang's bytes: {'; '.join(notes)}."] if notes else []
    return "\n".join(lines)


def _grid(headings: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (headings, rule, *rows)]


def insert(path: Path, summary: Summary) -> None:
    """Replace the generated part of a document.

    Raises:
        ConfigError: the document is missing or has no markers.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}.",
            expected="a document with the two markers",
            fix="Pass --docs docs/kernels.md.",
        ) from error
    path.write_text(replaced(text, markdown(summary), str(path)), encoding="utf-8")


def replaced(text: str, generated: str, name: str) -> str:
    """``text`` with ``generated`` between the markers.

    Raises:
        ConfigError: a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(
            f"{name} has no generated part.",
            expected=f"the lines {BEGIN} and {END}",
            fix="Add them where the tables belong.",
        )
    return f"{before}{BEGIN}\n{generated}\n{END}{after}"
