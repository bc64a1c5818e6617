"""The CPU platform's sampler: the builtin's law for every mix of rows, without its sort."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dspark_sglang.core.sampling import filter_weights, sample
from dspark_sglang.serving.cpu import sampler
from tests.core.laws import THRESHOLD, p_value

VOCAB, ALL = 23, 1 << 30


def probabilities(rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(rows, VOCAB, generator=generator), dim=-1)


def filters(*rows: tuple[int, float, float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    top_k, top_p, min_p = zip(*rows, strict=True)
    return torch.tensor(top_k), torch.tensor(top_p), torch.tensor(min_p)


def test_greedy_rows_take_the_most_probable_token() -> None:
    probs = probabilities(5)
    top_k, top_p, _ = filters(*[(1, 1.0, 0.0)] * 5)
    drawn = sampler.draw(probs, top_k, top_p, None, torch.rand(5, dtype=torch.float64))
    assert drawn.dtype == torch.int32
    assert torch.equal(drawn.long(), probs.argmax(-1))


def test_every_row_of_a_mixed_batch_is_drawn_by_its_own_law() -> None:
    probs = probabilities(6)
    top_k, top_p, min_p = filters(
        (1, 1.0, 0.0), (ALL, 1.0, 0.0), (4, 1.0, 0.0), (ALL, 0.6, 0.0), (ALL, 1.0, 0.3), (3, 0.5, 0.1)
    )  # fmt: skip
    uniforms = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = sampler.draw(probs, top_k, top_p, min_p, uniforms).long()
    assert drawn[0] == probs[0].argmax()
    assert drawn[1] == sample(probs[1:2], uniforms[1:2])
    weights = filter_weights(probs, top_k, top_p, min_p)
    assert torch.equal(drawn[2:], sample(weights[2:], uniforms[2:]))


@pytest.mark.parametrize(
    "row",
    [(ALL, 1.0, 0.0), (5, 1.0, 0.0), (ALL, 0.8, 0.0), (ALL, 1.0, 0.2), (6, 0.9, 0.05)],
    ids=["plain", "top-k", "top-p", "min-p", "all three"],
)
def test_the_law_is_the_builtins(row: tuple[int, float, float]) -> None:
    from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch as builtin

    count = 20_000
    probs = probabilities(1, seed=3)
    top_k, top_p, min_p = filters(row)
    _, weights, tokens, _ = builtin(
        probs.clone(), top_k, top_p, min_p, True, None, torch.zeros(1), return_filtered_probs=True
    )
    law = torch.zeros(VOCAB).scatter_(0, tokens[0].long(), weights[0])
    many = [values.expand(count) for values in (top_k, top_p, min_p)]
    torch.manual_seed(0)
    uniforms = torch.rand(count, dtype=torch.float64)
    drawn = sampler.draw(probs.expand(count, -1), *many, uniforms)
    observed = torch.bincount(drawn.long(), minlength=VOCAB)
    assert not observed[law == 0].any()
    assert p_value(observed, law / law.sum()) > THRESHOLD


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the builtin was not needed")


def test_hooks_draw_without_the_builtin() -> None:
    probs = probabilities(3)
    top_k, top_p, min_p = filters(*[(1, 1.0, 0.0)] * 3)
    drawn = sampler.filtered(never, probs, top_k, top_p, min_p, False, None, None, max_top_k=1)
    assert torch.equal(drawn.long(), probs.argmax(-1))
    sure = torch.eye(3)
    assert sampler.unfiltered(never, sure).tolist() == [0, 1, 2]


def test_a_request_for_its_mask_is_left_to_the_builtin() -> None:
    probs = probabilities(2)
    answer = torch.tensor([7, 8])
    found = sampler.filtered(
        lambda *args, **kwargs: answer, probs, *filters(*[(4, 1.0, 0.0)] * 2), False, None, None,
        return_filtered_probs=True,
    )  # fmt: skip
    assert found is answer


def test_seeded_draws_are_the_builtins(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers import sampler as builtin

    monkeypatch.setattr(builtin, "multinomial_with_seed", sampler.seeded)
    rows = 200
    probs = probabilities(rows, seed=4)
    seeds, positions = torch.arange(rows) - 100, torch.arange(rows) * 7
    top_k, top_p, min_p = filters(*[(6, 0.9, 0.0)] * rows)
    given = (top_k, top_p, min_p, False, seeds, positions)
    wanted = builtin.top_k_top_p_min_p_sampling_from_probs_torch(probs.clone(), *given)
    assert torch.equal(sampler.filtered(never, probs, *given), wanted)
    wanted = builtin.sampling_from_probs_torch(probs, seeds, positions)
    unfiltered = builtin.sampling_from_probs_torch
    assert torch.equal(sampler.unfiltered(unfiltered, probs, seeds, positions), wanted)
    # One that filters nothing, in a batch where others filter, is drawn as if they did not.
    top_k[:] = ALL
    top_p[:] = 1.0
    top_k[0] = 2
    mixed = sampler.filtered(never, probs, top_k, top_p, min_p, False, seeds, positions)
    assert torch.equal(mixed[1:], wanted[1:])
