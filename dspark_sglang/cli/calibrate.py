"""``dspark calibrate``: fit the sequential temperatures of a drafter's confidence head."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dspark_sglang.artifacts import (
    SCHEMA_VERSION,
    STS_FILE,
    STSArtifact,
    require_writable,
    write_json,
)
from dspark_sglang.errors import ConfigError
from dspark_sglang.layouts.base import weights_digest


def calibrate(
    target: Annotated[Path | None, typer.Option(help="The target's directory.")] = None,
    drafter: Annotated[Path | None, typer.Option(help="The drafter's directory.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts file. Default: packaged ones that no benchmark uses."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write. Default: sts.json beside the weights.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=16, help="Tokens of each answer.")] = 96,
    seed: Annotated[int, typer.Option(help="Seed of the target's answers.")] = 0,
    url: Annotated[
        str,
        typer.Option(help="A running server: fit to what it verified lately, and serve with that."),
    ] = "",
    cost: Annotated[
        bool, typer.Option("--cost", help="Measure the step cost instead, and draw it.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of --cost: bfloat16 or float32.")] = "bfloat16",
    requests: Annotated[int, typer.Option(min=1, help="Of --cost: most requests at once.")] = 32,
) -> None:
    """Fit STS on half of the prompts and report calibration on the other half.

    With --url to what a running server verified instead; --out then keeps the fit for the next start. The
    server's key is read from API_KEY.

    With --cost nothing is fitted: a server of target and drafter measures what its steps cost, as at its first start.
    Serve with that by DSPARK_COST=OUT/cost.json; a server of other models, dtype, device or ranks refuses it.
    """
    if cost:
        from dspark_sglang.cli import step_cost
        from dspark_sglang.cli.demo import DRAFTER

        chosen = drafter or DRAFTER
        folder = out or Path("runs/step-cost")
        step_cost.measure(folder, chosen, target, dtype=dtype, requests=requests)
        return
    if url:
        from dspark_sglang.evaluation.refit import refit

        refit(url, out)
        return
    if target is None or drafter is None:
        raise ConfigError(
            "calibrate was given no models.",
            expected="--target and --drafter, or --url of a running server",
            fix="Pass them.",
        )
    from dspark_sglang.evaluation import answer
    from dspark_sglang.evaluation.report import Blocks

    answer.refuse_bundle(
        drafter,
        instead="Serve it, let it answer requests, then: "
        f"dspark calibrate --url http://127.0.0.1:30000 --out {drafter / STS_FILE}",
    )
    destination = out or drafter / STS_FILE
    require_writable(destination)
    from dspark_sglang.core.sts import fit_sts, survival_errors
    from dspark_sglang.provenance import provenance

    console = Console()
    questions = answer.load_questions(prompts) if prompts else answer.calibration_questions()
    if len(questions) < 4:
        raise ConfigError(
            f"{len(questions)} prompts were given.",
            expected="at least 4, half to fit and half to check",
            fix="Add prompts to the file.",
        )
    with console.status("loading target and drafter"):
        pair = answer.load_pair(target, drafter, bf16=False)
    gamma = pair.drafter.gamma
    with Progress(console=console) as bar:
        task = bar.add_task("answering", total=len(questions))
        answers = answer.answer(
            pair,
            questions,
            temperature=1.0,
            max_tokens=max_tokens,
            seed=seed,
            shortlist=pair.candidates(sampled=True),
            progress=lambda done: bar.update(task, completed=done),
        )
    # By prompt, so that no block of a checked answer was fitted on.
    if len(answers) < 2:
        raise ConfigError(
            "The target's answers are too short to fit and to check.",
            expected="answers of at least two tokens to two prompts",
            fix="Use other prompts, or check the target's chat template.",
        )
    fitted, held = Blocks.of(answers[::2]), Blocks.of(answers[1::2])
    fit = fit_sts(*fitted)
    before = survival_errors(*held, np.ones(gamma))
    after = survival_errors(*held, fit.temperatures)
    command = ["dspark", "calibrate", "--target", target.name, "--drafter", drafter.name]
    command += ["--max-tokens", str(max_tokens), "--seed", str(seed)]
    command += [] if prompts is None else ["--prompts", prompts.name]
    artifact = STSArtifact(
        schema_version=SCHEMA_VERSION,
        gamma=gamma,
        temperatures=[round(float(t), 4) for t in fit.temperatures],
        drafter_sha256=weights_digest(drafter),
        target=target.name,
        blocks=len(fitted.confidence),
        ece_before=round(float(before.mean()), 5),
        ece_after=round(float(after.mean()), 5),
        provenance=provenance(
            command,
            data=f"{len(questions)} {'packaged' if prompts is None else prompts.name} prompts "
            "answered at temperature 1; the rounds of every second answer fitted, the others "
            "checked; labels min(1, p/q) of the drafted tokens",
        ),
    )
    write_json(destination, artifact)
    view = Table(title=f"Survival calibration on {len(held.confidence)} unseen blocks")
    for heading in ("position", "temperature", "ECE before", "ECE after", "acceptance"):
        view.add_column(heading, justify="right")
    for k in range(gamma):
        view.add_row(
            str(k + 1),
            f"{fit.temperatures[k]:.2f}",
            f"{before[k]:.2%}",
            f"{after[k]:.2%}",
            f"{held.acceptance[:, k].mean():.3f}",
        )
    console.print(view)
    console.print(f"Written: {destination}")
