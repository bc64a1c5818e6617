"""What the kernels are given of a batch: parameters a request, random numbers, budgets."""

from __future__ import annotations

import pytest
import torch

from dspark_sglang.serving.ops import SampledRows
from dspark_sglang.serving.ops.supply import Supply
from dspark_sglang.serving.ops.triton_ops import Batch

CPU = torch.device("cpu")


def supply(seed: int = 0) -> Supply:
    return Supply(torch.Generator().manual_seed(seed))


def test_no_number_is_handed_out_twice() -> None:
    given, rounds = supply(), 3000
    uniforms = torch.cat([given.uniforms(3, 5).flatten() for _ in range(rounds)])
    seeds = torch.cat([given.seeds(3) for _ in range(rounds)])
    assert len(uniforms.unique()) == len(uniforms)
    assert len(seeds.unique()) == len(seeds)
    assert (uniforms >= 0).all() and (uniforms < 1).all()
    assert int(seeds.min()) >= 0 and int(seeds.max()) < 1 << 62


def test_uniforms_are_uniform() -> None:
    given = supply()
    values = torch.cat([given.uniforms(7, 3).flatten() for _ in range(5000)]).sort().values
    steps = torch.arange(1, len(values) + 1) / len(values)
    distance = float((values - steps).abs().max())  # Kolmogorov and Smirnov
    assert distance < 1.95 / len(values) ** 0.5  # error rate 0.001


@pytest.mark.parametrize("requests", [0, 1, 3, 64, 40_000])
def test_any_size_is_served_aligned(requests: int) -> None:
    given = supply()
    given.seeds(1), given.uniforms(1, 1)
    uniforms, seeds = given.uniforms(requests, 5), given.seeds(requests)
    assert uniforms.shape == (requests, 5) and seeds.shape == (requests,)
    assert uniforms.is_contiguous() and uniforms.dtype == torch.float64
    if requests:
        assert uniforms.data_ptr() % 16 == 0 and seeds.data_ptr() % 16 == 0


def test_one_seed_gives_one_stream() -> None:
    one, other = supply(5), supply(5)
    for size in (3, 1, 8):
        assert torch.equal(one.uniforms(size, 6), other.uniforms(size, 6))
        assert torch.equal(one.seeds(size), other.seeds(size))


@pytest.mark.parametrize("tokens", [0, 1, 1023, 1024, 5000])
def test_budgets(tokens: int) -> None:
    given = supply()
    found = given.budget(tokens, CPU)
    assert found.tolist() == [tokens] and found.dtype == torch.int32
    assert found.data_ptr() % 16 == 0


def test_a_batch_of_greedy_and_sampled_requests() -> None:
    rows = SampledRows(
        index=torch.tensor([1, 3]),
        temperatures=torch.tensor([0.5, 2.0]),
        top_k=torch.tensor([5, 1 << 30]),
        top_p=None,
        min_p=torch.tensor([0.1, 0.0]),
    )
    batch = Batch.of(rows, 4, CPU)
    assert batch.temperatures.tolist() == [0.0, 0.5, 0.0, 2.0]
    assert batch.recorded.tolist() == [1, 1, 1, 1]
    assert batch.filters is not None
    assert batch.filters.top_k.tolist() == [2**31 - 1, 5, 2**31 - 1, 1 << 30]
    assert batch.filters.top_p.tolist() == [1.0] * 4
    assert batch.filters.min_p.tolist() == pytest.approx([0.0, 0.1, 0.0, 0.0])
    assert batch.seeds is None and batch.coupled is None


def test_a_batch_that_draws_by_seed() -> None:
    rows = SampledRows(torch.tensor([2]), torch.ones(1), None, None, None, torch.tensor([77]))
    batch = Batch.of(rows, 3, CPU)
    assert batch.seeds is not None and batch.seeds.tolist() == [0, 0, 77]
    assert batch.coupled is not None and batch.coupled.tolist() == [0, 0, 1]
    assert batch.recorded.tolist() == [0, 0, 0]
    assert batch.filters is None


def test_a_greedy_batch() -> None:
    batch = Batch.of(None, 2, CPU)
    assert batch.temperatures.tolist() == [0.0, 0.0]
    assert batch.filters is None and batch.seeds is None
