"""Drafting: the reference against the core and against probability, the kernels against the reference.

Tokens, candidates and untouched memory are compared exactly. Scores are float32: a draw could differ
from float64's only where two scores are within about 4e-6 of each other; seeds are fixed. Logits and
log-sum-exps carry float32 sums of up to a few dozen terms of order 1 (1e-5). Latents of gated and rnn
heads are rounded to the weights' type, which the reference does not do: 2^-8 of a logit of order
10 for bfloat16 (4e-2), 2^-11 for float16 (5e-3).
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
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

from benchmarks import traffic
from dspark_kernels.markov_step import (
    Sampling,
    draft_block,
    draft_shortlist,
    launch,
    markov_step,
    reference,
)
from dspark_kernels.markov_step.noise import noise_of
from dspark_kernels.markov_step.plan import Plan, plan
from dspark_kernels.support.backend import LAUNCHES, interpreting
from dspark_sglang.core import draft as core
from dspark_sglang.core import seeded
from dspark_sglang.core.heads import MarkovHead

pytestmark = pytest.mark.filterwarnings(
    # Padding lanes and -inf logits; the interpreter computes both sides of a choice.
    "ignore::RuntimeWarning"
)


SHAPES = {
    "one-of-one": Shape(1, 1, 1, 1, size=1),
    "one-request-gamma7": Shape(1, 7, 129, 64),
    "odd-batch": Shape(5, 2, 300, 24),
    "bfloat16": Shape(3, 2, 700, 64, dtype=torch.bfloat16, size=128),
    "float16": Shape(3, 2, 129, 40, dtype=torch.float16),
    "gated": Shape(3, 3, 97, 24, "gated"),
    "gated-bfloat16": Shape(2, 2, 97, 48, "gated", torch.bfloat16),
    "rnn": Shape(3, 4, 97, 24, "rnn"),
    "rnn-bfloat16": Shape(2, 2, 97, 48, "rnn", torch.bfloat16),
    "two-row-blocks": Shape(67, 2, 40, 16, dtype=torch.bfloat16),
}


IDS = list(SHAPES)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output and scratch tensor starts as NaN or -1."""
    monkeypatch.setattr(launch, "_new", poisoned)


def tolerance(shape: Shape) -> float:
    if shape.kind == "vanilla" or shape.dtype == torch.float32:
        return 1e-5
    return 5e-3 if shape.dtype == torch.float16 else 4e-2


# --- the reference ------------------------------------------------------------------------------


def test_the_hash_is_murmur3() -> None:
    """Published: MurmurHash3_x86_32 of ``"test"`` and of ``"aaaa"``-like words with seed 0."""
    word = int.from_bytes(b"test", "little")
    assert int(reference.murmur3([torch.tensor([word])])) == 0xBA6BD213


def test_the_reference_noise_is_the_cores() -> None:
    random = torch.Generator().manual_seed(3)
    seeds = torch.randint(-(2**62), 2**62, (6,), generator=random)
    positions = torch.randint(0, 2**32, (6,), generator=random)
    tokens = torch.arange(500)
    wanted = seeded.gumbel(seeds, positions, tokens)
    for row in range(6):
        found = reference.noise(seeds[row], positions[row], tokens)
        torch.testing.assert_close(found, wanted[row], atol=1e-12, rtol=1e-12)


def test_the_reference_draws_from_the_softmax() -> None:
    z = torch.tensor([0.3, -1.0, 2.0, 0.0, float("-inf"), 1.2], dtype=torch.float64)
    draws, temperature = 4000, 1.3
    positions = torch.arange(draws)
    sampling = Sampling(torch.full((draws,), temperature), torch.full((draws,), 5), positions)
    tokens = [int(reference.draw(z, torch.arange(6), sampling, row, 0)) for row in range(draws)]
    share = torch.bincount(torch.tensor(tokens), minlength=6) / draws
    # Four standard deviations of the likeliest token's share.
    torch.testing.assert_close(
        share.double(), torch.softmax(z / temperature, 0), atol=0.032, rtol=0
    )
    assert share[4] == 0


@pytest.mark.parametrize("mode", ["whole", "vocabulary", "shortlist"])
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_the_reference_is_the_core(kind: str, mode: str) -> None:
    shape = Shape(5, 4, 60, 16, kind)
    given = operands(shape, words=None if mode == "whole" else 90)
    base, anchors, head, hidden, sampling, names = given
    assert sampling is not None
    joint = None if head.weight is None or head.bias is None else (head.weight, head.bias)
    markov = MarkovHead(
        head.w1,
        head.w2,
        gate=joint if kind == "gated" else None,
        joint=joint if kind == "rnn" else None,
    )
    chosen = (sampling.temperatures > 0).nonzero().view(-1)
    block = core.draft_block(
        base,
        anchors,
        torch.zeros(5, 4, 1, device=DEVICE) if hidden is None else hidden,
        markov,
        temperatures=sampling.temperatures[chosen],
        sampled=chosen,
        noise=seeded.Noise(sampling.seeds[chosen], sampling.positions[chosen]),
        shortlist=20 if mode == "shortlist" else None,
        vocabulary=names,
    )
    if mode == "shortlist":
        found: Any = reference.draft_shortlist(*given, 20, dtype=torch.float64)
    else:
        found, _ = reference.draft(*given, None, dtype=torch.float64)
    assert torch.equal(found.tokens, block.tokens)
    assert torch.equal(found.previous, block.previous)


def test_candidates_are_those_of_topk() -> None:
    values = torch.randn(300, generator=torch.Generator().manual_seed(1))
    assert reference.best(values, 40).tolist() == values.topk(40).indices.sort().values.tolist()


# --- the kernels against the reference ----------------------------------------------------------


@triton.jit
def _noise_kernel(words, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, noise_of(tl.load(words + at).to(tl.uint32)))


def test_noise_is_within_float32_of_the_exact_one_at_every_end() -> None:
    last = 2**32 - 1
    ends = [0, 1, 2, 3, last, last - 1, last - 2, 3 * 2**30 - 1, 3 * 2**30, 2**31, 2**24, 2**24 + 1]
    random = torch.randint(0, 2**32, (500,), generator=torch.Generator().manual_seed(0))
    words = torch.cat([torch.tensor(ends), random]).to(DEVICE)
    out = torch.full((512,), float("nan"), device=DEVICE)
    _noise_kernel[(1,)](words, out, N=512)
    u = words.double() / last
    least = torch.finfo(torch.float64).min
    exact = -torch.log(-torch.log(u).clamp(min=least, max=-(2.0**-32)))
    # Noise reaches from -3 to 22; hash 0 alone is at -709.8.
    torch.testing.assert_close(out.double(), exact, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("name", IDS)
def test_a_block_is_the_references(name: str) -> None:
    shape = SHAPES[name]
    given = operands(shape)
    out = torch.full_like(given.base, 77.0)
    assert_block(given, run_block(given, out), out, tolerance(shape))


@pytest.mark.parametrize("name", IDS)
def test_a_shortlist_is_the_references(name: str) -> None:
    shape = SHAPES[name]
    given = operands(shape)
    if shape.batch > 5:
        given = operands(shape._replace(batch=5, gamma=1))
    assert given.sampling is not None
    result = run_shortlist(given, shape.size)
    wanted = reference.draft_shortlist(*given, shape.size, dtype=torch.float64)
    assert torch.equal(result.support, wanted.support)
    assert torch.equal(result.base, wanted.base)
    assert torch.equal(result.tokens, wanted.tokens)
    assert torch.equal(result.previous, wanted.previous)
    drawn = given.sampling.temperatures > 0
    close = tolerance(shape)
    torch.testing.assert_close(
        result.probs[drawn].double(), wanted.probs[drawn], atol=close, rtol=0
    )
    assert result.probs[~drawn].isnan().all()


@pytest.mark.parametrize("kind", ["vanilla", "gated"])
def test_every_row_greedy_stores_nothing_and_has_no_lse(kind: str) -> None:
    shape = Shape(3, 3, 130, 16, kind, torch.bfloat16)
    given = operands(shape)._replace(sampling=None)
    assert_block(given, run_block(given), None, tolerance(shape))
    short = run_shortlist(given, 8)
    assert short.probs is None
    wanted = reference.draft_shortlist(*given, 8, dtype=torch.float64)
    assert torch.equal(short.tokens, wanted.tokens)


@pytest.mark.parametrize("kind", ["vanilla", "rnn"])
def test_a_draft_vocabulary(kind: str) -> None:
    given = operands(Shape(3, 2, 140, 16, kind), words=200)
    out = torch.full_like(given.base, 77.0)
    assert_block(given, run_block(given, out), out, 1e-5)
    result = run_shortlist(given, 9)
    wanted = reference.draft_shortlist(*given, 9, dtype=torch.float64)
    assert torch.equal(result.support, wanted.support)
    assert torch.equal(result.tokens, wanted.tokens)


def test_only_recorded_rows_are_stored_and_rounded() -> None:
    given = operands(Shape(5, 2, 150, 32, dtype=torch.bfloat16))
    assert given.sampling is not None
    flags = torch.tensor([1, 1, 0, 1, 1], dtype=torch.uint8, device=DEVICE)
    given = given._replace(sampling=given.sampling._replace(recorded=flags))
    out = torch.full_like(given.base, 77.0)
    assert_block(given, run_block(given, out), out, 1e-5)
    # Rows 1 and 4 are greedy, row 2 is sampled and not recorded.
    assert (out[[1, 2, 4]] == 77.0).all()
    short = run_shortlist(given, 9)
    assert short.probs[[1, 2, 4]].isnan().all()
    assert not short.probs[[0, 3]].isnan().any()


def test_step_logits_may_replace_the_base_logits() -> None:
    given = operands(Shape(5, 3, 200, 32, dtype=torch.bfloat16))
    apart = torch.full_like(given.base, 77.0)
    wanted = run_block(given, apart)
    before = given.base.clone()
    result = run_block(given, given.base)
    assert all(torch.equal(a, b) for a, b in zip(result[:4], wanted[:4], strict=True))
    stored = apart != 77.0
    assert torch.equal(given.base, torch.where(stored, apart, before))


def test_the_stored_law_and_lse_give_the_probability_of_the_token() -> None:
    given = operands(Shape(5, 2, 200, 32, dtype=torch.bfloat16))
    assert given.sampling is not None
    out = torch.zeros_like(given.base)
    result = run_block(given, out)
    for row in (0, 2, 3):
        scaled = out[row].double() / given.sampling.temperatures[row].double()
        law = torch.softmax(scaled, -1).gather(-1, result.tokens[row][:, None])[:, 0]
        q = torch.exp(result.logit[row] / given.sampling.temperatures[row] - result.lse[row])
        torch.testing.assert_close(q.double(), law, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_single_steps_make_the_block(kind: str) -> None:
    given = operands(Shape(3, 3, 70, 16, kind))
    base, token, head, hidden, sampling, _ = given
    assert sampling is not None
    whole = run_block(given, cut=plan(70, 16, 4))
    state = None
    for step in range(3):
        keys = sampling._replace(positions=sampling.positions + step)
        h = None if hidden is None else hidden[:, step].contiguous()
        found = markov_step(
            base[:, step], token, head, hidden=h, state=state, sampling=keys, backend="triton"
        )
        wanted = reference.step(
            base[:, step], token, head, h, keys, None, None, torch.float64, state
        )
        token, state = found.token, found.state
        assert torch.equal(token, whole.tokens[:, step])
        assert torch.equal(found.lse, whole.lse[:, step])
        assert (state is None) == (kind != "rnn")
        if state is not None:
            torch.testing.assert_close(state.double(), wanted.state, atol=1e-5, rtol=0)


# --- layout, batches, launches ------------------------------------------------------------------


def test_no_requests_and_no_launches() -> None:
    for kind in ("vanilla", "rnn"):
        given = operands(Shape(0, 5, 40, 16, kind))
        LAUNCHES.clear()
        block = draft_block(
            given.base, given.anchors, given.head, **given.named(), backend="triton"
        )
        short = draft_shortlist(
            given.base, given.anchors, given.head, size=8, **given.named(), backend="triton"
        )
        assert block.tokens.shape == (0, 5)
        assert short.support.shape == (0, 5, 8)
        assert not LAUNCHES


@pytest.mark.parametrize(
    ("kind", "block", "short"), [("vanilla", 6, 3), ("gated", 12, 4), ("rnn", 12, 4)]
)
def test_launches_of_five_steps(kind: str, block: int, short: int) -> None:
    given = operands(Shape(2, 5, 40, 16, kind))
    LAUNCHES.clear()
    draft_block(given.base, given.anchors, given.head, **given.named(), backend="triton")
    assert LAUNCHES.total() == block
    LAUNCHES.clear()
    draft_shortlist(
        given.base, given.anchors, given.head, size=8, **given.named(), backend="triton"
    )
    assert LAUNCHES.total() == short


def test_rows_and_steps_of_any_stride() -> None:
    given = operands(Shape(2, 2, 100, 16))
    wider = torch.full((2, 2, 130), float("nan"), device=DEVICE)
    view = wider[:, :, 20:120].transpose(0, 1)
    view.copy_(given.base)
    strided = given._replace(base=view)
    wanted, result = run_block(given), run_block(strided)
    assert torch.equal(result.tokens, wanted.tokens)
    assert torch.equal(result.lse, wanted.lse)
    assert torch.equal(run_shortlist(strided, 9).support, run_shortlist(given, 9).support)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    given = operands(Shape(20, 2, 130, 32))
    assert given.sampling is not None
    whole = run_block(given)
    for row in (0, 3, 17):
        one = slice(row, row + 1)
        keys = Sampling(*(x[one] for x in given.sampling[:3]))
        alone = Operands(given.base[one], given.anchors[one], given.head, None, keys)
        result = run_block(alone)
        assert torch.equal(result.tokens, whole.tokens[one])
        if interpreting():
            # On a GPU products of other tile shapes may differ in the last bit.
            assert torch.equal(result.lse, whole.lse[one])


def test_the_cut_does_not_change_the_draft() -> None:
    given = operands(Shape(4, 2, 500, 16))
    wanted = run_block(given, cut=Plan(512, 1, 1))
    for cut in (Plan(32, 1, 16), Plan(64, 4, 2), plan(500, 16, 4)):
        assert torch.equal(run_block(given, cut=cut).tokens, wanted.tokens)


def test_programs_cover_every_vocabulary_and_stay_within_their_allowance() -> None:
    for columns in (1, 63, 32000, 49152, 129280, 151936, 262144):
        for rank in (64, 256, 512):
            cut = plan(columns, rank, 2)
            span = cut.block_v * cut.tiles
            assert (cut.chunks - 1) * span < columns <= cut.chunks * span
            again = 64 * cut.chunks * (2 * rank + 4 * cut.chunks)
            assert cut.chunks == 1 or again <= 0.11 * columns * (2 * rank + 128)


@pytest.mark.skipif(not interpreting(), reason="reaches memory of the host")
def test_rows_beyond_the_reach_of_int32() -> None:
    """Row 2 starts beyond element 2^31, in memory of which only the rows' pages exist.

    The stride itself fits int32: a row index multiplied in int32 would wrap.
    """
    shape = Shape(3, 2, 48, 16, dtype=torch.bfloat16, size=8)
    given = operands(shape)
    stride = 2**30 + 4096
    # 0x4000 is Linux's MAP_NORESERVE, which Python 3.11 does not name.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    with mmap.mmap(-1, 2 * (2 * stride + 4096), flags=flags) as memory:
        far = torch.frombuffer(memory, dtype=torch.bfloat16)
        base = far.as_strided((3, 2, 48), (stride, 48, 1))
        base.copy_(given.base)
        moved = given._replace(base=base)
        wanted = torch.full_like(given.base, 77.0)
        near = run_block(given, wanted)
        listed = run_shortlist(moved, 8)
        result = run_block(moved, base)
        assert torch.equal(result.tokens, near.tokens)
        assert torch.equal(base[[0, 2]], wanted[[0, 2]])
        assert torch.equal(listed.support, run_shortlist(given, 8).support)
        del far, base, moved, result, listed


@pytest.mark.skipif(not interpreting(), reason="counts in the interpreter")
def test_w2_is_read_once_a_step_whatever_the_batch() -> None:
    shape = Shape(1, 2, 700, 64, dtype=torch.bfloat16)
    totals = {}
    for batch in (1, 4, 64):
        given = operands(shape._replace(batch=batch))
        out = torch.zeros_like(given.base)
        counted = traffic.count(lambda g=given, o=out: run_block(g, o))  # type: ignore[misc]
        assert counted.outside == 0
        assert counted.loaded["scan.w2"] == 2 * 700 * 64 * 2
        assert counted.loaded["scan.base"] == batch * 2 * 700 * 2
        sampled = int((given.sampling.temperatures > 0).sum()) if given.sampling else 0
        assert counted.stored["scan.out"] == sampled * 2 * 700 * 2
        totals[batch] = counted.kernels - counted.stored["scan.out"]
    assert (totals[64] - totals[1]) * 3 == (totals[4] - totals[1]) * 63


@pytest.mark.skipif(not interpreting(), reason="counts in the interpreter")
def test_a_shortlist_reads_each_base_logit_once_and_few_rows_of_w2() -> None:
    given = operands(Shape(2, 2, 700, 64, dtype=torch.bfloat16))
    counted = traffic.count(lambda: run_shortlist(given, 20))
    assert counted.outside == 0
    assert counted.loaded["select.base"] == 2 * 2 * 700 * 2
    assert counted.loaded["chain.w2"] == 2 * 2 * 20 * 64 * 2


# --- compiled -----------------------------------------------------------------------------------


def test_other_dtypes_batches_and_options_compile_without_spills(
    compiling_python: Callable[[str], str],
) -> None:
    code = """
import json
import torch
from benchmarks.aot import compile_sm90
from dspark_kernels.markov_step import Head, Sampling, draft_block, draft_shortlist

def given(kind, columns, rank, dtype, rows=63, base=None, recorded=True, mapped=False, follow=0):
    parts, state = {"vanilla": (0, 0), "rnn": (3, 2 * rank)}[kind]
    weight = torch.empty(parts * rank, 4096 + state, dtype=dtype) if parts else None
    bias = torch.empty(parts * rank, dtype=dtype) if parts else None
    table = torch.empty(columns, rank, dtype=dtype)
    long = torch.empty(rows, dtype=torch.int64)
    flags = torch.empty(rows, dtype=torch.uint8) if recorded else None
    found = {
        "base": torch.empty(rows, 1, columns, dtype=base or dtype),
        "anchors": long,
        "head": Head(table, table, weight, bias),
        "hidden": torch.empty(rows, 1, 4096, dtype=dtype) if parts else None,
        "sampling": Sampling(torch.empty(rows), long, long, flags),
        "vocabulary": torch.empty(columns, dtype=torch.int64) if mapped else None,
    }
    if follow:
        found["successors"] = torch.empty(columns, follow, dtype=torch.int32)
    return found

def whole(*sizes, **options):
    call = given("vanilla", 129280, 512, *sizes, **options)
    return lambda: draft_block(**call, out=torch.empty_like(call["base"]), backend="triton")

def listed(call, tail=True):
    out = torch.empty_like(call["base"]) if tail else None
    return lambda: draft_shortlist(**call, size=128, out=out, backend="triton")

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
rnn = given("rnn", 129280, 512, fp32)
tails = [given("vanilla", 262144, 512, dtype, mapped=mapped, follow=128)
         for dtype, mapped in ((bf16, True), (fp16, False), (fp32, True))]
greedy = given("vanilla", 262144, 512, bf16, follow=128) | {"sampling": None}
calls = [
    # Base logits in float32 over a head in bfloat16: the most shared memory.
    whole(bf16, base=fp32, mapped=True),
    whole(bf16, 1, recorded=False), whole(bf16, 32, recorded=False), whole(fp32, recorded=False),
    lambda: draft_block(**rnn, out=torch.empty_like(rnn["base"]), backend="triton"),
    listed(given("rnn", 262144, 512, fp32), tail=False),
    *map(listed, tails),
    # Successors without the tail.
    listed(greedy, tail=False),
]
print(json.dumps([used for call in calls for used in compile_sm90(call)]))
"""
    found = json.loads(compiling_python(code).splitlines()[-1])
    assert len(found) == 4 * 2 + 4 + 4 + 3 * 3 + 3
    for name, _, _, spills, stack, shared in found:
        assert (spills, stack) == (0, 0), name
        # What one program may take of a multiprocessor.
        assert shared <= 227 * 1024, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_a_captured_graph_replays_the_draft(kind: str) -> None:
    given = operands(Shape(5, 5, 129280, 256, kind, torch.bfloat16, width=512))
    call = (given.base, given.anchors, given.head)
    eager = draft_block(*call, **given.named())
    listed = draft_shortlist(*call, **given.named())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block = draft_block(*call, **given.named())
        short = draft_shortlist(*call, **given.named())
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(block.tokens, eager.tokens)
    assert torch.equal(short.tokens, listed.tokens)
