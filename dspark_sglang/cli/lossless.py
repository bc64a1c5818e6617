"""``dspark lossless``: the output law of the real server is plain decoding's, option by option."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from dspark_sglang import targets
from dspark_sglang.cli.demo import DRAFTER
from dspark_sglang.errors import CheckpointError

if TYPE_CHECKING:
    from dspark_sglang.lossless.real import Real

_REAL = {"greedy", "two-sample", "seeded"}


def lossless(
    out: Annotated[Path, typer.Option(help="Where results and logs go.")] = Path("runs/lossless"),
    samples: Annotated[int, typer.Option(min=100, help="Continuations of each option.")] = 20_000,
    mutant_samples: Annotated[
        int, typer.Option(min=100, help="Continuations of each mutant.")
    ] = 4_000,
    options: Annotated[str, typer.Option(help="Comma-separated options, or all.")] = "all",
    parts: Annotated[
        str, typer.Option(help="plan, options, mutants, greedy, two-sample, seeded, or all.")
    ] = "all",
    greedy_prompts: Annotated[int, typer.Option(min=4, help="Greedy prompts.")] = 216,
    draws: Annotated[int, typer.Option(min=100, help="Continuations of the two samples.")] = 2_000,
    target: Annotated[
        Path | None, typer.Option(help="The real target. Default: SmolLM2, fetched once.")
    ] = None,
    drafter: Annotated[Path, typer.Option(help="Its drafter.")] = DRAFTER,
    seed: Annotated[int, typer.Option(help="Seed of the tiny models.")] = 0,
    family: Annotated[
        Literal["dense", "v4"], typer.Option(help="Of the tiny models of options and mutants.")
    ] = "dense",
    minutes: Annotated[
        float, typer.Option(min=0, help="Start no further piece after this time. 0: no limit.")
    ] = 0.0,
) -> None:
    """Prove that what the server gives follows plain decoding's law; goes on where it stopped."""
    from dspark_sglang.lossless import run
    from dspark_sglang.lossless.options import choose
    from dspark_sglang.lossless.sampled import Setting
    from dspark_sglang.lossless.store import Clock

    console = Console()
    chosen, wanted = choose(options), run.choose_parts(parts)
    clock = Clock(minutes)
    real = None
    if wanted & _REAL:
        real = _real(console, out, target, drafter, greedy_prompts, draws)
    proof = run.Proof(
        out=out,
        options=chosen,
        parts=wanted,
        setting=Setting(out, seed, samples, min(mutant_samples, samples), family),
        real=real,
    )
    summary = run.run(proof, console, clock=clock)
    _show(console, summary)
    console.print(f"Written: {out / 'summary.json'}; logs in {out / 'logs'}")
    left = run.unfinished(proof, summary)
    if left:
        console.print(f"Not finished: {', '.join(left)}. Run the same command again.")
    wrong = run.failures(summary)
    for line in wrong:
        console.print(f"[red]✗[/] {line}")
    if wrong:
        raise typer.Exit(1)


def _real(
    console: Console,
    out: Path,
    target: Path | None,
    drafter: Path,
    greedy_prompts: int,
    draws: int,
) -> Real:
    from dspark_sglang.lossless.real import Real

    if not (drafter / "config.json").is_file():
        raise CheckpointError(
            f"{drafter} holds no drafter.",
            expected="a drafter directory (run this from the repository's root)",
            fix="Pass --drafter DIR, or --parts plan,options,mutants.",
        )
    if target is None:
        with console.status("checking the target model") as status:
            target = targets.of_drafter(drafter, None, progress=lambda line: status.update(line))
    return Real(out, target, drafter, greedy_prompts, draws)


def _show(console: Console, summary: dict[str, Any]) -> None:
    if summary["options"]:
        view = Table(title=f"Output laws (family-wise level {summary['level']})")
        for heading in ("option", "samples", "p-value", "law", "mutant's p-value", "mutant"):
            view.add_column(heading)
        for name, entry in summary["options"].items():
            view.add_row(
                name,
                _number(entry["samples"], "{:,}"),
                _number(entry["p_value"], "{:.3g}"),
                _verdict(entry["passed"], "ok", "WRONG LAW"),
                _number(entry["mutant_p_value"], "{:.1e}"),
                _verdict(entry["mutant_rejected"], "rejected", "NOT NOTICED"),
            )
        console.print(view)
    for part in ("greedy", "retracted", "bf16", "seeded"):
        if summary.get(f"{part}_total"):
            ties = summary.get(f"{part}_near_ties")
            console.print(
                f"{part}: {summary[f'{part}_equal']} of {summary[f'{part}_total']} texts equal"
                + (f", {ties} near-ties" if ties else "")
            )
    if summary.get("two_sample"):
        console.print(f"sampled with and without: p-value {summary['two_sample']['p_value']:.3g}")
    if summary["plan_us"]:
        console.print(f"planning, microseconds by requests: {summary['plan_us']}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _verdict(passed: bool | None, good: str, bad: str) -> str:
    return "-" if passed is None else f"[green]{good}[/]" if passed else f"[red]{bad}[/]"
