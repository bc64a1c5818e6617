"""Acceptance: greedy against a loop, sampled against the target's law, with mutants that fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_sglang.core.accept import (
    Accepted,
    Round,
    accept_block,
    accept_greedy,
    accept_sampled,
    stop_at,
)
from dspark_sglang.core.sampling import UNDECIDED
from tests.core.laws import THRESHOLD, draw, grouped_p_values, p_value, uniforms

#: The largest float64 below 1, the largest uniform there is.
LAST = 1.0 - 2.0**-53
GAMMA, VOCAB = 3, 4
#: Next-token laws by previous token: unequal, with a zero in the target and one in the draft.
TARGET = torch.tensor(
    [[0.6, 0.3, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.2, 0.3], [0.0, 0.5, 0.1, 0.4]],
    dtype=torch.float64,
)
DRAFT = torch.tensor(
    [[0.3, 0.3, 0.2, 0.2], [0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.2, 0.3], [0.3, 0.3, 0.4, 0.0]],
    dtype=torch.float64,
)
Accept = Callable[..., Accepted]


# --- greedy --------------------------------------------------------------------------------


def greedy_loop(
    choice: list[int], drafted: list[list[int]], lens: list[int], first: list[int]
) -> list[tuple[int, int]]:
    outcome = []
    for tokens, length, start in zip(drafted, lens, first, strict=True):
        count = 0
        while count < length and choice[start + count] == tokens[count]:
            count += 1
        outcome.append((count, choice[start + count]))
    return outcome


@st.composite
def greedy_rounds(
    draw: st.DrawFn,
) -> tuple[list[int], list[list[int]], list[int], list[int]]:
    gamma = draw(st.integers(1, 7))
    lens = draw(st.lists(st.integers(0, gamma), min_size=1, max_size=6))
    if draw(st.booleans()):  # compact rows, or gamma + 1 rows a request
        first = [sum(lens[:r]) + r for r in range(len(lens))]
        rows = sum(lens) + len(lens)
    else:
        first = [r * (gamma + 1) for r in range(len(lens))]
        rows = len(lens) * (gamma + 1)
    token = st.integers(0, 2)
    choice = draw(st.lists(token, min_size=rows, max_size=rows))
    block = st.lists(token, min_size=gamma, max_size=gamma)
    drafted = draw(st.lists(block, min_size=len(lens), max_size=len(lens)))
    return choice, drafted, lens, first


@given(case=greedy_rounds())
def test_greedy_is_the_longest_matching_prefix(
    case: tuple[list[int], list[list[int]], list[int], list[int]],
) -> None:
    result = accept_greedy(*map(torch.tensor, case))
    found = list(zip(result.count.tolist(), result.token.tolist(), strict=True))
    assert found == greedy_loop(*case)


def test_greedy_keeps_a_fully_matching_block_and_adds_the_bonus() -> None:
    choice, drafted = torch.tensor([5, 6, 7, 8]), torch.tensor([[5, 6, 7]])
    result = accept_greedy(choice, drafted, torch.tensor([3]), torch.tensor([0]))
    assert (result.count.item(), result.token.item()) == (3, 8)
    shorter = accept_greedy(choice, drafted, torch.tensor([1]), torch.tensor([0]))
    assert (shorter.count.item(), shorter.token.item()) == (1, 6)


# --- sampled -------------------------------------------------------------------------------


class Case:
    """Many requests, each with a block drawn from the draft after anchor 0, ragged lengths."""

    def __init__(
        self,
        requests: int,
        *,
        seed: int,
        target: torch.Tensor = TARGET,
        draft: torch.Tensor = DRAFT,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.target, self.draft = target, draft
        previous = torch.zeros(requests, dtype=torch.int64)
        tokens, laws = [], []
        for _ in range(GAMMA):
            laws.append(draft[previous])
            previous = draw(draft[previous], generator)
            tokens.append(previous)
        self.drafted, self.laws = torch.stack(tokens, 1), torch.stack(laws, 1)
        self.lens = torch.arange(requests) % (GAMMA + 1)
        self.uniforms = uniforms(generator, requests, GAMMA + 1)
        self._scale = uniforms(generator, requests, GAMMA + 1) * 9 + 1
        self._before = torch.cat([torch.zeros(requests, 1).long(), self.drafted], 1)

    def arguments(
        self, *, strided: bool = False, shortlist: int = 0, shared: torch.Tensor | None = None
    ) -> tuple[Round, torch.Tensor]:
        # Weights are scaled at random: they need not be normalised.
        rows = self.target[self._before] * self._scale[..., None]
        if strided:
            weights = rows.flatten(0, 1)
            first = torch.arange(len(self.lens)) * (GAMMA + 1)
        else:
            weights = rows[torch.arange(GAMMA + 1) <= self.lens[:, None]]
            first = (self.lens + 1).cumsum(0) - (self.lens + 1)
        laws, support = self.laws, None
        if shortlist:
            laws, support = self.laws.topk(shortlist, sorted=False)
        if shared is not None:
            laws, support = self.laws[..., shared], shared
        return Round(weights, self.drafted, laws, self.lens, first, support), self.uniforms

    def committed(self, outcome: Accepted) -> torch.Tensor:
        """``[R, GAMMA + 1]`` committed tokens, -1 where a request committed fewer."""
        position = torch.arange(GAMMA + 1)
        tokens = torch.cat([self.drafted, self.drafted.new_zeros(len(self.lens), 1)], 1)
        tokens = tokens.scatter(1, outcome.count[:, None], outcome.token[:, None])
        return tokens.masked_fill(position > outcome.count[:, None], -1)

    def worst_p_value(
        self, accept: Accept, *, shortlist: int = 0, shared: torch.Tensor | None = None
    ) -> float:
        """The smallest p-value over positions, sent lengths and previous tokens."""
        outcome = accept(*self.arguments(shortlist=shortlist, shared=shared))
        committed = self.committed(outcome)
        before = torch.cat([torch.zeros(len(self.lens), 1).long(), committed], 1)
        worst = 1.0
        for length in range(GAMMA + 1):
            for position in range(length + 1):
                chosen = (self.lens == length) & (committed[:, position] >= 0)
                values = grouped_p_values(
                    before[chosen, position], committed[chosen, position], self.target
                )
                worst = min(worst, *values)
        return worst


def variant(*, test: str = "p/q", residual: str = "p-q", bonus: str = "own") -> Accept:
    """Rejection sampling one request at a time in spirit, vectorised; options plant one defect."""

    def accept(round_: Round, uniforms: torch.Tensor) -> Accepted:
        weights, drafted, laws, lens, first, _ = round_
        generator = torch.Generator().manual_seed(7)
        p = weights / weights.sum(-1, keepdim=True)
        count = torch.zeros_like(lens)
        running = torch.ones_like(lens, dtype=torch.bool)
        for k in range(drafted.shape[1]):
            row = p[(first + k).clamp(max=len(p) - 1)]
            target = row.gather(1, drafted[:, k : k + 1])[:, 0]
            draft = laws[:, k].gather(1, drafted[:, k : k + 1])[:, 0]
            ratio = target / draft if test == "p/q" else draft / target
            running &= (k < lens) & (uniforms[:, k] < ratio)
            count += running
        rejected = count < lens
        row = count if bonus == "own" else count - ((count > 0) & ~rejected).long()
        final = p[first + row].clone()
        if residual == "p-q":
            excess = (final - laws[torch.arange(len(lens)), count.clamp(max=GAMMA - 1)]).clamp(
                min=0
            )
            final[rejected] = excess[rejected]
        return Accepted(count=count, token=draw(final, generator))

    return accept


CASE = Case(240_000, seed=11)
MUTANTS = {
    "inverted-ratio": variant(test="q/p"),
    "residual-not-subtracted": variant(residual="p"),
    "bonus-of-the-row-before": variant(bonus="previous"),
}


def test_committed_tokens_follow_the_target() -> None:
    assert CASE.worst_p_value(accept_sampled) > THRESHOLD


def test_the_check_accepts_another_correct_version() -> None:
    assert CASE.worst_p_value(variant()) > THRESHOLD


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_rejects(mutant: str) -> None:
    assert CASE.worst_p_value(MUTANTS[mutant]) < THRESHOLD


def test_acceptance_is_as_often_as_the_laws_overlap() -> None:
    """Sum of min(p, q): a smaller rate would be correct but slow, a larger one biased."""
    outcome = accept_sampled(*CASE.arguments())
    sent = CASE.lens > 0
    overlap = float(torch.minimum(TARGET[0], DRAFT[0]).sum())
    kept = int((outcome.count[sent] > 0).sum())
    total = int(sent.sum())
    law = torch.tensor([overlap, 1 - overlap])
    assert p_value(torch.tensor([kept, total - kept]), law) > THRESHOLD


def test_compact_and_strided_rows_decide_alike() -> None:
    case = Case(5_000, seed=3)
    compact = accept_sampled(*case.arguments())
    strided = accept_sampled(*case.arguments(strided=True))
    assert torch.equal(compact.count, strided.count)
    assert torch.equal(compact.token, strided.token)


#: Two candidates a position: what a drafter with a shortlist of 2 draws from.
SHORT = torch.tensor(
    [[0.5, 0.0, 0.0, 0.5], [0.75, 0.25, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.9, 0.1]],
    dtype=torch.float64,
)


def test_a_shortlisted_draft_leaves_the_target_law_alone() -> None:
    case = Case(120_000, seed=19, draft=SHORT)
    assert case.worst_p_value(accept_sampled, shortlist=2) > THRESHOLD


@pytest.mark.parametrize("size", [2, 3, VOCAB])
def test_laws_over_a_support_decide_like_laws_over_the_vocabulary(size: int) -> None:
    case = Case(5_000, seed=23, draft=SHORT)
    dense = accept_sampled(*case.arguments())
    short = accept_sampled(*case.arguments(shortlist=size))
    assert torch.equal(dense.count, short.count)
    assert torch.equal(dense.token, short.token)


#: A draft vocabulary of tokens 0, 1 and 3: the target also emits token 2, which is never drafted.
WITHOUT_2 = torch.tensor(
    [[0.4, 0.3, 0.0, 0.3], [0.6, 0.2, 0.0, 0.2], [0.5, 0.5, 0.0, 0.0], [0.0, 0.9, 0.0, 0.1]],
    dtype=torch.float64,
)
SHARED = torch.tensor([0, 1, 3])


@pytest.mark.parametrize("accept", [accept_sampled, accept_block])
def test_a_shared_draft_vocabulary_leaves_the_target_law_alone(accept: Accept) -> None:
    case = Case(120_000, seed=37, draft=WITHOUT_2)
    assert case.worst_p_value(accept, shared=SHARED) > THRESHOLD
    # A vocabulary that names other tokens than were drafted from would be noticed.
    assert case.worst_p_value(accept, shared=torch.tensor([0, 1, 2])) < THRESHOLD


@pytest.mark.parametrize("accept", [accept_sampled, accept_block])
def test_a_shared_vocabulary_decides_like_one_for_each_law(accept: Accept) -> None:
    case = Case(5_000, seed=41, draft=WITHOUT_2)
    round_, drawn = case.arguments(shared=SHARED)
    each = round_._replace(support=SHARED.expand(round_.probs.shape).contiguous())
    outcomes = [accept(given, drawn) for given in (round_, each, case.arguments()[0])]
    for other in outcomes[1:]:
        assert torch.equal(outcomes[0].count, other.count)
        assert torch.equal(outcomes[0].token, other.token)


def test_a_token_outside_the_shared_vocabulary_was_drafted_with_chance_0() -> None:
    weights = torch.tensor([[1.0, 1.0, 2.0, 0.0]], dtype=torch.float64).expand(2, -1)
    laws = torch.tensor([[[0.5, 0.5, 0.0]]] * 2, dtype=torch.float64)
    drafted, at = torch.tensor([[2], [1]]), torch.arange(2)
    round_ = Round(weights, drafted, laws, torch.ones(2).long(), at, SHARED)
    assert round_.chances()[1].tolist() == [[0.0], [0.5]]


def test_counts_never_pass_what_was_sent() -> None:
    outcome = accept_sampled(*CASE.arguments())
    assert bool((outcome.count <= CASE.lens).all())
    assert bool((outcome.count >= 0).all())


@pytest.mark.parametrize("edge", [0.0, LAST], ids=["u=0", "u=1-eps"])
def test_equal_laws_accept_everything(edge: float) -> None:
    # Dyadic probabilities stay exact through the normalisation.
    law = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).expand(VOCAB, -1)
    case = Case(4_000, seed=5, target=law, draft=law)
    case._scale = torch.full_like(case._scale, 4.0)
    case.uniforms[:, :GAMMA] = edge
    assert torch.equal(accept_sampled(*case.arguments()).count, case.lens)


@pytest.mark.parametrize("edge", [None, 0.0, LAST], ids=["u=any", "u=0", "u=1-eps"])
def test_impossible_tokens_are_never_committed(edge: float | None) -> None:
    case = Case(200_000 if edge is None else 5_000, seed=13)
    if edge is not None:
        case.uniforms.fill_(edge)
    committed = case.committed(accept_sampled(*case.arguments()))
    before = torch.cat([torch.zeros(len(committed), 1).long(), committed[:, :-1]], 1)
    real = committed >= 0
    assert bool((TARGET[before[real], committed[real]] > 0).all())
    # The drafter did propose such tokens, so this is not vacuous.
    assert bool((TARGET[0, case.drafted[:, 0]] == 0).any())


def test_disjoint_supports_always_reject_and_emit_from_the_target() -> None:
    target = torch.tensor([[0.7, 0.3, 0.0, 0.0]], dtype=torch.float64).expand(VOCAB, -1)
    draft = torch.tensor([[0.0, 0.0, 0.5, 0.5]], dtype=torch.float64).expand(VOCAB, -1)
    case = Case(40_000, seed=17, target=target, draft=draft)
    outcome = accept_sampled(*case.arguments())
    assert outcome.count.max() == 0
    assert p_value(torch.bincount(outcome.token, minlength=VOCAB), target[0]) > THRESHOLD


def test_rejection_without_residual_mass_falls_back_to_the_target() -> None:
    """Float32 rounding can reject where p equals q up to rounding; a real token must follow."""
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    laws = torch.tensor([[[0.2500001, 0.7500001]]])
    outcome = accept_sampled(
        Round(weights, torch.tensor([[0]]), laws, torch.tensor([1]), torch.tensor([0])),
        torch.tensor([[LAST, 0.9]], dtype=torch.float64),
    )
    assert (outcome.count.item(), outcome.token.item()) == (0, 1)


# --- block verification --------------------------------------------------------------------


def test_a_block_of_one_is_rejection_sampling() -> None:
    case = Case(20_000, seed=29)
    case.lens = case.lens.clamp(max=1)
    ours, theirs = accept_block(*case.arguments()), accept_sampled(*case.arguments())
    assert torch.equal(ours.count, theirs.count)
    assert torch.equal(ours.token, theirs.token)


def test_a_block_keeps_at_least_as_many_tokens() -> None:
    blocks, tokens = accept_block(*CASE.arguments()), accept_sampled(*CASE.arguments())
    gain = (blocks.count - tokens.count)[CASE.lens == GAMMA].double().mean()
    assert float(gain) > 0.02  # standard error 0.004


def test_block_verification_of_compact_strided_and_shortlisted_rows_is_alike() -> None:
    case = Case(5_000, seed=31, draft=SHORT)
    expected = accept_block(*case.arguments())
    for outcome in (
        accept_block(*case.arguments(strided=True)),
        accept_block(*case.arguments(shortlist=2)),
    ):
        assert torch.equal(expected.count, outcome.count)
        assert torch.equal(expected.token, outcome.token)


@pytest.mark.parametrize("edge", [0.0, LAST], ids=["u=0", "u=1-eps"])
def test_equal_laws_keep_the_whole_block(edge: float) -> None:
    law = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).expand(VOCAB, -1)
    case = Case(4_000, seed=5, target=law, draft=law)
    case._scale = torch.full_like(case._scale, 4.0)
    case.uniforms[:, :GAMMA] = edge
    assert torch.equal(accept_block(*case.arguments()).count, case.lens)


# --- stop tokens ---------------------------------------------------------------------------


def test_a_run_ends_at_its_first_stop_token() -> None:
    drafted = torch.tensor([[5, 6, 7], [5, 6, 7], [6, 6, 7], [5, 7, 6], [5, 6, 7], [0, 0, 0]])
    stops = torch.tensor([[6, -1], [6, 9], [6, 7], [6, -1], [-1, -1], [6, 0]])
    outcome = Accepted(torch.tensor([3, 1, 2, 1, 3, 0]), torch.tensor([1, 2, 3, 4, 5, 6]))
    cut = stop_at(outcome, drafted, stops)
    assert cut.count.tolist() == [1, 1, 0, 1, 3, 0]
    assert cut.token.tolist() == [6, 2, 6, 4, 5, 6]


# --- rows and drafts without a law -----------------------------------------------------------


def chain(drafted: list[int], lens: int, row: int | None = None, draft: int | None = None) -> Round:
    """One request whose target has no law at ``row``, and whose drafter has none at ``draft``."""
    path = [0, *drafted]
    weights = TARGET[path].clone()
    laws = DRAFT[path[:-1]].clone()
    if row is not None:
        weights[row] = torch.nan
    if draft is not None:
        laws[draft] = torch.nan
    return Round(
        weights[: lens + 1],
        torch.tensor([drafted]),
        laws[None],
        torch.tensor([lens]),
        torch.zeros(1, dtype=torch.int64),
    )


@pytest.mark.parametrize("accept", [accept_sampled, accept_block])
@pytest.mark.parametrize("row", range(GAMMA + 1))
def test_a_row_without_a_law_undecides_only_who_reaches_it(accept: Accept, row: int) -> None:
    drafted = [1, 2, 3]
    reached = 0
    for test in (0.0, 0.3, 0.6, 0.9, LAST):
        given = torch.full((1, GAMMA + 1), test, dtype=torch.float64)
        found = accept(chain(drafted, GAMMA, row=row), given)
        # The rows before it decide as they would if the block ended there.
        alone = accept(chain(drafted, row), given)
        assert int(found.count) == int(alone.count) <= row
        if int(found.count) == row:
            assert int(found.token) == UNDECIDED
            reached += 1
        else:
            assert int(found.token) == int(alone.token)
    assert reached


@pytest.mark.parametrize("accept", [accept_sampled, accept_block])
def test_drafts_from_no_law_leave_the_targets_law(accept: Accept) -> None:
    """Whatever the drafter made up at a position, the token there is the target's own, and so is what stands before."""
    numbers = uniforms(torch.Generator().manual_seed(5), 4000, GAMMA + 1)
    for broken in range(GAMMA):
        counts = torch.zeros(VOCAB, dtype=torch.int64)
        whole = chain([1, 2, 3], GAMMA, draft=broken)
        for some in numbers:
            found = accept(whole, some[None])
            assert int(found.count) <= broken and int(found.token) >= 0
            if int(found.count) == broken:
                counts[int(found.token)] += 1
        law = TARGET[[0, 1, 2, 3][broken]]
        assert not counts[law == 0].any()
        assert p_value(counts, law) > THRESHOLD


def test_greedy_drafts_stop_where_nothing_was_drawn() -> None:
    choice = torch.tensor([1, UNDECIDED, 3, 0])
    found = accept_greedy(choice, torch.tensor([[1, 2, 3]]), torch.tensor([3]), torch.tensor([0]))
    assert (int(found.count), int(found.token)) == (1, UNDECIDED)
