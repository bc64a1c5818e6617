"""``dspark train``: train a drafter from one configuration file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from dspark_sglang.training.run_folder import Log
    from dspark_sglang.training.trainer import StepReport, Trainer

EXAMPLE = """\
# dspark train --config this.yaml       (every field: docs/reference/settings.md)
target: path/to/target                  # any Hugging Face causal language model
out: runs/train                         # state, logs and the drafter; the same command resumes
data:
  files: [conversations.jsonl]          # from `dspark data`
drafter: {gamma: 5, layers: 2, markov_head: vanilla, markov_rank: 64}
batch: {sequences: 16, anchors: 64}
optim: {steps: 2000, lr: 1e-3}
cache: {kind: ram, gib: 4}
"""


def train(
    config: Annotated[Path | None, typer.Option(help="The run's YAML file.")] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override one field, such as optim.lr=5e-4. Repeatable."),
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0, help="Save and stop after this time. 0: when done.")
    ] = 0.0,
    example: Annotated[bool, typer.Option(help="Print a file to start from.")] = False,
) -> None:
    """Train a drafter; stop it at any time, the same command goes on.

    Under torchrun (`torchrun --nproc-per-node 2 -m dspark_sglang.cli.main train --config ...`)
    every process takes its share of a larger batch.
    """
    from dspark_sglang.errors import ConfigError

    if example:
        typer.echo(EXAMPLE, nl=False)
        return
    if config is None:
        raise ConfigError(
            "No --config was given.",
            expected="a YAML file",
            fix="Start from `dspark train --example > train.yaml`.",
        )
    from dspark_sglang.memory import keep_freed_memory
    from dspark_sglang.training import distributed
    from dspark_sglang.training.config import read_config

    settings = read_config(config, tuple(assign or ()))
    world, device = distributed.join(settings.device)
    settings = msgspec.structs.replace(settings, device=device)
    console = Console(quiet=not world.first)
    if settings.device == "cpu":
        keep_freed_memory()
    try:
        from dspark_sglang.training.target import Target
        from dspark_sglang.training.trainer import Trainer

        with console.status("loading the target"):
            target = Target(settings.target, device=settings.device, bf16=settings.bf16)
        trainer = Trainer(settings, target, world, log=console.print)
        console.print(
            ", ".join(f"{v:,} {k.replace('_', ' ')}" for k, v in trainer.corpus.summary.items())
        )
        _run(console, trainer, minutes)
    finally:
        distributed.leave()


def _logs(trainer: Trainer) -> tuple[Log, Log]:
    """The CSV files of steps and of validations."""
    from dspark_sglang.training.run_folder import Log

    positions = range(1, trainer.config.drafter.gamma + 1)
    steps = ["step", "epoch", "loss", "confidence", "lr", "norm", "seconds", "blocks"]
    steps += [f"acceptance_{k}" for k in positions] + [f"match_{k}" for k in positions]
    checks = ["step", "greedy", "sampled", *(f"greedy_{k}" for k in positions)]
    return (
        Log(trainer.folder / "steps.csv", steps, after=trainer.step),
        Log(trainer.folder / "validations.csv", checks, after=trainer.step),
    )


def _run(console: Console, trainer: Trainer, minutes: float) -> None:
    from dspark_sglang.artifacts import write_json

    settings, world = trainer.config, trainer.world
    started = time.monotonic()
    logs = None
    if world.first:
        write_json(trainer.folder / "corpus.json", {**trainer.corpus.summary})
        logs = _logs(trainer)
    layout = (
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*layout, console=console) as bar:
        task = bar.add_task("", total=settings.optim.steps, completed=trainer.step, note="")
        for report in trainer.steps():
            if logs is not None:
                logs[0].add(
                    *(report.step, report.epoch, report.loss, report.confidence, report.rate),
                    *(report.norm, report.seconds, report.blocks),
                    *(report.acceptance + report.match),
                )
                _show(bar, task, report)
            late = bool(minutes) and world.sum_flag(time.monotonic() - started > 60 * minutes)
            last = trainer.step >= settings.optim.steps
            # Not when time is up: a stretch must not add validations of its own.
            if trainer.step % settings.validate_every == 0 or last:
                last = _validate(console, trainer, logs) or last
            last = last or late
            if trainer.step % settings.checkpoint_every == 0 or last:
                trainer.save()
            if last:
                break
    if world.first:
        trainer.export(trainer.folder / "drafter")
        reused, computed = trainer.source.reused, trainer.source.computed
        console.print(
            f"step {trainer.step}; target states: {computed:,} tokens computed, {reused:,} "
            f"reused, {trainer.source.cached_bytes / 2**30:.2f} GiB cached"
        )
        console.print(f"drafter: {trainer.folder / 'drafter'}  best: {trainer.folder / 'best'}")


def _show(bar: Progress, task: TaskID, report: StepReport) -> None:
    first, last = report.acceptance[0], report.acceptance[-1]
    note = f"loss {report.loss:.3f} acceptance {first:.2f}…{last:.2f} {report.seconds:.1f} s/step"
    bar.update(task, completed=report.step, note=note)


def _validate(console: Console, trainer: Trainer, logs: tuple[Log, Log] | None) -> bool:
    """Score, keep the best drafter; True when patience has run out (on every process)."""
    stop = False
    if logs is not None:
        walks = trainer.validator.run(trainer.model)
        greedy, sampled = walks["greedy"], walks["sampled"]
        logs[1].add(trainer.step, greedy.accept_length, sampled.accept_length, *greedy.per_position)
        trainer.export(trainer.folder / "drafter")
        stop = trainer.judge(walks)
        positions = " ".join(f"{value:.2f}" for value in greedy.per_position)
        console.print(
            f"step {trainer.step}: accepted length {greedy.accept_length:.3f} greedy "
            f"({positions}), {sampled.accept_length:.3f} at temperature 1"
        )
    return bool(trainer.world.sum_flag(stop))
