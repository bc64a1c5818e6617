"""Plans as text: one page for a terminal, a paragraph for a finding, JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dspark_sglang.planning.plan import Plan
from dspark_sglang.planning.sizing import DRAFTER

_GB = 1e9
#: Parts that are estimates, not sums over tensors.
_ESTIMATES = ("activations", "graphs", "runtime")
_MARKS = {"refused": ("✗", "red"), "added": ("+", "yellow"), "note": ("·", "dim")}


def gigabytes(size: float) -> str:
    """Bytes in GB (10^9) with two digits."""
    return f"{size / _GB:,.2f}"


def verdict(plan: Plan) -> str:
    """Whether it fits, in a sentence."""
    least = f"{plan.requests} request{'s' * (plan.requests > 1)} of {plan.context:,} tokens"
    if plan.refused:
        count = len(plan.refused)
        return f"Refused, for {count} reason{'s' * (count > 1)}:"
    if plan.fits:
        return f"Fits: {least} with {gigabytes(plan.headroom)} GB a GPU to spare."
    return f"Does not fit: for {least} {gigabytes(-plan.headroom)} GB a GPU are missing."


def layout(plan: Plan) -> str:
    """The ranks in a few words."""
    words = [f"TP {plan.tp}"]
    if plan.ep > 1:
        words.append(f"EP {plan.ep}")
    if plan.attention_dp > 1:
        words.append(f"attention DP {plan.attention_dp}")
    return ", ".join(words)


def render(plan: Plan) -> RenderableType:
    """The plan as one page."""
    machine = plan.hardware
    nodes = f"{machine.nodes} nodes of " if machine.nodes > 1 else ""
    title = Text.assemble(
        (plan.target, "bold"), f" + {plan.drafter}" if plan.drafter else " without a drafter"
    )
    where = f"{nodes}{machine.gpus} × {machine.gpu}, {layout(plan)} ({plan.label})"
    colour = "green" if plan.fits else "red"
    parts: list[RenderableType] = [title, Text(where), Text(verdict(plan), style=f"bold {colour}")]
    if plan.per_gpu_bytes:
        parts += ["", _title("Memory of one GPU"), _memory(plan)]
        parts += ["", _title("Requests at once"), _concurrency(plan), *_drafter(plan)]
    if plan.findings:
        parts.append("")
        parts += list(_findings(plan))
    return Group(*parts)


def show(plan: Plan, console: Console) -> None:
    """Print the plan, its command on one line that can be copied."""
    console.print(render(plan))
    if not plan.command:
        return
    console.print("\nCommand", style="bold")
    console.print(Text(plan.command), soft_wrap=True)
    if "--nnodes" in plan.command:
        console.print("On the other nodes: the same with their --node-rank.")


def _title(text: str) -> Text:
    return Text(text, style="bold")


def _memory(plan: Plan) -> Table:
    table = Table(box=None)
    table.add_column("part")
    table.add_column("GB", justify="right")
    table.add_column("share", justify="right")
    table.add_column("", style="dim")
    total = plan.hardware.memory_mib * 2**20
    detail = _detail(plan)
    for part, size in plan.per_gpu_bytes.items():
        if not size:
            continue
        note = "estimate" if part in _ESTIMATES else detail.get(part, "")
        table.add_row(part, gigabytes(size), f"{size / total:.0%}", note)
    used = sum(plan.per_gpu_bytes.values())
    table.add_row("sum", gigabytes(used), f"{used / total:.0%}", f"of {gigabytes(total)} GB")
    return table


def _detail(plan: Plan) -> dict[str, str]:
    """The largest parts of the weights; capacity of the pools."""
    target = {k: v for k, v in plan.weights_by_part.items() if not k.startswith(DRAFTER)}
    drafted = {
        k.removeprefix(DRAFTER): v for k, v in plan.weights_by_part.items() if k.startswith(DRAFTER)
    }
    return {
        "target weights": _largest(target),
        "drafter weights": _largest(drafted),
        "target KV": f"{plan.tokens:,} tokens",
    }


def _largest(parts: dict[str, int], count: int = 4) -> str:
    ordered = sorted(parts.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{part} {gigabytes(size)}" for part, size in ordered if size >= 5e6)


def _concurrency(plan: Plan) -> Table:
    table = Table(box=None)
    table.add_column("context")
    for length in plan.max_concurrency:
        number = int(length)
        table.add_column(f"{number // 1024}K" if number % 1024 == 0 else length, justify="right")
    table.add_row("requests", *(str(count) for count in plan.max_concurrency.values()))
    return table


def _drafter(plan: Plan) -> list[RenderableType]:
    cost = plan.drafter_bytes
    if cost is None:
        return []
    text = f"Drafter over all GPUs, counted once: {gigabytes(cost.gross)} GB"
    if cost.mtp_layer:
        text += f", {gigabytes(cost.net)} GB net of the MTP layer it replaces"
    if plan.smallest_tp is not None:
        text += f". Fits from TP {plan.smallest_tp}"
    return ["", Text(text + ".")]


def _findings(plan: Plan) -> Iterator[RenderableType]:
    for finding in plan.refused or plan.findings:
        mark, style = _MARKS[finding.verdict]
        yield Text.assemble((f"{mark} ", style), finding.message, (f" [{finding.source}]", "dim"))
