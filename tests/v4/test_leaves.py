"""Each torch leaf of V4 against its contract, worked out here one number at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from scipy.linalg import hadamard as hadamard_matrix

pytest.importorskip("sglang")
from dspark_sglang.serving.cpu.v4 import (
    attention,
    compressor,
    indexer,
    layers,
    pages,
    rotary,
)

PAGE = 8


@pytest.fixture
def chance() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def normal(chance: torch.Generator, *size: int) -> torch.Tensor:
    return torch.randn(size, generator=chance)


def table(rows: int, rope: int, chance: torch.Generator) -> torch.Tensor:
    """A rotation of each position, of lengths that are not one as YaRN's need not be."""
    angle = normal(chance, rows, rope // 2)
    return torch.polar(torch.full_like(angle, 1.1), angle)


def turned(x: list[float], factors: list[complex]) -> list[float]:
    """The last numbers of ``x``, two by two, by complex factors."""
    start = len(x) - 2 * len(factors)
    out = list(x)
    for k, factor in enumerate(factors):
        pair = complex(x[start + 2 * k], x[start + 2 * k + 1]) * factor
        out[start + 2 * k], out[start + 2 * k + 1] = pair.real, pair.imag
    return out


def normed(x: list[float], eps: float, weight: list[float] | None = None) -> list[float]:
    size = math.sqrt(sum(v * v for v in x) / len(x) + eps)
    return [v / size * (1.0 if weight is None else weight[i]) for i, v in enumerate(x)]


def eighth(value: float, scale: float) -> float:
    held = max(-448.0, min(448.0, value / scale))
    return float(torch.tensor(held).to(torch.float8_e4m3fn).float()) * scale


def stored(latent: list[float]) -> list[float]:
    """A latent as it comes back from a packed page: tiles of 64 in fp8, the last 64 in bfloat16."""
    out = []
    for start in range(0, 448, 64):
        tile = latent[start : start + 64]
        scale = 2.0 ** math.ceil(math.log2(max(1e-4, *(abs(v) for v in tile)) / 448.0))
        out += [eighth(v, scale) for v in tile]
    return out + torch.tensor(latent[448:]).bfloat16().float().tolist()


def latent_cache(number: int, padding: int = 0) -> torch.Tensor:
    """Pages of packed latents, padded at the end as SGLang's are."""
    return torch.zeros((number, PAGE * 584 + padding), dtype=torch.uint8)


def test_a_packed_page_byte_by_byte(chance: torch.Generator) -> None:
    cache = latent_cache(3, padding=24)
    slots = torch.tensor([PAGE + 3, -1, 2])
    latents = normal(chance, 3, 512) * torch.tensor([[3.0], [1.0], [1e-7]])
    pages.store(cache, slots, latents, PAGE)
    assert int((cache != 0).any(1).sum()) == 2  # a negative slot writes nothing
    row = cache[1, 3 * 576 : 4 * 576]
    for tile in range(7):
        byte = int(cache[1, PAGE * 576 + 3 * 8 + tile])
        largest = float(latents[0, 64 * tile : 64 * tile + 64].abs().max())
        assert 2.0 ** (byte - 127) * 448 >= largest > 2.0 ** (byte - 128) * 448
        values = row[64 * tile : 64 * tile + 64].view(torch.float8_e4m3fn).float()
        wanted = latents[0, 64 * tile : 64 * tile + 64] / 2.0 ** (byte - 127)
        assert torch.equal(values, wanted.to(torch.float8_e4m3fn).float())
    assert torch.equal(row[448:].view(torch.bfloat16), latents[0, 448:].bfloat16())
    assert int(cache[1, PAGE * 576 + 3 * 8 + 7]) == 0
    found = pages.load(cache, slots[[0, 2]], PAGE)
    wanted = torch.tensor([stored(latents[i].tolist()) for i in (0, 2)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_indexer_keys_byte_by_byte(chance: torch.Generator) -> None:
    cache = torch.zeros((2, PAGE * 132), dtype=torch.uint8)
    keys = normal(chance, 2, 128)
    pages.store_index_keys(cache, torch.tensor([PAGE + 1, -1]), keys, PAGE)
    scale = float(keys[0].abs().max()) / 448
    assert float(cache[1, PAGE * 128 + 4 : PAGE * 128 + 8].view(torch.float32)) == pytest.approx(
        scale
    )
    found = pages.load_index_keys(cache, torch.tensor([1]), PAGE, 128)[0, 1]
    wanted = torch.tensor([eighth(v, scale) for v in keys[0].tolist()])
    torch.testing.assert_close(found, wanted)
    assert int((cache[0] != 0).sum()) == 0


@pytest.mark.parametrize("inverse", [False, True])
def test_rotation_in_place(chance: torch.Generator, inverse: bool) -> None:
    freqs, positions = table(9, 8, chance), torch.tensor([4, 0, 8])
    q, k = normal(chance, 3, 2, 8), normal(chance, 3, 1, 8)
    given = q.clone(), k.clone()
    rotary.fused_rope_inplace(q, k, freqs, positions, inverse)
    for found, before in zip((q, k), given, strict=True):
        for row in range(3):
            factors = freqs[positions[row]]
            factors = (factors.conj() if inverse else factors).tolist()
            for head in range(before.shape[1]):
                wanted = turned(before[row, head].tolist(), factors)
                torch.testing.assert_close(found[row, head], torch.tensor(wanted))


@pytest.mark.parametrize("eps", [None, 1e-6])
def test_queries_normed_and_turned(chance: torch.Generator, eps: float | None) -> None:
    freqs, positions = table(5, 4, chance), torch.tensor([3, 1])
    q, out = normal(chance, 2, 3, 10), torch.empty(2, 3, 10)
    rotary.fused_q_norm_rope(q, out, eps, freqs, positions)
    for row in range(2):
        for head in range(3):
            x = q[row, head].tolist()
            x = x if eps is None else normed(x, eps)
            wanted = turned(x, freqs[positions[row]].tolist())
            torch.testing.assert_close(out[row, head], torch.tensor(wanted))


def test_latents_normed_turned_and_stored(chance: torch.Generator) -> None:
    freqs, positions = table(5, 64, chance), torch.tensor([3, 1])
    kv, weight = normal(chance, 2, 512), normal(chance, 512)
    latents = [
        turned(normed(kv[i].tolist(), 1e-6, weight.tolist()), freqs[positions[i]].tolist())
        for i in range(2)
    ]
    cache, slots = latent_cache(2), torch.tensor([9, 4])
    rotary.fused_k_norm_rope_flashmla(kv, weight, 1e-6, freqs, positions, slots, cache, PAGE)
    found = pages.load(cache, slots, PAGE)
    torch.testing.assert_close(
        found, torch.tensor([stored(x) for x in latents]), rtol=0.07, atol=1e-3
    )
    again = latent_cache(2)
    rotary.fused_store_cache(torch.tensor(latents), again, slots, page_size=PAGE, type="flashmla")
    assert torch.equal(pages.load(again, slots, PAGE), torch.tensor([stored(x) for x in latents]))
    rotary.fused_norm_rope_inplace(kv, weight, 1e-6, freqs, positions)
    torch.testing.assert_close(kv, torch.tensor(latents))


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("extra", [False, True])
def test_attention(chance: torch.Generator, rows: int, extra: bool) -> None:
    heads, most, number = 3, 6, 5
    caches = [latent_cache(number), latent_cache(number)]
    held = [normal(chance, number * PAGE, 512) for _ in caches]
    for cache, latents in zip(caches, held, strict=True):
        pages.store(cache, torch.arange(number * PAGE), latents, PAGE)
    tables = [torch.randint(-1, number * PAGE, (rows, 1, most), generator=chance) for _ in caches]
    lengths = torch.randint(0, most + 1, (rows,), generator=chance)
    q, sink = normal(chance, rows, 1, heads + 1, 512), normal(chance, heads)
    more: dict[str, Any] = {}
    if extra:
        more = {
            "extra_k_cache": caches[1][:, : PAGE * 584].view(number, PAGE, 1, 584),
            "extra_indices_in_kvcache": tables[1],
            "extra_topk_length": None,
        }
    out, _ = attention.flash_mla_with_kvcache(
        q,
        caches[0][:, : PAGE * 584].view(number, PAGE, 1, 584),
        head_dim_v=512,
        softmax_scale=0.05,
        indices=tables[0],
        topk_length=lengths,
        attn_sink=sink,
        **more,
    )
    assert int((out[:, 0, heads] != 0).sum()) == 0  # a head that pads
    for row in range(0, rows, 97 if rows > 100 else 1):
        seen = {(0, s) for s in tables[0][row, 0, : int(lengths[row])].tolist() if s >= 0}
        if extra:
            seen |= {(1, s) for s in tables[1][row, 0].tolist() if s >= 0}
        keys = [torch.tensor(stored(held[c][s].tolist())) for c, s in sorted(seen)]
        for head in range(heads):
            weights = [math.exp(0.05 * float(q[row, 0, head] @ key)) for key in keys]
            total = sum(weights) + math.exp(float(sink[head]))
            wanted = sum(
                (w / total * k for w, k in zip(weights, keys, strict=True)), torch.zeros(512)
            )
            torch.testing.assert_close(out[row, 0, head], wanted, rtol=1e-4, atol=1e-5)


def test_the_hadamard_transform(chance: torch.Generator) -> None:
    x = normal(chance, 3, 2, 128)
    wanted = x @ torch.tensor(hadamard_matrix(128), dtype=torch.float32) / math.sqrt(128)
    torch.testing.assert_close(indexer.hadamard(x), wanted)


def test_queries_of_the_indexer(chance: torch.Generator) -> None:
    freqs, positions = table(5, 64, chance), torch.tensor([3, 1])
    q, weight = normal(chance, 2, 3, 128), normal(chance, 2, 3)
    fp8, weights = indexer.fused_q_indexer_rope_hadamard_quant(q, weight, 0.25, freqs, positions)
    matrix = torch.tensor(hadamard_matrix(128), dtype=torch.float32) / math.sqrt(128)
    for row in range(2):
        for head in range(3):
            x = turned(q[row, head].tolist(), freqs[positions[row]].tolist())
            y = torch.tensor(x) @ matrix
            scale = float(y.abs().max()) / 448
            torch.testing.assert_close(
                fp8[row, head].float() * scale, y, rtol=0.07, atol=scale * 0.01
            )
            wanted = float(weight[row, head]) * 0.25 * scale
            assert float(weights[row, head]) == pytest.approx(wanted, rel=1e-5)


def test_scores_of_the_indexer(chance: torch.Generator) -> None:
    number, rows, heads = 4, 3, 2
    cache = torch.zeros((number, PAGE * 132), dtype=torch.uint8)
    keys = normal(chance, number * PAGE, 128)
    pages.store_index_keys(cache, torch.arange(number * PAGE), keys, PAGE)
    q = normal(chance, rows, 1, heads, 128).to(torch.float8_e4m3fn)
    weight, lens = normal(chance, rows, heads), torch.tensor([0, 5, 13])
    where = torch.tensor([[0, 1], [3, 1], [2, 0]])
    found = indexer.fp8_paged_mqa_logits(
        q, cache.view(number, PAGE, 1, 132), weight, lens, where, None, 17
    )
    assert found.shape == (rows, 17)
    for row in range(rows):
        for block in range(17):
            if block >= lens[row]:
                assert float(found[row, block]) == -math.inf
                continue
            slot = int(where[row, block // PAGE]) * PAGE + block % PAGE
            scale = float(keys[slot].abs().max()) / 448
            key = torch.tensor([eighth(v, scale) for v in keys[slot].tolist()])
            wanted = sum(
                float(weight[row, h]) * max(0.0, float(q[row, 0, h].float() @ key))
                for h in range(heads)
            )
            assert float(found[row, block]) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("most", [2, 5, 40])
def test_the_best_blocks(chance: torch.Generator, most: int) -> None:
    rows, width = 4, 24
    scores = torch.randint(0, 4, (rows, width), generator=chance).float()  # many are equal
    lens = torch.tensor([0, 3, 11, 24])
    where = torch.randint(0, 50, (rows, 3), generator=chance)
    out = torch.empty((rows, most), dtype=torch.int32)
    numbers = torch.empty_like(out)
    indexer.topk_transform_paged(scores, lens, where, out, PAGE, numbers)
    for row in range(rows):
        ended = range(int(lens[row]))
        best = sorted(ended, key=lambda b, row=row: (-float(scores[row, b]), b))[:most]
        best = list(ended) if len(ended) <= most else best
        kept = numbers[row, : len(best)].tolist()
        assert sorted(kept) == sorted(best)
        assert set(numbers[row, len(best) :].tolist()) <= {-1}
        assert set(out[row, len(best) :].tolist()) <= {-1}
        for block, slot in zip(kept, out[row].tolist(), strict=False):
            assert slot == int(where[row, block // PAGE]) * PAGE + block % PAGE


class Rings(NamedTuple):
    """Two requests whose compressor states lie in rings, driven as SGLang drives them."""

    ratio: int
    ring: int
    page: int
    req_to_token: torch.Tensor
    full_to_state: torch.Tensor
    buffer: torch.Tensor

    @classmethod
    def make(cls, ratio: int, width: int, chance: torch.Generator) -> Rings:
        page, requests, length = 256, 5, 1024
        ring = 16 if ratio == 4 else 256  # with speculation
        chosen = torch.randperm(requests * length // page, generator=chance)
        req_to_token = (chosen[:, None] * page + torch.arange(page)).view(requests, length)
        shuffled = torch.randperm(requests * length // page, generator=chance)
        full_to_state = (shuffled[:, None] * page + torch.arange(page)).view(-1)
        rows = requests * (length // page * ring if ratio == 4 else ring)
        buffer = torch.full((rows // ratio, ratio, width), math.nan)
        return cls(ratio, ring, page, req_to_token.int(), full_to_state, buffer)

    def plan(self, requests: list[int], lens: list[int], extend: list[int] | None) -> Any:
        given = {
            "compress_ratio": self.ratio,
            "req_pool_indices": torch.tensor(requests),
            "req_to_token": self.req_to_token,
            "full_to_state": self.full_to_state,
            "seq_lens": torch.tensor(lens),
            "swa_page_size": self.page,
            "ring_size": self.ring,
        }
        if extend is None:
            return compressor.decode_plan(**given)
        return compressor.prefill_plan(
            **given, extend_lens=torch.tensor(extend), num_q_tokens=sum(extend)
        )


def block_latent(
    values: list[torch.Tensor], ape: torch.Tensor, end: int, ratio: int, d: int
) -> torch.Tensor:
    """The latent of the block that ends before ``end``, from everything a sequence ever gave."""
    rows = []
    for place in range(ratio * (2 if ratio == 4 else 1)):
        position = end - ratio * (2 if ratio == 4 else 1) + place
        if position < 0:
            continue
        given = values[position]
        if ratio == 4:
            half = slice(0, d) if place < ratio else slice(d, 2 * d)
            kv, score = given[: 2 * d][half], given[2 * d :][half]
        else:
            kv, score = given[:d], given[d:]
        rows.append((kv.double(), (score + ape[place]).double()))
    out = torch.zeros(d, dtype=torch.float64)
    for i in range(d):
        weights = [math.exp(float(score[i])) for _, score in rows]
        mixed = sum(w * float(kv[i]) for w, (kv, _) in zip(weights, rows, strict=True))
        out[i] = mixed / sum(weights)
    return out.float()


def driven(ratio: int, chance: torch.Generator) -> Iterator[tuple[int, int]]:
    """Steps of one request: how many positions it takes in, and how many of them are kept."""
    lengths = [1, ratio - 1, ratio, 3, 2 * ratio + 1, 130, 127, 5]
    for length in lengths:
        yield length, length
    for _ in range(30 if ratio == 4 else 60):  # verified blocks, some of which are taken back
        kept = int(torch.randint(1, 7, (1,), generator=chance))
        yield 6, kept


@pytest.mark.parametrize("ratio", [4, 128])
def test_a_compressor_over_chunks_blocks_taken_back_and_decode_steps(
    ratio: int, chance: torch.Generator
) -> None:
    """Whatever the chunks are, a block's latent is that of the whole sequence."""
    d = 3
    width = d * (4 if ratio == 4 else 2)
    rings = Rings.make(ratio, width, chance)
    ape = normal(chance, (2 if ratio == 4 else 1) * ratio, d)
    requests, values = [3, 1], [[], []]  # type: tuple[list[int], list[list[torch.Tensor]]]
    checked = 0
    for steps in zip(driven(ratio, chance), driven(ratio, chance), strict=True):
        taken = [normal(chance, length, width) for length, _ in steps]
        lens = [len(v) + len(t) for v, t in zip(values, taken, strict=True)]
        plan = rings.plan(requests, lens, [len(t) for t in taken])
        out = compressor.compress_forward(
            rings.buffer, torch.cat(taken), ape, plan, head_dim=d, compress_ratio=ratio
        )
        words = plan.plan_c.view(torch.int32)
        ends = [
            (r, end)
            for r in range(2)
            for end in range(len(values[r]) + 1, lens[r] + 1)
            if end % ratio == 0
        ]
        assert words[:, 0].tolist() == [end for _, end in ends]
        for row, (r, end) in enumerate(ends):
            whole = [*values[r], *taken[r]]
            torch.testing.assert_close(out[row], block_latent(whole, ape, end, ratio, d))
            checked += 1
        for r, (_, kept) in enumerate(steps):
            values[r] += list(taken[r][:kept])
    for _ in range(2 * ratio + 2):  # then one at a time
        given = normal(chance, 2, width)
        lens = [len(v) + 1 for v in values]
        plan = rings.plan(requests, lens, None)
        out = compressor.compress_forward(
            rings.buffer, given, ape, plan, head_dim=d, compress_ratio=ratio
        )
        for r in range(2):
            values[r].append(given[r])
            if lens[r] % ratio == 0:
                torch.testing.assert_close(out[r], block_latent(values[r], ape, lens[r], ratio, d))
                checked += 1
    assert checked > (100 if ratio == 4 else 6)


def test_compressed_latents_are_normed_turned_and_stored(chance: torch.Generator) -> None:
    freqs, weight = table(40, 64, chance), normal(chance, 512)
    plan = compressor.decode_plan(
        4, torch.tensor([0, 1]), torch.arange(64).view(2, 32), torch.arange(64), torch.tensor([8, 7]), 32, 8
    )  # fmt: skip
    kv, cache = normal(chance, 2, 512), latent_cache(3)
    compressor.compress_norm_rope_store(
        kv,
        plan,
        norm_weight=weight,
        norm_eps=1e-6,
        freq_cis=freqs,
        out_loc=torch.tensor([5, 6]),
        kvcache=cache,
        page_size=PAGE,
    )
    x = turned(normed(kv[0].tolist(), 1e-6, weight.tolist()), freqs[4].tolist())
    found = pages.load(cache, torch.tensor([5, 6]), PAGE)
    torch.testing.assert_close(found[0], torch.tensor(stored(x)), rtol=0.07, atol=1e-3)
    assert int((found[1] != 0).sum()) == 0  # its block has not ended


def test_the_compressed_caches_metadata(chance: torch.Generator) -> None:
    lens = torch.tensor([1, 4, 128, 300, 512])
    where = torch.randint(0, 9, (5, 2), generator=chance)
    slots = torch.randint(0, 4096, (4,), generator=chance)
    found = compressor.init_compression_metadata(lens, lens - 1, slots, where, 256)
    for k, ratio in enumerate((4, 128)):
        out, positions, ended, least = found[4 * k : 4 * k + 4]
        assert out is not None and positions is not None and ended is not None and least is not None
        for row, length in enumerate(lens.tolist()):
            if row < 4:
                assert int(out[row]) == (int(slots[row]) // ratio if length % ratio == 0 else 0)
            assert int(positions[row]) == (length - 1) // ratio * ratio
            assert (int(ended[row]), int(least[row])) == (length // ratio, max(1, length // ratio))
    for row, length in enumerate(lens.tolist()):
        wanted = [
            int(where[row, b // 2]) * 2 + b % 2 if b < length // 128 else -1 for b in range(4)
        ]
        assert found[8] is not None and found[8][row].tolist() == wanted
    assert (
        compressor.init_compression_metadata(lens, lens - 1, slots, compute_page_indices=False)[8]
        is None
    )


def test_streams(chance: torch.Generator) -> None:
    m, d, eps = 4, 5, 1e-3
    mixes, scale, base = normal(chance, 2, 24), normal(chance, 3), normal(chance, 24)
    pre, post, comb = layers.hc_split_sinkhorn(mixes, scale, base, m, 3, eps)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    for n in range(2):
        at = lambda k, s, n=n: float(mixes[n, k] * scale[s] + base[k])  # noqa: E731
        for i in range(m):
            assert float(pre[n, i]) == pytest.approx(sigmoid(at(i, 0)) + eps, rel=1e-5)
            assert float(post[n, i]) == pytest.approx(2 * sigmoid(at(m + i, 1)), rel=1e-5)
        rows = [[math.exp(at(2 * m + m * i + j, 2)) for j in range(m)] for i in range(m)]
        rows = [[v / sum(row) + eps for v in row] for row in rows]
        for turn in range(5):  # columns, rows, columns, rows, columns
            if turn % 2:
                rows = [[v / (sum(row) + eps) for v in row] for row in rows]
            else:
                sums = [sum(row[j] for row in rows) + eps for j in range(m)]
                rows = [[v / sums[j] for j, v in enumerate(row)] for row in rows]
        torch.testing.assert_close(comb[n], torch.tensor(rows))
    x, weights = normal(chance, 2, m * d), normal(chance, 2, m)
    found = layers.mhc_combine(x, weights, m, torch.float32)
    for n in range(2):
        for k in range(d):
            wanted = sum(float(weights[n, i] * x[n, i * d + k]) for i in range(m))
            assert float(found[n, k]) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    fn, one, own = normal(chance, m, m * d), normal(chance, 1), normal(chance, m)
    head = layers.fused_hc_head(x.view(2, m, d), fn, one, own, 1e-6, eps)
    for n in range(2):
        flat = torch.tensor(normed(x[n].tolist(), 1e-6))
        share = [sigmoid(float(fn[i] @ flat * one + own[i])) + eps for i in range(m)]
        wanted = sum((share[i] * x.view(2, m, d)[n, i] for i in range(m)), torch.zeros(d))
        torch.testing.assert_close(head[n], wanted)


@pytest.mark.parametrize("limit", [None, 0.7])
def test_experts(chance: torch.Generator, limit: float | None) -> None:
    number, d, w = 4, 5, 3
    layer = SimpleNamespace(
        w13_weight=normal(chance, number, 2 * w, d),
        w2_weight=normal(chance, number, d, w),
        moe_runner_config=SimpleNamespace(swiglu_limit=limit),
    )
    x, weights = normal(chance, 6, d), torch.rand(6, 2, generator=chance)
    chosen = torch.randint(-1, number, (6, 2), generator=chance)
    given = SimpleNamespace(hidden_states=x, topk_output=(weights, chosen, None))
    found = layers.routed_experts(layer, given)
    for n in range(6):
        wanted = torch.zeros(d)
        for k in range(2):
            index = int(chosen[n, k])
            if index < 0:  # another rank's
                continue
            inner = []
            for j in range(w):
                gate = float(layer.w13_weight[index, j] @ x[n])
                up = float(layer.w13_weight[index, w + j] @ x[n])
                if limit is not None:
                    gate, up = min(gate, limit), max(-limit, min(limit, up))
                inner.append(gate / (1 + math.exp(-gate)) * up)
            wanted += float(weights[n, k]) * (layer.w2_weight[index] @ torch.tensor(inner))
        torch.testing.assert_close(found[n], wanted, rtol=1e-4, atol=1e-5)


def test_projections(chance: torch.Generator) -> None:
    o, wo_a = normal(chance, 3, 2, 4), normal(chance, 2, 5, 4)
    found = layers.wo_a_matmul(o, wo_a)
    for n in range(3):
        for g in range(2):
            torch.testing.assert_close(found[n, g], wo_a[g] @ o[n, g])
    x, weight = normal(chance, 3, 4).bfloat16(), normal(chance, 5, 4).bfloat16()
    made = layers.linear_bf16_fp32(x, weight)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, x.float() @ weight.float().T)
