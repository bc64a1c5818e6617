"""``docs/results/simulation.json``: the published result re-derived, and the simulator's validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from dspark_sglang.artifacts import SCHEMA_VERSION, write_json
from dspark_sglang.errors import ArtifactError
from dspark_sglang.provenance import provenance
from dspark_sglang.simulate import figures
from dspark_sglang.simulate.assumptions import Assumptions, rows
from dspark_sglang.simulate.published import CLAIMS, LOADS, Tell, compare, frontier, sensitivity

FILE = "simulation.json"
_NOTES = {"flash": ("+51%", "+661%"), "pro": ("+52%", "+406%")}


def total(with_sensitivity: bool) -> int:
    """Calls of ``tell`` in all."""
    loads = 2 * len(CLAIMS) * len(LOADS)
    cases = 1 + sum(len(row.instead) for row in rows())
    return loads + (cases * len(CLAIMS) if with_sensitivity else 0)


def read(out: Path) -> dict[str, Any]:
    """What ``simulation.json`` in ``out`` holds already; nothing where there is none.

    Raises:
        ArtifactError: it is damaged.
    """
    path = out / FILE
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}.",
            expected="a result of `dspark simulate published`",
            fix="Remove it.",
        ) from error


def update(out: Path, **parts: Any) -> dict[str, Any]:
    """Write some parts of ``simulation.json`` and keep the others."""
    known = {"schema_version": SCHEMA_VERSION, **read(out), **parts}
    write_json(out / FILE, known)
    return known


def run(out: Path, with_sensitivity: bool, tell: Tell) -> dict[str, Any]:
    """Re-derive, draw and write; a validation that is there already is kept."""
    out.mkdir(parents=True, exist_ok=True)
    read(out)  # before minutes are spent
    given = Assumptions()
    made = {model: frontier(model, given, tell=tell) for model in CLAIMS}
    compared = {model: compare(model, one, given) for model, one in made.items()}
    for model, one in made.items():
        write_json(out / f"frontier-{model}.json", one)
    named = {f"V4-{model.capitalize()}": one for model, one in made.items()}
    marks = {
        f"V4-{model.capitalize()}": list(zip((claim.speed, claim.fast), _NOTES[model], strict=True))
        for model, claim in CLAIMS.items()
    }
    figures.frontiers(out / "simulation-frontier.png", named, marks)
    figures.loads(out / "simulation-load.png", named)
    short = {
        "flash_80": compared["flash"]["throughput_at"],
        "pro_35": compared["pro"]["throughput_at"],
        "flash_matched": compared["flash"]["matched"],
        "pro_matched": compared["pro"]["matched"],
    }
    parts: dict[str, Any] = {
        "frontier": {
            name: {key: value[key] for key in ("published", "simulated")}
            for name, value in short.items()
        },
        "details": compared,
        "assumptions": [msgspec.to_builtins(row) for row in rows()],
        "label": "computed, not run",
        "provenance": msgspec.to_builtins(provenance(["dspark", "simulate", "published"])),
    }
    if with_sensitivity:
        parts["sensitivity"] = sensitivity(tell)
    return update(out, **parts)


def dumps(found: dict[str, Any]) -> str:
    """The result as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(found), indent=2).decode()


def table(found: dict[str, Any]) -> Table:
    """Published against simulated."""
    view = Table(title="Published against simulated (computed, not run)")
    for heading in ("figure", "published", "simulated"):
        view.add_column(heading, justify="left" if heading == "figure" else "right")
    for name, pair in found["frontier"].items():
        view.add_row(name, _shown(pair["published"]), _shown(pair["simulated"]))
    for model, details in found["details"].items():
        collapse = details["collapse"]
        view.add_row(
            f"{model}, throughput at {collapse['speed']:g} tok/s/user",
            _shown(collapse["published"]),
            _shown(collapse["simulated"]),
        )
        view.add_row(
            f"{model}, fastest baseline user, tok/s", "", _shown(collapse["fastest_baseline"])
        )
    return view


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return " to ".join(f"{one:.2f}" for one in value)
    return f"{value:.2f}"
