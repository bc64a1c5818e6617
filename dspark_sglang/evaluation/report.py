"""One evaluation as numbers and a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from dspark_packaging.records import (
    SURVIVAL,
    AcceptedLength,
    Calibration,
    EvalArtifact,
    Reliability,
)
from dspark_sglang.artifacts import Provenance
from dspark_sglang.core.sts import BINS, area_under_curve, sigmoid, survival_errors
from dspark_sglang.evaluation.answer import Answer
from dspark_sglang.training.replay import Walk, nothing

Float64 = npt.NDArray[np.float64]


#: The standalone engine without prompt lookup.
ALONE = "drafter alone"


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """Accepted length at one temperature by one engine."""

    #: ``standalone``, ``server`` or :data:`ALONE`.
    engine: str
    temperature: float
    rounds: int
    #: Tokens a round, bonus included.
    accept_length: float
    #: 95% over prompts (bootstrap); None through a server, which counts by domain.
    ci95: tuple[float, float] | None
    by_domain: dict[str, float]
    #: Chance to accept each position given that those before it were.
    per_position: list[float]
    #: Share of rounds that accepted each position.
    survival: list[float]


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What ``dspark eval --json`` prints."""

    schema_version: int
    gamma: int
    drafter_sha256: str
    target: str
    prompts: str
    max_tokens: int
    dtype: str
    accept_length_greedy: float
    accept_length_t1: float
    #: What the drafter alone would reach, where greedy requests copy from their own text as well.
    accept_length_greedy_drafted: float | None
    #: Conditional acceptance by position at temperature 1, and at temperature 0.
    per_position: list[float]
    per_position_greedy: list[float]
    ece_before: float | None
    ece_after: float | None
    lengths: list[Lengths]
    calibration: Calibration | None
    provenance: Provenance
    #: Candidates a position of the standalone engine, by temperature; 0: all tokens could be drafted.
    candidates: dict[str, int] = {}


class Blocks(NamedTuple):
    """Drafted blocks of sampled answers, ``N`` in all."""

    #: ``[N, gamma]`` uncalibrated confidence logits, and the chance that each token is accepted given that those
    #: before it were.
    confidence: Float64
    acceptance: Float64

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Blocks:
        """All rounds of some sampled answers."""
        return cls(
            np.concatenate([answer.confidence for answer in answers]),
            np.concatenate([answer.acceptance for answer in answers]),
        )


class Domain(NamedTuple):
    """Rounds of one prompt, or of all prompts of a domain."""

    name: str
    walk: Walk


def lengths(
    engine: str, temperature: float, walks: Sequence[Domain], *, by_prompt: bool, seed: int = 0
) -> Lengths:
    """Sum up walks.

    Args:
        walks: of each prompt (``by_prompt``) or of each domain.
    """
    gamma = len(walks[0].walk.reached)
    total = sum((entry.walk for entry in walks), nothing(gamma))
    domains: dict[str, Walk] = {}
    for name, walk in walks:
        domains[name] = domains.get(name, nothing(gamma)) + walk
    interval = None
    if by_prompt and len(walks) > 1:
        counts = np.array([(entry.walk.tokens, entry.walk.rounds) for entry in walks])
        rng = np.random.default_rng(seed)
        drawn = counts[rng.integers(0, len(counts), (2000, len(counts)))].sum(axis=1)
        low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
        interval = (round(float(low), 3), round(float(high), 3))
    return Lengths(
        engine=engine,
        temperature=temperature,
        rounds=total.rounds,
        accept_length=round(total.accept_length, 4),
        ci95=interval,
        by_domain={name: round(walk.accept_length, 4) for name, walk in sorted(domains.items())},
        per_position=[round(value, 4) for value in total.per_position],
        survival=[round(float(n) / max(1, total.rounds), 4) for n in total.accepted],
    )


def reliability(
    logits: Float64, acceptance: Float64, temperatures: Sequence[float]
) -> list[Reliability]:
    """Reliability of survival at every position of ``[N, gamma]`` blocks."""
    survived = np.cumprod(sigmoid(logits / np.asarray(temperatures)), axis=1)
    curves = []
    for predicted, truth in zip(survived.T, np.cumprod(acceptance, axis=1).T, strict=True):
        index = np.minimum((predicted * BINS).astype(int), BINS - 1)
        count = np.bincount(index, minlength=BINS)
        used = count >= max(5, len(predicted) // 500)
        means = [
            np.bincount(index, weights=values, minlength=BINS)[used] / count[used]
            for values in (predicted, truth)
        ]
        curves.append(
            Reliability(
                predicted=[round(float(value), 5) for value in means[0]],
                observed=[round(float(value), 5) for value in means[1]],
                blocks=[int(value) for value in count[used]],
            )
        )
    return curves


def calibration(
    logits: Float64, acceptance: Float64, temperatures: Sequence[float] | None
) -> Calibration:
    """Expected calibration error of survival on ``[N, gamma]`` blocks, before and after STS."""
    before = survival_errors(logits, acceptance, np.ones(logits.shape[1]))
    after = None
    if temperatures is not None:
        after = survival_errors(logits, acceptance, np.array(temperatures))
    return Calibration(
        blocks=len(logits),
        ece_before=round(float(before.mean()), 5),
        ece_after=None if after is None else round(float(after.mean()), 5),
        per_position_before=[round(float(value), 5) for value in before],
        per_position_after=None if after is None else [round(float(value), 5) for value in after],
        per_position_auc=[
            round(area_under_curve(predicted, observed), 4)
            for predicted, observed in zip(
                np.cumprod(sigmoid(logits), axis=1).T, np.cumprod(acceptance, axis=1).T, strict=True
            )
        ],
        reliability_before=reliability(logits, acceptance, np.ones(logits.shape[1]).tolist()),
        reliability_after=None
        if temperatures is None
        else reliability(logits, acceptance, temperatures),
    )


def card_artifact(evaluation: Evaluation, hardware: str) -> EvalArtifact:
    """What ``eval.json`` says, of the first engine."""
    rows = [row for row in evaluation.lengths if row.engine == evaluation.lengths[0].engine]
    how = (
        "rounds of the reference engine (`dspark eval`)"
        if rows[0].engine == "standalone"
        else "rounds counted by a server (`dspark eval --engine server`)"
    )
    if any(row.engine == ALONE for row in evaluation.lengths):
        how += "; greedy requests copy from their own text as in serving (DSPARK_LOOKUP), "
        how += f"without that {evaluation.accept_length_greedy_drafted:.2f}"
    return EvalArtifact(
        schema_version=evaluation.schema_version,
        gamma=evaluation.gamma,
        drafter_sha256=evaluation.drafter_sha256,
        target=evaluation.target,
        definition="Tokens produced a verification round, the target's own (bonus) token "
        f"included, with the whole block verified; {how}.",
        position_definition=SURVIVAL,
        prompts=f"{evaluation.prompts}, answers of at most {evaluation.max_tokens} tokens, "
        f"{evaluation.dtype}",
        hardware=hardware,
        provenance=evaluation.provenance,
        accepted_length=[
            AcceptedLength(
                temperature=row.temperature,
                rounds=row.rounds,
                overall=row.accept_length,
                by_kind=row.by_domain,  # type: ignore[arg-type]  # checked before anything is measured
                by_position=row.survival,
                ci95=row.ci95,
            )
            for row in rows
        ],
        calibration=evaluation.calibration,
    )


def table(evaluation: Evaluation) -> Table:
    """Accepted length by engine, temperature and domain."""
    domains = sorted({name for entry in evaluation.lengths for name in entry.by_domain})
    view = Table(title="Accepted length (tokens a round, bonus included)")
    view.add_column("engine")
    for heading in ("T", *domains, "all", "95%"):
        view.add_column(heading, justify="right")
    for entry in evaluation.lengths:
        by = [f"{entry.by_domain[d]:.2f}" if d in entry.by_domain else "" for d in domains]
        interval = "" if entry.ci95 is None else f"{entry.ci95[0]:.2f}–{entry.ci95[1]:.2f}"
        view.add_row(
            entry.engine,
            f"{entry.temperature:g}",
            *by,
            f"[bold]{entry.accept_length:.2f}[/bold]",
            interval,
        )
    return view


def show(found: Evaluation, console: Console) -> None:
    """Print the result for a person."""
    console.print(table(found))
    for row in found.lengths:
        values = " ".join(f"{value:.2f}" for value in row.per_position)
        console.print(f"Acceptance by position ({row.engine}, T={row.temperature:g}): {values}")
    if found.calibration is None:
        return
    after = found.ece_after
    console.print(
        f"Expected calibration error of survival, {found.calibration.blocks} blocks: "
        f"{found.calibration.ece_before:.1%} before STS"
        + (f", {after:.1%} after" if after is not None else "; no sts.json beside the weights")
    )
    ranked = " ".join(f"{value:.2f}" for value in found.calibration.per_position_auc or ())
    console.print(f"Area under the ROC curve of survival, by position: {ranked}")
