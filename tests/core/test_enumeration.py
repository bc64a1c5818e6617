"""The output law of "draft, schedule, verify, accept", computed exactly, is plain decoding's.

Nothing is sampled here. Over every block that two drafters may draw, the real scheduler decides what
is sent; over every cell of the uniforms' unit cube in which the real acceptance decides alike, its
decision is taken once and weighed by the cell's volume. What is committed is completed by the
target's own law, and the joint law of both requests' next ``gamma + 1`` tokens compared with the
product of the target's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dspark_sglang.core.accept import (
    Accepted,
    Round,
    accept_block,
    accept_greedy,
    accept_sampled,
)
from dspark_sglang.core.penalties import Penalties
from dspark_sglang.core.sampling import Filters, filter_weights
from dspark_sglang.core.schedule import admission_order, early_stop_budget, global_budget, lengths
from dspark_sglang.core.schedule.admission import survival

Float64 = npt.NDArray[np.float64]
Accept = Callable[[Round, torch.Tensor], Accepted]
#: Budget of a step from both requests' survivals.
Budget = Callable[[Float64, npt.NDArray[np.int64]], int]


class TableCost:
    """Any positive cost for each number of tokens."""

    def __init__(self, seconds: Float64) -> None:
        self._seconds = seconds

    def seconds(self, tokens: npt.NDArray[np.int64]) -> Float64:
        return self._seconds[tokens]


class Model(NamedTuple):
    """One request: laws after every prefix of up to ``gamma`` tokens, in order of length."""

    gamma: int
    size: int
    #: Weights ``[size]`` of the target and law of the drafter after each prefix, and the
    #: confidence in the token that follows.
    target: dict[tuple[int, ...], torch.Tensor]
    draft: dict[tuple[int, ...], torch.Tensor]
    confidence: dict[tuple[int, ...], float]

    def blocks(self) -> list[tuple[int, ...]]:
        return list(itertools.product(range(self.size), repeat=self.gamma))

    def law(self, prefix: tuple[int, ...]) -> torch.Tensor:
        weights = self.target[prefix]
        return weights / weights.sum()


def prefixes(size: int, gamma: int) -> list[tuple[int, ...]]:
    return [p for n in range(gamma + 1) for p in itertools.product(range(size), repeat=n)]


def random_law(rng: np.random.Generator, size: int) -> torch.Tensor:
    """Uneven, with exact zeros and exact ties now and then."""
    law = rng.dirichlet(np.full(size, 0.7))
    if size > 1 and rng.random() < 0.3:
        law[rng.integers(size)] = 0.0
    if rng.random() < 0.2:
        law[:] = rng.integers(1, 3, size)
    return torch.tensor(law / law.sum(), dtype=torch.float64)


def random_model(rng: np.random.Generator, size: int, gamma: int) -> Model:
    """Confidences from a coarse grid, so that survivals tie; some drafts equal the target."""
    target, draft, confidence = {}, {}, {}
    for prefix in prefixes(size, gamma):
        target[prefix] = random_law(rng, size)
        same = rng.random() < 0.2
        draft[prefix] = target[prefix].clone() if same else random_law(rng, size)
        confidence[prefix] = float(rng.choice([0.0, 0.25, 0.5, 0.5, 0.8, 1.0]))
    return Model(gamma, size, target, draft, confidence)


# --- exact laws ----------------------------------------------------------------------------


def plain_law(model: Model) -> Float64:
    """``[size ** (gamma + 1)]`` law of the next ``gamma + 1`` tokens in plain decoding."""
    return np.array(
        [
            float(torch.stack([model.law(t[:i])[t[i]] for i in range(len(t))]).prod())
            for t in itertools.product(range(model.size), repeat=model.gamma + 1)
        ]
    )


def cells(edges: list[float]) -> tuple[list[float], list[float]]:
    """Midpoints and widths of the intervals between some edges in the unit interval."""
    inside = sorted({0.0, 1.0, *(edge for edge in edges if 0.0 < edge < 1.0)})
    pairs = [(a, b) for a, b in itertools.pairwise(inside) if b - a > 0]
    return [(a + b) / 2 for a, b in pairs], [b - a for a, b in pairs]


def edges_of(
    model: Model, block: tuple[int, ...], sent: int
) -> tuple[list[list[float]], list[float]]:
    """Where a decision may change: for each test, and for the final token.

    Every quantity that either method compares a uniform with, by the formulas; an implementation
    that compares with anything else gets another law.
    """
    weight, tests, final = 1.0, [], []
    for k in range(sent + 1):
        p = model.law(block[:k])
        laws = [p]
        if k < sent:
            q = model.draft[block[:k]]
            laws += [(p - q).clamp(min=0), (weight * p - q).clamp(min=0)]
            left = float(laws[2].sum())
            if k:
                tests[k - 1].append(left / (left + 1 - weight) if left + 1 > weight else 0.0)
            ratio = float(p[block[k]] / q[block[k]])
            weight = min(1.0, weight * ratio)
            tests.append([ratio, weight])
        for law in laws:
            total = float(law.sum())
            if total > 0:
                final += (law.cumsum(0) / total).tolist()
    return tests, final


def committed_law(model: Model, block: tuple[int, ...], sent: int, accept: Accept) -> Float64:
    """``[size ** (gamma + 1)]`` law of the next tokens given one drafted block and what is sent."""
    gamma, size = model.gamma, model.size
    tests, final = edges_of(model, block, sent)
    axes = [cells(test) for test in tests] + [([0.5], [1.0])] * (gamma - sent) + [cells(final)]
    points = torch.tensor(list(itertools.product(*(a[0] for a in axes))), dtype=torch.float64)
    volume = np.array([np.prod(w) for w in itertools.product(*(a[1] for a in axes))])
    count = len(points)
    outcome = accept(
        Round(
            torch.stack([model.target[block[:k]] for k in range(sent + 1)]).repeat(count, 1),
            torch.tensor([block] * count),
            torch.stack([model.draft[block[:k]] for k in range(gamma)]).expand(count, -1, -1),
            torch.full((count,), sent),
            torch.arange(count) * (sent + 1),
        ),
        points,
    )
    law = np.zeros([size] * (gamma + 1))
    kept, tokens = outcome.count.numpy(), outcome.token.numpy()
    for stop in range(sent + 1):
        for token in range(size):
            mass = volume[(kept == stop) & (tokens == token)].sum()
            if mass > 0:
                done = (*block[:stop], token)
                law[done] += mass * completion(model, done)
    return law.reshape(-1)


def completion(model: Model, done: tuple[int, ...]) -> Float64:
    """The target's law of the tokens missing from ``gamma + 1``."""
    missing = model.gamma + 1 - len(done)
    law = np.empty([model.size] * missing)
    for rest in itertools.product(range(model.size), repeat=missing):
        full = done + rest
        law[rest] = np.prod(
            [float(model.law(full[:i])[full[i]]) for i in range(len(done), len(full))]
        )
    return law


def output_law(models: tuple[Model, Model], accept: Accept, budget: Budget) -> Float64:
    """Joint law ``[n, n]`` of both requests' next tokens after one scheduled round."""
    gamma = models[0].gamma
    blocks = [model.blocks() for model in models]
    chance = [
        np.array([np.prod([float(m.draft[b[:k]][b[k]]) for k in range(gamma)]) for b in own])
        for m, own in zip(models, blocks, strict=True)
    ]
    scores = [
        np.array([[m.confidence[b[:k]] for k in range(gamma)] for b in own])
        for m, own in zip(models, blocks, strict=True)
    ]
    table: list[dict[tuple[int, int], Float64]] = [{}, {}]

    def law(which: int, index: int, sent: int) -> Float64:
        known = table[which].get((index, sent))
        if known is None:
            known = committed_law(models[which], blocks[which][index], sent, accept)
            table[which][index, sent] = known
        return known

    width = models[0].size ** (gamma + 1)
    joint = np.zeros((width, width))
    for i, j in itertools.product(range(len(blocks[0])), range(len(blocks[1]))):
        both = chance[0][i] * chance[1][j]
        if both == 0.0:
            continue
        values = survival(np.stack([scores[0][i], scores[1][j]]))
        order = admission_order(values)
        sent = lengths(order, budget(values, order), requests=2)
        joint += both * np.outer(law(0, i, int(sent[0])), law(1, j, int(sent[1])))
    return joint


def worst(models: tuple[Model, Model], accept: Accept, budget: Budget) -> float:
    """Largest difference of a probability from plain decoding's."""
    wanted = np.outer(plain_law(models[0]), plain_law(models[1]))
    return float(np.abs(output_law(models, accept, budget) - wanted).max())


# --- schedulers ----------------------------------------------------------------------------


def early_stop(cost: TableCost) -> Budget:
    return lambda values, order: early_stop_budget(values, order, cost)


def filling(cost: TableCost, *buckets: int) -> Budget:
    """Algorithm 1, its last bucket filled."""
    ends = np.array(buckets)
    return lambda values, order: early_stop_budget(values, order, cost, ends)


def fixed(tokens: int) -> Budget:
    """What the asynchronous form comes to: a budget that nothing of this step has touched."""
    return lambda values, order: tokens


def retrospective(cost: TableCost) -> Budget:
    """Appendix A's mistake: the global argmax over the confidences of the step it decides."""
    return lambda values, order: global_budget(values, cost)


def random_cost(rng: np.random.Generator, tokens: int) -> TableCost:
    """Rising or falling, with steps and ties."""
    return TableCost(rng.choice([1.0, 1.0, 1.25, 1.5, 2.0, 4.0], tokens + 1))


# --- acceptance ----------------------------------------------------------------------------


def greedy(round_: Round, uniforms: torch.Tensor) -> Accepted:
    choice = round_.weights.max(dim=-1).indices
    return accept_greedy(choice, round_.drafted, round_.lens, round_.first)


def shortlisted(round_: Round, uniforms: torch.Tensor) -> Accepted:
    """The laws given over their tokens in another order, as a shortlist gives them."""
    support = torch.arange(round_.probs.shape[-1]).flip(0).expand(round_.probs.shape)
    return accept_sampled(
        round_._replace(probs=round_.probs.flip(-1), support=support.contiguous()), uniforms
    )


def sharpened(model: Model) -> Model:
    """The same model at temperature 0: all mass on the first of the likeliest tokens."""
    size = model.size
    sharp = {p: torch.eye(size, dtype=torch.float64)[w.argmax()] for p, w in model.target.items()}
    return model._replace(target=sharp)


METHODS: dict[str, Accept] = {
    "rejection": accept_sampled,
    "shortlist": shortlisted,
    "block": accept_block,
}
SHAPES = [(2, 1), (2, 2), (3, 2), (5, 1), (2, 3)]


def pair(seed: int, size: int, gamma: int) -> tuple[tuple[Model, Model], np.random.Generator]:
    rng = np.random.default_rng([seed, size, gamma])
    return (random_model(rng, size, gamma), random_model(rng, size, gamma)), rng


@pytest.mark.parametrize(("size", "gamma"), SHAPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_synchronous_rounds_are_plain_decoding(
    method: str, size: int, gamma: int, seed: int
) -> None:
    models, rng = pair(seed, size, gamma)
    budget = early_stop(random_cost(rng, 2 * gamma + 2))
    assert worst(models, METHODS[method], budget) < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("buckets", [(4,), (3, 5), (2, 4, 6)])
def test_filled_buckets_are_plain_decoding(method: str, buckets: tuple[int, ...]) -> None:
    models, rng = pair(8, 2, 2)
    budget = filling(random_cost(rng, 6), *buckets)
    assert worst(models, METHODS[method], budget) < 1e-12


def test_giving_up_a_bucket_that_hardly_began_is_caught() -> None:
    cost = TableCost(np.array([1.0, 1.0, 1.0, 1.15, 1.3, 1.45, 1.6]))

    def all_or_nothing(values: Float64, order: npt.NDArray[np.int64]) -> int:
        return 4 if early_stop_budget(values, order, cost) >= 3 else 0

    gaps = [worst(pair(seed, 2, 2)[0], accept_sampled, all_or_nothing) for seed in range(12)]
    assert max(gaps) > 0.01
    assert worst(pair(0, 2, 2)[0], accept_sampled, filling(cost, 6)) < 1e-12


@pytest.mark.parametrize(("size", "gamma"), SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_any_budget_from_earlier_steps_is_plain_decoding(
    method: str, size: int, gamma: int
) -> None:
    models, _ = pair(9, size, gamma)
    for tokens in range(2 * gamma + 1):
        assert worst(models, METHODS[method], fixed(tokens)) < 1e-12


@pytest.mark.parametrize(("size", "gamma"), SHAPES)
def test_greedy_rounds_are_greedy_decoding(size: int, gamma: int) -> None:
    models, rng = pair(2, size, gamma)
    sharp = (sharpened(models[0]), sharpened(models[1]))
    budget = early_stop(random_cost(rng, 2 * gamma + 2))
    assert worst(sharp, greedy, budget) == 0.0


def test_a_greedy_and_a_sampled_request_do_not_touch() -> None:
    models, rng = pair(3, 3, 2)
    mixed = (sharpened(models[0]), models[1])
    budget = early_stop(random_cost(rng, 6))
    assert worst(mixed, accept_sampled, budget) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_filters_are_plain_decodings(method: str) -> None:
    models, rng = pair(4, 5, 1)
    filters = Filters(torch.tensor([3]), torch.tensor([0.8]), torch.tensor([0.15]))

    def kept(law: torch.Tensor) -> torch.Tensor:
        """A token stays by its rank, by the mass ranked before it, and by the largest."""
        order = sorted(range(len(law)), key=lambda x: -float(law[x]))
        stays = [
            rank < 3
            and float(sum(law[y] for y in order[:rank])) <= 0.8
            and float(law[x]) >= 0.15 * float(law.max())
            for rank, x in enumerate(order)
        ]
        made = torch.zeros_like(law)
        for x, stay in zip(order, stays, strict=True):
            made[x] = law[x] if stay else 0.0
        return made

    filtered = []
    for model in models:
        spread = {p: random_law(rng, 5) for p in model.target}
        expected = {p: kept(law) for p, law in spread.items()}
        for prefix, law in spread.items():
            ours = filter_weights(law[None], *filters)[0]
            torch.testing.assert_close(ours, expected[prefix], rtol=0, atol=1e-15)
        filtered.append(model._replace(target=expected))
    budget = early_stop(random_cost(rng, 4))
    assert worst((filtered[0], filtered[1]), METHODS[method], budget) < 1e-12


def plain_penalties(
    logits: torch.Tensor, output: tuple[int, ...], penalties: Penalties
) -> torch.Tensor:
    """The logits of one plain step, token by token."""
    made = logits.clone()
    for token in range(len(logits)):
        times = output.count(token)
        if times:
            value = float(made[token]) - penalties.frequency * times - penalties.presence
            scaled = value / penalties.repetition if value > 0 else value * penalties.repetition
            made[token] = scaled
    if len(output) < penalties.min_new_tokens:
        made[list(penalties.stop_tokens)] = float("-inf")
    return made


@pytest.mark.parametrize("method", METHODS)
def test_penalties_grow_within_a_block_as_in_plain_decoding(method: str) -> None:
    models, rng = pair(5, 3, 2)
    output = (1, 2)
    penalties = Penalties(
        frequency=0.5, presence=0.3, repetition=1.3, min_new_tokens=3, stop_tokens=(0,)
    )
    made = []
    for model in models:
        logits = {p: torch.tensor(rng.normal(size=3), dtype=torch.float64) for p in model.target}
        target: dict[tuple[int, ...], torch.Tensor] = {}
        for block in model.blocks():
            rows = torch.stack([logits[block[:k]] for k in range(model.gamma + 1)])
            penalties.apply(rows, output, block)
            for k in range(model.gamma + 1):
                target[block[:k]] = torch.softmax(rows[k], -1)
        for prefix, law in target.items():
            wanted = plain_penalties(logits[prefix], output + prefix, penalties)
            torch.testing.assert_close(law, torch.softmax(wanted, -1), rtol=0, atol=1e-15)
        made.append(model._replace(target=target))
    budget = early_stop(random_cost(rng, 6))
    assert worst((made[0], made[1]), METHODS[method], budget) < 1e-12


# --- what must be caught -------------------------------------------------------------------


def appendix_a() -> tuple[Model, Model]:
    """The paper's counterexample beside a request whose tokens are never worth sending."""
    law = {p: torch.tensor([0.7, 0.3], dtype=torch.float64) for p in prefixes(2, 2)}
    even = {p: torch.tensor([0.5, 0.5], dtype=torch.float64) for p in prefixes(2, 2)}
    own = {p: 0.8 if not p else (0.9 if p[0] == 0 else 0.0) for p in prefixes(2, 2)}
    return Model(2, 2, law, even, own), Model(2, 2, law, even, dict.fromkeys(own, 0.0))


def first_request(values: Float64, cost: TableCost) -> int:
    """Retrospective: the budget of the first request by itself."""
    return global_budget(values[:1], cost)


def test_the_retrospective_scheduler_of_appendix_a_is_caught() -> None:
    models = appendix_a()
    seconds = TableCost(np.array([1.0, 1.0, 2.0, 1 / 0.45]))
    law = output_law(models, accept_sampled, lambda v, o: first_request(v, seconds))
    chance = law.sum(1).reshape(2, 2, 2)[0].sum()
    assert chance == pytest.approx(0.85, abs=1e-12)
    right = output_law(
        models,
        accept_sampled,
        lambda v, o: early_stop_budget(v[:1], admission_order(v[:1]), seconds),
    )
    assert right.sum(1).reshape(2, 2, 2)[0].sum() == pytest.approx(0.70, abs=1e-12)


def test_a_retrospective_budget_is_caught_over_random_models() -> None:
    # A cliff after which tokens are all but free: worth crossing only for a long survivor.
    cliff = TableCost(np.array([1.0, 1.0, 1.0, 1.8, 1.81, 1.82, 1.83]))
    gaps = [worst(pair(seed, 2, 2)[0], accept_sampled, retrospective(cliff)) for seed in range(12)]
    assert max(gaps) > 0.01
    assert worst(pair(0, 2, 2)[0], accept_sampled, early_stop(cliff)) < 1e-12


def correction_from_p(round_: Round, uniforms: torch.Tensor) -> Accepted:
    """Rejection sampling that forgets to take the drafter's law off the correction."""
    counted = accept_sampled(round_, uniforms)
    rows = round_.weights[round_.first + counted.count]
    law = rows.cumsum(-1) / rows.sum(-1, keepdim=True)
    token = torch.searchsorted(law, uniforms[:, -1:].contiguous(), right=True).squeeze(1)
    return Accepted(counted.count, token.clamp(max=rows.shape[-1] - 1))


def block_corrected_as_rejection(round_: Round, uniforms: torch.Tensor) -> Accepted:
    """Block verification whose correction is rejection sampling's."""
    counted = accept_block(round_, uniforms)
    stop = round_._replace(lens=round_.lens)
    never = torch.full_like(uniforms, 1 - 2.0**-53)
    never[:, -1] = uniforms[:, -1]
    position = torch.arange(uniforms.shape[1] - 1)
    never[:, :-1] = torch.where(position < counted.count[:, None], -1.0, 2.0**60)
    token = accept_sampled(stop, never).token
    return Accepted(counted.count, token)


@pytest.mark.parametrize("mutant", [correction_from_p, block_corrected_as_rejection])
def test_wrong_corrections_are_caught(mutant: Accept) -> None:
    gaps = [worst(pair(seed, 3, 2)[0], mutant, fixed(3)) for seed in range(3)]
    assert max(gaps) > 1e-3
