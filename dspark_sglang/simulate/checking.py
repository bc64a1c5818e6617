"""The simulator against a real server, at loads that were not used to fit it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from dspark_loadtests.prompts import load_prompts
from dspark_sglang import targets
from dspark_sglang.artifacts import SCHEMA_VERSION, CostArtifact, write_json
from dspark_sglang.checkpoint import weights_digest
from dspark_sglang.errors import ArtifactError, ConfigError
from dspark_sglang.provenance import machine, provenance
from dspark_sglang.simulate import measure, rederive
from dspark_sglang.simulate.parameters import Compared, Observed, Parameters, compare, worst
from dspark_sglang.simulate.summary import Summary

_METRICS = ("throughput", "tpot", "budget")
Tell = Callable[[str], None]


def check_loads(given: Parameters, loads: Sequence[int]) -> None:
    """Refuse loads that the parameters were fitted at, or that the server does not run at once.

    Raises:
        ConfigError: such a load.
    """
    fitted = {block.users for block in given.fitted}
    both = sorted(fitted & set(loads))
    if both or max(loads) > given.slots:
        raise ConfigError(
            f"Loads {', '.join(map(str, loads))}; fitted at {', '.join(map(str, sorted(fitted)))}, "
            f"at most {given.slots} at once.",
            expected="loads that were not fitted and that run at once",
            fix="As in --concurrency 2,3,6,12,24.",
        )


def run(
    given: Parameters,
    predicted: Mapping[int, Summary],
    *,
    target: Path | None,
    drafter: Path,
    work: Path,
    tell: Tell,
    blocks: int,
    warm_s: float,
    window_s: float,
) -> list[Compared]:
    """Measure what was predicted.

    Raises:
        ArtifactError: another drafter than the parameters are of.
        ServerError: the server does not start, or fails under load.
    """
    if weights_digest(drafter) != given.drafter_sha256:
        raise ArtifactError(
            f"The parameters were fitted with drafter {given.drafter_sha256[:12]}.",
            expected=f"{weights_digest(drafter)[:12]}, the weights in {drafter}",
            fix="Fit again with `dspark simulate fit`.",
        )
    cost = work / "cost.json"
    write_json(cost, _cost(given))
    plan = measure.Plan(
        temperature=given.temperature,
        max_tokens=given.max_tokens,
        warm_s=warm_s,
        window_s=window_s,
        blocks=blocks,
    )
    seen: dict[int, list[Observed]] = {users: [] for users in predicted}
    prompts = list(load_prompts())
    with measure.serving(
        target=targets.of_drafter(drafter, target),
        drafter=drafter,
        dtype=given.dtype,
        slots=given.slots,
        out=work,
        cost=cost,
    ) as server:
        server.update(dspark_speculation=1 if given.speculation == "on" else -1)
        pace = measure.Pace(server)
        for number in range(blocks):
            for users in predicted:
                tell(f"{users} requests, block {number + 1} of {blocks}")
                observed, _, _ = measure.observe(server, prompts, plan.load(users, 100 + number))
                seen[users].append(msgspec.structs.replace(observed, reference_s=pace.around()))
    return [compare(one, seen[users], given.reference_s) for users, one in predicted.items()]


def _cost(given: Parameters) -> CostArtifact:
    """The fitted step cost as the server reads it: both schedule by the same numbers at the start."""
    return CostArtifact(
        schema_version=SCHEMA_VERSION,
        fingerprint=given.fingerprint,
        model=given.cost,
        provenance=given.provenance,
    )


def write(found: Sequence[Compared], given: Parameters, source: Path, out: Path) -> Path:
    """Put the validation into ``simulation.json`` in ``out``.

    Returns:
        That file.
    """
    validation: dict[str, Any] = {
        "machine": machine(),
        "parameters": source.name,
        "parameters_created": given.provenance.created,
        "fitted_at": sorted({block.users for block in given.fitted}),
        "loads": [msgspec.to_builtins(one) for one in found],
        "provenance": msgspec.to_builtins(provenance(["dspark", "simulate", "check"])),
    }
    rederive.update(out, sim_error_pct=worst(found), validation=validation)
    return out / rederive.FILE


def table(found: Sequence[Compared]) -> Table:
    """Simulated against measured."""
    view = Table(
        title="Simulated first, measured then, on the machine as fast as when it was fitted"
    )
    view.add_column("requests", justify="right")
    for name in ("tok/s", "TPOT ms", "budget"):
        for heading in (f"{name} simulated", "measured", "error"):
            view.add_column(heading, justify="right")
    view.add_column("slowdown", justify="right")
    scale = {"throughput": 1.0, "tpot": 1e3, "budget": 1.0}
    for one in found:
        cells = []
        for name in _METRICS:
            cells += [
                f"{scale[name] * one.simulated[name]:.2f}",
                f"{scale[name] * one.measured[name]:.2f}",
                f"{one.error_pct[name]:+.1f}%",
            ]
        view.add_row(str(one.users), *cells, f"{one.slowdown:.2f}")
    return view


def predictions(predicted: Mapping[int, Summary]) -> Table:
    """What the simulator says before anything is measured."""
    view = Table(title="Simulated")
    for heading in ("requests", "tok/s", "TPOT ms", "budget", "length", "drafting"):
        view.add_column(heading, justify="right")
    for users, one in predicted.items():
        view.add_row(
            str(users),
            f"{one.tok_s:.1f}",
            "-" if one.tpot_ms is None else f"{one.tpot_ms[1]:.1f}",
            f"{one.budget:.3f}",
            "-" if one.accept_length is None else f"{one.accept_length:.3f}",
            f"{one.drafting:.0%}",
        )
    return view
