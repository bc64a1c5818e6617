"""Confidence and survival: the reference's properties, and the kernel against it.

Tolerance: float32 sums of up to ~700 products of order 1/sqrt(d) leave an error below 1e-5 in the
logit, and a sigmoid shrinks it at least fourfold. Everything about survival is compared exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import traffic
from benchmarks.ops.confidence import Case
from dspark_kernels.confidence import Confidence, confidence
from dspark_kernels.confidence.reference import reference
from dspark_kernels.support.backend import LAUNCHES
from dspark_kernels.support.errors import OperandError
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.core.schedule.admission import survival

TOLERANCE = 1e-5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# exp(-x) of a very negative logit is infinite on purpose: 1 / (1 + inf) is exactly 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


class Shape(NamedTuple):
    batch: int
    gamma: int
    width: int
    rank: int
    vocabulary: int = 301
    dtype: torch.dtype = torch.float32


SHAPES = {
    "no-requests": Shape(0, 5, 16, 4),
    "one-of-one": Shape(1, 1, 1, 1),
    "odd-batch": Shape(3, 7, 96, 16),
    "no-markov": Shape(3, 5, 96, 0),
    "width-in-two-blocks": Shape(2, 4, 700, 24),
    "wide-rank": Shape(2, 3, 33, 600),
    "bfloat16": Shape(5, 7, 160, 32, dtype=torch.bfloat16),
    "float16": Shape(2, 8, 64, 8, dtype=torch.float16),
    "sixteen-positions": Shape(1, 16, 20, 0),
}


class Operands(NamedTuple):
    hidden: torch.Tensor
    previous: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    temperatures: torch.Tensor
    w1: torch.Tensor | None


def operands(shape: Shape, device: torch.device, seed: int = 0) -> Operands:
    random = torch.Generator().manual_seed(seed)
    made = Operands(
        hidden=torch.randn(shape.batch, shape.gamma, shape.width, generator=random).to(shape.dtype),
        previous=torch.randint(shape.vocabulary, (shape.batch, shape.gamma), generator=random),
        weight=torch.randn(shape.width + shape.rank, generator=random) / shape.width**0.5,
        bias=torch.randn((), generator=random),
        temperatures=torch.rand(shape.gamma, generator=random) * 2 + 0.25,
        w1=torch.randn(shape.vocabulary, shape.rank, generator=random).to(shape.dtype)
        if shape.rank
        else None,
    )
    return Operands(*(None if t is None else t.to(device) for t in made))  # type: ignore[arg-type]


def poisoned(shape: tuple[int, int], device: torch.device) -> Confidence:
    def full(dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    return Confidence(full(torch.float32), full(torch.float32), full(torch.float64))


def run(given: Operands, **named: Any) -> Confidence:
    """The kernel into poisoned outputs."""
    out = poisoned(tuple(given.hidden.shape[:2]), given.hidden.device)  # type: ignore[arg-type]
    result = confidence(*given[:-1], w1=given.w1, backend="triton", out=out, **named)
    assert all(a is b for a, b in zip(result, out, strict=True))
    return result


def product(confidences: torch.Tensor) -> torch.Tensor:
    """Left to right in float64, one multiplication at a time."""
    alive = torch.ones(confidences.shape[0], dtype=torch.float64)
    columns = []
    for column in confidences.double().cpu().unbind(1):
        alive = alive * column
        columns.append(alive)
    return torch.stack(columns, dim=1)


# --- the reference -------------------------------------------------------------------------------


def test_the_reference_on_a_case_worked_by_hand() -> None:
    # Logits 2 and 4 at temperatures 1 and 2 are both sigmoid(2).
    hidden = torch.tensor([[[1.0, 1.0], [1.0, 3.0]]])
    w1 = torch.tensor([[0.0], [10.0]])
    found = reference(
        hidden,
        torch.tensor([[0, 1]]),
        torch.tensor([0.5, 1.0, 0.05]),
        torch.tensor(0.5),
        torch.tensor([1.0, 2.25]),
        w1,
        dtype=torch.float64,
    )
    logits = torch.tensor([[2.0, 4.5]], dtype=torch.float64)
    torch.testing.assert_close(found[0], logits, rtol=0, atol=1e-7)
    sure = torch.sigmoid(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(found[2], torch.stack([sure, sure**2])[None], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["odd-batch", "no-markov"])
def test_the_reference_is_what_serving_computes(name: str) -> None:
    given = operands(SHAPES[name], torch.device("cpu"))
    head = ConfidenceHead(given.weight, given.bias, given.w1 is not None, given.temperatures)
    table = torch.zeros(301, 1) if given.w1 is None else given.w1
    logits = head.logits(given.hidden, given.previous, MarkovHead(table, table))
    found = reference(*given)
    torch.testing.assert_close(found[0], logits, rtol=0, atol=4 * TOLERANCE)
    torch.testing.assert_close(found[1], head.calibrate(logits), rtol=0, atol=TOLERANCE)
    assert torch.equal(found[2], torch.from_numpy(survival(found[1].numpy()).copy()))


def test_auto_on_a_cpu_is_the_reference() -> None:
    given = operands(SHAPES["odd-batch"], torch.device("cpu"))
    before = LAUNCHES["confidence"]
    found = confidence(*given[:-1], w1=given.w1)
    for a, b in zip(found, reference(*given), strict=True):
        assert torch.equal(a, b)
    assert LAUNCHES["confidence"] == before


# --- the kernel ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_agrees_with_float64(name: str, device: torch.device) -> None:
    shape = SHAPES[name]
    given = operands(shape, device)
    before = LAUNCHES["confidence"]
    found = run(given)
    logits, exact, _ = reference(*given, dtype=torch.float64)
    torch.testing.assert_close(found.logits.double(), logits, rtol=0, atol=4 * TOLERANCE)
    torch.testing.assert_close(found.confidence.double(), exact, rtol=0, atol=TOLERANCE)
    assert torch.equal(found.survival.cpu(), product(found.confidence))
    # A launch for the whole batch, none for an empty one.
    assert LAUNCHES["confidence"] == before + (shape.batch > 0)


def test_new_outputs_are_made_where_none_are_given(device: torch.device) -> None:
    given = operands(SHAPES["odd-batch"], device)
    made = confidence(*given[:-1], w1=given.w1, backend="triton")
    for a, b in zip(made, run(given), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_strided_hidden_states_are_read_where_they_lie(device: torch.device) -> None:
    given = operands(SHAPES["odd-batch"], device)
    batch, gamma, width = given.hidden.shape
    # As a drafter with one row more than gamma gives them, in a buffer wider than the width.
    buffer = torch.full((batch, gamma + 1, width + 3), torch.nan, device=device)
    buffer[:, 1:, :width] = given.hidden
    strided = given._replace(hidden=buffer[:, 1:, :width])
    for a, b in zip(run(strided), run(given), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("batch", "gamma", "strides"),
    [
        pytest.param(3, 2, (2**30, 4, 1), id="requests"),
        pytest.param(2, 3, (4, 2**30, 1), id="positions"),
    ],
)
def test_offsets_beyond_int32_are_reached(
    batch: int, gamma: int, strides: tuple[int, int, int], device: torch.device
) -> None:
    # Rows 2^30 elements apart in memory that is reserved and, between the rows, never touched.
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    hidden = memory.as_strided((batch, gamma, 4), strides)
    given = operands(Shape(batch, gamma, 4, 0, dtype=torch.bfloat16), device)
    hidden.copy_(given.hidden)
    for a, b in zip(run(given._replace(hidden=hidden)), run(given), strict=True):
        assert torch.equal(a, b)


def test_nan_is_visible_and_nothing_behind_it_survives(device: torch.device) -> None:
    given = operands(SHAPES["odd-batch"], device)
    clean = run(given)
    given.hidden[1, 3, 7] = torch.nan
    found = run(given)
    for result in (found, Confidence(*reference(*given))):
        bad = torch.zeros(3, 7, dtype=torch.bool)
        bad[1, 3] = True
        assert torch.equal(result.confidence.isnan().cpu(), bad)
        assert torch.equal(result.logits.isnan().cpu(), bad)
        assert result.survival[1, 3:].tolist() == [0.0] * 4
        assert not result.survival.isnan().any()
    bad = found.confidence.isnan()
    assert torch.equal(found.confidence[~bad], clean.confidence[~bad])
    assert torch.equal(found.survival[1, :3], clean.survival[1, :3])


@pytest.mark.parametrize("token", [-1, 301, 2**31, 2**62], ids=str)
def test_a_token_outside_the_vocabulary_is_not_looked_up(token: int, device: torch.device) -> None:
    given = operands(SHAPES["odd-batch"], device)
    given.previous[2, 0] = token
    for result in (run(given), Confidence(*reference(*given))):
        assert result.confidence[2, 0].isnan() and result.survival[2].eq(0).all()
        assert int(result.confidence.isnan().sum()) == 1


def test_extreme_logits_give_exactly_0_and_1(device: torch.device) -> None:
    hidden = torch.tensor([[[1e4], [torch.inf], [-1e4], [-torch.inf]]], device=device)
    one, nothing = torch.ones(1, device=device), torch.zeros((), device=device)
    given = Operands(
        hidden,
        torch.zeros(1, 4, dtype=torch.int64, device=device),
        one,
        nothing,
        one.expand(4),
        None,
    )
    given = given._replace(temperatures=given.temperatures.contiguous())
    found = run(given)
    assert found.confidence.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert found.survival.tolist() == [[1.0, 1.0, 0.0, 0.0]]


@settings(max_examples=25)
@given(
    logits=st.lists(
        st.lists(st.floats(-90, 90, width=32), min_size=7, max_size=7), min_size=1, max_size=3
    )
)
def test_survival_never_rises_and_is_the_product_bit_for_bit(logits: list[list[float]]) -> None:
    hidden = torch.tensor(logits, device=DEVICE)[..., None]
    given = Operands(
        hidden,
        torch.zeros(hidden.shape[:2], dtype=torch.int64, device=DEVICE),
        torch.ones(1, device=DEVICE),
        torch.zeros((), device=DEVICE),
        torch.ones(7, device=DEVICE),
        None,
    )
    found = run(given)
    assert ((found.confidence >= 0) & (found.confidence <= 1)).all()
    assert (found.survival[:, 1:] <= found.survival[:, :-1]).all()
    assert torch.equal(found.survival.cpu(), product(found.confidence))


def test_nothing_waits_for_the_device(device: torch.device, no_host_sync: Any) -> None:
    given = operands(SHAPES["odd-batch"], device)
    with no_host_sync():
        confidence(*given[:-1], w1=given.w1, backend="triton")


@pytest.mark.gpu
def test_a_captured_call_replays_on_new_operands(device: torch.device, captured: Any) -> None:
    given, other = (operands(SHAPES["odd-batch"], device, seed) for seed in (0, 1))
    out = poisoned((3, 7), device)
    replay = captured(lambda: confidence(*given[:-1], w1=given.w1, out=out))
    for target, source in zip(given, other, strict=True):
        target.copy_(source)
    replay()
    for a, b in zip(out, run(other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_the_bytes_of_the_formula_are_moved() -> None:
    given = operands(Shape(3, 5, 700, 24, dtype=torch.bfloat16), torch.device("cpu"))
    case = Case(5, 700, 24, 301)
    counted = traffic.count(lambda: run(given))
    assert (counted.kernels, counted.outside) == (3 * (case.row_bytes + case.shared_bytes), 0)
    assert counted.loaded["confidence_kernel.hidden"] == 3 * 5 * 700 * 2


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        pytest.param("hidden", torch.zeros(3, 7), "hidden has shape [3, 7]", id="hidden-rank"),
        pytest.param("hidden", torch.zeros(3, 17, 96), "17 positions", id="gamma"),
        pytest.param(
            "hidden", torch.zeros(3, 96, 7).mT, "stride 7 in its last dimension", id="hidden-stride"
        ),
        pytest.param(
            "hidden", torch.zeros(3, 7, 96).double(), "hidden has dtype float64", id="hidden-dtype"
        ),
        pytest.param(
            "previous", torch.zeros(3, 7, dtype=torch.int32), "dtype int32", id="previous-dtype"
        ),
        pytest.param(
            "previous",
            torch.zeros(7, 3, dtype=torch.int64).T,
            "strides [1, 3]",
            id="previous-stride",
        ),
        pytest.param("weight", torch.zeros(96), "Expected: [112]", id="weight-without-markov"),
        pytest.param("bias", torch.zeros(1), "bias has shape [1]", id="bias"),
        pytest.param("temperatures", torch.ones(1), "Expected: [7]", id="one-temperature"),
        pytest.param("w1", torch.zeros(16, 301).T, "w1 has strides", id="w1-transposed"),
        pytest.param("w1", torch.zeros(301, 16, device="meta"), "w1 is on meta", id="w1-device"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_wrong_operand_is_refused(
    backend: Any, name: str, value: torch.Tensor, message: str
) -> None:
    given = operands(SHAPES["odd-batch"], torch.device("cpu"))._replace(**{name: value})
    with pytest.raises(OperandError) as caught:
        confidence(*given[:-1], w1=given.w1, backend=backend)
    assert message in str(caught.value)


def test_a_wrong_output_is_refused() -> None:
    given = operands(SHAPES["odd-batch"], torch.device("cpu"))
    out = poisoned((3, 7), torch.device("cpu"))
    with pytest.raises(OperandError, match=r"out\.survival has dtype float32"):
        confidence(*given[:-1], w1=given.w1, out=out._replace(survival=out.confidence.clone()))
