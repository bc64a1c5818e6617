"""``python -m tests.simulation fit``, ``check`` and ``published``: the simulator against a server here, and published.

``fit`` learns a server at some loads and writes its parameters. ``check`` simulates other loads first and measures them
then. Each takes about 7 minutes on 2 cores; nothing else may run. ``published`` re-derives the published V4 result.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from dspark_loadtests.prompts import load_prompts
from dspark_sglang import targets
from dspark_sglang.artifacts import SCHEMA_VERSION, CostArtifact, write_json
from dspark_sglang.cli.main import run
from dspark_sglang.errors import ArtifactError, ConfigError
from dspark_sglang.layouts.base import weights_digest
from dspark_sglang.provenance import machine, provenance
from dspark_sglang.simulate.summary import Summary
from dspark_sglang.values import read_numbers
from tests.simulation import measure, published, twin
from tests.simulation.measure import Plan
from tests.simulation.twin import Compared, Observed, Parameters, compare, worst

ROOT = Path(__file__).resolve().parents[2]
_METRICS = ("throughput", "tpot", "budget")


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


def compare_with(
    given: Parameters, predicted: Mapping[int, Summary], plan: Plan, options: argparse.Namespace
) -> list[Compared]:
    """Measure what was predicted.

    Raises:
        ArtifactError: another drafter than the parameters are of.
        ServerError: the server does not start, or fails under load.
    """
    drafter, work = options.drafter, options.work.absolute()
    if weights_digest(drafter) != given.drafter_sha256:
        raise ArtifactError(
            f"The parameters were fitted with drafter {given.drafter_sha256[:12]}.",
            expected=f"{weights_digest(drafter)[:12]}, the weights in {drafter}",
            fix="Fit again with `make simulate-fit`.",
        )
    # The fitted step cost as the server reads it: both schedule by the same numbers at the start.
    cost = CostArtifact(
        schema_version=SCHEMA_VERSION,
        fingerprint=given.fingerprint,
        model=given.cost,
        provenance=given.provenance,
    )
    write_json(work / "cost.json", cost)
    seen: dict[int, list[Observed]] = {users: [] for users in predicted}
    prompts = list(load_prompts())
    with measure.serving(
        target=targets.of_drafter(drafter, options.target),
        drafter=drafter,
        dtype=given.dtype,
        slots=given.slots,
        out=work,
        cost=work / "cost.json",
    ) as server:
        server.update(dspark_speculation=1 if given.speculation == "on" else -1)
        pace = measure.Pace(server)
        for number in range(plan.blocks):
            for users in predicted:
                print(f"{users} requests, block {number + 1} of {plan.blocks}", flush=True)
                observed, _, _ = measure.observe(server, prompts, plan.load(users, 100 + number))
                seen[users].append(msgspec.structs.replace(observed, reference_s=pace.around()))
    return [compare(one, seen[users], given.reference_s) for users, one in predicted.items()]


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
        "provenance": msgspec.to_builtins(provenance(["make", "simulate-check"])),
    }
    published.update(out, sim_error_pct=worst(found), validation=validation)
    return out / published.FILE


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


def fit(options: argparse.Namespace) -> None:
    """Learn a server: step cost, acceptance, what lies between steps."""
    loads, work = read_numbers(options.concurrency, "--concurrency", int), options.work.absolute()
    plan = Plan(options.temperature, options.max_tokens, 4.0, options.window_s, options.blocks)
    fixed: dict[str, Any] = {
        "target": targets.of_drafter(options.drafter, options.target),
        "drafter": options.drafter,
        "dtype": options.dtype,
        "slots": max(32, *loads),
    }
    with measure.serving(**fixed, out=work) as server:
        found = measure.fit(
            server, plan, loads=loads, speculation=options.speculation,
            tell=lambda what: print(what, flush=True), given=["make", "simulate-fit"], **fixed,
        )  # fmt: skip
    write_json(options.parameters, found)
    own = found.overheads
    print(
        f"Between steps {1e3 * own.step:.1f} ms and {1e3 * own.request:.2f} ms a request; "
        f"prefill {1e3 * own.prefill_step:.0f} ms. Written: {options.parameters}. Commit it, then `make simulate-check`."
    )


def check(options: argparse.Namespace) -> None:
    """Simulate, measure, compare; exit code 1 where they differ by more than ``--tolerance`` per cent."""
    loads = read_numbers(options.concurrency, "--concurrency", int)
    given = twin.read(options.parameters, here=not options.simulate_only)
    check_loads(given, loads)
    predicted = {users: twin.predict(given, users) for users in loads}
    console = Console()
    console.print(predictions(predicted))
    if options.simulate_only:
        return
    plan = Plan(given.temperature, given.max_tokens, 4.0, options.window_s, options.blocks)
    found = compare_with(given, predicted, plan, options)
    path = write(found, given, options.parameters, options.out)
    console.print(table(found))
    wrong = {name: value for name, value in worst(found).items() if not value <= options.tolerance}
    console.print(f"Written: {path}")
    if wrong:
        shown = ", ".join(f"{name} {value:.1f}%" for name, value in wrong.items())
        raise SystemExit(f"Beyond {options.tolerance:g}%: {shown}")


def rederive(options: argparse.Namespace) -> None:
    """Re-derive the published V4-Flash and V4-Pro result on H800s from one table of assumptions: computed, not run.

    Keeps the validation of an earlier ``check`` with the same ``--out``.
    """
    found = published.run(options.out, not options.quick, lambda what: print(what, flush=True))
    Console().print(published_table(found))
    print(f"Written: {options.out / 'simulation.json'}, frontiers and figures beside it")


def published_table(found: dict[str, Any]) -> Table:
    """Published against simulated."""
    view = Table(title="Published against simulated (computed, not run)")
    for heading in ("figure", "published", "simulated"):
        view.add_column(heading, justify="left" if heading == "figure" else "right")
    for name, pair in found["frontier"].items():
        view.add_row(name, ratio(pair["published"]), ratio(pair["simulated"]))
    for model, details in found["details"].items():
        own = details["collapse"]
        name = f"{model}, throughput at {own['speed']:g} tok/s/user"
        view.add_row(name, ratio(own["published"]), ratio(own["simulated"]))
        view.add_row(f"{model}, fastest baseline user, tok/s", "", ratio(own["fastest_baseline"]))
    return view


def ratio(value: Any) -> str:
    """A number, the ends of a range, or that there is none."""
    if isinstance(value, list):
        return " to ".join(f"{one:.2f}" for one in value)
    return "none" if value is None else f"{value:.2f}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, what, loads, window in (("fit", fit, "1,4,8,16,32", 24.0), ("check", check, "2,3,6,12,24", 32.0)):  # fmt: skip
        own = commands.add_parser(name, help=what.__doc__)
        own.set_defaults(what=what)
        own.add_argument("--parameters", type=Path, default=ROOT / "docs/results/simulation-parameters.json")  # fmt: skip
        own.add_argument("--work", type=Path, default=Path(f"runs/simulate-{name}"))
        own.add_argument("--target", type=Path)
        own.add_argument("--drafter", type=Path, default=ROOT / "model_cards/smollm2-135m-instruct-dspark")  # fmt: skip
        own.add_argument("--concurrency", default=loads)
        own.add_argument("--blocks", type=int, default=2, help="turns of each load")
        own.add_argument("--window-s", type=float, default=window)
        if name == "check":
            own.add_argument("--out", type=Path, default=ROOT / "docs/results")
            own.add_argument("--tolerance", type=float, default=10.0, help="per cent")
            own.add_argument("--simulate-only", action="store_true", help="start no server")
            continue
        own.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
        own.add_argument("--temperature", type=float, default=1.0)
        own.add_argument("--max-tokens", type=int, default=96)
        own.add_argument("--speculation", choices=("on", "auto"), default="on")
    own = commands.add_parser("published", help=rederive.__doc__)
    own.set_defaults(what=rederive)
    own.add_argument("--out", type=Path, default=ROOT / "docs/results")
    own.add_argument("--quick", action="store_true", help="keep every assumption as it is")
    options = parser.parse_args()
    options.what(options)


if __name__ == "__main__":
    run(main)
