"""The CPU platform's attention against a loop over requests in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.ragged_verify import RaggedVerifyLayout

from dspark_sglang.serving.cpu.attention import (
    _CALL,
    _KEY,
    CpuAttentionBackend,
    group_requests,
)
from dspark_sglang.serving.cpu.platform import _kv_pool_cls

# --- a paged cache and a batch ------------------------------------------------------------------


@dataclass
class Batch:
    """The fields of SGLang's ForwardBatch that attention reads."""

    forward_mode: ForwardMode
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    input_ids: torch.Tensor
    out_cache_loc: torch.Tensor
    extend_seq_lens: torch.Tensor | None = None
    spec_info: Any = None
    out_cache_loc_is_physical: bool = True


class Cache:
    """Requests with ``kv`` cached positions each, scattered over SGLang's own KV pool."""

    def __init__(self, kv_lens: Sequence[int], *, kv_heads: int, dim: int, layers: int = 2) -> None:
        size, context = sum(kv_lens) + 16, max(kv_lens) + 3
        self.req_to_token_pool = SimpleNamespace(
            req_to_token=torch.zeros((len(kv_lens) + 3, context), dtype=torch.int32)
        )
        self.token_to_kv_pool = _kv_pool_cls()(
            size=size,
            page_size=1,
            dtype=torch.float32,
            head_num=kv_heads,
            head_dim=dim,
            layer_num=layers,
            device="cpu",
            enable_memory_saver=False,
        )
        for layer in range(layers):
            for buffer in (self.keys(layer), self.values(layer)):
                buffer.normal_()
        # Slot 0 is SGLang's dummy: padding points there, so it must never be seen.
        self.keys(0)[0] = self.values(0)[0] = 1e4
        self.requests = torch.randperm(len(kv_lens) + 3)[: len(kv_lens)]
        free = torch.randperm(size - 1)[: sum(kv_lens)] + 1
        self.slots = list(free.split(list(kv_lens)))
        for request, taken in zip(self.requests.tolist(), self.slots, strict=True):
            self.req_to_token_pool.req_to_token[request, : len(taken)] = taken.int()

    def keys(self, layer: int) -> torch.Tensor:
        return self.token_to_kv_pool.get_key_buffer(layer)

    def values(self, layer: int) -> torch.Tensor:
        return self.token_to_kv_pool.get_value_buffer(layer)

    def own(self, q_lens: Sequence[int]) -> torch.Tensor:
        """The slots of every request's last ``q`` positions."""
        return torch.cat([s[len(s) - q :] for s, q in zip(self.slots, q_lens, strict=True)])


def layout(verify_lens: Sequence[int], *, on_host: bool) -> RaggedVerifyLayout:
    lens = torch.tensor(verify_lens, dtype=torch.int32)
    ends = torch.nn.functional.pad(lens.cumsum(0), (1, 0))
    return RaggedVerifyLayout(
        verify_lens=lens,
        graph_num_tokens=sum(verify_lens),
        extend_start_loc=ends[:-1],
        qo_indptr_device=ends,
        verify_lens_cpu=list(verify_lens) if on_host else None,
        total_verify_tokens=sum(verify_lens) if on_host else None,
    )


def batch_of(mode: str, cache: Cache, q_lens: Sequence[int]) -> Batch:
    kv_lens = torch.tensor([len(taken) for taken in cache.slots])
    lens = torch.tensor(list(q_lens))
    common = {
        "req_pool_indices": cache.requests,
        "input_ids": torch.zeros(sum(q_lens), dtype=torch.int64),
        "out_cache_loc": cache.own(q_lens),
    }
    if mode == "decode":
        return Batch(ForwardMode.DECODE, seq_lens=kv_lens, **common)
    if mode == "extend":
        return Batch(ForwardMode.EXTEND, seq_lens=kv_lens, extend_seq_lens=lens, **common)
    spec = SimpleNamespace()  # a block of the same size for everybody carries no layout
    if mode.startswith("ragged"):
        on_host = mode == "ragged-host"
        spec = SimpleNamespace(ragged_verify_layout=layout(q_lens, on_host=on_host))
    # In verification SGLang's seq_lens does not count the rows being verified.
    return Batch(ForwardMode.TARGET_VERIFY, seq_lens=kv_lens - lens, spec_info=spec, **common)


def reference(
    query: torch.Tensor, cache: Cache, layer: RadixAttention, q_lens: Sequence[int]
) -> torch.Tensor:
    """Attention of one row, one head at a time."""
    keys, values = cache.keys(layer.layer_id).double(), cache.values(layer.layer_id).double()
    heads, share = layer.tp_q_head_num, layer.tp_q_head_num // layer.tp_k_head_num
    rows = query.double().view(-1, heads, layer.qk_head_dim)
    out, row = [], 0
    for taken, q in zip(cache.slots, q_lens, strict=True):
        kv = len(taken)
        for position in range(kv - q, kv):
            last = position if layer.attn_type is AttentionType.DECODER else kv - 1
            window = layer.sliding_window_size
            start = max(0, position - window) if window >= 0 else 0
            seen = taken[start : last + 1]
            for head in range(heads):
                key, value = keys[seen, head // share], values[seen, head // share]
                weight = torch.softmax(key @ rows[row, head] * layer.scaling, 0)
                out.append(weight @ value)
            row += 1
    return torch.stack(out).view(row, -1)


def make_layer(heads: int, kv_heads: int, dim: int, **options: Any) -> RadixAttention:
    return RadixAttention(heads, dim, dim**-0.5, kv_heads, 0, **options)


def compare(
    mode: str,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    heads: tuple[int, int] = (4, 2),
    dim: int = 8,
    padded_rows: int = 0,
    **options: Any,
) -> CpuAttentionBackend:
    cache = Cache(kv_lens, kv_heads=heads[1], dim=dim)
    layer = make_layer(*heads, dim, **options)
    backend = CpuAttentionBackend(cache)
    batch = batch_of(mode, cache, q_lens)
    backend.init_forward_metadata(batch)
    rows = sum(q_lens)
    # SGLang hands slices of one fused projection: strided rows, contiguous heads.
    fused = torch.randn(rows, (heads[0] + 2 * heads[1]) * dim)
    widths = [heads[0] * dim, heads[1] * dim, heads[1] * dim]
    q, k, v = fused.split(widths, dim=-1)
    q = torch.cat([q, q.new_full((padded_rows, widths[0]), 7.0)]) if padded_rows else q
    k, v = k.reshape(rows, heads[1], dim), v.reshape(rows, heads[1], dim)
    found = backend.forward_extend(q, k, v, layer, batch)
    assert torch.equal(cache.keys(0)[batch.out_cache_loc], k)
    assert torch.equal(cache.values(0)[batch.out_cache_loc], v)
    assert found.shape == (rows + padded_rows, widths[0])
    wanted = reference(q[:rows], cache, layer, q_lens)
    torch.testing.assert_close(found[:rows].double(), wanted, atol=2e-5, rtol=2e-5)
    assert bool((found[rows:] == 0).all())
    return backend


GQA = pytest.mark.parametrize("heads", [(9, 3), (4, 4), (8, 1)], ids=["9q3kv", "mha", "mqa"])
DIM = pytest.mark.parametrize("dim", [8, 64, 80])


# --- against the loop ---------------------------------------------------------------------------


@GQA
@DIM
def test_decode(heads: tuple[int, int], dim: int) -> None:
    compare("decode", [1, 1, 1], [5, 9, 1], heads=heads, dim=dim)


@GQA
@DIM
def test_extend_after_a_cached_prefix(heads: tuple[int, int], dim: int) -> None:
    compare("extend", [4, 7, 5], [11, 7, 30], heads=heads, dim=dim)


@GQA
@pytest.mark.parametrize("mode", ["ragged-host", "ragged-device"])
def test_ragged_verification(heads: tuple[int, int], mode: str) -> None:
    compare(mode, [1, 6, 3, 8, 1], [40, 41, 17, 8, 2], heads=heads)


def test_many_requests_of_different_lengths() -> None:
    compare("decode", [1] * 40, [1 + 9 * i for i in range(40)])


def test_verification_of_equal_blocks() -> None:
    compare("block", [6, 6, 6], [40, 41, 17])


@GQA
def test_bidirectional_draft_block(heads: tuple[int, int]) -> None:
    options = {"attn_type": AttentionType.DECODER_BIDIRECTIONAL}
    compare("block", [5, 5, 5], [40, 41, 5], heads=heads, **options)
    compare("block", [5, 5], [21, 21], heads=heads, **options)


@pytest.mark.parametrize("window", [1, 4, 127])
@pytest.mark.parametrize("mode", ["decode", "extend", "ragged-host", "bidirectional"])
def test_sliding_window(mode: str, window: int) -> None:
    q_lens = [1, 1, 1] if mode == "decode" else [4, 4, 4] if mode == "bidirectional" else [3, 6, 1]
    options: dict[str, Any] = {"sliding_window_size": window}
    if mode == "bidirectional":
        options["attn_type"] = AttentionType.DECODER_BIDIRECTIONAL
        mode = "block"
    compare(mode, q_lens, [7, 150, 31], **options)


@pytest.mark.parametrize(
    ("mode", "q_lens", "kv_lens"),
    [
        ("decode", [1] * 6, [3, 900, 70, 4, 300, 1]),
        ("extend", [1, 40, 3, 2, 39, 64], [500, 40, 3, 65, 700, 64]),
        ("ragged-host", [8, 1, 2, 8, 1, 7], [600, 601, 9, 8, 100, 2000]),
    ],
    ids=["decode", "extend", "ragged"],
)
def test_very_different_lengths_share_a_batch(
    mode: str, q_lens: list[int], kv_lens: list[int]
) -> None:
    """Several groups, whose rows must come back in the batch's order."""
    backend = compare(mode, q_lens, kv_lens, heads=(9, 3))
    assert len(backend._groups) > 1


def test_one_request() -> None:
    compare("decode", [1], [1])
    compare("extend", [12], [12])
    compare("ragged-device", [1], [3])


@pytest.mark.parametrize("lens", [([3, 3], [9, 9]), ([3, 6, 1], [9, 300, 4])], ids=["one", "many"])
def test_rows_padded_for_a_graph_come_back_as_zeros(lens: tuple[list[int], list[int]]) -> None:
    compare("ragged-host", *lens, padded_rows=5)


@given(
    requests=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 200)), min_size=1, max_size=6),
    window=st.sampled_from([-1, 3]),
    kind=st.sampled_from([AttentionType.DECODER, AttentionType.DECODER_BIDIRECTIONAL]),
)
def test_any_ragged_batch(
    requests: list[tuple[int, int]], window: int, kind: AttentionType
) -> None:
    q_lens = [q for q, _ in requests]
    kv_lens = [q + prefix for q, prefix in requests]
    options = {"sliding_window_size": window, "attn_type": kind}
    compare("ragged-host", q_lens, kv_lens, heads=(2, 1), dim=4, **options)


def test_metadata_serves_layers_of_different_kinds() -> None:
    """Masks are built once a step and shared between layers: they must not be mixed up."""
    q_lens, cache = [3, 5], Cache([40, 45], kv_heads=2, dim=8)
    backend = CpuAttentionBackend(cache)
    batch = batch_of("ragged-host", cache, q_lens)
    backend.init_forward_metadata(batch)
    query = torch.randn(8, 32)
    layers = [
        make_layer(4, 2, 8),
        make_layer(4, 2, 8, sliding_window_size=2),
        make_layer(4, 2, 8, attn_type=AttentionType.DECODER_BIDIRECTIONAL),
        make_layer(4, 2, 8),
    ]
    for layer in layers:
        found = backend.forward_extend(query, None, None, layer, batch)
        wanted = reference(query, cache, layer, q_lens)
        torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=2e-5)


def test_without_saving_the_cache_stays() -> None:
    cache = Cache([6], kv_heads=2, dim=8)
    backend, batch = CpuAttentionBackend(cache), batch_of("decode", cache, [1])
    backend.init_forward_metadata(batch)
    before = cache.keys(0).clone()
    kv = torch.randn(1, 2, 8)
    args = (torch.randn(1, 32), kv, kv, make_layer(4, 2, 8), batch)
    backend.forward_decode(*args, save_kv_cache=False)
    assert torch.equal(cache.keys(0), before)


def test_unsupported_features_are_refused_by_name() -> None:
    cache = Cache([6], kv_heads=2, dim=8)
    backend, batch = CpuAttentionBackend(cache), batch_of("decode", cache, [1])
    backend.init_forward_metadata(batch)
    query = torch.randn(1, 32)
    with pytest.raises(NotImplementedError, match="logit_cap"):
        backend.forward_extend(query, None, None, make_layer(4, 2, 8, logit_cap=30.0), batch)
    with pytest.raises(NotImplementedError, match="sinks"):
        backend.forward_extend(query, None, None, make_layer(4, 2, 8), batch, sinks=query)


# --- grouping ------------------------------------------------------------------------------------


@given(
    requests=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 3000)), min_size=1, max_size=40)
)
def test_padding_is_bounded_and_every_row_is_in_one_group(requests: list[tuple[int, int]]) -> None:
    q_lens = [q for q, _ in requests]
    kv_lens = [q + prefix for q, prefix in requests]
    slots = [torch.arange(kv) for kv in kv_lens]
    rows: list[int] = []
    for group in group_requests(q_lens, kv_lens, slots):
        assert group.q <= max(16, 2 * int(group.q_lens.min()))
        # More than one call more would cost.
        padding = group.kv * group.batch - int(group.kv_lens.sum())
        assert padding * _KEY <= group.batch * _CALL
        taken = torch.arange(sum(q_lens)) if group.rows is None else group.rows
        assert len(taken) == group.batch * group.q
        rows += (taken if group.real is None else taken[group.real]).tolist()
    assert sorted(rows) == list(range(sum(q_lens)))


def padded_cost(runs: list[list[int]], q: int) -> float:
    """What attention over caches of these lengths costs, each run padded to its longest."""
    return sum(_CALL + (_KEY + q) * len(run) * max(run) for run in runs)


@given(
    kv_lens=st.lists(st.integers(1, 4000), min_size=1, max_size=8),
    q=st.integers(1, 8),
)
def test_no_other_cut_of_the_sorted_batch_costs_less(kv_lens: list[int], q: int) -> None:
    slots = [torch.arange(kv) for kv in kv_lens]
    found = group_requests([q] * len(kv_lens), kv_lens, slots)
    cost = padded_cost([group.kv_lens.tolist() for group in found], q)
    ordered = sorted(kv_lens)
    for cuts in itertools.product((False, True), repeat=len(ordered) - 1):
        runs = [[ordered[0]]]
        for length, cut in zip(ordered[1:], cuts, strict=True):
            if cut:
                runs.append([])
            runs[-1].append(length)
        assert cost <= padded_cost(runs, q) * (1 + 1e-9)
