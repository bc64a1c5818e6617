"""The parts of a report about money."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_sglang.economics.account import Stage
from dspark_sglang.economics.prices import UNITS
from dspark_sglang.economics.quoted import Quoted
from dspark_sglang.economics.study import Study
from dspark_sglang.economics.view import (
    HEADINGS,
    METRICS,
    cells,
    gain_line,
    memory_line,
    short,
    stage_rows,
)
from dspark_sglang.report.page import Figure, Section, Table
from dspark_sglang.report.sections import plain


def economics(
    name: str, title: str, study: Study | None, figures: Sequence[Figure], partial: Sequence[str]
) -> Section:
    """One question of economics and its answer."""
    if study is None:
        return Section(name=name, title=title, partial=partial)
    sides = [side for side in (study.ours, study.baseline) if side is not None]
    rows = [
        [side.name, *(cells(side.hour) if side.hour else [f"never that fast: {side.fastest:.3g} tok/s/user at most"])]
        for side in sides
    ]  # fmt: skip
    draws = [
        [METRICS[metric], short(s.p5), short(s.p50), short(s.p95)]
        for metric, s in study.monte_carlo.metrics.items()
    ]
    if study.monte_carlo.gain is not None:
        s = study.monte_carlo.gain
        draws.append(["cost of the baseline over ours", short(s.p5), short(s.p50), short(s.p95)])
    prices = [
        [key, short(q.value), f"{short(q.range[0])} to {short(q.range[1])}", UNITS[key], plain(f"{q.date}: {q.source}" if q.date else q.source)]
        for key, q in study.assumptions.quantities().items()
    ]  # fmt: skip
    found = study.monte_carlo
    return Section(
        name=name,
        title=title,
        partial=partial,
        label=f"computed from a {study.source} frontier",
        text=[f"{study.model} on {study.hardware}, at {study.question.sla:g} tok/s for every user. {study.assumptions.about}."],
        tables=[
            Table(headings=["way of serving", *HEADINGS], rows=rows, caption="A paid hour of one GPU, at that speed for every user."),
            _stages(study.stages, f"{study.ours.name}: one thing left out after the other is counted"),
            Table(headings=["", "5th percentile", "median", "95th percentile"], rows=draws, caption=f"All assumptions drawn at once, {found.draws} times, seed {found.seed}."),
            Table(headings=["assumption", "value", "range", "unit", "date and source"], rows=prices),
        ],
        figures=figures,
        notes=[*_sentences(study), *study.notes],
    )  # fmt: skip


def quoted_economics(quoted: Quoted | None, partial: Sequence[str]) -> Section:
    """The arithmetic quoted with DSpark, and what it leaves out."""
    if quoted is None:
        return Section(name="quoted", title="The quoted economics", partial=partial)
    rows = [
        [c.what, c.unit, "-" if c.published is None else f"{c.published:,.2f}", f"{c.computed:,.2f}", c.how]
        for c in quoted.claims
    ]  # fmt: skip
    return Section(
        name="quoted",
        title="The quoted economics",
        label="computed",
        partial=partial,
        text=[quoted.reading],
        tables=[
            Table(headings=["figure", "unit", "published", "computed", "how"], rows=rows),
            _stages(quoted.stages, "5 million tokens an hour, were they of decoding alone: what that leaves out"),
        ],
    )  # fmt: skip


def _stages(stages: Sequence[Stage], caption: str) -> Table:
    return Table(headings=["counted so far", *HEADINGS], rows=stage_rows(stages), caption=caption)


def _sentences(study: Study) -> list[str]:
    found = [] if study.baseline is None else [gain_line(study)]
    return found if study.slots is None else [*found, memory_line(study.slots)]
