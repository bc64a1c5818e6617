"""Seeded draws: SGLang's hash and noise, the right law, and independence of the batch."""

from __future__ import annotations

import pytest
import torch

from dspark_sglang.core.draft import draft_block
from dspark_sglang.core.heads import MarkovHead
from dspark_sglang.core.sampling import Filters, filter_weights
from dspark_sglang.core.seeded import Noise, gumbel, hash32, seeded_draw
from tests.core.laws import THRESHOLD, p_value

M32 = 0xFFFFFFFF
SEEDS = [0, 42, -5, 2**62 + 17, -(2**63)]
POSITIONS = [0, 1, 77, 4096, 2**31 + 5]


def murmur3(seed: int, position: int, column: int) -> int:
    """MurmurHash3_x86_32 over 16 bytes, by the published algorithm, in Python's integers."""
    state = 0
    for key in (seed & M32, (seed >> 32) & M32, position & M32, column & M32):
        key = key * 0xCC9E2D51 & M32
        key = (key << 15 | key >> 17) & M32
        state ^= key * 0x1B873593 & M32
        state = (state << 13 | state >> 19) & M32
        state = (state * 5 + 0xE6546B64) & M32
    state ^= 16
    state = (state ^ state >> 16) * 0x85EBCA6B & M32
    state = (state ^ state >> 13) * 0xC2B2AE35 & M32
    return state ^ state >> 16


@pytest.mark.parametrize("seed", SEEDS)
def test_the_hash_is_murmur3(seed: int) -> None:
    columns = torch.tensor([0, 1, 129279, 2**32 - 1])
    found = hash32(torch.tensor([seed] * 5), torch.tensor(POSITIONS), columns)
    wanted = [[murmur3(seed, p, int(c)) for c in columns] for p in POSITIONS]
    assert found.tolist() == wanted


def test_columns_may_differ_by_row() -> None:
    seeds, positions = torch.tensor([3, 4]), torch.tensor([9, 10])
    columns = torch.tensor([[5, 2], [0, 7]])
    whole = gumbel(seeds, positions, torch.arange(8))
    assert torch.equal(gumbel(seeds, positions, columns), whole.gather(1, columns))


def test_noise_is_finite_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from dspark_sglang.core import seeded

    for edge in (0, M32):
        monkeypatch.setattr(seeded, "hash32", lambda *_, edge=edge: torch.tensor([[edge]]))
        assert gumbel(torch.tensor([0]), torch.tensor([0]), torch.tensor([0])).isfinite().all()


LAW = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
COUNT = 60_000


def noise(filters: Filters | None = None) -> Noise:
    return Noise(torch.full((COUNT,), 11), torch.arange(COUNT), filters)


def filters(top_k: int, top_p: float, min_p: float) -> Filters:
    return Filters(
        torch.full((COUNT,), top_k), torch.full((COUNT,), top_p), torch.full((COUNT,), min_p)
    )


@pytest.mark.parametrize(
    "given",
    [None, (5, 1.0, 0.0), (2, 1.0, 0.0), (5, 0.7, 0.0), (5, 1.0, 0.4), (3, 0.9, 0.25)],
    ids=["none", "idle", "top-k", "top-p", "min-p", "all"],
)
def test_draws_over_positions_follow_the_law(given: tuple[int, float, float] | None) -> None:
    used = None if given is None else filters(*given)
    drawn = seeded_draw(LAW.expand(COUNT, -1), noise(used))
    law = LAW if used is None else filter_weights(LAW[None], *used.take(torch.tensor([0])))[0]
    assert p_value(torch.bincount(drawn, minlength=5), law) > THRESHOLD


def test_a_row_does_not_depend_on_the_others() -> None:
    g = torch.Generator().manual_seed(0)
    probs = torch.softmax(torch.randn(6, 40, generator=g), -1)
    keys = Noise(
        torch.arange(6),
        torch.arange(6) * 3,
        Filters(
            torch.tensor([1, 40, 5, 40, 40, 7]),
            torch.tensor([1.0, 1.0, 1.0, 0.6, 1.0, 0.9]),
            torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1, 0.0]),
        ),
    )
    assert keys.filters is not None
    together = seeded_draw(probs, keys)
    assert together[0] == probs[0].argmax()
    for row in range(6):
        at = torch.tensor([row])
        one = Noise(keys.seeds[at], keys.positions[at], keys.filters.take(at))
        assert seeded_draw(probs[at], one) == together[row]
    # The row that filters nothing is drawn as in a batch without filters.
    assert seeded_draw(probs[1:2], Noise(keys.seeds[1:2], keys.positions[1:2])) == together[1]


def head(size: int, generator: torch.Generator) -> MarkovHead:
    return MarkovHead(
        torch.randn(size, 4, generator=generator), 0.1 * torch.randn(size, 4, generator=generator)
    )


@pytest.mark.parametrize("shortlist", [None, 12])
def test_a_drafter_that_knows_the_target_drafts_its_seeded_text(shortlist: int | None) -> None:
    g = torch.Generator().manual_seed(5)
    size, gamma = 30, 4
    base = 3 * torch.randn(2, gamma, size, generator=g)
    markov = head(size, g)
    keys = Noise(torch.tensor([7, -8]), torch.tensor([100, 3]))
    block = draft_block(
        base,
        torch.tensor([1, 2]),
        torch.zeros(2, gamma, 3),
        markov,
        temperatures=torch.tensor([0.9, 0.7]),
        sampled=torch.tensor([0, 1]),
        noise=keys,
        shortlist=shortlist,
    )
    assert block.probs is None
    previous, same = torch.tensor([1, 2]), 0
    for step in range(gamma):
        logits = base[:, step] + markov.embed(previous) @ markov.w2.T
        law = torch.softmax(logits / torch.tensor([[0.9], [0.7]]), -1)
        drawn = seeded_draw(law, keys._replace(positions=keys.positions + step))
        same += int((drawn == block.tokens[:, step]).sum())
        previous = block.tokens[:, step]
    assert same == 2 * gamma if shortlist is None else same >= gamma
