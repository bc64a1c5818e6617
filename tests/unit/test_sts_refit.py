"""Calibration fitted in service: to the blocks that were verified, and to enough of them."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_sglang.core.reliability import Blocks
from dspark_sglang.core.sts import sigmoid
from dspark_sglang.errors import ConfigError
from dspark_sglang.serving import sts_refit

GAMMA = 3


def blocks(count: int, *, scale: float, sampled: bool, seed: int = 0) -> Blocks:
    """Verified blocks of a head whose logits are ``scale`` times too large."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.8, 1.2, (count, GAMMA)) * scale
    accepted = rng.random((count, GAMMA)) < sigmoid(logits / scale)
    lens = rng.integers(1, GAMMA + 1, count)
    counts = np.minimum(accepted.cumprod(axis=1).sum(axis=1), lens)
    return Blocks(logits, lens, counts, np.full(count, sampled))


def both(one: Blocks, other: Blocks) -> Blocks:
    return Blocks(*(np.concatenate(pair) for pair in zip(one, other, strict=True)))


def test_the_scale_of_a_head_is_found() -> None:
    found = sts_refit.fit(blocks(4096, scale=3.0, sampled=True))
    assert found.temperatures[:2] == pytest.approx([3.0] * 2, rel=0.35)
    assert found.after < found.before / 2
    assert found.blocks == 4096


def test_the_last_position_is_as_right_on_average_as_the_first() -> None:
    """Few of its tokens are reached, and their calibration error is about the same everywhere."""
    found = [
        sts_refit.fit(blocks(1500, scale=2.0, sampled=True, seed=seed)).temperatures
        for seed in range(10)
    ]
    off = np.log(np.array(found) / 2.0)
    assert np.abs(off.mean(axis=0)).max() < 0.15
    assert np.sqrt((off**2).mean(axis=0)).max() < 0.35


def test_sampled_requests_decide_where_there_are_enough() -> None:
    greedy = blocks(3000, scale=0.5, sampled=False)
    many = sts_refit.fit(both(greedy, blocks(1500, scale=3.0, sampled=True)))
    assert many.blocks == 1500 and min(many.temperatures) > 1.5
    few = sts_refit.fit(both(greedy, blocks(sts_refit.FEWEST - 1, scale=3.0, sampled=True)))
    assert few.blocks == 3000 + sts_refit.FEWEST - 1 and max(few.temperatures) < 1.5


def test_too_few_blocks_are_refused() -> None:
    few = blocks(sts_refit.FEWEST - 1, scale=1.0, sampled=False)
    with pytest.raises(ConfigError, match=f"{sts_refit.FEWEST - 1} blocks") as caught:
        sts_refit.fit(few)
    assert str(sts_refit.FEWEST) in caught.value.expected
    with pytest.raises(ConfigError, match="0 blocks"):
        sts_refit.fit(blocks(0, scale=1.0, sampled=True))
