"""The frontier drawn, and read at equal service: the paper's Figures 7 and 8 (arXiv 2607.05147)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dspark_sglang.load.frontier import (
    Frontier,
    Series,
    non_dominated,
    speed_at,
    throughput_at,
)

_COLOURS = ("#1f6fb4", "#c44e52", "#8c8c8c", "#5a9e6f", "#b58900", "#7d5ba6")
_MARKS = ("o", "s", "^", "D", "v", "P")


class Iso(NamedTuple):
    """Ours over another way at equal service.

    Attributes:
        kind: ``speed``: the ratio of throughput at a user's speed ``at``; ``throughput``: that of a user's speed at a
            GPU's throughput ``at``.
        theirs: None where the other way cannot serve that at all.
    """

    other: str
    kind: Literal["speed", "throughput"]
    at: float
    ours: float | None
    theirs: float | None

    @property
    def ratio(self) -> float | None:
        """Ours over theirs; None where either cannot."""
        return self.ours / self.theirs if self.ours and self.theirs else None


def iso(frontier: Frontier, ours: str, *, speeds: Sequence[float] | None = None) -> list[Iso]:
    """Ratios at equal service, between the measured points only.

    Args:
        speeds: tokens a second and user; None: those of the other ways' own frontier points.
    """
    mine = frontier.of(ours).points
    found = []
    for series in frontier.series:
        if series.name == ours:
            continue
        theirs = series.points
        line = non_dominated(theirs)
        for speed in speeds or [point.tok_s_per_user for point in line]:
            pair = throughput_at(mine, speed), throughput_at(theirs, speed)
            found.append(Iso(series.name, "speed", speed, *pair))
        for point in line:
            wanted = point.tok_s_per_gpu
            pair = speed_at(mine, wanted), speed_at(theirs, wanted)
            found.append(Iso(series.name, "throughput", wanted, *pair))
    return found


def _plot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _style(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKS[number % len(_MARKS)]}


def draw_frontier(
    frontier: Frontier, path: Path, *, ours: str, speeds: Sequence[float] | None = None
) -> None:
    """Figure 7: tokens a second and GPU against those of a user. Dominated points are hollow and off the line."""
    plt = _plot()
    figure, axis = plt.subplots(figsize=(7.2, 5), layout="constrained")
    ordered = sorted(frontier.series, key=lambda series: series.name != ours)
    for number, series in enumerate(ordered):
        style = _style(number)
        line = non_dominated(series.points)
        axis.plot(
            [p.tok_s_per_user for p in line], [p.tok_s_per_gpu for p in line],
            label=series.name, linewidth=1.6, zorder=3 - 0.1 * number, **style,
        )  # fmt: skip
        beaten = [p for p in series.points if p not in line]
        axis.scatter(
            [p.tok_s_per_user for p in beaten], [p.tok_s_per_gpu for p in beaten],
            facecolors="none", edgecolors=style["color"], marker=style["marker"], zorder=2,
        )  # fmt: skip
        for point in series.points if number == 0 else ():
            axis.annotate(
                f"{point.load:g}", (point.tok_s_per_user, point.tok_s_per_gpu),
                xytext=(5, 5), textcoords="offset points", fontsize=8, color=style["color"],
            )  # fmt: skip
    for found in iso(frontier, ours, speeds=speeds or ()) if speeds else ():
        if found.kind == "speed" and found.ratio and found.ours and found.theirs:
            axis.vlines(
                found.at, found.theirs, found.ours, linestyle=":", color="black", linewidth=1
            )
            middle = (found.at, (found.theirs + found.ours) / 2)
            axis.annotate(f"{found.ratio:.2f}×", middle, xytext=(4, 0), textcoords="offset points", fontsize=8)  # fmt: skip
    gpus = {series.gpus for series in frontier.series}
    axis.set(
        xlabel="output tokens a second and user (1 / TPOT)",
        ylabel="output tokens a second and GPU" if max(gpus) > 1 else "output tokens a second",
        title=f"{Path(frontier.model).name}, {frontier.source}",
    )
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    axis.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def draw_budget(frontier: Frontier, path: Path) -> bool:
    """Figure 8: drafted tokens verified a request and round, and the accepted length, against the load.

    Returns:
        Whether anything was drawn: other servers than ours do not tell their budget.
    """
    told = [
        series for series in frontier.series if any(p.budget is not None for p in series.points)
    ]
    if not told:
        return False
    plt = _plot()
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 6), sharex=True, layout="constrained")
    for number, series in enumerate(told):
        _against_load(top, series, "budget", number)
        _against_load(bottom, series, "accept_length", number)
    top.set(ylabel="drafted tokens verified\na request and round", ylim=(0, None))
    bottom.set(ylabel="accepted length\n(bonus included)", xlabel="load", ylim=(1, None))
    bottom.set_xscale("log", base=2)
    loads = sorted({point.load for series in told for point in series.points})
    bottom.set_xticks(loads, [f"{load:g}" for load in loads])
    top.legend(frameon=False)
    top.set_title(f"{Path(frontier.model).name}, {frontier.source}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return True


def _against_load(axis: Any, series: Series, field: str, number: int) -> None:
    known = [(p.load, value) for p in series.points if (value := getattr(p, field)) is not None]
    if known:
        axis.plot(*zip(*sorted(known), strict=True), label=series.name, **_style(number))
    axis.grid(alpha=0.25)
