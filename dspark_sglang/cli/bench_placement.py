"""``dspark bench-placement``: servers of several ranks, text by text and collective by collective."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dspark_sglang import targets
from dspark_sglang.artifacts import write_bytes
from dspark_sglang.cli.demo import DRAFTER
from dspark_sglang.core import placement as costs
from dspark_sglang.demo import report
from dspark_sglang.profiling.placement import Case, Found, kill_rank, measure, running
from dspark_sglang.provenance import machine
from tests.tiny_models import Heads, ensure_models

#: Prompts of the tiny models, tokens.
PROMPTS = ((1, 9, 40, 77, 130, 23, 68), (1, 150, 12, 99, 60), (1, 33, 34, 35), (1, 171, 90, 20, 8))
#: Heads that do not divide over two ranks: those of SmolLM2's drafter.
UNEVEN = Heads(target=(8, 4), drafter=(9, 3))
EVEN = Heads(target=(8, 4), drafter=(8, 4))
#: The shape the byte counts at eight ranks are computed for: DeepSeek-V4-Pro's width and vocabulary.
COMPUTED: dict[str, Any] = {"requests": 64, "gamma": 5, "ranks": 8, "hidden": 7168}
_VOCABULARY = 129280
_SEED = 3


def cases(folder: Path, *, large: bool) -> list[Case]:
    """The servers that are compared; texts have to equal those of the case with one rank."""
    target, uneven = ensure_models(folder / "uneven", _SEED, UNEVEN)
    _, even = ensure_models(folder / "even", _SEED, EVEN)

    def tiny(
        name: str, drafter: Path, ranks: int, placement: str | None, heads: str = "auto"
    ) -> Case:
        return Case(
            name=name,
            target=target,
            drafter=drafter,
            ranks=ranks,
            placement=placement,
            heads=heads,
            prompts=PROMPTS,
        )

    found = [
        tiny("tp1", uneven, 1, "auto"),
        tiny("tp2-replicate", uneven, 2, "replicate"),
        tiny("tp2-single", uneven, 2, "single"),
        tiny("tp2-shard", even, 2, "shard"),
        tiny("tp2-heads-shard", uneven, 2, "replicate", "shard"),
        tiny("tp2-heads-single", uneven, 2, "single", "single"),
        tiny("tp2-builtin", even, 2, None),
        tiny("tp4-replicate", uneven, 4, "replicate"),
        tiny("tp4-single", uneven, 4, "single"),
        tiny("tp4-shard", even, 4, "shard"),
        tiny("tp4-heads-shard", even, 4, "shard", "shard"),
    ]
    if large:
        prompts = ((504, 2365, 260, 3575, 30), (6330, 346, 1232, 1195, 563))
        found += [
            Case(
                name=name,
                target=targets.ensure_target(),
                drafter=DRAFTER,
                ranks=ranks,
                placement=placement,
                prompts=prompts,
                max_tokens=32,
            )
            for name, ranks, placement in (
                ("smollm2-tp1", 1, "replicate"),
                ("smollm2-tp3", 3, "replicate"),
                ("smollm2-tp3-single", 3, "single"),
                ("smollm2-tp3-shard", 3, "shard"),
            )
        ]
    return found


def _against(case: Case) -> str:
    """The case on one rank that has the texts of ``case``."""
    return "smollm2-tp1" if case.name.startswith("smollm2") else "tp1"


def _row(case: Case, found: dict[str, Found]) -> dict[str, Any]:
    own = found[case.name]
    ours = {"count": own.collectives, "bytes": own.collective_bytes}
    parts = {
        kind: round(sum(v for k, v in values.items() if k != "target"), 2)
        for kind, values in ours.items()
    }
    return {
        "identical": own.texts == found[_against(case)].texts,
        "accept_length": own.accept_length,
        "collectives": parts["count"],
        "collective_bytes": parts["bytes"],
        "by_purpose": {
            name: [own.collectives[name], own.collective_bytes[name]] for name in own.collectives
        },
    }


def summarise(known: list[Case], found: dict[str, Found], death: float | None) -> dict[str, Any]:
    """The numbers of a run; what planning measures is joined by :func:`join_plan`."""
    result: dict[str, Any] = {}
    for case in known:
        if case.ranks == 1:
            continue
        group = f"smollm2_tp{case.ranks}" if "smollm2" in case.name else f"tp{case.ranks}"
        name = case.placement or "builtin"
        if case.heads != "auto":
            name += f", heads {case.heads}"
        result.setdefault(group, {})[name] = _row(case, found)
    ours = {
        law: costs.exchanged_bytes(**COMPUTED, sampled=law == "sampled")
        for law in ("greedy", "sampled")
    }
    apart = costs.exchanged_bytes(**COMPUTED, sampled=True, heads="shard")
    builtin = costs.builtin_bytes(**COMPUTED, vocabulary=_VOCABULARY)
    return result | {
        "tp8_computed_bytes": max(parts["all"] for parts in ours.values()),
        "builtin_tp8_computed_bytes": builtin["all"],
        "tp8_computed": {
            "shape": COMPUTED | {"vocabulary": _VOCABULARY},
            **ours,
            "sampled, heads shard": apart,
            "builtin": builtin,
        },
        "plan_error_pct": None,
        "rank_death_s": None if death is None else round(death, 2),
        "anchors": {},
    }


def join_plan(summary: dict[str, Any], plan: Path) -> dict[str, Any]:
    """The summary with what ``tests.planning.measure`` wrote, where there is such a file."""
    if not plan.is_file():
        return summary
    known = json.loads(plan.read_text(encoding="utf-8"))
    return summary | {name: known[name] for name in ("plan_error_pct", "anchors") if name in known}


def _table(summary: dict[str, Any]) -> Table:
    view = Table(title="Drafting and acceptance, a step of one request, float32")
    for title in ("ranks", "placement", "same text", "tokens", "collectives", "bytes"):
        view.add_column(title, justify="left" if title in ("ranks", "placement") else "right")
    for group, placements in summary.items():
        if "tp" not in group or "computed" in group:
            continue
        for name, row in placements.items():
            same = "yes" if row["identical"] else "NO"
            counted = f"{row['collectives']:.1f}", f"{row['collective_bytes']:,.0f}"
            view.add_row(group, name, same, f"{row['accept_length']:.2f}", *counted)
    return view


def bench_placement(
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("runs/placement"),
    large: Annotated[bool, typer.Option(help="Also SmolLM2 on three ranks.")] = True,
    plan: Annotated[
        Path, typer.Option(help="What `python -m tests.planning.measure` wrote.")
    ] = Path("docs/results/plan.json"),
) -> None:
    """Serve with several ranks on this machine: same texts, collectives counted, a rank killed."""
    console = Console()
    known = cases(out / "models", large=large)
    found: dict[str, Found] = {}
    for case in known:
        console.print(f"{case.name}: starting {case.ranks} ranks ...")
        found[case.name] = measure(case, out)
        console.print(f"{case.name}: {found[case.name].collectives or 'no collectives'} a step")
    console.print("killing a rank of a decoding server ...")
    with running(known[1], out) as (server, _):
        death, said = kill_rank(server, PROMPTS[0])
    console.print(f"The server ended after {death:.1f} s: {said}")
    summary = join_plan(summarise(known, found, death), plan)
    summary |= {
        "rank_death_said": re.sub(r"pid \d+", "pid N", said),
        "machine": machine(),
        "command": f"dspark bench-placement{'' if large else ' --no-large'}",
    }
    console.print(_table(summary))
    write_bytes(out / "summary.json", report.dumps(summary))
    console.print(f"Written: {out / 'summary.json'}")
    wrong = [case.name for case in known if not _row(case, found)["identical"]]
    if wrong:
        console.print(f"Other texts than on one rank: {', '.join(wrong)}")
        raise typer.Exit(1)
