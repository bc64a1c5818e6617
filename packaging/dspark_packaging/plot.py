"""``calibration.png``: predicted against observed survival, drawn from ``eval.json``."""

from __future__ import annotations

from pathlib import Path

from dspark_packaging.layout import PLOT_FILE
from dspark_packaging.schemas import EVAL_FILE, Calibration, read_eval_as_it_is


def write_plot(directory: Path) -> bool:
    """Draw the figure where reliability was measured, else remove it; returns whether it is there."""
    path = directory / PLOT_FILE
    source = directory / EVAL_FILE
    measured = read_eval_as_it_is(source).calibration if source.is_file() else None
    if measured is None or not measured.reliability_before:
        path.unlink(missing_ok=True)
        return False
    _draw(path, measured)
    return True


def _draw(path: Path, measured: Calibration) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    gamma = len(measured.reliability_before)
    figure = Figure(figsize=(2.3 * gamma, 2.9), layout="constrained")
    axes = figure.subplots(1, gamma, sharey=True, squeeze=False)[0]
    curves = [("before", measured.reliability_before, "tab:gray")]
    if measured.reliability_after is not None:
        curves.append(("after STS", measured.reliability_after, "tab:blue"))
    for k, panel in enumerate(axes):
        panel.plot([0, 1], [0, 1], color="black", linewidth=0.7, linestyle=":")
        for label, points, colour in curves:
            panel.plot(
                points[k].predicted,
                points[k].observed,
                marker="o",
                markersize=3,
                linewidth=1.2,
                color=colour,
                label=label,
            )
        panel.set(title=f"position {k + 1}", xlim=(0, 1), ylim=(0, 1))
        panel.set_xticks([0, 0.5, 1], labels=["0", "0.5", "1"])
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("observed survival")
    figure.supxlabel("predicted survival", fontsize="medium")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    FigureCanvasAgg(figure)
    # Without the library's version in the file the same numbers give the same bytes.
    figure.savefig(path, dpi=110, metadata={"Software": None})
