"""Prove that what the server gives follows plain decoding's distribution; goes on where it stopped.

``python -m tests.exactness`` does all of it. Exit code 0: nothing wrong was found. 1: a distribution or a text is
wrong, or a mutant was not noticed. 2: bad input.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dspark_sglang import targets
from dspark_sglang.cli.main import run as run_command
from dspark_sglang.errors import CheckpointError
from tests.exactness import run
from tests.exactness.options import choose
from tests.exactness.real import Real
from tests.exactness.sampled import Setting
from tests.exactness.store import ROOT, Clock

DRAFTER = ROOT / "model_cards" / "smollm2-135m-instruct-dspark"


def at_least(least: int) -> Callable[[str], int]:
    """A reader of whole numbers that are large enough."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m tests.exactness", description=__doc__)
    add = made.add_argument
    add("--out", type=Path, default=ROOT / "runs" / "exactness", help="where results and logs go")
    add("--samples", type=at_least(100), default=20_000, help="continuations of each option")
    add("--mutant-samples", type=at_least(100), default=4_000, help="continuations of each mutant")
    add("--options", default="all", help="comma-separated options, or all")
    add("--parts", default="all", help=f"{', '.join(run.PARTS)}, or all")
    add("--greedy-prompts", type=at_least(4), default=216)
    add("--draws", type=at_least(100), default=2_000, help="continuations of the two samples")
    add("--target", type=Path, help="the real target; default: SmolLM2, fetched once")
    add("--drafter", type=Path, default=DRAFTER, help="its drafter")
    add("--seed", type=int, default=0, help="of the tiny models")
    add("--family", choices=("dense", "v4"), default="dense", help="of the tiny models")
    add("--minutes", type=float, default=0.0, help="start nothing more after it; 0: no limit")
    return made


def prove(arguments: Sequence[str] | None = None) -> int:
    """Run the proof; the exit code.

    Raises:
        DSparkError: bad input, or a server that did not start or answer.
    """
    given = parser().parse_args(arguments)
    wanted = run.choose_parts(given.parts)
    proof = run.Proof(
        out=given.out,
        options=choose(given.options),
        parts=wanted,
        setting=Setting(
            given.out, given.seed, given.samples, min(given.mutant_samples, given.samples), given.family
        ),
        real=_real(given) if wanted - {"options", "mutants"} else None,
    )  # fmt: skip
    summary = run.run(proof, clock=Clock(given.minutes))
    _show(summary)
    print(f"Written: {given.out / 'summary.json'}; logs in {given.out / 'logs'}")
    left = run.unfinished(proof, summary)
    if left:
        print(f"Not finished: {', '.join(left)}. Run the same command again.")
    wrong = run.failures(summary)
    for line in wrong:
        print(f"WRONG: {line}")
    return int(bool(wrong))


def _real(given: argparse.Namespace) -> Real:
    drafter: Path = given.drafter
    if not (drafter / "config.json").is_file():
        raise CheckpointError(
            f"{drafter} holds no drafter.",
            expected="a drafter directory",
            fix="Pass --drafter DIR, or --parts options,mutants.",
        )
    target = given.target or targets.of_drafter(drafter, None, progress=print)
    return Real(given.out, target, drafter, given.greedy_prompts, given.draws)


def _show(summary: dict[str, Any]) -> None:
    for name, entry in summary["options"].items():
        print(f"{name:<20}" + ", ".join(_verdicts(entry)))
    for part in ("greedy", "retracted", "bf16", "seeded"):
        if summary.get(f"{part}_total"):
            ties = summary.get(f"{part}_near_ties")
            print(
                f"{part}: {summary[f'{part}_equal']} of {summary[f'{part}_total']} texts equal"
                + (f", {ties} near-ties" if ties else "")
            )
    if summary.get("two_sample"):
        print(f"sampled with and without: p-value {summary['two_sample']['p_value']:.3g}")


def _verdicts(entry: dict[str, Any]) -> list[str]:
    said = []
    if entry["samples"]:
        verdict = "ok" if entry["passed"] else "WRONG DISTRIBUTION"
        said.append(f"{entry['samples']:,} samples, p-value {entry['p_value']:.3g}: {verdict}")
    if entry["mutant_rejected"] is not None:
        verdict = "rejected" if entry["mutant_rejected"] else "NOT NOTICED"
        said.append(f"its mutant {verdict}, p-value {entry['mutant_p_value']:.1e}")
    return said


if __name__ == "__main__":
    run_command(prove)
