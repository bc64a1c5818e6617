"""``dspark bench-round``: what a round costs in plain decode steps, and where its time goes."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dspark_loadtests.prompts import Prompt
from dspark_sglang import targets
from dspark_sglang.artifacts import write_bytes
from dspark_sglang.cli.demo import DRAFTER, choose_prompts, run_comparison, start_pair
from dspark_sglang.demo import report
from dspark_sglang.demo.measure import Comparison, accept_length, bootstrap, rate, step_seconds
from dspark_sglang.demo.measure import running as running_server
from dspark_sglang.provenance import machine

#: Parts of a round as the worker times them, outermost first; "draft" contains "draft_head".
_PARTS = ("draft", "draft_head", "plan", "target_verify", "accept", "commit")


def parts_per_round(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Milliseconds each part of a round took on average between two snapshots."""
    steps = max(1, after["steps"] - before["steps"])
    spent = {
        part: after["seconds"].get(part, 0.0) - before["seconds"].get(part, 0.0) for part in _PARTS
    }
    return {part: round(1e3 * seconds / steps, 3) for part, seconds in spent.items()}


def measure(
    console: Console,
    target: Path,
    drafter: Path,
    prompts: list[Prompt],
    *,
    dtype: str,
    max_tokens: int,
    temperature: float,
    logs: Path,
) -> tuple[Comparison, dict[str, float]]:
    """Run the comparison in one dtype and time the parts of a round."""
    with ExitStack() as stack:
        servers = start_pair(stack, console, target, drafter, dtype, logs)
        with running_server(servers[1]):
            before = servers[1].dspark() or {"steps": 0, "seconds": {}}
        both = run_comparison(
            console,
            servers,
            prompts,
            max_tokens=max_tokens,
            title=f"round cost ({dtype})",
            temperature=temperature,
        )
        with running_server(servers[1]):
            after = servers[1].dspark() or before
    return both, parts_per_round(before, after)


def bench_round(
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("runs/round"),
    drafter: Annotated[Path, typer.Option(help="The drafter to serve.")] = DRAFTER,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    per_kind: Annotated[int, typer.Option(min=1, max=9, help="Prompts of each kind.")] = 6,
    max_tokens: Annotated[int, typer.Option(min=16, help="Tokens of each answer.")] = 96,
    temperature: Annotated[float, typer.Option(min=0.0, help="Temperature of the answers.")] = 0.0,
) -> None:
    """Measure a verification round against a plain decode step, one request at a time."""
    console = Console()
    target = targets.of_drafter(drafter, None)
    prompts = choose_prompts(per_kind)
    both, parts = measure(
        console,
        target,
        drafter,
        prompts,
        dtype=dtype,
        max_tokens=max_tokens,
        temperature=temperature,
        logs=out / "logs",
    )
    cost = step_seconds(both.dspark) / step_seconds(both.plain)
    interval = bootstrap(both, lambda plain, ours: step_seconds(ours) / step_seconds(plain))
    speedup = bootstrap(both, lambda plain, ours: rate(ours) / rate(plain))
    plain_ms = round(1e3 * step_seconds(both.plain), 2)
    summary: dict[str, Any] = {
        "dtype": dtype,
        "temperature": temperature,
        "plain_step_ms": plain_ms,
        "round_ms": round(1e3 * step_seconds(both.dspark), 2),
        "round_cost": round(cost, 4),
        "round_cost_ci95": [round(value, 4) for value in interval],
        "baseline_tok_s": round(rate(both.plain), 3),
        "dspark_tok_s": round(rate(both.dspark), 3),
        "speedup": round(rate(both.dspark) / rate(both.plain), 4),
        "speedup_ci95": [round(value, 4) for value in speedup],
        "accept_length": round(accept_length(both.dspark), 4),
        "parts_ms": parts,
        "prompts": len(prompts),
        "max_tokens": max_tokens,
        "machine": machine(),
        "command": f"dspark bench-round --dtype {dtype} --per-kind {per_kind} "
        f"--max-tokens {max_tokens}" + (f" --temperature {temperature}" if temperature else ""),
    }
    view = Table(title=f"Where a round goes ({dtype})")
    view.add_column("part")
    view.add_column("ms a round", justify="right")
    view.add_column("plain steps", justify="right")
    for part, spent in parts.items():
        view.add_row(part, f"{spent:.2f}", f"{spent / plain_ms:.3f}")
    view.add_section()
    view.add_row("whole round", f"{summary['round_ms']:.2f}", f"{cost:.3f}", style="bold")
    view.add_row("plain step", f"{summary['plain_step_ms']:.2f}", "1.000")
    console.print(view)
    console.print(
        f"Round cost {cost:.3f} (95% {interval[0]:.3f} to {interval[1]:.3f}); "
        f"{summary['baseline_tok_s']:.1f} → {summary['dspark_tok_s']:.1f} tok/s, accepted length "
        f"{summary['accept_length']:.2f}"
    )
    name = f"summary-{dtype}{'' if not temperature else f'-t{temperature:g}'}.json"
    write_bytes(out / name, report.dumps(summary))
    console.print(f"Written: {out / name}")
