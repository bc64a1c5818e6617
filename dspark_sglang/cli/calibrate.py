"""``dspark calibrate``: fit the sequential temperatures of a drafter's confidence head."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dspark_sglang.artifacts import SCHEMA_VERSION, STS_FILE, STSArtifact, write_json
from dspark_sglang.checkpoint import weights_digest
from dspark_sglang.errors import ConfigError


def calibrate(
    target: Annotated[Path, typer.Option(help="The target's directory.")],
    drafter: Annotated[Path, typer.Option(help="The drafter's directory.")],
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts file. Default: the packaged ones.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write. Default: sts.json beside the weights.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=16, help="Tokens of each answer.")] = 96,
    seed: Annotated[int, typer.Option(help="Seed of the target's answers.")] = 0,
) -> None:
    """Fit STS on half of the prompts and report calibration on the other half."""
    from dspark_loadtests.prompts import load_prompts
    from dspark_sglang.calibration.offline import load_pair, score
    from dspark_sglang.core.sts import fit_sts, survival_errors
    from dspark_sglang.provenance import provenance

    console = Console()
    chosen = load_prompts(prompts)
    if len(chosen) < 4:
        raise ConfigError(
            f"{len(chosen)} prompts were given.",
            expected="at least 4, half to fit and half to check",
            fix="Add prompts to the file.",
        )
    with console.status("loading target and drafter"):
        pair = load_pair(target, drafter)
    with Progress(console=console) as bar:
        task = bar.add_task("answering and scoring", total=len(chosen))
        blocks = score(
            pair,
            [prompt.messages() for prompt in chosen],
            max_tokens=max_tokens,
            seed=seed,
            progress=lambda done: bar.update(task, completed=done),
        )
    # By prompt, so that no block of a checked answer was fitted on.
    fitted = blocks.prompt % 2 == 0
    if not fitted.any() or fitted.all():
        raise ConfigError(
            "The target's answers hold too few whole blocks to fit and to check.",
            expected=f"answers longer than {pair.config.gamma} tokens on both halves",
            fix="Raise --max-tokens or add prompts.",
        )
    fit = fit_sts(blocks.logits[fitted], blocks.acceptance[fitted])
    held = blocks.logits[~fitted], blocks.acceptance[~fitted]
    before = survival_errors(*held, np.ones(pair.config.gamma))
    after = survival_errors(*held, fit.temperatures)
    command = ["dspark", "calibrate", "--target", target.name, "--drafter", drafter.name]
    command += ["--max-tokens", str(max_tokens), "--seed", str(seed)]
    command += [] if prompts is None else ["--prompts", prompts.name]
    artifact = STSArtifact(
        schema_version=SCHEMA_VERSION,
        gamma=pair.config.gamma,
        temperatures=[round(float(t), 4) for t in fit.temperatures],
        drafter_sha256=weights_digest(drafter),
        target=target.name,
        blocks=int(fitted.sum()),
        ece_before=round(float(before.mean()), 5),
        ece_after=round(float(after.mean()), 5),
        provenance=provenance(
            command,
            data=f"{len(chosen)} {'packaged' if prompts is None else prompts.name} prompts answered by the target at temperature 1; even "
            "prompts fitted, odd ones checked; labels 1 - TV(p, q)",
        ),
    )
    destination = out or drafter / STS_FILE
    write_json(destination, artifact)
    view = Table(title=f"Survival calibration on {int((~fitted).sum())} unseen blocks")
    for heading in ("position", "temperature", "ECE before", "ECE after", "acceptance"):
        view.add_column(heading, justify="right")
    for k in range(pair.config.gamma):
        view.add_row(
            str(k + 1),
            f"{fit.temperatures[k]:.2f}",
            f"{before[k]:.2%}",
            f"{after[k]:.2%}",
            f"{held[1][:, k].mean():.3f}",
        )
    console.print(view)
    expected = 1 + np.cumprod(held[1], axis=1).sum(axis=1).mean()
    console.print(f"Expected accepted length at temperature 1: {expected:.2f}")
    console.print(f"Written: {destination}")
