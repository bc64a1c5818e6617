"""Ablations: every variant once, the same batches for all, and a stopped set that goes on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tiny_training import write_config, write_conversations, write_target

from dspark_sglang.errors import DataError
from dspark_sglang.training import ablation
from dspark_sglang.training import config as configs
from dspark_sglang.training.config import DrafterSpec


def test_the_set_varies_one_thing_at_a_time() -> None:
    base = DrafterSpec(gamma=5, layers=2, sample_from_anchor=True)
    made = ablation.variants(base, seed=0)
    assert len({(variant.name, variant.seed) for variant in made}) == len(made)
    for variant in made:
        changed = [
            f for f in base.__struct_fields__ if getattr(variant.drafter, f) != getattr(base, f)
        ]
        assert len(changed) <= 1, variant.name
    dflash = [variant.seed for variant in made if variant.drafter.markov_head == "none"]
    assert dflash == [0, 1]
    assert {variant.drafter.markov_head for variant in made} == {"none", "vanilla", "gated", "rnn"}
    assert {variant.drafter.layers for variant in made} == {1, 2, 3}
    assert {variant.drafter.gamma for variant in made} == {4, 5, 8}


def test_a_set_is_run_once_and_goes_on(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target")
    data = write_conversations(tmp_path / "data.jsonl", 40)
    settings = configs.read_config(write_config(tmp_path, target, data), ("optim.steps=3",))
    path = tmp_path / "out" / "ablations.json"
    first = ablation.run(settings, path, log=lambda line: None)
    done = [next(first), next(first)]
    first.close()
    rest = list(ablation.run(settings, path, log=lambda line: None))
    results = ablation.read_results(path)
    assert results is not None
    assert results.outcomes == [*done, *rest]
    assert len(results.outcomes) == len(ablation.variants(settings.drafter, settings.seed))
    for outcome in results.outcomes:
        assert 1.0 <= outcome.accept_length_greedy <= outcome.gamma + 1
        assert outcome.steps == 3
    gain = ablation.gain_over_dflash(results.outcomes)
    assert gain is not None
    assert math.isfinite(gain)
    ablation.plot(results.outcomes, tmp_path / "out" / "ablations.png")
    assert (tmp_path / "out" / "ablations.png").stat().st_size > 5000
    assert list(ablation.run(settings, path, log=lambda line: None)) == []


def test_results_of_another_configuration_are_not_mixed_in(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target")
    data = write_conversations(tmp_path / "data.jsonl", 40)
    config = write_config(tmp_path, target, data)
    path = tmp_path / "ablations.json"
    next(ablation.run(configs.read_config(config, ("optim.steps=1",)), path, log=lambda line: None))
    other = configs.read_config(config, ("optim.steps=2",))
    with pytest.raises(DataError, match="another configuration"):
        next(ablation.run(other, path, log=lambda line: None))


def test_gain_is_paired_by_seed() -> None:
    def outcome(name: str, seed: int, greedy: float, sampled: float) -> ablation.Outcome:
        return ablation.Outcome(
            name=name, group="head", seed=seed, gamma=5, layers=2, markov_head="none",
            parameters=1, steps=1, accept_length_greedy=greedy, accept_length_t1=sampled,
            per_position_greedy=[], per_position_t1=[], seconds=0.0,
        )  # fmt: skip

    pairs = [
        outcome("DFlash (no head)", 0, 2.0, 1.5),
        outcome("DSpark (vanilla)", 0, 2.2, 1.8),
        outcome("DSpark (vanilla)", 1, 9.0, 9.0),  # its pair was not run
    ]
    assert ablation.gain_over_dflash(pairs) == 15.0
    assert ablation.gain_over_dflash(pairs[2:]) is None
