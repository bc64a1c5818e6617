"""Drafting with hard values (ties, infinities, NaN) and with operands that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markov_operands import (
    DEVICE,
    Operands,
    Shape,
    assert_block,
    operands,
    poisoned,
    run_block,
    run_shortlist,
)

from dspark_kernels.markov_step import (
    Head,
    draft_block,
    draft_shortlist,
    launch,
    markov_step,
    reference,
)
from dspark_kernels.markov_step.plan import Plan
from dspark_kernels.support.backend import LAUNCHES
from dspark_kernels.support.errors import OperandError

pytestmark = pytest.mark.filterwarnings(
    # Padding lanes and -inf logits; the interpreter computes both sides of a choice.
    "ignore::RuntimeWarning"
)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output and scratch tensor starts as NaN or -1."""
    monkeypatch.setattr(launch, "_new", poisoned)


# --- hard values --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["block", "shortlist"])
def test_the_first_of_equals_wins(mode: str) -> None:
    shape = Shape(2, 2, 300, 16)
    given = operands(shape)._replace(sampling=None)
    given.head.w2.zero_()
    given.base.fill_(0.0)
    # Equal maxima in one tile, in two tiles of a chunk and in two chunks.
    given.base[0, 0, [37, 40]] = 5.0
    given.base[0, 1, [70, 95]] = 5.0
    given.base[1, 0, [299, 101]] = 5.0
    result = run_block(given) if mode == "block" else run_shortlist(given, 7)
    assert result.tokens.tolist() == [[37, 70], [101, 0]]
    if mode == "shortlist":
        assert result.support[1, 0].tolist() == [0, 1, 2, 3, 4, 101, 299]


def test_the_first_of_equal_chunks_wins_however_far_apart_they_are() -> None:
    """Chunk scores are compared sixteen at a time."""
    given = operands(Shape(1, 2, 700, 16))._replace(sampling=None)
    given.head.w2.zero_()
    given.base.fill_(0.0)
    given.base[0, 0, [5, 690]] = 5.0
    given.base[0, 1, [600, 695]] = 5.0
    result = run_block(given, cut=Plan(32, 1, 22))
    assert result.tokens.tolist() == [[5, 600]]
    assert result.previous[0, 1] == 5


@pytest.mark.parametrize("mode", ["block", "shortlist"])
def test_excluded_tokens_are_never_drawn(mode: str) -> None:
    given = operands(Shape(3, 2, 300, 16, size=40))
    given.base[..., :280] = float("-inf")
    given.base[:, 1, :299] = float("-inf")
    out = torch.full_like(given.base, 77.0)
    if mode == "block":
        result = run_block(given, out)
        assert_block(given, result, out, 1e-5)
    else:
        result = run_shortlist(given, 40)
        wanted = reference.draft_shortlist(*given, 40, dtype=torch.float64)
        assert torch.equal(result.support, wanted.support)
        assert torch.equal(result.tokens, wanted.tokens)
    assert (result.tokens >= 280).all()
    assert (result.tokens[:, 1] == 299).all()


@pytest.mark.parametrize("value", [float("-inf"), float("nan")], ids=["all-excluded", "all-nan"])
def test_a_broken_row_stays_inside_the_vocabulary_and_alone(value: float) -> None:
    given = operands(Shape(5, 1, 160, 16))
    clean = run_block(given)
    short = run_shortlist(given, 12)
    given.base[2] = value
    given.base[1] = value
    broken, listed = run_block(given), run_shortlist(given, 12)
    others = [0, 3, 4]
    assert torch.equal(broken.tokens[others], clean.tokens[others])
    assert torch.equal(listed.tokens[others], short.tokens[others])
    for tokens in (broken.tokens, listed.tokens):
        assert ((tokens >= 0) & (tokens < 160)).all()
    # The first token where nothing tells them apart.
    assert broken.tokens[1].tolist() == [0]
    assert not broken.lse[2].isfinite().any()


def test_a_nan_is_the_largest_and_shows_in_the_lse() -> None:
    given = operands(Shape(3, 1, 300, 16))
    given.base[:, 0, 211] = float("nan")
    result = run_block(given)
    assert result.tokens[:, 0].tolist() == [211] * 3
    assert result.logit.isnan().all()
    assert result.lse[[0, 2]].isnan().all()
    assert (run_shortlist(given, 5).support == 211).any(-1).all()


def test_minus_zero_ties_with_zero() -> None:
    given = operands(Shape(1, 1, 64, 16))._replace(sampling=None)
    given.base.fill_(-0.0)
    given.base[0, 0, 40:] = 0.0
    assert run_shortlist(given, 5).support[0, 0].tolist() == [0, 1, 2, 3, 4]


def test_large_logits_that_share_groups_are_all_found() -> None:
    """``select``'s bound lets too many pass, and it has to search the span itself."""
    given = operands(Shape(1, 1, 1024, 16))._replace(sampling=None)
    # Groups of a span of 256 are columns 32 apart: 8 large logits in each of 4 groups.
    columns = torch.tensor([c for c in range(256) if c % 32 < 4], device=DEVICE)
    given.base[0, 0] = -torch.arange(1024.0, device=DEVICE)
    given.base[0, 0, columns] = 5000.0 + torch.arange(32.0, device=DEVICE)
    result = run_shortlist(given, 4, span=256)
    assert result.support[0, 0].tolist() == columns[-4:].tolist()
    given.base[0, 0, columns] = 5000.0
    result = run_shortlist(given, 4, span=256)
    assert result.support[0, 0].tolist() == [0, 1, 2, 3]


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_candidates_of_tied_logits(data: st.DataObject) -> None:
    columns = data.draw(st.integers(2, 150))
    size = data.draw(st.integers(1, min(columns, 40)))
    values = data.draw(st.lists(st.integers(-3, 3), min_size=columns, max_size=columns))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    given = operands(Shape(1, 1, columns, 4, dtype=dtype))._replace(sampling=None)
    given.base[0, 0] = torch.tensor(values, device=DEVICE)
    found = run_shortlist(given, size).support[0, 0].tolist()
    assert found == sorted(sorted(range(columns), key=lambda c: (-values[c], c))[:size])


# --- refusals -----------------------------------------------------------------------------------


REFUSALS: dict[str, tuple[Callable[[Operands], dict[str, Any]], str]] = {
    "base-dtype": (lambda g: {"base": g.base.double()}, "base has dtype float64"),
    "base-shape": (lambda g: {"base": g.base[0]}, "base has shape"),
    "base-columns": (lambda g: {"base": g.base[..., :-1]}, "base has 29 columns"),
    "base-inner-stride": (
        lambda g: {"base": g.base.mT.contiguous().mT},
        "base has strides",
    ),
    "anchors-dtype": (lambda g: {"anchors": g.anchors.int()}, "anchors has dtype int32"),
    "anchors-shape": (lambda g: {"anchors": g.anchors[:1]}, "anchors has shape"),
    "w2-dtype": (
        lambda g: {"head": g.head._replace(w2=g.head.w2.half())},
        "head.w2 has dtype float16",
    ),
    "w1-strides": (
        lambda g: {"head": g.head._replace(w1=g.head.w1.T.contiguous().T)},
        "head.w1 has strides",
    ),
    "rank-too-large": (
        lambda g: {"head": Head(torch.zeros(30, 513), torch.zeros(30, 513))},
        "head.w1 has rank 513",
    ),
    "bias-missing": (lambda g: {"head": g.head._replace(bias=None)}, "Only one of"),
    "joint-shape": (
        lambda g: {"head": g.head._replace(weight=g.head.w1[:7])},
        "head.weight has shape",
    ),
    "hidden-missing": (lambda g: {"hidden": None}, "hidden is a NoneType"),
    "temperatures": (
        lambda g: {"sampling": g.sampling._replace(temperatures=g.base[:, 0, 0].half())},  # type: ignore[union-attr]
        "sampling.temperatures has dtype float16",
    ),
    "vocabulary": (
        lambda g: {"vocabulary": torch.arange(30, dtype=torch.int32)},
        "vocabulary has dtype int32",
    ),
    "out-dtype": (lambda g: {"out": g.base.half()}, "out has dtype float16"),
    "out-without-sampling": (
        lambda g: {"out": g.base, "sampling": None},
        "out is given and sampling is not",
    ),
    "backend": (lambda g: {"backend": "cuda"}, "The backend is 'cuda'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_wrong_operand_is_refused(name: str) -> None:
    given = operands(Shape(2, 2, 30, 16, "gated"))
    change, message = REFUSALS[name]
    call = {"base": given.base, "anchors": given.anchors, "head": given.head, **given.named()}
    changed = {
        key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for key, value in change(given).items()
    }
    with pytest.raises(OperandError, match="Expected: ") as refused:
        draft_block(**(call | changed))
    assert message in str(refused.value)


def test_a_wrong_shortlist_or_state_is_refused() -> None:
    given = operands(Shape(2, 2, 30, 16))
    call = (given.base, given.anchors, given.head)
    for size in (0, 31, 257):
        with pytest.raises(OperandError, match=f"size is {size}"):
            draft_shortlist(*call, size=size)
    with pytest.raises(OperandError, match="support_dtype is"):
        draft_shortlist(*call, size=3, support_dtype=torch.int16)
    state = torch.zeros(2, 16, device=DEVICE)
    with pytest.raises(OperandError, match="state is given and the head is vanilla"):
        markov_step(given.base[:, 0], given.anchors, given.head, state=state)
    with pytest.raises(OperandError, match="base has shape"):
        markov_step(given.base, given.anchors, given.head)


def test_the_torch_backend_is_the_reference() -> None:
    given = operands(Shape(3, 2, 60, 16, "rnn"))
    call = (given.base, given.anchors, given.head)
    LAUNCHES.clear()
    block = draft_block(*call, **given.named(), backend="torch")
    short = draft_shortlist(
        *call, size=8, support_dtype=torch.int64, **given.named(), backend="torch"
    )
    assert not LAUNCHES
    assert torch.equal(block.tokens, run_block(given).tokens)
    assert torch.equal(short.support, run_shortlist(given, 8).support.long())
