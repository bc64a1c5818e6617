"""Drafting and acceptance over shards decide what they decide over whole rows."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import pytest
import torch

from dspark_sglang.core import accept as whole
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.core.sampling import UNDECIDED, Filters, best, target_weights
from dspark_sglang.core.seeded import Noise, gumbel, seeded_draw
from dspark_sglang.core.tensor_parallel import (
    Keys,
    Sampling,
    Shard,
    Sum,
    accept,
    confidence_logits,
    draft_block,
    held_heads,
)
from dspark_sglang.core.tensor_parallel.accept import keep

VOCABULARY, GAMMA = 203, 5
#: Columns of each rank: one, even, uneven, and a rank whose columns hardly exist.
DIVISIONS = ((203,), (104, 99), (52, 52, 52, 47), (100, 1, 102))


def shards(widths: Sequence[int]) -> list[Shard]:
    starts = [sum(widths[:rank]) for rank in range(len(widths))]
    given = zip(starts, widths, strict=True)
    return [Shard(rank, start, width, sum(widths)) for rank, (start, width) in enumerate(given)]


def together(
    ranks: list[Generator[torch.Tensor | Sum, torch.Tensor, Any]],
) -> tuple[list[Any], list[int]]:
    """Run all ranks in lockstep; what each returns, and the elements of each exchanged record or sum."""
    given = [next(rank) for rank in ranks]
    sizes, found = [], [None] * len(ranks)
    while True:
        summed = isinstance(given[0], Sum)
        records = [record.values if isinstance(record, Sum) else record for record in given]
        assert len({(record.shape, record.dtype) for record in records}) == 1
        sizes.append(records[0].numel())
        every, given, ended = torch.stack(records), [], 0
        if summed:
            every = every.sum(dim=0)
        for place, rank in enumerate(ranks):
            try:
                given.append(rank.send(every.clone()))
            except StopIteration as end:
                found[place], ended = end.value, ended + 1
        assert ended in (0, len(ranks)), "some ranks ended and some wait"
        if ended:
            return found, sizes


class World(NamedTuple):
    logits: torch.Tensor
    drafted: torch.Tensor
    lens: torch.Tensor
    first: torch.Tensor
    index: torch.Tensor
    temperatures: torch.Tensor
    laws: torch.Tensor
    uniforms: torch.Tensor


def world(seed: int, requests: int = 7) -> World:
    """Requests of all lengths, some of which sample; drafted laws near the target's."""
    generator = torch.Generator().manual_seed(seed)
    lens = torch.randint(0, GAMMA + 1, (requests,), generator=generator)
    lens[:2] = torch.tensor([0, GAMMA])
    first = (lens + 1).cumsum(0) - (lens + 1)
    rows = int((lens + 1).sum())
    logits = torch.randn((rows, VOCABULARY), generator=generator) * 2
    index = torch.arange(0, requests, 2)
    temperatures = 0.5 + torch.rand(len(index), generator=generator)
    at = (first[index][:, None] + torch.arange(GAMMA)).clamp(max=rows - 1)
    near = logits[at] + 0.7 * torch.randn((len(index), GAMMA, VOCABULARY), generator=generator)
    laws = (near / temperatures[:, None, None]).softmax(-1)
    drafted = torch.randint(0, VOCABULARY, (requests, GAMMA), generator=generator)
    drafted[index] = torch.multinomial(laws.view(-1, VOCABULARY), 1, generator=generator).view(
        len(index), GAMMA
    )
    greedy = torch.arange(1, requests, 2)
    argmax = logits.argmax(-1)[(first[greedy][:, None] + torch.arange(GAMMA)).clamp(max=rows - 1)]
    drafted[greedy] = torch.where(
        torch.rand(argmax.shape, generator=generator) < 0.7, argmax, drafted[greedy]
    )
    uniforms = torch.rand((len(index), GAMMA + 1), dtype=torch.float64, generator=generator)
    return World(logits, drafted, lens, first, index, temperatures, laws, uniforms)


def on_whole_rows(given: World, filters: Filters | None, block: bool) -> whole.Accepted:
    outcome = whole.accept_greedy(best(given.logits), given.drafted, given.lens, given.first)
    row, owner, start = whole.rows_of(given.lens[given.index], given.first[given.index])
    used = {} if filters is None else filters.take(owner)._asdict()
    weights = target_weights(given.logits[row], given.temperatures[owner], **used)
    round_ = whole.Round(
        weights, given.drafted[given.index], given.laws, given.lens[given.index], start
    )
    method = whole.accept_block if block else whole.accept_sampled
    found = method(round_, given.uniforms)
    return whole.Accepted(
        outcome.count.index_copy(0, given.index, found.count),
        outcome.token.index_copy(0, given.index, found.token),
    )


def on_shards(
    given: World, widths: Sequence[int], **more: Any
) -> tuple[list[whole.Accepted], list[int]]:
    def rank(shard: Shard) -> Any:
        part = slice(shard.start, shard.start + shard.width)
        sampling = Sampling(
            given.index,
            given.temperatures,
            probs=given.laws[..., part],
            uniforms=given.uniforms,
            **more,
        )
        logits = given.logits[:, part]
        return accept(logits, given.drafted, given.lens, given.first, shard, sampling)

    return together([rank(shard) for shard in shards(widths)])


def filters_of(kind: str, rows: int) -> Filters | None:
    index = torch.arange(rows)
    top_k = torch.where(index % 2 == 0, 1 + 3 * index, VOCABULARY)
    top_p = torch.where(index % 3 == 0, 0.4 + 0.1 * index, 1.0).clamp(max=0.95)
    min_p = torch.where(index % 2 == 1, 0.05, 0.0)
    none_k, none_p = torch.full_like(index, VOCABULARY), torch.ones(rows)
    return {
        "none": None,
        "idle": Filters(none_k, none_p, torch.zeros(rows)),
        "top_k": Filters(top_k, none_p, torch.zeros(rows)),
        "top_p": Filters(none_k, top_p, torch.zeros(rows)),
        "min_p": Filters(none_k, none_p, min_p),
        "all": Filters(top_k.clamp(min=2), top_p, min_p),
    }[kind]


@pytest.mark.parametrize("widths", DIVISIONS, ids=str)
@pytest.mark.parametrize("block", [False, True], ids=["rejection", "block"])
@pytest.mark.parametrize("kind", ["none", "idle", "top_k", "top_p", "min_p", "all"])
def test_acceptance_over_shards_is_that_over_whole_rows(
    widths: Sequence[int], block: bool, kind: str
) -> None:
    """Counts and tokens are equal for equal uniforms, whatever the division."""
    kept = 0
    for seed in range(12):
        given = world(seed)
        filters = filters_of(kind, len(given.index))
        expected = on_whole_rows(given, filters, block)
        found, _ = on_shards(given, widths, filters=filters, block=block)
        for own in found:
            torch.testing.assert_close(own.count, expected.count)
            torch.testing.assert_close(own.token, expected.token)
        kept += int(expected.count.sum())
    assert kept > 0


@pytest.mark.parametrize(
    ("kind", "block", "exchanges"),
    [("none", False, 3), ("none", True, 4), ("min_p", False, 4), ("top_p", False, 21)],
)
def test_acceptance_takes_a_fixed_number_of_exchanges(
    kind: str, block: bool, exchanges: int
) -> None:
    given = world(1)
    filters = filters_of(kind, len(given.index))
    _, sizes = on_shards(given, DIVISIONS[1], filters=filters, block=block)
    assert len(sizes) == exchanges
    assert max(sizes) < VOCABULARY * len(given.logits) / 4


@pytest.mark.parametrize("widths", DIVISIONS, ids=str)
def test_greedy_acceptance_takes_one_exchange(widths: Sequence[int]) -> None:
    given = world(4)
    given.logits[:, 150] = given.logits[:, 20]  # equal logits on two ranks: the lower token wins
    expected = whole.accept_greedy(best(given.logits), given.drafted, given.lens, given.first)
    ranks = [
        accept(
            given.logits[:, shard.start : shard.start + shard.width],
            given.drafted,
            given.lens,
            given.first,
            shard,
        )
        for shard in shards(widths)
    ]
    found, sizes = together(ranks)
    assert sizes == [2 * len(given.logits)]
    for own in found:
        assert torch.equal(own.count, expected.count)
        assert torch.equal(own.token, expected.token)


def test_a_batch_whose_sampling_requests_have_just_left() -> None:
    given = world(2)
    none = given._replace(
        index=given.index[:0], temperatures=given.temperatures[:0], laws=given.laws[:0],
        uniforms=given.uniforms[:0],
    )  # fmt: skip
    expected = whole.accept_greedy(best(given.logits), given.drafted, given.lens, given.first)
    for own in on_shards(none, DIVISIONS[1])[0]:
        assert torch.equal(own.token, expected.token)


@pytest.mark.parametrize("widths", DIVISIONS, ids=str)
def test_seeded_draws_are_those_of_whole_rows(widths: Sequence[int]) -> None:
    given = world(5)
    seeds, anchors = torch.arange(len(given.index)) * 7919, torch.arange(len(given.index)) + 31
    row, owner, start = whole.rows_of(given.lens[given.index], given.first[given.index])
    probs = (given.logits[row] / given.temperatures[owner, None]).softmax(-1)
    positions = anchors[owner] + torch.arange(len(owner)) - start[owner]
    choice = best(given.logits)
    choice[row] = seeded_draw(probs, Noise(seeds[owner], positions))
    expected = whole.accept_greedy(choice, given.drafted, given.lens, given.first)
    found, sizes = on_shards(given, widths, seeds=seeds, anchors=anchors)
    assert len(sizes) == 1
    for own in found:
        assert torch.equal(own.count, expected.count)
        assert torch.equal(own.token, expected.token)


BROKEN = (float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize("widths", DIVISIONS, ids=str)
@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("block", [False, True], ids=["rejection", "block"])
@pytest.mark.parametrize("kind", ["none", "all"])
def test_rows_without_a_law_are_decided_as_on_whole_rows(
    widths: Sequence[int], value: float, block: bool, kind: str
) -> None:
    undecided = 0
    for row in range(12):
        given = world(6)
        # NaN and infinity on one rank alone, whose columns the others do not see.
        given.logits[row, VOCABULARY - 1 if value == math.inf else slice(None)] = value
        if math.isnan(value):
            given.logits[row, : VOCABULARY // 2] = 0.0
        filters = filters_of(kind, len(given.index))
        expected = on_whole_rows(given, filters, block)
        found, _ = on_shards(given, widths, filters=filters, block=block)
        for own in found:
            assert torch.equal(own.count, expected.count)
            assert torch.equal(own.token, expected.token)
        undecided += int((expected.token < 0).sum())
    assert bool(undecided) == (value != math.inf)  # infinity counts as the largest number


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_seeded_draws_stop_at_a_row_without_a_law_on_every_rank(value: float) -> None:
    given = world(6)
    request = int(given.index[1])
    given.logits[given.first[request]] = value
    seeds, anchors = torch.arange(len(given.index)) + 5, torch.arange(len(given.lens)) * 9
    found, _ = on_shards(given, DIVISIONS[1], seeds=seeds, anchors=anchors[given.index])
    for own in found:
        assert (int(own.count[request]), int(own.token[request])) == (0, UNDECIDED)
        assert int((own.token < 0).sum()) == 1


def test_equal_weights_at_the_edge_are_kept_by_token() -> None:
    """Of five equal weights on three ranks, top-k keeps as many as it has room for."""
    weights = torch.tensor([[1.0, 0.25, 0.25, 0.1, 0.25, 0.25, 0.1, 0.25, 0.0]]).double()
    filters = Filters(torch.tensor([4]), torch.ones(1), torch.zeros(1))
    parts = shards((3, 2, 4))
    found, _ = together([keep(weights[:, s.start : s.start + s.width], filters, s) for s in parts])
    assert torch.cat(found, dim=-1).tolist() == [[1.0, 0.25, 0.25, 0, 0.25, 0, 0, 0, 0]]


def markov(kind: str, generator: torch.Generator, width: int) -> MarkovHead:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.4

    rank = 6
    gate = (random(rank, width + rank), random(rank)) if kind == "gated" else None
    joint = (random(3 * rank, 2 * rank + width), random(3 * rank)) if kind == "rnn" else None
    return MarkovHead(random(VOCABULARY, rank), random(VOCABULARY, rank), gate, joint)


@pytest.mark.parametrize("widths", DIVISIONS[1:], ids=str)
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_a_block_is_the_same_however_the_vocabulary_is_divided(
    widths: Sequence[int], kind: str
) -> None:
    generator = torch.Generator().manual_seed(11)
    base = torch.randn((6, GAMMA, VOCABULARY), generator=generator) * 2
    hidden = torch.randn((6, GAMMA, 9), generator=generator)
    anchors = torch.randint(0, VOCABULARY, (6,), generator=generator)
    head = markov(kind, generator, 9)
    sampled, temperatures = torch.tensor([1, 2, 5]), torch.tensor([0.7, 1.0, 1.3])
    keys = Keys(torch.tensor([5, 6, 7 << 40]), torch.tensor([10, 20, 30]), coupled=False)

    def ranks(division: Sequence[int]) -> list[Any]:
        made = []
        for shard in shards(division):
            part = slice(shard.start, shard.start + shard.width)
            own = MarkovHead(head.w1, head.w2[part], head.gate, head.joint)
            made.append(
                draft_block(
                    base[..., part], anchors, hidden, own, shard,
                    temperatures=temperatures, sampled=sampled, keys=keys,
                )
            )  # fmt: skip
        return made

    (alone,), _ = together(ranks((VOCABULARY,)))
    found, sizes = together(ranks(widths))
    assert sizes == [6 * 3] * GAMMA
    laws = torch.cat([block.probs for block in found], dim=-1)
    torch.testing.assert_close(laws, alone.probs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(laws.sum(-1), torch.ones_like(laws[..., 0]), atol=1e-5, rtol=0)
    for block in found:
        assert torch.equal(block.tokens, alone.tokens)
        assert torch.equal(block.previous, alone.previous)
    for row, request in enumerate(sampled.tolist()):
        for step in range(GAMMA):
            noise = gumbel(keys.seeds[row : row + 1], keys.positions[row : row + 1] + step,
                           torch.arange(VOCABULARY))  # fmt: skip
            score = laws[row, step].double().log() + noise[0]
            assert int(score.argmax()) == int(alone.tokens[request, step])


@pytest.mark.parametrize("widths", DIVISIONS, ids=str)
@pytest.mark.parametrize("placement", ["shard", "single"])
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_heads_that_no_rank_has_whole_draft_and_score_alike(
    widths: Sequence[int], placement: Any, kind: str
) -> None:
    generator = torch.Generator().manual_seed(17)
    width = 9
    base = torch.randn((6, GAMMA, VOCABULARY), generator=generator) * 2
    hidden = torch.randn((6, GAMMA, width), generator=generator)
    anchors = torch.randint(0, VOCABULARY, (6,), generator=generator)
    head = markov(kind, generator, width)
    rank_width = head.w1.shape[1]
    probe = ConfidenceHead(
        torch.randn(width + rank_width, generator=generator), torch.tensor(0.3), True, torch.ones(5)
    )

    def drafting(shard: Shard, *, whole_heads: bool) -> Any:
        held = None if whole_heads else held_heads(placement, shard, len(widths), width)
        w1 = head.w1 if held is None else held.rows.cut(head.w1)
        own = MarkovHead(w1, shard.cut(head.w2), head.gate, head.joint)
        return draft_block(shard_of(base, shard), anchors, hidden, own, shard, held=held)

    def scoring(shard: Shard, previous: torch.Tensor) -> Any:
        held = held_heads(placement, shard, len(widths), width)
        assert held is not None
        w1 = held.rows.cut(head.w1)
        assert len(w1) == held.rows.width, "a rank keeps its own rows alone"
        return confidence_logits(probe, hidden, previous, w1, held)

    parts = shards(widths)
    expected, _ = together([drafting(shard, whole_heads=True) for shard in parts])
    found, sizes = together([drafting(shard, whole_heads=False) for shard in parts])
    assert sizes == [6 * rank_width, 6 * 2] * GAMMA
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own.tokens, other.tokens)
    previous = found[0].previous
    scores, sizes = together([scoring(shard, previous) for shard in parts])
    assert sizes == [6 * GAMMA]
    for score in scores:
        torch.testing.assert_close(score, probe.logits(hidden, previous, head))


def shard_of(rows: torch.Tensor, shard: Shard) -> torch.Tensor:
    return rows[..., shard.start : shard.start + shard.width]


def test_a_drafted_token_follows_the_recorded_law() -> None:
    """20,000 draws with other seeds: chi-squared of 9 degrees of freedom below its 1e-6 quantile."""
    count, size = 20000, 10
    law = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05, 0.03, 0.015, 0.005])
    base = law.log().expand(count, 1, size)
    head = MarkovHead(torch.zeros(size, 1), torch.zeros(size, 1))
    seeds = torch.randint(1 << 62, (count,), generator=torch.Generator().manual_seed(1))
    keys = Keys(seeds, torch.zeros(count, dtype=torch.int64), coupled=False)
    rows, ones = torch.arange(count), torch.ones(count)
    zeros = torch.zeros(count, dtype=torch.int64)

    def rank(shard: Shard) -> Any:
        part = slice(shard.start, shard.start + shard.width)
        own = MarkovHead(head.w1, head.w2[part])
        return draft_block(
            base[..., part], zeros, torch.zeros(count, 1, 1), own, shard,
            temperatures=ones, sampled=rows, keys=keys,
        )  # fmt: skip

    found, _ = together([rank(shard) for shard in shards((4, 6))])
    seen = torch.bincount(found[0].tokens[:, 0], minlength=size).double()
    expected = law.double() * count
    assert float(((seen - expected) ** 2 / expected).sum()) < 45.1
