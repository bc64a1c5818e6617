"""Keys and values into the draft's pool: the reference, and the kernel against it.

Tolerances. In float32 the error is a few units in the last place of a sum of squares, far below
1e-5. In bfloat16 the key is rounded twice, before it turns and when it is stored; each rounding is
at most 2^-9 of a value, and a rotation adds two of the first kind: 2^-9 (2 max|y| + |K|), with a
little room for float32. Values are copied and compared exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from benchmarks import traffic
from dspark_kernels.kv_inject import Pools, kv_inject, pools, rope_table
from dspark_kernels.kv_inject.reference import reference
from dspark_kernels.support.backend import LAUNCHES
from dspark_kernels.support.errors import OperandError
from dspark_sglang.layouts.dense.reference import rotate

EPS = 1e-6
SLOTS, POSITIONS = 37, 50


class Shape(NamedTuple):
    rows: int
    layers: int
    heads: int
    dim: int
    rotary: int
    dtype: torch.dtype = torch.float32


SHAPES = {
    "no-rows": Shape(0, 2, 2, 16, 16),
    "one-of-all": Shape(1, 1, 1, 2, 2),
    "odd": Shape(7, 3, 3, 24, 24),
    "half-turns": Shape(5, 2, 2, 32, 16),
    "odd-width": Shape(5, 1, 5, 40, 12),
    "bfloat16": Shape(9, 2, 8, 64, 64, torch.bfloat16),
    "bfloat16-half-turns": Shape(4, 1, 3, 48, 24, torch.bfloat16),
    "float16": Shape(3, 2, 2, 16, 16, torch.float16),
}


class Operands(NamedTuple):
    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    weight: torch.Tensor
    table: torch.Tensor


def operands(shape: Shape, device: torch.device) -> Operands:
    """Rows of which every third is not accepted; keys and values are views of one projection."""
    random = torch.Generator().manual_seed(11)
    width = shape.heads * shape.dim
    fused = torch.randn(shape.rows, shape.layers, 2, width, generator=random).to(shape.dtype)
    slots = torch.randperm(SLOTS, generator=random)[: shape.rows]
    slots[2::3] = -1
    fused = fused.to(device)
    return Operands(
        fused[:, :, 0],
        fused[:, :, 1],
        torch.randint(POSITIONS, (shape.rows,), generator=random).to(device),
        slots.to(device),
        torch.randn(shape.layers, shape.dim, generator=random).to(device, shape.dtype),
        rope_table(POSITIONS, shape.rotary, 10000.0).to(device),
    )


def poisoned(shape: Shape, device: torch.device) -> Pools:
    def fresh() -> list[torch.Tensor]:
        size = (SLOTS, shape.heads, shape.dim)
        return [
            torch.full(size, torch.nan, dtype=shape.dtype, device=device)
            for _ in range(shape.layers)
        ]

    return pools(fresh(), fresh())


def run(
    given: Operands, shape: Shape, backend: Any = "triton"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, ``[L, slots, heads, dim]``, after injection into poisoned pools."""
    into = poisoned(shape, given.k.device)
    kv_inject(*given, into, eps=EPS, backend=backend)
    return torch.stack(into.keys).cpu(), torch.stack(into.values).cpu()


def exact(given: Operands, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float64 from the reference."""
    size = (shape.layers, SLOTS, shape.heads, shape.dim)
    keys, values = (torch.full(size, torch.nan, dtype=torch.float64) for _ in range(2))
    wide = Operands(*(t.cpu() for t in given))
    wide = wide._replace(k=wide.k.double(), v=wide.v.double())
    reference(*wide, list(keys), list(values), eps=EPS, dtype=torch.float64)
    return keys, values


def rounding(dtype: torch.dtype, found: torch.Tensor) -> torch.Tensor | float:
    """The bound of the module's docstring."""
    unit = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-22}[dtype]
    largest = found.abs().amax(dim=-1, keepdim=True).nan_to_num()
    # |y| of a pair is the pair's length, which turning keeps: at most sqrt(2) times its larger part.
    return 1.05 * unit * (2 * 2**0.5 * largest + found.abs().nan_to_num()) + 1e-6


# --- the reference -------------------------------------------------------------------------------


def test_the_reference_on_a_case_worked_by_hand() -> None:
    # Mean square 4: normed to (1, 1), gained to (1, 2); a quarter turn gives (-2, 1).
    keys, values = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    k, v = torch.tensor([[[2.0, 2.0]]]), torch.tensor([[[5.0, 6.0]]])
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    gain = torch.tensor([[1.0, 2.0]])
    reference(
        k, v, torch.tensor([1]), torch.tensor([1]), gain, table, list(keys), list(values), eps=0.0
    )
    assert keys.flatten().tolist() == [0.0, 0.0, -2.0, 1.0]
    assert values.flatten().tolist() == [0.0, 0.0, 5.0, 6.0]


def test_the_reference_is_what_the_drafter_computes() -> None:
    shape = SHAPES["odd"]
    given = operands(shape, torch.device("cpu"))
    keys, values = run(given, shape, backend="torch")
    accepted = given.slots >= 0
    for layer in range(shape.layers):
        heads = given.k[:, layer].view(-1, shape.heads, shape.dim)
        normed = torch.nn.functional.rms_norm(heads, (shape.dim,), given.weight[layer], EPS)
        turned = rotate(normed, given.positions, 10000.0)
        found = keys[layer][given.slots[accepted]]
        torch.testing.assert_close(found, turned[accepted], rtol=0, atol=1e-4)
        copied = given.v[:, layer].view(-1, shape.heads, shape.dim)
        assert torch.equal(values[layer][given.slots[accepted]], copied[accepted])


def test_turning_by_a_shared_amount_keeps_products_of_keys() -> None:
    table = rope_table(POSITIONS, 16, 10000.0)
    rows = torch.randn(2, 1, 16)
    products = []
    for shift in (0, 13):
        into = pools([torch.zeros(2, 1, 16)], [torch.zeros(2, 1, 16)])
        positions, slots = torch.tensor([3 + shift, 8 + shift]), torch.arange(2)
        kv_inject(rows, rows, positions, slots, torch.ones(1, 16), table, into, eps=EPS)
        products.append((into.keys[0][0] * into.keys[0][1]).sum())
    torch.testing.assert_close(products[0], products[1], rtol=0, atol=1e-5)


def test_auto_on_a_cpu_is_the_reference() -> None:
    shape, before = SHAPES["odd"], LAUNCHES["kv_inject"]
    run(operands(shape, torch.device("cpu")), shape, backend="auto")
    assert LAUNCHES["kv_inject"] == before


# --- the kernel ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_agrees_with_float64(name: str, device: torch.device) -> None:
    shape = SHAPES[name]
    given, before = operands(shape, device), LAUNCHES["kv_inject"]
    keys, values = run(given, shape)
    right_keys, right_values = exact(given, shape)
    # Poison stays exactly where nothing is to be written.
    assert torch.equal(keys.isnan(), right_keys.isnan())
    error = (keys.double() - right_keys).abs().nan_to_num()
    assert (error <= rounding(shape.dtype, right_keys)).all()
    assert torch.equal(values.double().nan_to_num(-1), right_values.nan_to_num(-1))
    # One launch for all layers, none for no rows.
    assert LAUNCHES["kv_inject"] == before + (shape.rows > 0)


def test_the_kernel_rounds_where_the_reference_does(device: torch.device) -> None:
    # Both round twice; a float32 sum in another order may move a value across a rounding edge.
    shape = SHAPES["bfloat16"]
    given = operands(shape, device)
    keys, torch_keys = run(given, shape)[0], run(given, shape, backend="torch")[0]
    different = (keys != torch_keys) & ~keys.isnan()
    assert different.float().mean() < 0.01


def test_rows_that_were_not_accepted_are_not_read(device: torch.device) -> None:
    shape = SHAPES["odd"]
    given = operands(shape, device)
    clean = run(given, shape)
    skipped = given.slots < 0
    given.k[skipped] = torch.nan
    given.v[skipped] = torch.inf
    given.positions[skipped] = 2**62
    for a, b in zip(run(given, shape), clean, strict=True):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("slot", [-1, -(2**40), SLOTS, 2**31, 2**62], ids=str)
def test_a_slot_outside_the_pool_is_not_written(
    slot: int, backend: Any, device: torch.device
) -> None:
    shape = SHAPES["odd"]
    given = operands(shape, device)
    given.slots[:] = slot
    for written in run(given, shape, backend):
        assert written.isnan().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("position", [-1, POSITIONS, 2**40], ids=str)
def test_a_position_outside_the_table_shows_as_nan(
    position: int, backend: Any, device: torch.device
) -> None:
    shape = SHAPES["half-turns"]
    given = operands(shape, device)
    given.positions[0] = position
    keys, values = run(given, shape, backend)
    slot = int(given.slots[0])
    assert keys[:, slot, :, : shape.rotary].isnan().all()
    assert not values[:, slot].isnan().any()
    assert not keys[:, int(given.slots[1])].isnan().any()


def test_nan_in_a_row_stays_in_its_head(device: torch.device) -> None:
    shape = SHAPES["odd"]
    given = operands(shape, device)
    given.k[0, 1, shape.dim] = torch.nan
    keys, _ = run(given, shape)
    slots = given.slots[given.slots >= 0].cpu()
    bad = keys[:, slots].isnan().all(dim=-1)
    assert bad.nonzero().tolist() == [[1, 0, 1]]


def test_slots_beyond_int32_offsets_are_written(device: torch.device) -> None:
    # Slots 2^30 elements apart in memory that is reserved and, between the slots, never touched.
    shape = Shape(3, 1, 1, 8, 8, torch.bfloat16)
    stride = 2**30
    far = [
        torch.empty(2 * stride + 8, dtype=torch.bfloat16, device=device).as_strided(
            (3, 1, 8), (stride, 8, 1)
        )
        for _ in range(2)
    ]
    given = operands(shape, device)._replace(slots=torch.tensor([2, 0, 1], device=device))
    kv_inject(*given, pools(far[:1], far[1:]), eps=EPS, backend="triton")
    for written, right in zip(far, run(given, shape), strict=True):
        assert torch.equal(written.cpu(), right[0, :3])


@pytest.mark.parametrize("which", ["k", "v"])
def test_rows_beyond_int32_offsets_are_read(which: str, device: torch.device) -> None:
    shape = Shape(3, 1, 1, 8, 8, torch.bfloat16)
    given = operands(shape, device)._replace(slots=torch.arange(3, device=device))
    memory = torch.empty(2**31 + 8, dtype=torch.bfloat16, device=device)
    far = memory.as_strided((3, 1, 8), (2**30, 8, 1))
    far.copy_(getattr(given, which))
    for a, b in zip(run(given._replace(**{which: far}), shape), run(given, shape), strict=True):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


def test_nothing_waits_for_the_device(device: torch.device, no_host_sync: Any) -> None:
    shape = SHAPES["odd"]
    given, into = operands(shape, device), poisoned(shape, device)
    with no_host_sync():
        kv_inject(*given, into, eps=EPS, backend="triton")


@pytest.mark.gpu
def test_a_captured_call_replays_into_other_slots(device: torch.device, captured: Any) -> None:
    shape = SHAPES["bfloat16"]
    given, into = operands(shape, device), poisoned(shape, device)
    replay = captured(lambda: kv_inject(*given, into, eps=EPS))
    given.slots.copy_(given.slots.flip(0))
    for pool in (*into.keys, *into.values):
        pool.fill_(torch.nan)
    replay()
    keys, values = run(given, shape)
    assert torch.equal(torch.stack(into.keys).cpu().nan_to_num(-1), keys.nan_to_num(-1))
    assert torch.equal(torch.stack(into.values).cpu().nan_to_num(-1), values.nan_to_num(-1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
@pytest.mark.parametrize("name", ["odd", "half-turns", "bfloat16"])
def test_the_bytes_of_accepted_rows_are_moved(name: str) -> None:
    shape = SHAPES[name]
    given, into = operands(shape, torch.device("cpu")), poisoned(shape, torch.device("cpu"))
    named = {
        f"{kind}.{i}": t for kind in ("keys", "values") for i, t in enumerate(getattr(into, kind))
    }
    counted = traffic.count(
        lambda: kv_inject(*given, into, eps=EPS, backend="triton"), reached=named
    )
    accepted, size = int((given.slots >= 0).sum()), given.k.element_size()
    row = shape.heads * shape.dim * size
    assert counted.stored == dict.fromkeys(named, accepted * row)
    moved = sum(counted.loaded[f"kv_inject_kernel.{x}"] for x in ("k", "v"))
    assert moved == 2 * shape.layers * accepted * row
    assert counted.loaded["kv_inject_kernel.slots"] == shape.layers * shape.rows * 8
    assert counted.loaded["kv_inject_kernel.positions"] == shape.layers * accepted * 8
    assert (counted.outside, counted.launches) == (0, 1)
    if size == 2:
        # Each layer's program reads its row's slot, position, rotation, gain and addresses again.
        each = accepted * (4 * row + 8 + 4 * shape.rotary + 2 * shape.dim + 16)
        assert counted.kernels == shape.layers * (each + shape.rows * 8)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        pytest.param("k", torch.zeros(7, 72), "k has shape [7, 72]", id="no-layers"),
        pytest.param("k", torch.zeros(7, 3, 72).double(), "k has dtype float64", id="k-dtype"),
        pytest.param("v", torch.zeros(6, 3, 72), "v has shape [6, 3, 72]", id="v-rows"),
        pytest.param("v", torch.zeros(7, 72, 3).mT, "v has stride 3 in its last", id="v-stride"),
        pytest.param(
            "slots", torch.zeros(7, dtype=torch.int32), "slots has dtype int32", id="slots"
        ),
        pytest.param("positions", torch.zeros(7), "positions has dtype float32", id="positions"),
        pytest.param("weight", torch.ones(24), "weight has shape [24]", id="one-gain"),
        pytest.param("table", torch.ones(50, 26), "turns 26 of 24 elements", id="wide-table"),
        pytest.param("table", torch.ones(50, 7), "turns 7 of 24 elements", id="odd-table"),
        pytest.param(
            "table", torch.ones(50, 24, device="meta"), "table is on meta", id="table-device"
        ),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_wrong_operand_is_refused(
    backend: Any, name: str, value: torch.Tensor, message: str
) -> None:
    shape, cpu = SHAPES["odd"], torch.device("cpu")
    given = operands(shape, cpu)._replace(**{name: value})
    with pytest.raises(OperandError) as caught:
        kv_inject(*given, poisoned(shape, cpu), eps=EPS, backend=backend)
    assert message in str(caught.value)


def _pool(*, slots: int = 5, padding: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(slots, 2, 8 + padding, dtype=dtype)[:, :, :8]


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        pytest.param([], [], "0 pools of keys", id="no-layers"),
        pytest.param([_pool()], [], "1 pools of keys and 0 of values", id="no-values"),
        pytest.param([_pool()], [_pool(slots=4)], "values[0] has shape [4, 2, 8]", id="shapes"),
        pytest.param(
            [_pool(), _pool(dtype=torch.bfloat16)],
            [_pool(), _pool()],
            "keys[1] has dtype bfloat16",
            id="dtypes",
        ),
        pytest.param(
            [_pool(padding=8)], [_pool()], "keys[0] has strides [32, 16, 1]", id="padded-heads"
        ),
        pytest.param(
            [torch.zeros(100)[1:81].view(5, 2, 8)], [_pool()], "leaves 4 modulo 16", id="unaligned"
        ),
    ],
)
def test_wrong_pools_are_refused(
    keys: list[torch.Tensor], values: list[torch.Tensor], message: str
) -> None:
    with pytest.raises(OperandError) as caught:
        pools(keys, values)
    assert message in str(caught.value)
