"""Tables of ``docs/results.md`` from ``simulation.json``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_NAMES = {"flash": "V4-Flash", "pro": "V4-Pro"}


def assumptions(found: dict[str, Any]) -> Iterator[str]:
    """One line an assumption."""
    for row in found["assumptions"]:
        instead = ", ".join(f"{value:g}" for value in row["instead"]) or "–"
        yield f"| `{row['name']}` | {row['value']} | {row['source']} | {instead} |"


def figures(found: dict[str, Any]) -> Iterator[str]:
    """One line a published figure."""
    for model, one in found["details"].items():
        name, at, fast = _NAMES[model], one["throughput_at"], one["collapse"]
        shared = at["at_equal_share_of_fastest"]
        matched, alone = one["matched"], one["independent"]
        budgets = [budget for _, budget in one["verified_a_request"]]
        yield (
            f"| {name}: throughput at {at['speed']:g} tok/s/user | {_gain(at['published'])} | {_gain(at['simulated'])} "
            f"| {_gain(shared['simulated'])} at the same share of the baseline's fastest, {shared['speed']:g} |"
        )
        low, high = matched["simulated"]
        yield (
            f"| {name}: speed of a user at equal throughput | {_gain(matched['published'][0])} to "
            f"{_gain(matched['published'][1])} | {_gain(low)} to {_gain(high)} | over throughputs the baseline has "
            f"from {at['speed']:g} to {fast['speed']:g} tok/s/user |"
        )
        yield (
            f"| {name}: throughput at {fast['speed']:g} tok/s/user | {_gain(fast['published'])} | "
            f"{_gain(fast['simulated'])} | {_gain(fast['published'])} is reached at {fast['reached_at_speed']:g}; fastest users "
            f"{fast['fastest_baseline']:g} (MTP-1), {fast['fastest_ours']:g} (DSpark-5) |"
        )
        published = "4 to 6, falling with load"
        yield f"| {name}: tokens verified a request | {published} | {max(budgets):.1f} to {min(budgets):.1f} | smallest to largest loads |"
        user, first, task = alone["user_tok_s"], alone["ttft_s"], alone["task"]
        yield (
            f"| {name}: one user, tok/s | {user['published']:g} | at {user['load_there']:,.0f} requests at once | an independent report |"
        )
        yield f"| {name}: seconds to the first token | {first['published']:g} | {first['simulated']:.2f} | multiplications of 21.9 thousand tokens alone |"
        yield f"| {name}: one task, times as fast | {task['published']:.2f} | {task['simulated']:.2f} | a lone user |"


def sensitivity(found: dict[str, Any]) -> Iterator[str]:
    """A table of the headline figures with each assumption replaced."""
    keys = [key for key in found["sensitivity"][0] if key not in ("assumption", "value")]
    yield "| assumption | instead | " + " | ".join(key.replace("_", " ") for key in keys) + " |"
    yield "|---|---:|" + "---:|" * len(keys)
    for row in found["sensitivity"]:
        value = "" if row["value"] is None else f"{row['value']:g}"
        yield (
            f"| {row['assumption']} | {value} | "
            + " | ".join(_cell(row[key]) for key in keys)
            + " |"
        )


def _gain(ratio: float | None) -> str:
    return "none" if ratio is None else f"{round(100 * (ratio - 1)):+d}%"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return " to ".join(f"{one:.2f}" for one in value)
    return f"{value:.2f}" if value < 20 else f"{value:.0f}"
