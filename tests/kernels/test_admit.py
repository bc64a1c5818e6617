"""Admission: the reference against the rule, and the kernel against it, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import traffic
from benchmarks.ops.admit import Case
from dspark_kernels.admit import Admission, admit
from dspark_kernels.admit.reference import reference
from dspark_kernels.support.backend import LAUNCHES
from dspark_kernels.support.errors import OperandError
from dspark_sglang.core.schedule.admission import admission_order, lengths

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(0, 5), (1, 1), (1, 7), (3, 7), (5, 8), (16, 5), (17, 1), (33, 4)]
IDS = [f"R{requests}-gamma{gamma}" for requests, gamma in SHAPES]


def chances(requests: int, gamma: int, kind: str) -> torch.Tensor:
    """Survivals: untied, heavily tied, all equal, or running into 0."""
    random = torch.Generator().manual_seed(requests * 31 + gamma)
    confidence = torch.rand(requests, gamma, generator=random)
    if kind == "tied":
        confidence = confidence.mul(2).round() / 2 + 0.5
        confidence = confidence.clamp(max=1.0)
    elif kind == "equal":
        confidence = torch.ones(requests, gamma)
    elif kind == "zeros":
        confidence = confidence.masked_fill(confidence < 0.3, 0.0)
    return confidence.double().cumprod(1)


def run(survival: torch.Tensor, budget: int) -> Admission:
    """The kernel into poisoned outputs."""
    requests, gamma = survival.shape
    out = Admission(
        torch.full((requests,), -7, dtype=torch.int32, device=DEVICE),
        torch.full((requests,), -7, dtype=torch.int32, device=DEVICE),
        torch.full((requests + 1,), -7, dtype=torch.int32, device=DEVICE),
        torch.full((requests * (gamma + 1),), -7, dtype=torch.int64, device=DEVICE),
    )
    tokens = torch.tensor([budget], dtype=torch.int32, device=DEVICE)
    result = admit(survival.to(DEVICE), tokens, backend="triton", out=out)
    assert all(a is b for a, b in zip(result, out, strict=True))
    return result


def agree(survival: torch.Tensor, budget: int) -> None:
    for found, right in zip(run(survival, budget), reference(survival, budget), strict=True):
        assert found.dtype == right.dtype and torch.equal(found.cpu(), right)


# --- the reference -------------------------------------------------------------------------------


def test_the_reference_on_a_case_worked_by_hand() -> None:
    survival = torch.tensor([[0.9, 0.5, 0.5], [0.9, 0.9, 0.1], [0.5, 0.5, 0.0]]).double()
    # In order: (0,0) (1,0), then position 1 of request 1, then 0.5s: (2,0), (0,1), (2,1), (0,2).
    lens = [int(x) for budget in range(9) for x in reference(survival, budget)[0]]
    assert [lens[3 * b : 3 * b + 3] for b in range(9)] == [
        [0, 0, 0],
        [1, 0, 0],
        [1, 1, 0],
        [1, 2, 0],
        [1, 2, 1],
        [2, 2, 1],
        [2, 2, 2],
        [3, 2, 2],
        [3, 3, 2],
    ]
    _, sent, offsets, rows = reference(survival, 4)
    assert sent.tolist() == [2, 3, 2]
    assert offsets.tolist() == [0, 2, 5, 7]
    assert rows.tolist() == [0, 1, 4, 5, 6, 8, 9, -1, -1, -1, -1, -1]


@pytest.mark.parametrize(("requests", "gamma"), SHAPES, ids=IDS)
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_the_reference_keeps_its_promises(requests: int, gamma: int, kind: str) -> None:
    survival = chances(requests, gamma, kind)
    for budget in range(-1, requests * gamma + 2):
        lens, sent, offsets, rows = reference(survival, budget)
        assert torch.equal(sent, lens + 1)
        assert int(lens.sum()) == min(max(budget, 0), requests * gamma)
        assert torch.equal(offsets.diff(), lens + 1) or not requests
        admitted = torch.arange(gamma) < lens[:, None]
        if admitted.any() and not admitted.all():
            assert survival[admitted].min() >= survival[~admitted].max()
        packed = rows[: int(offsets[-1])]
        assert (packed.diff() > 0).all()
        assert torch.equal((packed // (gamma + 1)).bincount(minlength=requests).int(), lens + 1)
        assert rows[int(offsets[-1]) :].eq(-1).all()


@pytest.mark.parametrize(("requests", "gamma"), SHAPES, ids=IDS)
@pytest.mark.parametrize("kind", ["untied", "tied", "zeros"])
def test_the_reference_is_what_serving_plans_by(requests: int, gamma: int, kind: str) -> None:
    survival = chances(requests, gamma, kind)
    order = admission_order(survival.numpy())
    for budget in range(-1, requests * gamma + 2):
        planned = lengths(order, budget, requests=requests)
        assert reference(survival, budget)[0].tolist() == planned.tolist()


def test_auto_on_a_cpu_is_the_reference() -> None:
    survival, before = chances(3, 7, "tied"), LAUNCHES["admit"]
    found = admit(survival, torch.tensor([9], dtype=torch.int32))
    assert all(torch.equal(a, b) for a, b in zip(found, reference(survival, 9), strict=True))
    assert LAUNCHES["admit"] == before


# --- the kernel ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["untied", "tied", "equal", "zeros"])
@pytest.mark.parametrize(("requests", "gamma"), SHAPES, ids=IDS)
def test_the_kernel_agrees_exactly(requests: int, gamma: int, kind: str) -> None:
    survival, cells = chances(requests, gamma, kind), requests * gamma
    before = LAUNCHES["admit"]
    budgets = sorted({-(2**31), -1, 0, 1, cells // 3, cells // 2, cells - 1, cells, 2**31 - 1})
    for budget in budgets:
        agree(survival, budget)
    assert LAUNCHES["admit"] == before + len(budgets)


@pytest.mark.parametrize("budget", [1, 100, 4095, 4096, 8191])
def test_the_largest_batch(budget: int) -> None:
    agree(chances(1024, 8, "tied"), budget)
    agree(chances(1023, 8, "untied"), budget)


def test_neighbouring_floats_are_told_apart() -> None:
    base = torch.tensor(0.7, dtype=torch.float64)
    steps = [base]
    for _ in range(11):
        steps.append(torch.nextafter(steps[-1], torch.zeros((), dtype=torch.float64)))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    survival = torch.stack(steps)[order][:, None]
    for budget in range(13):
        agree(survival, budget)
    assert run(survival, 5).lens.cpu().flatten().tolist() == (order < 5).int().tolist()


def test_subnormal_survivals_keep_their_order() -> None:
    survival = torch.tensor([[5e-324, 0.0], [1e-323, 5e-324], [1.0, 1e-310]], dtype=torch.float64)
    for budget in range(7):
        agree(survival, budget)


@settings(max_examples=30)
@given(data=st.data())
def test_any_survivals_and_budget(data: st.DataObject) -> None:
    requests, gamma = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 8))
    # Few distinct values: ties within a request, across requests, and chains of 1.0.
    one = st.sampled_from([0.0, 0.25, 0.5, 0.999, 1.0]) | st.floats(0, 1, width=32)
    cells = data.draw(st.lists(one, min_size=requests * gamma, max_size=requests * gamma))
    survival = torch.tensor(cells).view(requests, gamma).double().cumprod(1)
    agree(survival, data.draw(st.integers(-2, requests * gamma + 2)))


def test_nan_and_negative_values_count_as_zero() -> None:
    survival = torch.tensor([[0.5, torch.nan], [-torch.nan, -0.0], [-3.0, 0.25]]).double()
    for budget in range(7):
        agree(survival, budget)
    assert run(survival, 2).lens.tolist() == [1, 0, 1]


def test_nothing_waits_for_the_device(device: torch.device, no_host_sync: Any) -> None:
    survival = chances(3, 7, "tied").to(device)
    tokens = torch.tensor([8], dtype=torch.int32, device=device)
    with no_host_sync():
        admit(survival, tokens, backend="triton")


@pytest.mark.gpu
def test_a_captured_call_replays_with_another_budget(device: torch.device, captured: Any) -> None:
    survival, other = chances(16, 5, "tied").to(device), chances(16, 5, "untied").to(device)
    tokens = torch.tensor([8], dtype=torch.int32, device=device)
    out = run(survival, 0)
    replay = captured(lambda: admit(survival, tokens, out=out))
    for budget in (0, 33, 80):
        survival.copy_(other)
        tokens.fill_(budget)
        replay()
        for found, right in zip(out, reference(other, budget), strict=True):
            assert torch.equal(found, right)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_every_byte_is_moved_once() -> None:
    survival = chances(3, 7, "tied")
    counted = traffic.count(lambda: run(survival, 8))
    assert (counted.kernels, counted.outside) == (Case(7, 4).floor_bytes(3), 0)
    assert counted.launches == 1


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("survival", "budget", "message"),
    [
        pytest.param(torch.zeros(2, 3), None, "survival has dtype float32", id="float32"),
        pytest.param(torch.zeros(6).double(), None, "survival has shape [6]", id="rank"),
        pytest.param(torch.zeros(3, 2).double().T, None, "survival has strides", id="transposed"),
        pytest.param(torch.zeros(1025, 3).double(), None, "1025 requests", id="too-many"),
        pytest.param(torch.zeros(2, 9).double(), None, "9 positions", id="gamma"),
        pytest.param(torch.zeros(2, 0).double(), None, "0 positions", id="no-positions"),
        pytest.param(
            torch.zeros(2, 3).double(), torch.tensor([1]), "budget has dtype int64", id="budget"
        ),
        pytest.param(
            torch.zeros(2, 3).double(),
            torch.tensor(1, dtype=torch.int32),
            "budget has shape []",
            id="budget-scalar",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_wrong_operand_is_refused(
    backend: Any, survival: torch.Tensor, budget: torch.Tensor | None, message: str
) -> None:
    tokens = torch.ones(1, dtype=torch.int32) if budget is None else budget
    with pytest.raises(OperandError) as caught:
        admit(survival, tokens, backend=backend)
    assert message in str(caught.value)


def test_a_wrong_output_is_refused() -> None:
    survival, tokens = chances(3, 7, "tied"), torch.ones(1, dtype=torch.int32)
    out = admit(survival, tokens)
    with pytest.raises(OperandError, match=r"out\.rows has shape \[20\]"):
        admit(survival, tokens, out=out._replace(rows=out.rows[:20]))
