"""Cache slots and packed weights of the CPU platform."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.layers.linear import ReplicatedLinear

from dspark_sglang.serving.cpu.packing import (
    PackedLinearMethod,
    is_packed,
    pack,
    pack_model,
    packed_linear,
    pad_index,
    padded_rows,
    row_counts,
)
from dspark_sglang.serving.cpu.platform import assign_slots, cache_slots

# --- slots ----------------------------------------------------------------------------------------


@given(
    spans=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), min_size=1, max_size=5),
    data=st.data(),
)
def test_reading_slots_inverts_writing_them(
    spans: list[tuple[int, int]], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(8)))[: len(spans)]
    start = torch.tensor([low for low, _ in spans])
    end = start + torch.tensor([length for _, length in spans])
    table = torch.full((8, 40), -1, dtype=torch.int32)
    slots = torch.randperm(100)[: int((end - start).sum())]
    requests = torch.tensor(order)
    assign_slots(requests, table, start, end, slots, len(spans))
    where = {"req_pool_indices": requests, "start_offset": start, "end_offset": end}
    found = cache_slots(req_to_token=table, **where)
    assert torch.equal(found, slots)
    assert found.dtype == torch.int64
    assert int((table >= 0).sum()) == len(slots)
    for request, low, high in zip(order, start.tolist(), end.tolist(), strict=True):
        assert bool((table[request, low:high] >= 0).all())


# --- packed weights -------------------------------------------------------------------------------


def supported(dtype: torch.dtype) -> bool:
    """Whether oneDNN has matrix kernels of this type here."""
    available = torch.backends.mkldnn.is_available()
    return available and (
        dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


TYPES = [
    pytest.param(dtype, marks=pytest.mark.skipif(not supported(dtype), reason="not in oneDNN here"))
    for dtype in (torch.bfloat16, torch.float32)
]
types = pytest.mark.parametrize("dtype", TYPES, ids=["bfloat16", "float32"])


def close(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> None:
    """Within two roundings of the exact product."""
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias)
    assert found.dtype is weight.dtype
    unit = torch.finfo(weight.dtype).eps
    scale = math.sqrt(weight.shape[1])
    share = 0.25 if weight.dtype is torch.bfloat16 else 16.0  # float32 also sums in it
    torch.testing.assert_close(found.double(), exact, atol=scale * unit * share, rtol=unit)


@types
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rows", [*range(1, 10), 16, 17, 100, 300, 1100])
def test_packed_linear_is_linear(rows: int, bias: bool, dtype: torch.dtype) -> None:
    weight, x = torch.randn(96, 48).to(dtype), torch.randn(rows, 48).to(dtype)
    added = torch.randn(96).to(dtype) if bias else None
    found = packed_linear(x, pack(weight), added)
    assert found.shape == (rows, 96)
    close(found, x, weight, None if added is None else added.double())


def test_rows_are_padded_to_few_numbers_and_not_far() -> None:
    numbers = range(4097)
    found = [padded_rows(n) for n in numbers]
    assert found[:17] == list(range(17)) and len(set(found)) < 70
    assert all(
        n <= padded <= max(n + 15, n * 1.3) for n, padded in zip(numbers, found, strict=True)
    )
    assert all(padded_rows(padded) == padded for padded in set(found))
    assert row_counts(4096).tolist() == sorted(set(found[1:]))
    assert row_counts(20).tolist() == [*range(1, 17), 32]


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 40])
def test_an_index_is_padded_with_its_last_row(rows: int) -> None:
    index = torch.arange(rows) * 3
    found = pad_index(index)
    assert len(found) == padded_rows(rows) and found[:rows].tolist() == index.tolist()
    assert set(found[rows:].tolist()) <= {3 * (rows - 1)}


@types
def test_packed_linear_takes_strided_rows(dtype: torch.dtype) -> None:
    weight, wide = torch.randn(96, 48).to(dtype), torch.randn(5, 100).to(dtype)
    x = wide[:, 20:68]
    close(packed_linear(x, pack(weight), None), x, weight, None)


@types
def test_a_packed_layer_falls_back_for_another_type_of_input(dtype: torch.dtype) -> None:
    layer = ReplicatedLinear(48, 96, bias=False, params_dtype=dtype)
    layer.weight.data.normal_()
    method = PackedLinearMethod()
    method.process_weights_after_loading(layer)
    x = torch.randn(4, 48).bfloat16()
    for given_ in (x, x.float()):
        close(method.apply(layer, given_), x, layer.weight, None)


@types
def test_a_model_is_packed_where_it_can_be(dtype: torch.dtype) -> None:
    model = torch.nn.ModuleDict(
        {
            "plain": ReplicatedLinear(48, 96, bias=False, params_dtype=dtype),
            "sixteen": ReplicatedLinear(48, 96, bias=False, params_dtype=torch.float16),
            "other": torch.nn.Linear(48, 96, dtype=dtype),
        }
    )
    model["plain"].weight.data.normal_()
    assert not is_packed(model)
    assert pack_model(model) == 1 and is_packed(model)
    assert isinstance(model["plain"].quant_method, PackedLinearMethod)
    x = torch.randn(3, 48).to(dtype)
    close(model["plain"](x)[0], x, model["plain"].weight, None)
    # Loading again packs again.
    model["plain"].weight.data.normal_()
    model["plain"].quant_method.process_weights_after_loading(model["plain"])
    close(model["plain"](x)[0], x, model["plain"].weight, None)
