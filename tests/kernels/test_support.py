"""The shared parts of the kernels: errors, operand checks, backends, counted traffic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import measure, ops, traffic
from dspark_kernels.support import backend as backends
from dspark_kernels.support.backend import LAUNCHES, interpreting, launched, resolve
from dspark_kernels.support.checks import operand
from dspark_kernels.support.errors import OperandError

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")


@triton.jit
def _add_rows(x, y, out, n, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    total = tl.load(x + row * stride + columns, mask=mask) + tl.load(y + columns, mask=mask)
    tl.store(out + row * n + columns, total, mask=mask)
    tl.store(out + row * n, tl.sum(tl.where(mask, total, 0.0)))


@triton.jit
def _count_up(counter, outside):
    tl.atomic_add(counter, 1)
    tl.load(counter + outside)


@triton.jit
def _to_bfloat16(x, out, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out + lanes, tl.load(x + lanes).to(tl.bfloat16))


# --- errors and checks ---------------------------------------------------------------------------


def test_an_error_says_what_was_found_what_is_expected_and_what_to_do() -> None:
    error = OperandError("x is odd.", expected="even", fix="Double it.")
    assert str(error) == "x is odd. Expected: even. Double it."
    assert isinstance(error, ValueError)


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(
    ("tensor", "wanted", "message"),
    [
        pytest.param([1.0], {}, "x is a list. Expected: a torch.Tensor.", id="no-tensor"),
        pytest.param(
            torch.zeros(2, 3, dtype=torch.float64),
            {},
            "x has dtype float64. Expected: float32 or bfloat16. ",
            id="dtype",
        ),
        pytest.param(torch.zeros(3, 3), {}, "shape [3, 3]. Expected: [2, any]. ", id="size"),
        pytest.param(torch.zeros(2), {}, "shape [2]. Expected: [2, any]. ", id="rank"),
        pytest.param(
            torch.zeros(2, 3),
            {"device": torch.device("cuda", 0)},
            "x is on cpu. Expected: cuda:0, where the other operands are. ",
            id="device",
        ),
        pytest.param(
            torch.zeros(3, 2).T,
            {},
            "x has strides [1, 2] for shape [2, 3]. Expected: a contiguous tensor. ",
            id="stride",
        ),
        pytest.param(
            _meta(2, 2**30),
            {},
            "x has 2147483648 elements. Expected: at most 2147483647. ",
            id="too-large",
        ),
    ],
)
def test_a_wrong_operand_is_refused(tensor: Any, wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(OperandError) as caught:
        operand("x", tensor, shape=(2, None), dtype=(torch.float32, torch.bfloat16), **wanted)
    assert message in str(caught.value)


def test_a_right_operand_passes() -> None:
    operand("x", torch.zeros(2, 3), shape=(2, None), dtype=torch.float32)
    operand("x", torch.zeros(3, 2).T, shape=(2, 3), dtype=torch.float32, contiguous=False)


# --- backends ------------------------------------------------------------------------------------


def test_auto_is_the_reference_on_a_cpu() -> None:
    assert resolve("auto", torch.zeros(1)) == "torch"
    assert resolve("torch", torch.zeros(1)) == "torch"


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "interpreting", lambda: True)
    assert resolve("triton", torch.zeros(1)) == "triton"
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    with pytest.raises(OperandError, match="TRITON_INTERPRET=1"):
        resolve("triton", torch.zeros(1))


def test_an_unknown_backend_or_device_is_refused() -> None:
    with pytest.raises(OperandError, match="'cuda'"):
        resolve("cuda", torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(OperandError, match="meta"):
        resolve("auto", _meta(1))


def test_launches_are_counted_by_name() -> None:
    before = LAUNCHES["test.launch"]
    launched("test.launch")
    launched("test.launch")
    assert LAUNCHES["test.launch"] == before + 2


def test_waiting_for_the_device_is_noticed(no_host_sync: Any) -> None:
    with no_host_sync():
        cells = torch.zeros(3) + 1
        with pytest.raises(AssertionError, match="_local_scalar_dense waits"):
            cells.sum().item()
        with pytest.raises(AssertionError, match="nonzero waits"):
            cells.nonzero()


# --- traffic -------------------------------------------------------------------------------------


def _run_add_rows(rows: int, n: int) -> traffic.Traffic:
    # Rows wider than what is read: the padding must not count.
    x, y, out = torch.randn(rows, n + 5), torch.randn(n), torch.full((rows, n), torch.nan)
    counted = traffic.count(
        lambda: _add_rows[(rows,)](x, y, out, n, x.stride(0), BLOCK=triton.next_power_of_2(n))
    )
    expected = x[:, :n] + y
    expected[:, 0] = expected.sum(1)
    torch.testing.assert_close(out, expected)
    return counted


@interpreted
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (3, 7), (2, 64)])
def test_only_unmasked_lanes_count_and_each_to_its_tensor(rows: int, n: int) -> None:
    counted = _run_add_rows(rows, n)
    row = rows * n * 4
    assert counted.loaded == {"_add_rows.x": row, "_add_rows.y": row}
    assert counted.stored == {"_add_rows.out": row + rows * 4}
    assert counted.kernels == 3 * row + rows * 4
    assert (counted.outside, counted.launches) == (0, 1)


@interpreted
def test_atomics_count_twice_and_stray_accesses_are_noticed() -> None:
    cells = torch.zeros(4, dtype=torch.int32)
    counted = traffic.count(lambda: _count_up[(1,)](cells[:2], 3))
    assert (counted.loaded, counted.stored) == ({"_count_up.counter": 4}, {"_count_up.counter": 4})
    assert counted.outside == 4
    assert cells.tolist() == [1, 0, 0, 0]


@interpreted
def test_nothing_is_left_hooked() -> None:
    counted = _run_add_rows(1, 3)
    x = torch.zeros(1, 3)
    _add_rows[(1,)](x, x[0], torch.empty(1, 3), 3, 3, BLOCK=4)
    assert counted.launches == 1


@interpreted
def test_counting_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not interpreting()
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is not set"):
        traffic.count(lambda: None)


# --- counting torch operations -------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    ("call", "bytes_"),
    [
        (lambda x: x.view(2, 50)[0].unsqueeze(0).expand(3, -1), 0),
        (lambda x: torch.empty(1000), 0),
        (lambda x: torch.zeros(1000), 4000),
        (lambda x: x + 1, 800),
        (lambda x: x.add_(1), 800),
        (lambda x: x.zero_(), 400),
        (lambda x: x.copy_(torch.empty(100)), 800),
        (lambda x: torch.add(x, x, out=torch.empty(100)), 800),
        (lambda x: x.expand(50, 100).sum(), 404),
        (lambda x: x[torch.empty(3, dtype=torch.int64).fill_(0)], 24 + 24 + 2 * 12),
        (lambda x: x.to(torch.bfloat16), 600),
        (lambda x: torch.zeros_like(x), 400),
    ],
    ids=[
        *("views", "allocation", "zeros", "sum", "in place", "overwritten", "copied", "out"),
        *("repeated in place", "rows picked", "converted", "shape of another"),
    ],
)
def test_bytes_of_torch_operations(call: Any, bytes_: int) -> None:
    x = torch.arange(100.0)
    assert traffic.count(lambda: call(x)).torch == bytes_


@interpreted
def test_uniform_numbers_are_one_half_inside_a_count() -> None:
    kept: list[torch.Tensor] = []
    found = traffic.count(lambda: kept.append(torch.rand(7)))
    assert kept[0].tolist() == [0.5] * 7
    assert (found.torch, found.operations) == (28, {"rand": 1})
    assert torch.rand(100).std() > 0


# --- rounding ------------------------------------------------------------------------------------


def test_bfloat16_is_rounded_to_nearest_ties_to_even(device: torch.device) -> None:
    ties = 1 + torch.arange(64) / 128 + 1 / 256
    special = torch.tensor([1.9999, -0.99999, 0.0, -0.0, torch.inf, -torch.inf, 3.4e38, 1e-40])
    x = torch.cat([torch.randn(440), ties, special]).to(device)
    out = torch.full((512,), torch.nan, dtype=torch.bfloat16, device=device)
    _to_bfloat16[(1,)](x, out, BLOCK=512)
    assert torch.equal(out.view(torch.int16), x.bfloat16().view(torch.int16))
    x[0] = torch.nan
    _to_bfloat16[(1,)](x, out, BLOCK=512)
    assert out[0].isnan()


# --- the report ----------------------------------------------------------------------------------


def test_counted_bytes_lie_on_a_line_or_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    line = {1: 100, 2: 200, 4: 400, 16: 1600, 64: 6400, 256: 25600}
    assert measure.extrapolate({1: 100, 2: 200}) == line
    assert measure.extrapolate({1: 130, 2: 140})[256] == 130 + 255 * 10
    monkeypatch.setattr(measure, "COUNTED", (1, 4))
    with pytest.raises(RuntimeError, match="not linear"):
        measure.extrapolate({1: 100, 4: 401})


@interpreted
def test_what_an_op_moves() -> None:
    counted = measure.count_op("admit")
    assert set(counted) == {case.name for case in ops.cases("admit")}
    for found in counted.values():
        assert (found.launches, found.operations, found.max_error) == (1, 0, 0.0)
        assert found.kernels == found.floor
        assert list(found.kernels) == [1, 2, 4, 16, 64, 256]


def _example(offset: int, error: float) -> Any:
    def make(batch: int) -> ops.Example:
        cells = torch.zeros(4, dtype=torch.int32)
        return ops.Example(lambda: _count_up[(1,)](cells[:2], offset), lambda _: error)

    return make


@interpreted
def test_a_kernel_that_leaves_its_operands_is_refused() -> None:
    assert measure.count(_example(1, 0.25)).max_error == 0.25
    with pytest.raises(RuntimeError, match="outside every operand"):
        measure.count(_example(3, 0.0))
