"""What a speculative step costs in plain decode steps, and where its time goes: one request at a time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from dspark_loadtests.prompts import KINDS
from dspark_sglang import targets
from dspark_sglang.artifacts import write_json
from dspark_sglang.cli.demo import DRAFTER, choose_prompts, run_comparison, start_pair
from dspark_sglang.cli.main import run
from dspark_sglang.demo.measure import (
    Comparison,
    accept_length,
    bootstrap,
    rate,
    running,
    step_seconds,
)
from dspark_sglang.provenance import machine

#: Parts of a step as the worker times them, outermost first; "draft" contains "draft_head".
_PARTS = ("draft", "draft_head", "plan", "target_verify", "accept", "commit")


def parts_per_round(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Milliseconds each part of a step took on average between two snapshots."""
    steps = max(1, after["steps"] - before["steps"])
    spent = {
        part: after["seconds"].get(part, 0.0) - before["seconds"].get(part, 0.0) for part in _PARTS
    }
    return {part: round(1e3 * seconds / steps, 3) for part, seconds in spent.items()}


def measure(given: argparse.Namespace) -> tuple[Comparison, dict[str, float]]:
    """Run the comparison in one dtype and time the parts of a step."""
    console, prompts = Console(), choose_prompts(given.per_kind)
    target = targets.of_drafter(given.drafter, None)
    with ExitStack() as stack:
        servers = start_pair(stack, console, target, given.drafter, given.dtype, given.out / "logs")
        with running(servers[1]):
            before = servers[1].dspark() or {"steps": 0, "seconds": {}}
        both = run_comparison(
            console,
            servers,
            prompts,
            max_tokens=given.max_tokens,
            title=f"cost of a step ({given.dtype})",
            temperature=given.temperature,
        )
        with running(servers[1]):
            after = servers[1].dspark() or before
    return both, parts_per_round(before, after)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.round_cost", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/round"), help="where results go")
    add("--drafter", type=Path, default=DRAFTER)
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--per-kind", type=int, choices=range(1, 10), default=6, help="prompts of each kind")
    add("--max-tokens", type=int, default=96, help="tokens of each answer")
    add("--temperature", type=float, default=0.0)
    given = parser.parse_args(arguments)
    both, parts = measure(given)
    plain_ms, round_ms = (1e3 * step_seconds(each) for each in (both.plain, both.dspark))
    cost = bootstrap(both, lambda plain, ours: step_seconds(ours) / step_seconds(plain))
    speedup = bootstrap(both, lambda plain, ours: rate(ours) / rate(plain))
    summary = {
        "dtype": given.dtype,
        "temperature": given.temperature,
        "plain_step_ms": round(plain_ms, 2),
        "round_ms": round(round_ms, 2),
        "round_cost": round(round_ms / plain_ms, 4),
        "round_cost_ci95": [round(value, 4) for value in cost],
        "baseline_tok_s": round(rate(both.plain), 3),
        "dspark_tok_s": round(rate(both.dspark), 3),
        "speedup": round(rate(both.dspark) / rate(both.plain), 4),
        "speedup_ci95": [round(value, 4) for value in speedup],
        "accept_length": round(accept_length(both.dspark), 4),
        "parts_ms": parts,
        "prompts": given.per_kind * len(KINDS),
        "max_tokens": given.max_tokens,
        "machine": machine(),
        "command": f"python -m benchmarks.round_cost --dtype {given.dtype} --per-kind {given.per_kind} "
        f"--max-tokens {given.max_tokens} --temperature {given.temperature:g}",
    }  # fmt: skip
    for part, spent in (*parts.items(), ("speculative step", round_ms), ("plain step", plain_ms)):
        print(f"{part:<17}{spent:8.2f} ms{spent / plain_ms:8.3f} plain steps")
    print(f"cost {round_ms / plain_ms:.3f} (95% {cost[0]:.3f} to {cost[1]:.3f}), {summary['baseline_tok_s']:.1f} → "
          f"{summary['dspark_tok_s']:.1f} tok/s, accepted length {summary['accept_length']:.2f}")  # fmt: skip
    name = f"summary-{given.dtype}{f'-t{given.temperature:g}' if given.temperature else ''}.json"
    write_json(given.out / name, summary)
    print(f"Written: {given.out / name}")


if __name__ == "__main__":
    run(main)
