"""One evaluation as numbers, a table and a reliability plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from rich.table import Table

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


class Reliability(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted against observed survival of one position, in the bins that hold enough blocks."""

    predicted: list[float]
    observed: list[float]
    blocks: list[int]


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """How well survival is predicted at temperature 1."""

    blocks: int
    #: Mean over positions; after: with the artifact's temperatures, None without any.
    ece_before: float
    ece_after: float | None
    per_position_before: list[float]
    per_position_after: list[float] | None
    #: Area under the ROC curve of survival, by position; STS hardly moves it.
    per_position_auc: list[float] | None = None
    #: One entry a position; after: with the artifact's temperatures.
    reliability_before: list[Reliability] = []
    reliability_after: list[Reliability] | None = None


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


def card_artifact(evaluation: Evaluation, hardware: str) -> dict[str, object]:
    """The fields of ``eval.json`` (:class:`dspark_packaging.records.EvalArtifact`)."""
    rows = [row for row in evaluation.lengths if row.engine == evaluation.lengths[0].engine]
    how = (
        "rounds of the reference engine (`dspark eval`)"
        if rows[0].engine == "standalone"
        else "rounds counted by a server (`dspark eval --engine server`)"
    )
    if any(row.engine == ALONE for row in evaluation.lengths):
        how += "; greedy requests copy from their own text as in serving (DSPARK_LOOKUP), "
        how += f"without that {evaluation.accept_length_greedy_drafted:.2f}"
    return {
        "kind": "eval",
        "schema_version": evaluation.schema_version,
        "gamma": evaluation.gamma,
        "drafter_sha256": evaluation.drafter_sha256,
        "target": evaluation.target,
        "definition": "Tokens produced a verification round, the target's own (bonus) token "
        f"included, with the whole block verified; {how}.",
        "position_definition": "Share of rounds in which the drafted token at this position was "
        "accepted.",
        "prompts": f"{evaluation.prompts}, answers of at most {evaluation.max_tokens} tokens, "
        f"{evaluation.dtype}",
        "hardware": hardware,
        "provenance": evaluation.provenance,
        "accepted_length": [
            {
                "temperature": row.temperature,
                "rounds": row.rounds,
                "overall": row.accept_length,
                "by_kind": row.by_domain,
                "by_position": row.survival,
                "ci95": row.ci95,
            }
            for row in rows
        ],
        "calibration": msgspec.to_builtins(evaluation.calibration),
    }


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


def positions(entry: Lengths) -> str:
    """Acceptance by position in words."""
    values = " ".join(f"{value:.2f}" for value in entry.per_position)
    return f"Acceptance by position ({entry.engine}, T={entry.temperature:g}): {values}"


def reliability_plot(
    path: Path, logits: Float64, acceptance: Float64, temperatures: Sequence[float] | None
) -> None:
    """Predicted against observed survival at every position, before and after STS."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    gamma = logits.shape[1]
    figure, axes = pyplot.subplots(
        1, gamma, figsize=(2.6 * gamma, 3.1), sharey=True, layout="constrained", squeeze=False
    )
    curves = [("before", reliability(logits, acceptance, [1.0] * gamma), "tab:gray")]
    if temperatures is not None:
        curves.append(("after STS", reliability(logits, acceptance, temperatures), "tab:blue"))
    for k, panel in enumerate(axes[0]):
        panel.plot([0, 1], [0, 1], color="black", linewidth=0.7, linestyle=":")
        for label, points, colour in curves:
            line = {"marker": "o", "markersize": 3, "linewidth": 1.2, "color": colour}
            panel.plot(points[k].predicted, points[k].observed, label=label, **line)
        panel.set(title=f"position {k + 1}", xlim=(0, 1), ylim=(0, 1), xlabel="predicted survival")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("observed survival")
    axes[0][0].legend(frameon=False, fontsize=8, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
