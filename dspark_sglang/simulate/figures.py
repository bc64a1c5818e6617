"""The paper's figures 7 and 8 from simulated frontiers, and any frontier that was simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dspark_loadtests.frontier import Frontier, Point, non_dominated, throughput_at

_COLOURS = ("#8c8c8c", "#1f6fb4", "#c44e52", "#2e8b57")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _line(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    kept = non_dominated(list(points))
    return [p.tok_s_per_user for p in kept], [p.tok_s_per_gpu for p in kept]


def frontiers(
    path: Path, made: Mapping[str, Frontier], marks: Mapping[str, Sequence[tuple[float, str]]]
) -> None:
    """Throughput of a GPU against speed of a user, with ratios at some speeds (figure 7).

    Args:
        made: a panel each, by title.
        marks: for a panel, speeds at which to show the ratio of its last series to its first, and what
            was published there.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        1, len(made), figsize=(6.0 * len(made), 4.6), squeeze=False, layout="constrained"
    )
    for panel, (title, one) in zip(axes[0], made.items(), strict=True):
        for colour, series in zip(_COLOURS, one.series, strict=False):
            panel.plot(*_line(series.points), "o-", color=colour, markersize=3.5, label=series.name)
        for number, (speed, note) in enumerate(marks.get(title, ())):
            _mark(panel, one, speed, note, inside=number > 0)
        panel.set_title(f"{title} ({one.hardware}, {one.source})")
        panel.set_xlabel("tokens a second and user")
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
    axes[0][0].set_ylabel("output tokens a second and GPU")
    _save(figure, path)


def _mark(panel: Any, made: Frontier, speed: float, note: str, *, inside: bool) -> None:
    low = throughput_at(made.series[0].points, speed)
    high = throughput_at(made.series[-1].points, speed)
    if high is None:
        return
    panel.plot([speed, speed], [low or 0.0, high], ":", color="black", linewidth=1.0)
    ratio = "no baseline" if not low else f"{round(100 * (high / low - 1)):+d}%"
    panel.annotate(
        f"{ratio} at {speed:g}\n(published {note})",
        # Inside, low down: the upper series comes back towards the mark further up.
        (speed, 0.85 * (low or 0.0) + 0.15 * high if inside else high),
        textcoords="offset points",
        xytext=(8, 0 if inside else 10),
        fontsize=8,
    )


def loads(path: Path, made: Mapping[str, Frontier]) -> None:
    """Tokens verified a request and throughput of a GPU against concurrent requests (figure 8)."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        2,
        len(made),
        figsize=(6.0 * len(made), 6.2),
        squeeze=False,
        sharex="col",
        layout="constrained",
    )
    for column, (title, one) in enumerate(made.items()):
        top, bottom = axes[0][column], axes[1][column]
        for colour, series in zip(_COLOURS, one.series, strict=False):
            at = [p.load for p in series.points]
            style = {"color": colour, "markersize": 3.5, "label": series.name}
            top.plot(at, [1 + (p.budget or 0.0) for p in series.points], "o-", **style)
            bottom.plot(at, [p.tok_s_per_gpu for p in series.points], "o-", **style)
        top.set_title(f"{title} ({one.hardware}, {one.source})")
        top.set_ylim(bottom=0)
        bottom.set_xscale("log", base=2)
        bottom.set_xlabel("concurrent requests")
        for panel in (top, bottom):
            panel.grid(alpha=0.25)
    axes[0][0].set_ylabel("tokens verified a request, its own included")
    axes[1][0].set_ylabel("output tokens a second and GPU")
    axes[0][0].legend(frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    _pyplot().close(figure)
