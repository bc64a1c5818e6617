"""The V4 target's reference: its pieces against Hugging Face's modules, and against planted mistakes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dspark_sglang.layouts.v4 import tiny
from dspark_sglang.layouts.v4.reference import Forward, Reference
from dspark_sglang.layouts.v4.stored import EXACT
from dspark_sglang.layouts.v4.target import TargetShape
from tests.v4.planted import BEYOND_TOP_K, MISTAKES, gaps

#: The largest gap that a float32 server left at 400 tokens: it rounds to fp8 too, but not always alike.
SERVER_NOISE = 3.5e-3


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return tiny.tensors(tiny.CONFIG, seed=0)


def made(weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Reference:
    """With an indexer that leaves blocks out from token 128 on."""
    shape = replace(TargetShape.from_config(tiny.CONFIG), index_topk=32)
    held = {n: v.to(dtype) if v.is_floating_point() else v for n, v in weights.items()}
    return Reference(held, shape)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 510, (300,), generator=generator).tolist()


def own(forward: Forward, tokens: list[int]) -> list[float]:
    rows = forward.logprobs()[:-1]
    return rows.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


@pytest.fixture(scope="module")
def noise(weights: dict[str, torch.Tensor], tokens: list[int]) -> float:
    """What float32 loses of float64, without the storage's rounding, which magnifies it."""
    single, double = made(weights), made(weights, torch.float64)
    single.rounding = double.rounding = EXACT
    return gaps(double, tokens, own(single(tokens), tokens)).largest


@pytest.fixture(scope="module")
def exact(weights: dict[str, torch.Tensor], tokens: list[int]) -> list[float]:
    return own(made(weights)(tokens), tokens)


def test_float32_is_near_float64(noise: float) -> None:
    assert noise < 5e-5


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_moves_the_log_probabilities(
    name: str, weights: dict[str, torch.Tensor], tokens: list[int], exact: list[float], noise: float
) -> None:
    """By 50 times what float32 loses, and by 50 times what a server was off."""
    reference = made(weights)
    with MISTAKES[name](reference):
        wrong = gaps(reference, tokens, exact)
    assert wrong.largest > 50 * max(noise, SERVER_NOISE)
    assert gaps(reference, tokens, exact).largest == 0.0  # and it is undone


def test_one_mistake_needs_an_indexer_that_leaves_blocks_out(
    weights: dict[str, torch.Tensor], tokens: list[int]
) -> None:
    reference = made(weights)
    reference.shape = replace(reference.shape, index_topk=512)
    right = own(reference(tokens), tokens)
    for name in BEYOND_TOP_K:
        with MISTAKES[name](reference):
            assert gaps(reference, tokens, right).largest == 0.0
