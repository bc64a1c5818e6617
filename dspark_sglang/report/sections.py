"""The parts of a report, each made from what its steps left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dspark_sglang.economics.study import Study
from dspark_sglang.load.frontier import Frontier, Point
from dspark_sglang.report.collect import Results
from dspark_sglang.report.page import Figure, Section, Table
from dspark_sglang.report.steps import Outcome

_DERIVED = {
    "flash_80": "V4-Flash: throughput at 80 tok/s/user over MTP-1's",
    "pro_35": "V4-Pro: throughput at 35 tok/s/user over MTP-1's",
    "flash_matched": "V4-Flash: speed of a user at equal throughput, over MTP-1's",
    "pro_matched": "V4-Pro: speed of a user at equal throughput, over MTP-1's",
}


def failures(outcomes: Sequence[Outcome], names: Sequence[str]) -> list[str]:
    """A line for each of the named steps that left nothing whole."""
    return [
        f"{outcome.title}: {outcome.status}{': ' + outcome.message if outcome.message else ''}."
        for outcome in outcomes
        if outcome.name in names and not outcome.good
    ]


def summary(
    results: Results, run: Mapping[str, Any] | None, studies: Mapping[str, Study]
) -> Section:
    """The figures that matter most, and where each is from."""
    rows = [*_measured_rows(run), *_derived_rows(results), *_study_rows(studies)]
    if results.sim_error_pct:
        worst = max(results.sim_error_pct, key=lambda name: results.sim_error_pct[name])  # type: ignore[index]
        rows.append(["simulator against a real server, worst metric", f"{results.sim_error_pct[worst]:.1f}% ({worst})", "measured"])  # fmt: skip
    if results.generator is not None:
        rows.append([f"load generator's lag with {results.generator.streams} streams, 99th percentile", f"{results.generator.lag_ms:.1f} ms", "measured"])  # fmt: skip
    return Section(
        name="summary",
        title="Summary",
        text=[
            "Measured figures are of the machine named above, which has no GPU. Figures of GPUs are simulated or computed: "
            "none of this software was run on one."
        ],
        tables=[Table(headings=["figure", "value", "how it is known"], rows=rows)],
    )


def _measured_rows(run: Mapping[str, Any] | None) -> Iterator[list[str]]:
    for heat, users, low, mid, high in _ratios(run):
        yield [
            f"DSPARK over no speculation, {users} {'request' if users == '1' else 'requests'} at once, temperature {heat}",
            f"{mid:.2f}× ({low:.2f} to {high:.2f})",
            "measured",
        ]


def _ratios(run: Mapping[str, Any] | None) -> Iterator[tuple[str, str, float, float, float]]:
    """Temperature, requests at once, and our throughput over no speculation's with its 95% interval."""
    for name, cell in (run or {}).get("cells", {}).items():
        if None not in cell.get("ratio_none", [None]):  # a machine so busy that nothing came
            low, mid, high = cell["ratio_none"]
            heat, users = name.split("-")[:2]  # T1-c8
            yield heat[1:], users[1:], low, mid, high


def _derived_rows(results: Results) -> Iterator[list[str]]:
    for name, pair in (results.frontier or {}).items():
        value = f"{span(pair.simulated)} (published {span(pair.published)})"
        yield [_DERIVED[name], value, "simulated"]


def _study_rows(studies: Mapping[str, Study]) -> Iterator[list[str]]:
    for title, study in studies.items():
        if study.ours.hour is None:
            continue
        against = ""
        if study.gain is not None and study.baseline is not None:
            against = f" ({study.baseline.name}: {study.gain:.2f}× that)"
        yield [
            f"{title}, {study.question.sla:g} tok/s/user: a million output tokens",
            f"${study.ours.hour.cost_per_million:.3g}{against}",
            "computed",
        ]


def span(value: float | Sequence[float] | None) -> str:
    """A ratio, or its lowest and highest."""
    if value is None:
        return "none: the baseline never is that fast"
    if isinstance(value, int | float):
        return f"{value:.2f}×"
    return f"{min(value):.2f}× to {max(value):.2f}×"


def measured(
    found: Frontier | None,
    run: Mapping[str, Any] | None,
    figures: Sequence[Figure],
    partial: Sequence[str],
) -> Section:
    """The real server on this machine, with and without speculation.

    Args:
        run: the summary of ``dspark bench-load``.
    """
    if found is None or run is None:
        return Section(name="measured", title="Measured on this machine", partial=partial)
    rows = [
        [series.name, *_point_cells(point)]
        for series in found.series
        for point in sorted(series.points, key=lambda point: point.load)
    ]
    ratios = [
        [heat, users, f"{mid:.3f}", f"{low:.3f} to {high:.3f}"]
        for heat, users, low, mid, high in _ratios(run)
    ]
    return Section(
        name="measured",
        title="Measured on this machine",
        label="measured",
        partial=partial,
        text=[
            f"{found.model} on {found.hardware}, a real SGLang server under a closed loop of real prompts, with and without "
            "speculation in turn.",
            run["command"],
        ],
        tables=[
            Table(headings=_POINT, rows=rows, caption="tok/s: output tokens a second of the machine. Verified: drafted tokens a request and step."),
            Table(headings=["temperature", "requests at once", "throughput over no speculation", "95% over turns"], rows=ratios, caption=f"{run['blocks']} turns of each, {run['window_s']:g} s each."),
        ],
        figures=figures,
    )  # fmt: skip


_POINT = ("way of serving", "requests at once", "tok/s", "tok/s/user", "to first token", "accepted length", "verified")  # fmt: skip


def _point_cells(point: Point) -> list[str]:
    ttft = "-" if point.ttft_ms is None else f"{point.ttft_ms:.0f} ms"
    return [
        f"{point.load:g}",
        f"{point.tok_s_per_gpu:.1f}",
        f"{point.tok_s_per_user:.1f}",
        ttft,
        "-" if point.accept_length is None else f"{point.accept_length:.2f}",
        "-" if point.budget is None else f"{point.budget:.2f}",
    ]


def simulated(
    results: Results,
    frontiers: Sequence[Frontier],
    figures: Sequence[Figure],
    partial: Sequence[str],
) -> Section:
    """The published result, derived again, and how far the simulator is off where it can be checked."""
    tables = []
    if results.frontier:
        rows = [
            [_DERIVED[n], span(p.published), span(p.simulated)] for n, p in results.frontier.items()
        ]
        tables.append(Table(headings=["published figure", "published", "simulated"], rows=rows))
    if results.sim_error_pct:
        rows = [
            [name.replace("_", " "), f"{value:.1f}%"]
            for name, value in results.sim_error_pct.items()
        ]
        tables.append(
            Table(
                headings=["metric", "worst error"],
                rows=rows,
                caption="The simulator against a real CPU server, at loads that were not used for fitting: "
                + results.sources["sim_error_pct"],
            )
        )
    assumptions = {name: value for found in frontiers for name, value in found.assumptions.items()}
    lines = "\n".join(f"{name}: {plain(str(value))}" for name, value in assumptions.items())
    return Section(
        name="simulated",
        title="The published result, derived again",
        label="simulated, not run on a GPU",
        partial=partial,
        text=["The same scheduler code on modelled steps: one set of assumptions, nothing fitted to the published figures."] if tables else [],
        tables=tables,
        figures=figures,
        details=[("Assumptions and their sources", lines)] if lines else [],
    )  # fmt: skip


def generator(results: Results, partial: Sequence[str]) -> Section:
    """The load generator against a server of known truth."""
    rows = []
    if results.generator is not None:
        rows.append(["streams at once", str(results.generator.streams)])
        rows.append(["lag, 99th percentile", f"{results.generator.lag_ms:.2f} ms"])
    errors = results.metric_error_pct
    if isinstance(errors, dict):
        rows += [
            [f"error of {name.replace('_', ' ')}", f"{value:.2f}%"]
            for name, value in errors.items()
        ]
    elif errors is not None:
        rows.append(["worst error of any metric", f"{errors:.2f}%"])
    return Section(
        name="generator",
        title="The load generator itself",
        label="measured",
        partial=partial,
        text=["Driven against a server whose timing is scripted, so that every metric has a truth."],
        tables=[Table(headings=["", "value"], rows=rows)] if rows else [],
    )  # fmt: skip


def method(results: Results) -> Section:
    """What was run, how long it took, and with which versions."""
    rows = [
        [o.title, o.status, f"{o.seconds:.0f} s" if o.seconds else "-", o.command]
        for o in results.steps
    ]
    libraries = ", ".join(f"{name} {v}" for name, v in results.provenance.versions.items())
    return Section(
        name="method",
        title="How this was made",
        text=[f"{results.machine}. {libraries}."],
        tables=[Table(headings=["step", "status", "took", "command"], rows=rows, caption="Kept: an earlier run's result with the same command, versions and machine.")],
        notes=["Made by `make report`. Figures are copied from the files of these steps."],
    )  # fmt: skip


def frontier_figure(found: Frontier, path: Path) -> Figure:
    """Throughput against the speed of a user, drawn to ``path``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    colours = ("#9aa5b1", "#c2410c", "#2f6fde")
    for series, colour in zip(found.series, colours[-len(found.series) :], strict=False):
        points = sorted(series.points, key=lambda point: point.load)
        axis.plot([p.tok_s_per_user for p in points], [p.tok_s_per_gpu for p in points], "o-", color=colour, label=series.name)  # fmt: skip
        for point in points:
            axis.annotate(f"{point.load:g}", (point.tok_s_per_user, point.tok_s_per_gpu), (4, 4), textcoords="offset points", fontsize=8, color=colour)  # fmt: skip
    axis.set_xlabel("tokens/s/user")
    axis.set_ylabel("output tokens/s of the machine")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return Figure(path=path, caption=f"{found.model}: throughput against the speed of a user; the numbers are requests at once.")  # fmt: skip


def plain(text: str) -> str:
    """Text without the scheme of addresses: the report refers to nothing outside."""
    return text.replace("https://", "").replace("http://", "")
