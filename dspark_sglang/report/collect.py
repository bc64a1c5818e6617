"""``report.json``: the figures of a report that others compare, each copied from the step that made it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from dspark_sglang.artifacts import SCHEMA_VERSION, Provenance
from dspark_sglang.errors import ArtifactError
from dspark_sglang.report.steps import Outcome

#: Published figures that are derived again, as the simulator names them.
DERIVED = ("flash_80", "pro_35", "flash_matched", "pro_matched")


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """A published figure, or its lowest and highest, next to the simulated one."""

    published: float | list[float]
    simulated: float | list[float] | None


class Generator(msgspec.Struct, frozen=True, kw_only=True):
    """The load generator against a server of known truth: streams at once, 99th percentile of its lag."""

    streams: int
    lag_ms: float


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """The file. What no step left is None.

    Attributes:
        sim_error_pct: worst error of each simulated metric against the real server, at loads not used for fitting.
        metric_error_pct: worst error of the load generator's metrics against the truth.
        sources: file that each figure was copied from.
    """

    schema_version: int = SCHEMA_VERSION
    sim_error_pct: dict[str, float] | None
    frontier: dict[str, Pair] | None
    generator: Generator | None
    metric_error_pct: float | dict[str, float] | None
    sources: dict[str, str]
    machine: str
    steps: list[Outcome]
    provenance: Provenance


def read(path: Path | None) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file or no path.

    Raises:
        ArtifactError: damaged.
    """
    if path is None:
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}.",
            expected="the JSON object that a step left",
            fix="Run `dspark report --fresh`.",
        ) from error


def results(
    *,
    derived: Path | None,
    validation: Path | None,
    generator: Path | None,
    outcomes: Sequence[Outcome],
    machine: str,
    provenance: Provenance,
) -> Results:
    """Copy the figures.

    Args:
        derived: of ``dspark simulate published``, with ``frontier``.
        validation: of the simulator against a real server, with ``sim_error_pct``.
        generator: of the load generator against a known truth, with ``streams``, ``lag_ms``, ``metric_error_pct``.

    Raises:
        ArtifactError: one of them is damaged or lacks what it should have.
    """
    sources: dict[str, str] = {}
    frontier = _part(derived, "frontier", dict[str, Pair], sources)
    if derived is not None and frontier is not None:
        missing = [name for name in DERIVED if name not in frontier]
        if missing:
            raise wrong(derived, f"its frontier lacks {', '.join(missing)}")
        frontier = {name: frontier[name] for name in DERIVED}
    errors = _part(validation, "sim_error_pct", dict[str, float], sources)
    metrics = _part(generator, "metric_error_pct", float | dict[str, float], sources)
    found = read(generator)
    return Results(
        sim_error_pct=errors,
        frontier=frontier,
        generator=None
        if generator is None or found is None
        else _convert(generator, found, Generator),
        metric_error_pct=metrics,
        sources=sources,
        machine=machine,
        steps=list(outcomes),
        provenance=provenance,
    )


def _part(path: Path | None, name: str, kind: Any, sources: dict[str, str]) -> Any:
    found = read(path)
    if path is None or found is None:
        return None
    if name not in found:
        raise wrong(path, f"it has no {name}")
    sources[name] = "/".join(path.parts[-3:])
    return _convert(path, found[name], kind)


def _convert(path: Path, value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise wrong(path, str(error)) from error


def wrong(path: Path, what: str) -> ArtifactError:
    """The error of a file that is not as expected."""
    return ArtifactError(
        f"{path} is not what a report reads: {what}.",
        expected="the file as this version's commands write it",
        fix="Run `dspark report --fresh`.",
    )
