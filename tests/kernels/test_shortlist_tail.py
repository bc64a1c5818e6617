"""Drafting from the best base logits, the successors of the token before, and the base tail.

Tokens, candidates and memory that must stay untouched are compared exactly with the float64 reference;
seeds are fixed, so no two scores are within float32 of each other. Log-sum-exps and laws carry
float32 sums (1e-5).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from tail_operands import (
    DEVICE,
    SPAN,
    Operands,
    Shape,
    assert_same,
    operands,
    poisoned,
    run,
    share_of_tail,
    wanted,
)

from benchmarks import traffic
from dspark_kernels.accept import ListedDraft, Rows, accept
from dspark_kernels.markov_step import (
    Head,
    Sampling,
    ShortlistDraft,
    draft_shortlist,
    launch,
    reference,
    successor_table,
    successors,
)
from dspark_kernels.support.backend import LAUNCHES, interpreting
from dspark_kernels.support.errors import OperandError

pytestmark = pytest.mark.filterwarnings(
    # Padding lanes and -inf logits; the interpreter computes both sides of a choice.
    "ignore::RuntimeWarning"
)


SHAPES = {
    "one-of-one": Shape(1, 1, 16, size=1),
    "one-request-gamma7": Shape(1, 7, 129),
    "odd-batch": Shape(5, 2, 300),
    "bfloat16": Shape(5, 2, 700, torch.bfloat16, size=128, follow=64, rank=24),
    "float16": Shape(5, 2, 257, torch.float16, size=3, follow=32),
    "mapped": Shape(5, 2, 300, words=420),
    "mapped-bfloat16": Shape(5, 1, 200, torch.bfloat16, follow=128, words=210),
}


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output and scratch tensor starts as NaN or -7."""
    monkeypatch.setattr(launch, "_new", poisoned)


def recorded(given: Operands) -> torch.Tensor:
    """``[B]`` rows that draw from a law that is returned."""
    assert given.sampling is not None
    assert given.sampling.recorded is not None
    return (given.sampling.temperatures > 0) & (given.sampling.recorded != 0)


# --- the kernels against the reference ----------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("mode", ["candidates", "over base", "beside base"])
def test_a_draft_is_the_references(name: str, mode: str) -> None:
    shape = SHAPES[name]
    given = operands(shape)
    before = given.base.clone()
    if mode == "candidates":
        assert_same(run(given, shape.size), wanted(given, shape.size))
        assert torch.equal(given.base, before)
        return
    stored = before.clone()
    known = wanted(given, shape.size, stored)
    out = given.base if mode == "over base" else before.clone()
    found = run(given, shape.size, out)
    assert found.logits is out
    assert_same(found, known)
    # float32 and float64 logits may round to neighbours.
    spacing = 2 * torch.finfo(shape.dtype).eps
    torch.testing.assert_close(out, stored, atol=1e-5, rtol=spacing)
    rows = recorded(given)
    assert torch.equal(out[~rows], before[~rows])
    if mode == "beside base":
        assert torch.equal(given.base, before)


def test_rows_of_every_kind_are_among_these_and_some_draw_from_the_tail() -> None:
    given = operands(SHAPES["odd-batch"])
    found = run(given, 8, given.base.clone())
    listed = (found.support == found.tokens[..., None]).any(-1)
    assert recorded(given).tolist() == [True, False, False, True, False]
    assert listed[[1, 2, 4]].all()
    assert not listed[[0, 3]].all()


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]
)
def test_the_tail_is_drawn_alike_over_many_keys(seed: int) -> None:
    given = operands(Shape(12, 2, 300, torch.bfloat16), seed)
    assert given.sampling is not None
    given = given._replace(sampling=given.sampling._replace(recorded=None))
    known = wanted(given, 8, given.base.clone())
    assert share_of_tail(known) > 0.1
    assert_same(run(given, 8, given.base), known)


def test_one_law_over_base_and_beside_it() -> None:
    given = operands(SHAPES["bfloat16"])
    apart = given.base.clone()
    first = run(given, 128, apart)
    second = run(given, 128, given.base)
    assert torch.equal(apart, given.base)
    assert torch.equal(first.tokens, second.tokens)
    assert first.lse is not None
    assert second.lse is not None
    assert torch.equal(first.lse, second.lse)


def test_the_stored_law_sums_to_one_and_gives_the_chance_of_the_token() -> None:
    given = operands(SHAPES["bfloat16"])
    assert given.sampling is not None
    found = run(given, 128, given.base)
    assert found.lse is not None
    for row in recorded(given).nonzero().view(-1).tolist():
        heat = given.sampling.temperatures[row].double()
        law = torch.exp(given.base[row].double() / heat - found.lse[row].double()[:, None])
        torch.testing.assert_close(law.sum(-1), torch.ones_like(law[:, 0]), atol=1e-5, rtol=0)
    assert (found.lse[~recorded(given)] == 0).all()


def test_every_row_greedy() -> None:
    given = operands(SHAPES["odd-batch"])._replace(sampling=None)
    found = run(given, 8)
    assert found.probs is None
    assert_same(found, wanted(given, 8)._replace(probs=None))


@pytest.mark.parametrize("kind", ["gated", "rnn"])
def test_other_heads_draw_from_the_tail_of_their_best(kind: str) -> None:
    """Successors need a vanilla head, the tail does not."""
    shape = Shape(5, 3, 300)
    given, random = operands(shape), torch.Generator().manual_seed(8)
    outputs, inputs = {"gated": (8, 4 + 8), "rnn": (24, 4 + 16)}[kind]
    joint = torch.randn(outputs, inputs + 1, generator=random).to(DEVICE)
    head = Head(given.head.w1, given.head.w2, joint[:, 1:].contiguous(), joint[:, 0].contiguous())
    hidden = torch.randn(5, 3, 4, generator=random).to(DEVICE)
    call = (given.base, given.anchors, head, hidden, given.sampling, None, 8, torch.int64, None)
    stored = given.base.clone()
    known = reference.draft_shortlist(*call, stored, SPAN, dtype=torch.float64)
    assert share_of_tail(known) > 0.05
    found = launch.draft_shortlist(*call, given.base, SPAN)
    assert_same(found, known)
    torch.testing.assert_close(given.base, stored, atol=1e-5, rtol=1e-6)


# --- candidates ---------------------------------------------------------------------------------


def test_a_successor_among_the_best_counts_once() -> None:
    given = operands(Shape(5, 2, 300, size=40))
    plain = launch.draft_shortlist(*given.first, 40, torch.int64, span=SPAN)
    for step in range(2):
        # Columns of this step's best follow every token: nothing is added to the first step.
        shared = plain.support[0, step, :16].int()
        given = given._replace(table=shared.expand(300, -1).contiguous())
        found = run(given, 40)
        assert (found.support[0, step, 40:] == -1).all()
        assert (found.base[0, step, 40:] == -math.inf).all()
        assert found.probs is not None
        assert plain.probs is not None
        if step == 0:
            torch.testing.assert_close(found.probs[0, 0, :40], plain.probs[0, 0], atol=0, rtol=0)
        assert (found.probs[0, step, 40:] == 0).all()
        assert_same(found, wanted(given, 40))


def test_a_listed_law_of_these_candidates_is_one_that_acceptance_takes() -> None:
    """Absent successors have token -1, as acceptance pads."""
    given = operands(Shape(5, 2, 40))
    found = run(given, 8)
    assert found.probs is not None
    rows = [0, 3]
    assert (found.support[rows] == -1).any()
    law = ListedDraft(found.probs[rows], found.support[rows])
    # The target has this very law, so everything is kept whatever the uniforms are.
    target = torch.full((2, 3, 40), -1e4, device=DEVICE)
    for r in range(2):
        for j in range(2):
            held = law.tokens[r, j] >= 0
            target[r, j, law.tokens[r, j, held]] = law.probs[r, j, held].log()
    judged = accept(
        Rows(
            target.flatten(0, 1),
            torch.tensor([0, 3], dtype=torch.int32, device=DEVICE),
            torch.tensor([2, 2], dtype=torch.int32, device=DEVICE),
            found.tokens[rows],
        ),
        torch.ones(2, device=DEVICE),
        torch.full((2, 3), 0.999, dtype=torch.float64, device=DEVICE),
        draft=law,
        backend="triton",
    )
    assert judged.count.tolist() == [2, 2]
    assert judged.flag.tolist() == [0, 0]


def test_the_first_of_equals_is_the_lowest_column_of_either_list() -> None:
    given = operands(Shape(2, 1, 300))._replace(sampling=None)
    given.head.w2.zero_()
    given.base.fill_(0.0)
    given.base[:, 0, 290:298] = 1.0  # the best
    following = torch.arange(100, 116, dtype=torch.int32, device=DEVICE).flip(0)
    given = given._replace(table=following.expand(300, -1).contiguous())
    given.base[0, 0, 290:298] = 0.0  # all alike: the best are columns 0 to 7
    assert run(given, 8).tokens[:, 0].tolist() == [0, 290]
    given.head.w2[[103, 107, 292]] = 1.0
    given.head.w1.fill_(1.0)
    # Row 0: 103 and 107 tie; row 1: 292 is ahead of both.
    assert run(given, 8).tokens[:, 0].tolist() == [103, 292]


@settings(max_examples=8, deadline=None)
@drawn(data=st.data())
def test_tied_logits_are_on_one_side_of_the_cut(data: st.DataObject) -> None:
    """With few distinct logits the last of the best, some successors and the tail are equal."""
    columns = data.draw(st.integers(20, 150))
    size = data.draw(st.integers(1, 20))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32]))
    given = operands(Shape(1, 1, columns, dtype), seed=columns)
    values = data.draw(st.lists(st.integers(-2, 2), min_size=columns, max_size=columns))
    given.base[0, 0] = torch.tensor(values, device=DEVICE)
    stored = given.base.clone()
    known = wanted(given, size, stored)
    assert_same(run(given, size, given.base), known)
    torch.testing.assert_close(given.base, stored, atol=1e-5, rtol=1e-2)


# --- layout, launches, bytes --------------------------------------------------------------------


def test_rows_and_steps_of_any_stride() -> None:
    given = operands(Shape(5, 2, 300))
    apart = given.base.clone()
    known = run(given, 8, apart)

    def strided() -> torch.Tensor:
        wider = torch.full((2, 5, 330), math.nan, device=DEVICE)
        view = wider[:, :, 20:320].transpose(0, 1)
        view.copy_(given.base)
        return view

    out = strided()
    found = run(given._replace(base=strided()), 8, out)
    assert torch.equal(found.tokens, known.tokens)
    assert torch.equal(out, apart)


@pytest.mark.skipif(not interpreting(), reason="reaches memory of the host")
def test_rows_beyond_the_reach_of_int32() -> None:
    """Row 2 starts beyond element 2^31, in memory of which only the rows' pages exist."""
    given = operands(Shape(3, 2, 300, torch.bfloat16))
    assert given.sampling is not None
    given = given._replace(sampling=given.sampling._replace(recorded=None))
    stride = 2**30 + 4096
    # 0x4000 is Linux's MAP_NORESERVE, which Python 3.11 does not name.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    with mmap.mmap(-1, 2 * (2 * stride + 4096), flags=flags) as memory:
        far = torch.frombuffer(memory, dtype=torch.bfloat16)
        base = far.as_strided((3, 2, 300), (stride, 300, 1))
        base.copy_(given.base)
        found = run(given._replace(base=base), 8, base)
        known = run(given, 8, given.base)
        assert torch.equal(found.tokens, known.tokens)
        assert torch.equal(base, given.base)
        del far, base, found


@pytest.mark.parametrize("tail", [False, True], ids=["candidates", "tail"])
def test_three_launches_and_nothing_waits(tail: bool, no_host_sync: Any) -> None:
    given = operands(Shape(2, 5, 40))
    LAUNCHES.clear()
    with no_host_sync():
        draft_shortlist(
            given.base, given.anchors, given.head, size=8, sampling=given.sampling,
            successors=given.table, out=given.base if tail else None, backend="triton",
        )  # fmt: skip
    assert dict(LAUNCHES) == {
        "markov_step.select": 1,
        "markov_step.merge": 1,
        "markov_step.chain": 1,
    }


@pytest.mark.skipif(not interpreting(), reason="counts in the interpreter")
def test_base_is_read_once_and_again_only_where_a_span_wins() -> None:
    given = operands(Shape(5, 2, 700, torch.bfloat16, size=20))
    kept: list[ShortlistDraft] = []
    counted = traffic.count(lambda: kept.append(run(given, 20, given.base)))
    (found,) = kept
    assert counted.outside == 0
    assert counted.loaded["select.base"] == 5 * 2 * 700 * 2
    present = int((found.support >= 0).sum())
    assert counted.loaded["chain.w2"] == present * 8 * 2
    (rows,) = recorded(given).nonzero(as_tuple=True)
    listed = (found.support == found.tokens[..., None]).any(-1)
    spans = found.tokens[rows][~listed[rows]] // SPAN
    again = sum(min(SPAN, 700 - int(span) * SPAN) for span in spans)
    assert again > 0
    # Over base, out goes by the name of the one that the launch lists last.
    loaded = counted.loaded.get("chain.base", 0) + counted.loaded.get("chain.out", 0)
    assert loaded == (5 * 2 * 16 + again) * 2
    stored = int((found.support[rows] >= 0).sum()) * 2
    assert counted.stored.get("chain.base", 0) + counted.stored.get("chain.out", 0) == stored


def test_no_requests_and_no_launches() -> None:
    given = operands(Shape(1, 2, 40))
    none = given.base[:0]
    LAUNCHES.clear()
    sampling = Sampling(*(x[:0] for x in given.sampling)) if given.sampling else None  # type: ignore[union-attr]
    for out in (None, none):
        found = draft_shortlist(
            none, given.anchors[:0], given.head, size=8, sampling=sampling,
            successors=given.table, out=out, backend="triton",
        )  # fmt: skip
        assert found.support.shape == (0, 2, 24)
        assert (found.probs is None) == (out is not None)
        assert (found.lse is None) == (out is None)
    assert not LAUNCHES


def test_the_torch_backend_is_the_reference() -> None:
    given = operands(SHAPES["odd-batch"])
    LAUNCHES.clear()
    stored = given.base.clone()
    found = draft_shortlist(
        given.base, given.anchors, given.head, size=8, sampling=given.sampling,
        successors=given.table, out=stored, support_dtype=torch.int64, backend="torch",
    )  # fmt: skip
    assert not LAUNCHES
    known = reference.draft_shortlist(
        *given.first, 8, torch.int64, given.table, given.base, dtype=torch.float64
    )
    assert_same(found, known)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_replays_the_draft() -> None:
    given = operands(Shape(5, 5, 129280, torch.bfloat16, follow=64, rank=256))
    call = {"sampling": given.sampling, "successors": given.table}
    operands_ = (given.base, given.anchors, given.head)
    known = draft_shortlist(*operands_, **call, out=given.base.clone())
    out = given.base.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = draft_shortlist(*operands_, **call, out=out)
    graph.replay()
    torch.cuda.synchronize()
    assert known.logits is not None
    assert torch.equal(found.tokens, known.tokens)
    assert torch.equal(out, known.logits)


# --- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [False, True])
def test_the_table_has_the_columns_of_largest_bias(
    mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = operands(Shape(1, 1, 90, words=130 if mapped else 0))
    whole = successor_table(given.head, 32, given.vocabulary)
    names = reference.names_of(given.base[0, 0], given.vocabulary)
    biases = given.head.w1.double() @ given.head.w2[names].double().T
    assert whole.dtype == torch.int32
    assert torch.equal(whole.long(), biases.topk(32, dim=1).indices)
    # Chunks of two tokens, the last of one where their number is odd.
    monkeypatch.setattr(successors, "_HELD", 2 * 90)
    assert torch.equal(successor_table(given.head, 32, given.vocabulary), whole)


# --- refusals -----------------------------------------------------------------------------------


REFUSALS: dict[str, tuple[Callable[[Operands], dict[str, Any]], str]] = {
    "dtype": (lambda g: {"successors": g.table.long()}, "successors has dtype int64"),
    "rows": (lambda g: {"successors": g.table[:-1]}, "successors has shape"),
    "number": (lambda g: {"successors": g.table[:, :12].contiguous()}, "There are 12 successors"),
    "strides": (lambda g: {"successors": g.table.T.contiguous().T}, "successors has strides"),
    "more than columns": (
        lambda g: {"successors": torch.zeros(30, 32, dtype=torch.int32)},
        "There are 32 successors of a token and 30 columns",
    ),
    "head": (
        lambda g: {
            "head": Head(g.head.w1, g.head.w2, torch.zeros(8, 12), torch.zeros(8)),
            "hidden": torch.zeros(2, 2, 4),
            "successors": g.table,
        },
        "successors are given and the head is gated",
    ),
    "out dtype": (lambda g: {"out": g.base.half()}, "out has dtype float16"),
    "out shape": (lambda g: {"out": g.base[:, :1]}, "out has shape"),
    "out without sampling": (
        lambda g: {"out": g.base, "sampling": None},
        "out is given and sampling is not",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_wrong_operand_is_refused(name: str) -> None:
    given = operands(Shape(2, 2, 30))
    change, message = REFUSALS[name]
    call = {
        "base": given.base,
        "anchors": given.anchors,
        "head": given.head,
        "sampling": given.sampling,
        "size": 8,
    }
    changed = {
        key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for key, value in change(given).items()
    }
    if "head" in changed:
        changed["head"] = Head(*(None if t is None else t.to(DEVICE) for t in changed["head"]))
    with pytest.raises(OperandError, match="Expected: ") as refused:
        draft_shortlist(**(call | changed))
    assert message in str(refused.value)


def test_a_wrong_table_is_refused() -> None:
    given = operands(Shape(1, 1, 30))
    gated = Head(
        given.head.w1,
        given.head.w2,
        torch.zeros(8, 12, device=DEVICE),
        torch.zeros(8, device=DEVICE),
    )
    with pytest.raises(OperandError, match="The head is gated"):
        successor_table(gated, 16)
    with pytest.raises(OperandError, match="There are 17 successors"):
        successor_table(given.head, 17)
    with pytest.raises(OperandError, match="There are 32 successors of a token and 30 columns"):
        successor_table(given.head, 32)
    with pytest.raises(OperandError, match="vocabulary has dtype int32"):
        successor_table(given.head, 16, torch.arange(30, dtype=torch.int32, device=DEVICE))
