"""The frontier of a serving system: tokens a second and GPU against tokens a second and user.

One schema for measured (``dspark bench``) and simulated (``dspark simulate``) points, drawn as Figures 7 and 8 of the
paper (arXiv 2607.05147), read at equal service, and priced by ``dspark simulate price``. A point is a steady state at
one load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from dspark_loadtests.schema import Summary
from dspark_sglang import artifacts
from dspark_sglang.errors import ArtifactError, ConfigError

_COLOURS = ("#1f6fb4", "#c44e52", "#8c8c8c", "#5a9e6f", "#b58900", "#7d5ba6")
_MARKS = ("o", "s", "^", "D", "v", "P")


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A steady state. Rates are output tokens a second, times milliseconds, both averages.

    Attributes:
        load: concurrent requests a server, or requests a second of an open loop.
        tok_s_per_user: 1000 / TPOT.
        accept_length: tokens a round, bonus included.
        budget: drafted tokens verified a request and round.
    """

    load: float
    tok_s_per_gpu: float
    tok_s_per_user: float
    ttft_ms: float | None = None
    accept_length: float | None = None
    budget: float | None = None


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One way of serving over several loads."""

    name: str
    gpus: int
    points: list[Point]


class Frontier(msgspec.Struct, frozen=True, kw_only=True, tag="frontier", tag_field="kind"):
    """Several ways of serving the same model on the same hardware."""

    schema_version: int = artifacts.SCHEMA_VERSION
    source: Literal["measured", "simulated"]
    model: str
    hardware: str
    assumptions: dict[str, str | float | int | bool | None] = {}
    series: list[Series]

    def of(self, name: str) -> Series:
        """The series called ``name``. Raises ArtifactError when there is none."""
        for series in self.series:
            if series.name == name:
                return series
        raise ArtifactError(
            f"The frontier has no series {name!r}.",
            expected="one of: " + ", ".join(s.name for s in self.series),
            fix="Name one of these.",
        )


def read(path: Path) -> Frontier:
    """A frontier file. Raises ArtifactError when it is missing, damaged or of another kind."""
    return artifacts.read_artifact(
        path, Frontier, "a frontier", "Make one with `dspark simulate` or `dspark bench`."
    )


def non_dominated(points: list[Point]) -> list[Point]:
    """Those that no other point beats on both axes, by falling speed of a user (rising throughput)."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.tok_s_per_user, -p.tok_s_per_gpu)):
        if not kept or point.tok_s_per_gpu > kept[-1].tok_s_per_gpu:
            kept.append(point)
    return kept


def throughput_at(points: list[Point], tok_s_per_user: float) -> float | None:
    """Largest tokens a second and GPU at which a user still has ``tok_s_per_user``.

    Linear between neighbouring points of the frontier, flat beyond its slow end; None where no point is that fast.
    """
    return _interpolate(
        [(p.tok_s_per_user, p.tok_s_per_gpu) for p in non_dominated(points)], tok_s_per_user
    )


def speed_at(points: list[Point], tok_s_per_gpu: float) -> float | None:
    """Largest tokens a second and user while a GPU still makes ``tok_s_per_gpu``; None where none does."""
    return _interpolate(
        [(p.tok_s_per_gpu, p.tok_s_per_user) for p in non_dominated(points)], tok_s_per_gpu
    )


def _interpolate(pairs: list[tuple[float, float]], x: float) -> float | None:
    """``pairs`` fall in y as they rise in x."""
    pairs = sorted(pairs)
    if not pairs or x > pairs[-1][0]:
        return None
    return float(np.interp(x, [pair[0] for pair in pairs], [pair[1] for pair in pairs]))


# --- from results ----------------------------------------------------------------------------------------


def point(summary: Summary, gpus: int) -> Point | None:
    """A stage as a point of the frontier; None where it has no speed of a user."""
    tpot = summary.latency.tpot_ms
    settings = summary.settings
    load = settings.users if settings.users is not None else settings.rate
    if tpot is None or tpot.mean <= 0 or load is None:
        return None
    ttft = summary.latency.ttft_ms
    return Point(
        load=load,
        tok_s_per_gpu=summary.throughput.output_tok_s / gpus,
        tok_s_per_user=1e3 / tpot.mean,
        ttft_ms=None if ttft is None else ttft.mean,
        accept_length=summary.acceptance.accepted_length,
        budget=summary.acceptance.budget,
    )


def frontier_of(
    ways: Mapping[str, Sequence[Sequence[Summary]]], *, gpus: int, hardware: str
) -> Frontier:
    """A series for each way, a point for each load: the mean over its complete summaries.

    Args:
        ways: by name, for each load the summaries taken at it.
        gpus: of each server.
    """
    first = next(iter(ways.values()))[0]
    return Frontier(
        source="measured",
        model=first[0].server.model_path or first[0].settings.model,
        hardware=hardware,
        assumptions={
            "temperature": first[0].settings.temperature,
            "max_tokens": first[0].settings.max_tokens,
            "prompts": first[0].settings.prompts,
            "arrival": first[0].settings.arrival,
            "blocks": len(first),
        },
        series=[
            Series(name=name, gpus=gpus, points=[p for load in loads if (p := _mean(load, gpus))])
            for name, loads in ways.items()
        ],
    )


def _mean(summaries: Sequence[Summary], gpus: int) -> Point | None:
    points = [p for one in summaries if one.complete and (p := point(one, gpus))]
    if not points:
        return None
    known = {
        name: [value for p in points if (value := getattr(p, name)) is not None]
        for name in Point.__struct_fields__
    }
    means = {name: float(np.mean(values)) for name, values in known.items() if values}
    return msgspec.structs.replace(points[0], **means)


def merge(found: Sequence[Frontier]) -> Frontier:
    """The series of several files in one frontier.

    Raises:
        ConfigError: other models, measured and simulated, or two series of a name.
    """
    series = [each for one in found for each in one.series]
    names = [each.name for each in series]
    doubled = sorted({name for name in names if names.count(name) > 1})
    models = sorted({Path(one.model).name for one in found})
    if doubled or len(models) > 1 or len({one.source for one in found}) > 1:
        raise ConfigError(
            f"The files are of the models {', '.join(models)}"
            + (f" and both have a series {', '.join(doubled)}." if doubled else "."),
            expected="one model, all measured or all simulated, and series of different names",
            fix="Name them with dspark bench --name.",
        )
    hardware = ", ".join(dict.fromkeys(one.hardware for one in found))
    return msgspec.structs.replace(found[0], hardware=hardware, series=series)


# --- at equal service ------------------------------------------------------------------------------------


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


# --- the figures -----------------------------------------------------------------------------------------


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
    colours = {series.name: _style(number)["color"] for number, series in enumerate(ordered)}
    for found in iso(frontier, ours, speeds=speeds) if speeds else ():
        if found.kind == "speed" and found.ratio and found.ours and found.theirs:
            colour = colours[found.other]
            axis.vlines(found.at, found.theirs, found.ours, linestyle=":", color=colour)
            axis.annotate(
                f"{found.ratio:.2f}× {found.other}", (found.at, found.theirs),
                xytext=(4, 4), textcoords="offset points", fontsize=8, color=colour,
            )  # fmt: skip
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
