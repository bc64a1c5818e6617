"""Ablations: the same data, states, steps and batches; one thing changed at a time.

All variants of one set share a single cache of target states, so what differs between them is the
drafter alone. Results are written after every variant; a set that is stopped goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from dspark_sglang.artifacts import write_json
from dspark_sglang.errors import DataError
from dspark_sglang.training.config import DrafterSpec, TrainConfig
from dspark_sglang.training.distributed import World
from dspark_sglang.training.states import StateSource, Target
from dspark_sglang.training.trainer import Corpus, Trainer, load_corpus


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a set."""

    name: str
    group: str
    drafter: DrafterSpec
    seed: int


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a variant reached on the validation conversations."""

    name: str
    group: str
    seed: int
    gamma: int
    layers: int
    markov_head: str
    parameters: int
    steps: int
    #: None where no validation conversation was written at that temperature.
    accept_length_greedy: float | None
    accept_length_t1: float | None
    per_position_greedy: list[float]
    per_position_t1: list[float]
    seconds: float


def variants(base: DrafterSpec, seed: int) -> list[Variant]:
    """The set: heads (two seeds for DFlash and vanilla), depths and block sizes.

    All predict from the anchor, the drafter without a head too, so that only the head differs.
    """
    base = msgspec.structs.replace(base, sample_from_anchor=True)

    def vary(group: str, name: str, seed: int = seed, **changes: object) -> Variant:
        spec = msgspec.structs.replace(base, **changes)
        return Variant(name=name, group=group, drafter=spec, seed=seed)

    made = [
        vary("head", name, seed=seed + offset, markov_head=head)
        for offset in (0, 1)
        for name, head in (("DFlash (no head)", "none"), ("DSpark (vanilla)", "vanilla"))
    ]
    made += [vary("head", f"DSpark ({head})", markov_head=head) for head in ("gated", "rnn")]
    made += [
        vary("depth", f"{layers} layer{'s' * (layers > 1)}", layers=layers)
        for layers in (1, 2, 3)
        if layers != base.layers
    ]
    made += [
        vary("block", f"gamma {gamma}", gamma=gamma) for gamma in (4, 8) if gamma != base.gamma
    ]
    return made


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """A set, finished or not."""

    config: TrainConfig
    outcomes: list[Outcome]


def read_results(path: Path) -> Results | None:
    """Results written so far; None without a file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise DataError(
            f"{path} cannot be read: {error}.", expected="results of ablations", fix="Remove it."
        ) from error


def run(
    config: TrainConfig, path: Path, *, log: Callable[[str], None], minutes: float = 0.0
) -> Iterator[Outcome]:
    """Train the variants that ``path`` does not hold yet; one outcome each.

    Args:
        config: the base; its drafter is varied.
        path: results file, rewritten after each variant.
        minutes: start no further variant after this time; 0 for no limit.

    Raises:
        DataError: ``path`` holds results of another configuration.
    """
    began = time.monotonic()
    earlier = read_results(path)
    if earlier is not None and earlier.config != config:
        raise DataError(
            f"{path} holds ablations of another configuration.",
            expected="the same configuration",
            fix="Give another --out, or remove it.",
        )
    outcomes = list(earlier.outcomes) if earlier else []
    done = {(outcome.name, outcome.seed) for outcome in outcomes}
    target = Target(config.target, device=config.device, bf16=config.bf16)
    corpus = load_corpus(config, target)
    source: StateSource | None = None
    for variant in variants(config.drafter, config.seed):
        if (variant.name, variant.seed) in done:
            continue
        if minutes and time.monotonic() - began > 60 * minutes:
            return
        outcome, source = _train(config, variant, target, corpus, source, log)
        outcomes.append(outcome)
        write_json(path, Results(config=config, outcomes=outcomes))
        yield outcome


def _train(
    config: TrainConfig,
    variant: Variant,
    target: Target,
    corpus: Corpus,
    source: StateSource | None,
    log: Callable[[str], None],
) -> tuple[Outcome, StateSource]:
    own = msgspec.structs.replace(config, drafter=variant.drafter, seed=variant.seed)
    trainer = Trainer(own, target, World(), log=log, corpus=corpus, source=source, resume=False)
    began = time.monotonic()
    for report in trainer.steps():
        if report.step % 50 == 0:
            log(f"{variant.name}: step {report.step}, loss {report.loss:.3f}")
    walks = trainer.validator.run(trainer.model)
    greedy, sampled = walks["greedy"], walks["sampled"]
    outcome = Outcome(
        name=variant.name,
        group=variant.group,
        seed=variant.seed,
        gamma=variant.drafter.gamma,
        layers=variant.drafter.layers,
        markov_head=variant.drafter.markov_head,
        parameters=sum(parameter.numel() for parameter in trainer.model.parameters()),
        steps=trainer.step,
        accept_length_greedy=round(greedy.accept_length, 4) if greedy.rounds else None,
        accept_length_t1=round(sampled.accept_length, 4) if sampled.rounds else None,
        per_position_greedy=[round(value, 4) for value in greedy.per_position],
        per_position_t1=[round(value, 4) for value in sampled.per_position],
        seconds=round(time.monotonic() - began, 1),
    )
    return outcome, trainer.source


def gain_over_dflash(outcomes: list[Outcome]) -> float | None:
    """Mean gain of the vanilla head over none in percent, both temperatures, seeds paired."""
    gains = []
    by = {(outcome.name, outcome.seed): outcome for outcome in outcomes}
    for (name, seed), outcome in by.items():
        other = by.get(("DFlash (no head)", seed))
        if name == "DSpark (vanilla)" and other is not None:
            for field in ("accept_length_greedy", "accept_length_t1"):
                ours, theirs = getattr(outcome, field), getattr(other, field)
                if ours and theirs:
                    gains.append(ours / theirs)
    return round(100 * (sum(gains) / len(gains) - 1), 2) if gains else None


def plot(outcomes: list[Outcome], path: Path) -> None:
    """Accepted length of every variant, and acceptance by position of the heads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    names = list(dict.fromkeys(outcome.name for outcome in outcomes))
    for offset, field, label in (
        (-0.2, "accept_length_greedy", "temperature 0"),
        (0.2, "accept_length_t1", "temperature 1"),
    ):
        values = [
            [getattr(o, field) for o in outcomes if o.name == name and getattr(o, field)]
            for name in names
        ]
        means = [sum(part) / len(part) if part else 0.0 for part in values]
        left.barh([i + offset for i in range(len(names))], means, height=0.36, label=label)
        for i, part in enumerate(values):
            left.plot(part, [i + offset] * len(part), "k.", markersize=4)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set(xlabel="accepted length (bonus included)", xlim=(1, None))
    left.legend(frameon=False, fontsize=8)
    for outcome in outcomes:
        if outcome.group == "head" and outcome.seed == outcomes[0].seed:
            at = range(1, outcome.gamma + 1)
            # Later positions are reached in few rounds; of all rounds they are comparable.
            kept = np.cumprod(outcome.per_position_greedy)
            right.plot(at, kept, marker="o", label=outcome.name)
    right.set(xlabel="position", ylabel="share of rounds that accept it (temperature 0)")
    right.set_ylim(bottom=0)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
