"""The frontier of a serving system: tokens a second and GPU against tokens a second and user.

One schema for measured (``dspark bench``) and simulated (``dspark simulate``) points, read by the plots and by
``dspark simulate price``. A point is a steady state at one load. Figure 7 of the paper (arXiv 2607.05147) is this plot.
"""

from __future__ import annotations

import bisect
from pathlib import Path
from typing import Literal

import msgspec

from dspark_sglang import artifacts
from dspark_sglang.errors import ArtifactError


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
    if x <= pairs[0][0]:
        return pairs[0][1]
    i = bisect.bisect_left([p[0] for p in pairs], x)
    (x0, y0), (x1, y1) = pairs[i - 1], pairs[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
