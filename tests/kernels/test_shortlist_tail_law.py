"""Drafting with successors and the base tail: the law that tokens follow, and hard values."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import pytest
import torch
from tail_operands import (
    DEVICE,
    Operands,
    Shape,
    assert_same,
    operands,
    poisoned,
    run,
    share_of_tail,
    wanted,
)

from dspark_kernels.accept import DenseDraft, Rows, accept
from dspark_kernels.markov_step import (
    Sampling,
    launch,
    reference,
)

pytestmark = pytest.mark.filterwarnings(
    # Padding lanes and -inf logits; the interpreter computes both sides of a choice.
    "ignore::RuntimeWarning"
)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output and scratch tensor starts as NaN or -7."""
    monkeypatch.setattr(launch, "_new", poisoned)


# --- the law ------------------------------------------------------------------------------------


class Many(NamedTuple):
    tokens: torch.Tensor
    #: ``[V]`` float64.
    law: torch.Tensor
    support: torch.Tensor


def one_position(columns: int, seed: int) -> Operands:
    given = operands(Shape(1, 1, columns, torch.bfloat16), seed)
    # Flat enough for a tail that is drawn from often.
    return given._replace(base=given.base / 2, anchors=given.anchors * 0 + 3)


def keys(count: int, temperature: float) -> Sampling:
    numbers = torch.arange(count, device=DEVICE)
    heat = torch.full((count,), temperature, device=DEVICE)
    return Sampling(heat, numbers * 7919 + 5, numbers % 97)


def law_of(logits: torch.Tensor, temperature: float, lse: torch.Tensor) -> torch.Tensor:
    return torch.exp(logits.double() / torch.tensor(temperature).double() - lse.double())


def by_reference(given: Operands, count: int, temperature: float, span: int) -> Many:
    base = given.base.expand(count, 1, -1).contiguous()
    sampling = keys(count, temperature)
    found = reference.draft_shortlist(
        base, given.anchors.expand(count), given.head, None, sampling, None, 8, torch.int64,
        given.table, base, span, dtype=torch.float64,
    )  # fmt: skip
    assert found.lse is not None
    return Many(found.tokens, law_of(base[0, 0], temperature, found.lse[0, 0]), found.support[0, 0])


def by_kernel(given: Operands, count: int, temperature: float, span: int) -> Many:
    """One position is searched, and drawn from with many keys."""
    base = given.base.expand(count, 1, -1).contiguous()
    one = keys(1, temperature)
    call = (given.head, one, None, 8, given.table)
    front = launch.Shortlist(given.base, given.anchors, *call, given.base, span)
    best, places = base.new_empty(1, 1, 24), given.anchors.new_empty(1, 1, 8, dtype=torch.int32)
    front.merge(front.select(), best, places)
    sampling = keys(count, temperature)
    block = launch.Shortlist(
        base, given.anchors.repeat(count), given.head, sampling, None, 8, given.table, base, span
    )
    block.tops, block.masses = front.tops.repeat(count, 1), front.masses.repeat(count, 1)
    support = given.anchors.new_empty(count, 1, 24)
    found = block.chain(
        best.repeat(count, 1, 1), places.repeat(count, 1, 1), support, given.anchors
    )
    assert found.lse is not None
    assert (base == base[0]).all()
    return Many(found.tokens, law_of(base[0, 0], temperature, found.lse[0, 0]), found.support[0, 0])


def assert_follows(found: Many, span: int) -> None:
    """Chi-square over all tokens, those expected fewer than five times together."""
    count, columns = len(found.tokens), len(found.law)
    assert float(found.law.sum()) == pytest.approx(1.0, abs=1e-5)
    seen = torch.bincount(found.tokens.view(-1), minlength=columns).double()
    expected = found.law * count
    rare = expected < 5
    tail = torch.ones(columns, dtype=torch.bool, device=DEVICE)
    tail[found.support[found.support >= 0]] = False
    # A tail that is drawn from often, in every span, and of which many tokens count one by one.
    assert float(found.law[tail].sum()) > 0.2
    assert all(int((part).sum()) > 5 for part in torch.split(tail & ~rare, span))
    pairs = [(seen[~rare], expected[~rare])]
    if bool(rare.any()):
        pairs.append((seen[rare].sum()[None], expected[rare].sum()[None]))
    statistic = sum(float(((a - b) ** 2 / b).sum()) for a, b in pairs)
    freedom = sum(len(a) for a, _ in pairs) - 1
    # Four standard deviations, and not closer than chance allows.
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("count", "columns", "temperature", "span"),
    [(8000, 96, 1.0, 32), pytest.param(6000, 300, 0.7, 128, marks=pytest.mark.slow)],
    ids=["even-spans", "uneven-spans"],
)
def test_the_references_tokens_follow_the_law_that_is_stored(
    count: int, columns: int, temperature: float, span: int
) -> None:
    assert_follows(by_reference(one_position(columns, 2), count, temperature, span), span)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_kernels_tokens_are_the_references_which_follow_the_law(count: int) -> None:
    given = one_position(96, 2)
    found = by_kernel(given, count, 2.0, 32)
    if count >= 1000:
        assert_follows(found, 32)
    known = by_reference(given, count, 2.0, 32)
    assert torch.equal(found.tokens, known.tokens)
    assert torch.equal(found.support, known.support)


def test_drafting_and_acceptance_together_give_the_targets_law() -> None:
    """The first token out, drafted or corrected, follows the target whatever was drafted."""
    count, columns, temperature = 6000, 96, 0.9
    given = one_position(columns, 4)
    base = given.base.expand(count, 1, -1).contiguous()
    sampling = keys(count, temperature)
    draft = reference.draft_shortlist(
        base, given.anchors.expand(count), given.head, None, sampling, None, 8, torch.int64,
        given.table, base, 32,
    )  # fmt: skip
    assert draft.lse is not None
    random = torch.Generator().manual_seed(6)
    target = (1.2 * torch.randn(columns, generator=random)).bfloat16().to(DEVICE)
    rows = Rows(
        target.expand(2 * count, -1).contiguous(),
        2 * torch.arange(count, dtype=torch.int32, device=DEVICE),
        torch.ones(count, dtype=torch.int32, device=DEVICE),
        draft.tokens,
    )
    uniforms = torch.rand(count, 2, generator=random, dtype=torch.float64).to(DEVICE)
    call = (rows, sampling.temperatures, uniforms)
    law = DenseDraft(base, draft.lse)
    judged = accept(*call, draft=law, backend="torch")
    assert (judged.flag == 0).all()
    first = torch.where(judged.count == 1, draft.tokens[:, 0], judged.token)
    p = torch.softmax(target.double() / temperature, 0)
    q = law_of(base[0, 0], temperature, draft.lse[0, 0])
    # Chance of being kept, and a target that is far enough from the draft to be corrected.
    kept = float(torch.minimum(p, q).sum())
    assert 0.2 < kept < 0.8
    assert float(judged.count.double().mean()) == pytest.approx(kept, abs=0.025)
    seen = torch.bincount(first, minlength=columns).double()
    often = p * count >= 5
    statistic = float(((seen - count * p) ** 2 / (count * p))[often].sum())
    freedom = int(often.sum())
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)
    few = slice(0, 40)
    listed = Rows(rows.logits, rows.first[few], rows.lens[few], rows.drafted[few])
    kernel = accept(
        listed, sampling.temperatures[few], uniforms[few],
        draft=DenseDraft(base[few], draft.lse[few]), backend="triton",
    )  # fmt: skip
    for mine, theirs in zip(kernel, judged, strict=True):
        assert torch.equal(mine, theirs[few])


# --- hard values --------------------------------------------------------------------------------


def test_excluded_tokens_are_never_drawn() -> None:
    """The tail has no mass but rounding's: every finite column is a candidate, or nearly."""
    given = operands(Shape(12, 2, 300))
    assert given.sampling is not None
    given = given._replace(sampling=given.sampling._replace(recorded=None))
    finite = given.base.clone()
    given.base[:] = -math.inf
    given.base[..., 4::31] = finite[..., 4::31]  # ten columns, eight of them the best
    stored = given.base.clone()
    known = wanted(given, 8, stored)
    found = run(given, 8, given.base)
    assert_same(found, known)
    drawn_from = torch.zeros(300, dtype=torch.bool, device=DEVICE)
    drawn_from[4::31] = True
    assert drawn_from[found.tokens].all()


@pytest.mark.parametrize("rest", [-math.inf, -18.0], ids=["none", "little"])
def test_what_successors_leave_of_a_span_is_not_made_of_rounding(rest: float) -> None:
    """They hold all of a span's mass, or all but 1e-8, and their bias makes them nothing themselves.

    A difference of float32 sums would leave about 1e-7, far above the candidates.
    """
    given = operands(Shape(12, 1, 256))
    assert given.sampling is not None
    given = given._replace(sampling=given.sampling._replace(recorded=None))
    given.head.w1.fill_(1.0)
    given.head.w2.fill_(-40.0 / 8)
    given.base[:] = rest
    given.base[..., :8] = 0.0  # the best, in the first span
    following = torch.arange(200, 216, dtype=torch.int32, device=DEVICE)
    given = given._replace(table=following.expand(256, -1).contiguous())
    given.base[..., 200:216] = -torch.rand(
        12, 1, 16, generator=torch.Generator().manual_seed(1)
    ).to(DEVICE)
    known = wanted(given, 8, given.base.clone())
    sampled = float((given.sampling.temperatures > 0).double().mean())
    assert share_of_tail(known) == pytest.approx(0.0 if rest == -math.inf else sampled)
    assert_same(run(given, 8, given.base), known)


def test_a_tail_far_below_the_best_keeps_its_mass() -> None:
    """At a low temperature, with a bias that takes the best down to the tail."""
    given = operands(Shape(12, 1, 300))
    assert given.sampling is not None
    cold = torch.full((12,), 0.05, device=DEVICE)
    given = given._replace(
        sampling=given.sampling._replace(temperatures=cold, recorded=None),
        anchors=given.anchors * 0,
    )
    given.base[..., :8] += 40.0
    given.head.w1.fill_(1.0)
    given.head.w2[:8] = -44.0 / 8
    given = given._replace(
        table=torch.arange(8, 24, dtype=torch.int32, device=DEVICE).repeat(300, 1)
    )
    known = wanted(given, 8, given.base.clone())
    assert share_of_tail(known) > 0.2
    assert_same(run(given, 8, given.base), known)


@functools.cache
def clean_tokens() -> torch.Tensor:
    """What is drawn where no row is broken."""
    given = operands(Shape(5, 1, 300))
    return run(given, 8, given.base.clone()).tokens


@pytest.mark.parametrize("value", [-math.inf, math.nan, math.inf], ids=str)
@pytest.mark.parametrize("where", ["row", "best", "tail"])
def test_a_broken_row_stays_inside_the_vocabulary_and_alone(value: float, where: str) -> None:
    given = operands(Shape(5, 1, 300))
    columns = {"row": slice(None), "best": slice(40, 41), "tail": slice(9, None)}[where]
    for row in (0, 1, 2):
        given.base[row, :, columns] = value
    out = given.base.clone()
    found = run(given, 8, out)
    assert torch.equal(found.tokens[3:], clean_tokens()[3:])
    assert ((found.tokens >= 0) & (found.tokens < 300)).all()
    assert found.lse is not None
    law = out[0].double() / 0.8
    finite = torch.logsumexp(law, -1).isfinite()
    assert torch.equal(found.lse[0].isfinite(), finite)
    if where == "tail" and value == -math.inf:
        assert finite.all()
        assert (found.tokens[:3] < 9).all()
