"""An answer as tables and as a figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from dspark_sglang.economics.account import Hour, Stage
from dspark_sglang.economics.prices import UNITS
from dspark_sglang.economics.quoted import Quoted
from dspark_sglang.economics.study import Side, Study

_OURS, _THEIRS, _LIMIT = "#2f6fde", "#9aa5b1", "#c2410c"
_METRICS = {
    "margin": "margin, share of revenue",
    "cost_per_million": "cost, $ a million output tokens",
    "profit": "profit, $/GPU-hour",
    "tokens": "output tokens a GPU-hour",
}


def show(study: Study, console: Console) -> None:
    """Everything of an answer that fits a terminal."""
    asked = study.question
    console.print(
        f"{study.model} on {study.hardware}, frontier {study.source}; {asked.sla:g} tokens/s for every user.\n"
        f"{study.assumptions.about}."
    )
    console.print(_stages(study.stages, f"{asked.series}: a paid hour of one GPU"))
    if study.baseline is not None:
        console.print(_sides([study.ours, study.baseline]))
        console.print(_gain(study))
    if study.slots is not None:
        slots = study.slots
        with_mtp = f", {slots.with_mtp} beside an MTP layer" if slots.with_mtp else ""
        console.print(
            f"The drafter takes {slots.drafter_gib:.1f} GiB of {slots.ranks} GPUs: {slots.requests} instead of "
            f"{slots.without_drafter} requests of {slots.context} tokens fit ({slots.lost:.1%} fewer{with_mtp}; {slots.label})."
        )
    console.print(_tornado(study))
    console.print(_monte_carlo(study))
    for note in study.notes:
        console.print(f"[dim]- {note}[/]")


def show_quoted(quoted: Quoted, console: Console) -> None:
    """The quoted arithmetic and what it leaves out."""
    table = Table(title="The quoted arithmetic")
    for heading in ("figure", "unit"):
        table.add_column(heading)
    for heading in ("published", "computed"):
        table.add_column(heading, justify="right")
    table.add_column("how")
    for claim in quoted.claims:
        published = "-" if claim.published is None else f"{claim.published:,.2f}"
        table.add_row(claim.what, claim.unit, published, f"{claim.computed:,.2f}", claim.how)
    console.print(table)
    console.print(quoted.reading)
    console.print(
        _stages(
            quoted.stages, "5 million tokens, were they of decoding alone: what that leaves out"
        )
    )


def _stages(stages: list[Stage], title: str) -> Table:
    table = Table(title=title)
    table.add_column("counted so far")
    for heading in ("M tokens", "prefill", "$/M tokens", "revenue $", "profit $", "margin"):
        table.add_column(heading, justify="right")
    for number, stage in enumerate(stages):
        label = stage.counted if number == 0 else f"+ {stage.counted}"
        table.add_row(label, *_cells(stage.hour))
    return table


def _cells(hour: Hour) -> list[str]:
    return [
        f"{hour.tokens / 1e6:.3g}",
        f"{hour.prefill_share:.0%}",
        f"{hour.cost_per_million:.3g}",
        _money(hour.revenue),
        _money(hour.profit),
        "-" if hour.margin is None else f"{hour.margin:.0%}",
    ]


def _money(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _sides(sides: list[Side]) -> Table:
    table = Table(title="At the same speed for every user")
    table.add_column("way of serving")
    for heading in ("tok/s/GPU", "M tokens", "prefill", "$/M tokens", "revenue $", "profit $", "margin"):  # fmt: skip
        table.add_column(heading, justify="right")
    for side in sides:
        if side.hour is None:
            cells = [f"never that fast: {side.fastest:.4g} at most", *[""] * 6]
        else:
            cells = [f"{side.hour.decode_tokens / 3600:.4g}", *_cells(side.hour)]
        table.add_row(side.name, *cells)
    return table


def _gain(study: Study) -> str:
    assert study.baseline is not None
    gain = study.gain
    if gain is None or study.ours.hour is None or study.baseline.hour is None:
        return f"{study.baseline.name} cannot serve at this speed, whatever it costs, so there is no ratio of costs."
    spread = study.monte_carlo.gain
    decode = study.ours.hour.decode_tokens / study.baseline.hour.decode_tokens
    text = f"A token costs {study.baseline.name} {gain:.2f} times as much"
    if spread is not None:
        text += f" (5th to 95th percentile: {spread.p5:.2f} to {spread.p95:.2f})"
    return f"{text}; decoding alone would say {decode:.2f}."


def _tornado(study: Study) -> Table:
    table = Table(title=f"One assumption at a time: {_METRICS[study.metric]}")
    table.add_column("assumption")
    table.add_column("unit")
    for heading in ("low", "high", "at low", "at high"):
        table.add_column(heading, justify="right")
    for swing in study.tornado:
        ends = [_short(value) for value in (swing.low, swing.high, swing.at_low, swing.at_high)]
        table.add_row(swing.name, UNITS[swing.name], *ends)
    return table


def _monte_carlo(study: Study) -> Table:
    found = study.monte_carlo
    table = Table(title=f"All at once, {found.draws} draws, seed {found.seed}")
    table.add_column("")
    for heading in ("5th percentile", "median", "95th percentile"):
        table.add_column(heading, justify="right")
    for name, spread in found.metrics.items():
        table.add_row(_METRICS[name], *(_short(value) for value in (spread.p5, spread.p50, spread.p95)))  # fmt: skip
    if found.profitable is not None:
        table.caption = f"A profit in {found.profitable:.0%} of draws."
    return table


def _short(value: float) -> str:
    """Three digits, and no power of ten."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def draw(study: Study, samples: NDArray[np.float64], path: Path) -> None:
    """Cost against speed, the tornado, and the distribution of the metric, as a PNG.

    Args:
        samples: ``[draws]`` of the metric.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.axes import Axes

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    left, middle, right = axes
    _draw_curves(study, left)
    _draw_tornado(study, middle)
    right.hist(samples, bins=50, color=_OURS, alpha=0.85)
    spread = study.monte_carlo.metrics[study.metric]
    for value in (spread.p5, spread.p50, spread.p95):
        right.axvline(value, color=_LIMIT, linewidth=1.2, linestyle="--")
    right.set_xlim(*np.percentile(samples, [0.2, 99.8]))
    right.set_yticks([])
    right.set_xlabel(_METRICS[study.metric])
    right.set_title("All at once: 5th, 50th, 95th percentile", fontsize=10)
    axis: Axes
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{study.model} on {study.hardware}, {study.source}; {study.question.sla:g} tok/s/user", fontsize=10
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_curves(study: Study, axis: Axes) -> None:  # type: ignore[name-defined]  # noqa: F821
    for name, costs in study.curves.items():
        colour = _OURS if name == study.question.series else _THEIRS
        axis.plot([c.tok_s_per_user for c in costs], [c.cost_per_million for c in costs], "o-", color=colour, label=name, markersize=4)  # fmt: skip
    axis.axvline(study.question.sla, color=_LIMIT, linestyle="--", linewidth=1.2, label="SLA")
    if study.assumptions.output is not None:
        axis.axhline(study.assumptions.output.value, color="black", linestyle=":", linewidth=1.0, label="price of output")  # fmt: skip
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set_xlabel("tokens/s/user")
    axis.set_ylabel("cost, $ a million output tokens")
    axis.set_title("What speed costs", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def _draw_tornado(study: Study, axis: Axes) -> None:  # type: ignore[name-defined]  # noqa: F821
    assert study.ours.hour is not None
    base = getattr(study.ours.hour, study.metric)
    swings = study.tornado[::-1]
    for place, swing in enumerate(swings):
        for end, colour in ((swing.at_low, _THEIRS), (swing.at_high, _OURS)):
            axis.barh(place, end - base, 0.6, left=base, color=colour)
    axis.axvline(base, color="black", linewidth=0.8)
    names = [f"{s.name.replace('_', ' ')}\n{_short(s.low)} to {_short(s.high)}" for s in swings]
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_xlabel(_METRICS[study.metric])
    axis.set_title("One at a time: grey at its low end, blue at its high end", fontsize=10)
