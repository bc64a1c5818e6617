"""The document of planned layouts: ``make layouts``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dspark_sglang.planning import plan as planning
from dspark_sglang.planning.hardware import read
from dspark_sglang.planning.plan import LABEL, Plan
from dspark_sglang.planning.report import gigabytes, verdict
from tests.planning.anchors import Anchor, anchors

OUT = Path(__file__).resolve().parents[2] / "docs" / "reference" / "layouts.md"
#: What is planned: target, stand-alone drafter, title.
MODELS = (
    ("deepseek-v4-flash-dspark", None, "DeepSeek-V4-Flash-DSpark"),
    ("deepseek-v4-pro-dspark", None, "DeepSeek-V4-Pro-DSpark"),
    ("qwen3-4b", "dspark_qwen3_4b_block7", "Qwen3-4B + dspark_qwen3_4b_block7"),
    ("qwen3-8b", "dspark_qwen3_8b_block7", "Qwen3-8B + dspark_qwen3_8b_block7"),
    ("qwen3-14b", "dspark_qwen3_14b_block7", "Qwen3-14B + dspark_qwen3_14b_block7"),
)
MACHINES = {
    "h100-80x8": "8 × H100",
    "2xh100-80x8": "2 × 8 × H100",
    "h800-80x8": "8 × H800",
    "h200-141x8": "8 × H200",
}
#: Dense models go on one node.
_DENSE_MACHINES = ("h100-80x8", "h800-80x8", "h200-141x8")
_CONTEXTS = ("8192", "32768", "131072")
#: Notes that stand under a command, as what was added to it does.
_NOTES = ("v4-plugin",)

_INTRO = f"""# Layouts

**Every figure here is {LABEL}.** Made by `make layouts` from shapes
alone; nothing here was run on a GPU. `dspark plan MODEL --hardware NAME` gives the same for one machine, with the source of
every rule. An H800 has an H100's memory and less NVLink: the plan is the same, the speed will not be.

GB are 10^9 bytes. Weights are sums over tensors as SGLang 0.5.23 keeps and shares them. Activations, graphs and what
CUDA takes before loading are estimates (SGLang's own heuristic); pools are what that leaves. "Requests" are requests at once
by the context each has, never more than `--max-running-requests`. What plans are worth where a server does run, on a CPU,
is in [`results/plan.json`](../results/plan.json) (`make plan`).
"""


def document() -> str:
    """The whole document."""
    lines = [_INTRO]
    plans = {
        (name, machine): planning.make(name, drafter, read(machine))
        for name, drafter, _ in MODELS
        for machine in (MACHINES if drafter is None else _DENSE_MACHINES)
    }
    for name, _, title in MODELS:
        own = {machine: plans[name, machine] for machine in MACHINES if (name, machine) in plans}
        lines += [f"## {title}\n", *_section(own)]
    lines += ["## Against published figures\n", *_anchors(anchors())]
    return "\n".join(lines).rstrip() + "\n"


def _section(plans: dict[str, Plan]) -> Iterator[str]:
    heads = " | ".join(f"requests, {int(length) // 1024}K" for length in _CONTEXTS)
    yield f"| machine | TP | weights | drafter | KV, both | fits | {heads} |"
    yield "|---|---:|---:|---:|---:|---|" + "---:|" * len(_CONTEXTS)
    for machine, plan in plans.items():
        parts = plan.per_gpu_bytes
        pools = parts["target KV"] + parts["draft KV"] if plan.fits else 0
        cells = [
            MACHINES[machine],
            str(plan.tp)
            if plan.tp == plan.hardware.ranks
            else f"{plan.tp} of {plan.hardware.ranks}",
            gigabytes(parts["target weights"]),
            gigabytes(parts["drafter weights"]),
            gigabytes(pools) if plan.fits else "-",
            "yes" if plan.fits else "**no**",
            *(str(plan.max_concurrency.get(length, "-")) for length in _CONTEXTS),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    for machine, plan in plans.items():
        if not plan.fits:
            yield f"{MACHINES[machine]}: {verdict(plan)}\n"
    yield from _commands(plans)


def _commands(plans: dict[str, Plan]) -> Iterator[str]:
    """Each command once, with the machines it is for and what was added to it and why."""
    by_command: dict[str, list[str]] = {}
    for machine, plan in plans.items():
        if plan.fits:
            by_command.setdefault(plan.command, []).append(machine)
    for command, machines in by_command.items():
        yield f"{', '.join(MACHINES[machine] for machine in machines)}:\n"
        yield f"```bash\n{command}\n```\n"
        for finding in plans[machines[0]].findings:
            if finding.verdict == "added" or finding.rule in _NOTES:
                yield f"- {finding.message} (`{finding.source}`)"
        yield ""


def _anchors(found: dict[str, Anchor]) -> Iterator[str]:
    yield "| figure | published | computed | what is counted |"
    yield "|---|---:|---:|---|"
    for name, anchor in found.items():
        values = f"{anchor.expected:g} | {anchor.computed:g} {anchor.unit}"
        yield f"| `{name}` | {values} | {anchor.note} |"


if __name__ == "__main__":
    OUT.write_text(document(), encoding="utf-8")
