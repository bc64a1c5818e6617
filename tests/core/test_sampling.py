"""Sampling with given uniforms, and the laws plain decoding would sample from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_sglang.core.sampling import UNDECIDED, best, filter_weights, sample, target_weights
from tests.core.laws import THRESHOLD, p_value, uniforms

LAST = 1.0 - 2.0**-53
#: SGLang's value for "no top-k".
ALL = 1 << 30


# --- sample --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize(
    ("weights", "lowest", "highest"),
    [
        ([0.0, 0.2, 0.0, 0.8, 0.0], 1, 3),
        ([0.0, 0.0, 3.0], 2, 2),
        ([1e-30, 0.0, 0.0], 0, 0),
        ([0.1] * 10 + [0.0], 0, 9),
        ([1.0, 1e-40, 0.0], 0, 0),
    ],
    ids=["holes", "last-only", "tiny-total", "sum-rounds", "absorbed"],
)
def test_edges_of_the_unit_interval(
    weights: list[float], lowest: int, highest: int, dtype: torch.dtype
) -> None:
    rows = torch.tensor([weights, weights], dtype=dtype)
    found = sample(rows, torch.tensor([0.0, LAST], dtype=torch.float64))
    assert found.tolist() == [lowest, highest]
    assert found.dtype == torch.int64


@given(
    weights=st.lists(
        # 5e-324 is the smallest number there is: any uniform times it rounds to 0 or to all of it.
        st.sampled_from([0.0, 5e-324, 1e-300, 1e-8, 0.1, 1 / 3, 1.0, 7.0]),
        min_size=1,
        max_size=12,
    ).filter(any),
    uniform=st.floats(0.0, LAST),
)
def test_a_token_of_weight_zero_is_never_drawn(weights: list[float], uniform: float) -> None:
    rows = torch.tensor([weights], dtype=torch.float64)
    token = int(sample(rows, torch.tensor([uniform], dtype=torch.float64)))
    assert weights[token] > 0


def test_a_product_that_rounds_up_to_the_total_draws_the_last_possible_token() -> None:
    weights = torch.tensor([[0.0, 5e-324, 0.0]], dtype=torch.float64)
    assert LAST * 5e-324 == 5e-324
    assert sample(weights, torch.tensor([LAST], dtype=torch.float64)).tolist() == [1]


def test_sample_inverts_the_cumulative_law() -> None:
    weights = torch.tensor([[1.0, 0.0, 2.0, 1.0]]).expand(5, -1)
    points = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75], dtype=torch.float64)
    assert sample(weights, points).tolist() == [0, 0, 2, 2, 3]


def test_samples_follow_unnormalised_weights() -> None:
    law = torch.tensor([0.5, 0.0, 2.0, 3.5, 0.25])
    draws = uniforms(torch.Generator().manual_seed(4), 200_000)
    counts = torch.bincount(sample(law.expand(200_000, -1), draws), minlength=5)
    assert p_value(counts, law) > THRESHOLD
    assert p_value(counts, law.roll(1)) < THRESHOLD


# --- filters against SGLang ------------------------------------------------------------------


def sglang_weights(
    probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, need: bool
) -> torch.Tensor:
    """The weights that SGLang's ``pytorch`` backend samples from, in token order."""
    from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch

    _, weights, index, _ = top_k_top_p_min_p_sampling_from_probs_torch(
        probs.clone(),
        top_k,
        top_p,
        min_p,
        need,
        None,
        torch.zeros(len(probs), dtype=torch.int64),
        return_filtered_probs=True,
    )
    return torch.zeros_like(probs).scatter_(1, index.long(), weights)


def parameters(rows: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def pick(*values: float) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]

    top_k = pick(1, 2, 5, 20, ALL).to(torch.int32)
    return top_k, pick(0.05, 0.5, 0.9, 0.99, 1.0), pick(0.0, 0.02, 0.3, 1.0)


@pytest.mark.parametrize("vocab", [1, 7, 257])
@pytest.mark.parametrize("flat", [False, True], ids=["peaked", "ties"])
def test_filters_are_those_of_sglang(vocab: int, flat: bool) -> None:
    logits = torch.randn(200, vocab) * 3
    if flat:
        logits = logits.round()
    probs = torch.softmax(logits, -1)
    top_k, top_p, min_p = parameters(200, seed=vocab)
    found = filter_weights(probs, top_k, top_p, min_p)
    wanted = sglang_weights(probs, top_k, top_p, min_p, True)
    assert torch.equal(found, wanted)
    assert bool((found.sum(-1) > 0).all())
    if vocab > 1:
        assert bool((found == 0).any())


@pytest.mark.parametrize(
    "used",
    [("top_k",), ("top_p",), ("min_p",), ("top_k", "top_p"), ("top_k", "top_p", "min_p")],
    ids="+".join,
)
def test_target_weights_are_what_sglang_samples_from(used: tuple[str, ...]) -> None:
    rows, vocab = 100, 64
    logits, temperature = torch.randn(rows, vocab) * 4, torch.rand(rows) * 2 + 0.1
    given_ = dict(zip(("top_k", "top_p", "min_p"), parameters(rows, seed=9), strict=True))
    off = {
        "top_k": torch.full((rows,), ALL, dtype=torch.int32),
        "top_p": torch.ones(rows),
        "min_p": torch.zeros(rows),
    }
    chosen = {name: given_[name] for name in used}
    found = target_weights(logits, temperature, **chosen)
    everything = {**off, **chosen}
    # Sampler.forward: logits.div_(temperatures), then softmax.
    probs = torch.softmax(logits.clone().div_(temperature[:, None]), -1)
    wanted = sglang_weights(
        probs, everything["top_k"], everything["top_p"], everything["min_p"], "min_p" in used
    )
    assert torch.equal(found > 0, wanted > 0)
    torch.testing.assert_close(found, wanted, atol=0, rtol=1e-6)


def test_without_filters_the_law_is_the_softmax() -> None:
    logits, temperature = torch.randn(3, 9), torch.tensor([0.5, 1.0, 2.0])
    found = target_weights(logits, temperature)
    torch.testing.assert_close(found, torch.softmax(logits / temperature[:, None], -1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_no_token_is_drawn_without_a_law_and_the_rows_beside_it_are(value: float) -> None:
    rows = torch.tensor([[0.2, 0.8], [value, 0.0 if value == 0.0 else 1.0], [0.5, 0.5]])
    found = sample(rows, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    assert found.tolist() == [0, UNDECIDED, 1]


def test_the_best_token_is_plain_decodings_whatever_a_row_holds() -> None:
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor(
        [[1.0, 3.0, 3.0], [-inf, -inf, -inf], [0.0, inf, inf], [inf, 0.0, nan], [0.0, -inf, 1.0]]
    )
    assert best(rows).tolist() == rows.argmax(-1).tolist() == [1, 0, 1, 2, 2]
