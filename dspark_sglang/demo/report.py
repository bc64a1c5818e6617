"""What the demo prints, draws and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dspark_sglang import __version__
from dspark_sglang.demo.measure import (
    Comparison,
    Sample,
    accept_length,
    bootstrap,
    rate,
    step_seconds,
)
from dspark_sglang.provenance import machine

SCHEMA_VERSION = 1


def _kinds(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(sample.kind for sample in comparison.dspark))


def _of(samples: list[Sample], kind: str) -> list[Sample]:
    return [sample for sample in samples if sample.kind == kind]


def _cached_share_once_seen(samples: list[Sample]) -> float:
    """Cached share of the prompts whose shared prefix an earlier prompt had brought in."""
    seen: set[str] = set()
    later = []
    for sample in samples:
        if sample.kind in seen:
            later.append(sample)
        seen.add(sample.kind)
    return sum(s.cached_tokens for s in later) / max(1, sum(s.prompt_tokens for s in later))


def summarise(
    speed: Comparison, equal: Comparison, *, ties: list[dict[str, Any]], status: dict[str, Any]
) -> dict[str, Any]:
    """The demo's result as one JSON object.

    Args:
        speed: the comparison in bfloat16, which speed is taken from.
        equal: the comparison in float32, which equality of text is taken from.
        ties: one entry for every differing text of ``equal``.
        status: the plugin's own counters.
    """
    prompt_tokens = sum(s.prompt_tokens for s in speed.dspark)
    cached = sum(s.cached_tokens for s in speed.dspark)
    same = sum(a.text == b.text for a, b in zip(equal.plain, equal.dspark, strict=True))
    near = [tie for tie in ties if tie["near_tie"]]
    same_bf16 = sum(a.text == b.text for a, b in zip(speed.plain, speed.dspark, strict=True))
    return {
        "schema_version": SCHEMA_VERSION,
        "baseline_tok_s": round(rate(speed.plain), 3),
        "dspark_tok_s": round(rate(speed.dspark), 3),
        "speedup": round(rate(speed.dspark) / rate(speed.plain), 4),
        "speedup_ci95": [
            round(v, 4) for v in bootstrap(speed, lambda plain, ours: rate(ours) / rate(plain))
        ],
        "round_cost": round(step_seconds(speed.dspark) / step_seconds(speed.plain), 4),
        "round_cost_ci95": [
            round(v, 4)
            for v in bootstrap(speed, lambda plain, ours: step_seconds(ours) / step_seconds(plain))
        ],
        "plain_step_ms": round(step_seconds(speed.plain) * 1e3, 2),
        "round_ms": round(step_seconds(speed.dspark) * 1e3, 2),
        "dtype": {"speed": "bfloat16", "identical": "float32"},
        "accept_length": round(accept_length(speed.dspark), 4),
        "accept_length_by_kind": {
            kind: round(accept_length(_of(speed.dspark, kind)), 4) for kind in _kinds(speed)
        },
        "identical": same,
        "near_ties": len(near),
        "differences": ties,
        "compared": len(equal.plain),
        "identical_bfloat16": same_bf16,
        "cached_tokens": cached,
        "prompt_tokens": prompt_tokens,
        "cached_share": round(cached / max(1, prompt_tokens), 4),
        "cached_share_prefix_seen": round(_cached_share_once_seen(speed.dspark), 4),
        "prompts": len(speed.plain),
        "tokens": sum(s.tokens for s in speed.dspark),
        "by_kind": {
            kind: {
                "baseline_tok_s": round(rate(_of(speed.plain, kind)), 3),
                "dspark_tok_s": round(rate(_of(speed.dspark, kind)), 3),
            }
            for kind in _kinds(speed)
        },
        "plugin": status,
        "sglang_version": status.get("sglang", ""),
        "dspark_version": __version__,
        "machine": machine(),
        "command": "make demo",
    }


def table(summary: dict[str, Any]) -> Table:
    """The summary as a table for the terminal."""
    view = Table(title="Same prompts, same server build, one request at a time, bfloat16")
    view.add_column("prompts")
    for heading in ("no speculation, tok/s", "DSPARK, tok/s", "speedup", "accepted length"):
        view.add_column(heading, justify="right")
    rows = [*summary["by_kind"].items()]
    for kind, row in rows:
        view.add_row(
            kind,
            f"{row['baseline_tok_s']:.1f}",
            f"{row['dspark_tok_s']:.1f}",
            f"{row['dspark_tok_s'] / row['baseline_tok_s']:.2f}×",
            f"{summary['accept_length_by_kind'][kind]:.2f}",
        )
    view.add_section()
    view.add_row(
        "all",
        f"{summary['baseline_tok_s']:.1f}",
        f"{summary['dspark_tok_s']:.1f}",
        f"{summary['speedup']:.2f}×",
        f"{summary['accept_length']:.2f}",
        style="bold",
    )
    return view


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """Print the table and the lines under it."""
    console.print(table(summary))
    low, high = summary["round_cost_ci95"]
    console.print(
        f"A round costs [bold]{summary['round_cost']:.2f}[/] plain decode steps "
        f"(95% {low:.2f} to {high:.2f}): {summary['round_ms']:.1f} ms against "
        f"{summary['plain_step_ms']:.1f} ms."
    )
    console.print(
        f"{summary['cached_tokens']} of {summary['prompt_tokens']} prompt tokens "
        f"({summary['cached_share']:.0%}) came from the radix cache; "
        f"{summary['cached_share_prefix_seen']:.0%} once a prompt's prefix had been seen."
    )
    console.print(
        f"Greedy text in float32: {summary['identical']} of {summary['compared']} identical, "
        f"{summary['near_ties']} near-ties. In bfloat16, where one row and six round "
        f"differently: {summary['identical_bfloat16']} of {summary['prompts']}."
    )


def draw(summary: dict[str, Any], path: Path) -> None:
    """Draw tokens per second and accepted length by kind of prompt as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    kinds = [*summary["by_kind"], "all"]
    plain = [row["baseline_tok_s"] for row in summary["by_kind"].values()]
    ours = [row["dspark_tok_s"] for row in summary["by_kind"].values()]
    plain.append(summary["baseline_tok_s"])
    ours.append(summary["dspark_tok_s"])
    accepted = [*summary["accept_length_by_kind"].values(), summary["accept_length"]]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    places = range(len(kinds))
    left.bar([p - 0.2 for p in places], plain, 0.38, label="no speculation", color="#9aa5b1")
    left.bar([p + 0.2 for p in places], ours, 0.38, label="DSPARK", color="#2f6fde")
    for place, (a, b) in enumerate(zip(plain, ours, strict=True)):
        left.annotate(f"{b / a:.2f}×", (place + 0.2, b), ha="center", va="bottom", fontsize=9)
    left.set_xticks(list(places), kinds)
    left.set_ylabel("output tokens per second")
    left.set_ylim(0, max(plain + ours) * 1.25)
    left.legend(loc="upper left", frameon=False, ncols=2)
    left.set_title("Speed, one request at a time, bfloat16")
    right.bar(list(places), accepted, 0.5, color="#2f6fde")
    for place, value in enumerate(accepted):
        right.annotate(
            f"{value:.2f}", (place, value), (0, 3), textcoords="offset points", ha="center"
        )
    cost = summary["round_cost"]
    right.axhline(
        cost,
        color="#c2410c",
        linestyle="--",
        linewidth=1.2,
        label=f"break-even: a round costs {cost:.2f} decode steps",
    )
    right.legend(loc="upper left", frameon=False)
    right.set_xticks(list(places), kinds)
    right.set_ylim(0, max([*accepted, cost]) * 1.25)
    right.set_ylabel("tokens per round, bonus included")
    right.set_title("Accepted length, greedy")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"SmolLM2-135M-Instruct on {summary['machine']}, SGLang {summary['sglang_version']}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def failures(summary: dict[str, Any]) -> list[str]:
    """What makes the demo fail; empty when everything it shows is true."""
    found = []
    different = summary["compared"] - summary["identical"] - summary["near_ties"]
    if different:
        found.append(f"{different} greedy texts differ beyond near-ties (see differences).")
    if not summary["plugin"].get("active"):
        found.append("the plugin was not active in the DSPARK server.")
    if not summary["cached_tokens"]:
        found.append("no prompt token came from the radix cache.")
    return found
