"""Sharded acceptance: the same as accept on whole rows, in one process and over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accept_operands import FAIR, Case, agree, operands, poisoned
from lawless_operands import WIDTH, Batch, Example, batches, made, one_dtype_each, unlike
from test_accept import _one, named
from test_accept_lawless import MIXED, spoil

from dspark_kernels.accept import DenseDraft, Rows, accept
from dspark_kernels.accept.reference import judge
from dspark_kernels.support.errors import OperandError
from dspark_kernels.vocab_parallel_accept import (
    Accepted,
    Shard,
    begin,
    exchanged_bytes,
    vocab_parallel_accept,
)

CASES = [
    Case(1, 1, 41),
    Case(5, 7, 131, temperature="greedy", dtype=torch.bfloat16),
    Case(5, 3, 300, temperature="sampled"),
    Case(5, 3, 300, "listed", torch.bfloat16, temperature="sampled"),
    Case(5, 3, 140, "certain", temperature="sampled"),
    Case(5, 3, 300, "listed", keys=True),
    Case(4, 2, 140, "listed", torch.bfloat16, filters=True, temperature="sampled"),
    Case(2, 2, 140, filters=True, temperature="sampled"),
    Case(5, 3, 140, adjustments=True),
    Case(4, 3, 140, "listed", apart=0.0, temperature="sampled"),
]


def split(width: int, ranks: int) -> tuple[int, ...]:
    """Uneven shards: the last ranks hold fewer columns."""
    each = -(-width // ranks)
    return tuple(min(each, width - each * rank) for rank in range(ranks))


def shards(given: dict[str, Any], widths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Every rank's operands, in memory of its own."""
    found = []
    for rank, width in enumerate(widths):
        shard = Shard(rank, widths)
        columns = slice(shard.base, shard.base + width)
        own = {k: v for k, v in given.items() if k != "block"} | {"shard": shard}
        own["rows"] = given["rows"]._replace(
            logits=given["rows"].logits[:, columns].contiguous().clone()
        )
        if isinstance(given["draft"], DenseDraft):
            law = given["draft"].logits[..., columns].contiguous()
            own["draft"] = given["draft"]._replace(logits=law)
        found.append(own)
    return found


def lockstep(ranks: list[dict[str, Any]], **more: Any) -> tuple[list[Accepted], int]:
    """All ranks in one process: outcomes, and the bytes they sent."""
    requests = len(ranks[0]["rows"].lens)
    device = ranks[0]["rows"].logits.device
    running = [begin(**own, **more, out=poisoned(requests, device)) for own in ranks]
    records, sent = [next(r) for r in running], 0
    while True:
        sent += sum(record.nbytes for record in records)
        gathered = torch.stack(records)
        after, done = [], []
        for generator in running:
            try:
                after.append(generator.send(gathered))
            except StopIteration as end:
                done.append(end.value)
        if done:
            assert len(done) == len(ranks)
            return done, sent
        records = after


#: Whole rows on one rank: one case of every search.
ALONE = (CASES[0], CASES[1], CASES[6])


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        pytest.param(
            case, ranks, id=f"{named(case)}-{ranks}",
            marks=[pytest.mark.slow] if ranks == 1 and case not in ALONE else [],
        )
        for case in CASES
        for ranks in (1, 3)
    ],
)  # fmt: skip
def test_shards_decide_as_whole_rows(case: Case, ranks: int, device: torch.device) -> None:
    given = operands(case, 17, device)
    own = {**given, "rows": given["rows"]._replace(logits=given["rows"].logits.clone())}
    whole = accept(**own, backend="triton")
    margin = judge(**operands(case, 17, torch.device("cpu"))).margin.to(device)
    outcomes, sent = lockstep(shards(given, split(case.width, ranks)))
    fair = margin > FAIR
    assert case.apart == 0.0 or fair.sum() >= 0.6 * case.requests
    for outcome in outcomes:
        for mine, theirs, first in zip(outcome, whole, outcomes[0], strict=True):
            assert torch.equal(mine[fair], theirs[fair])
            assert torch.equal(mine, first)
            assert (mine != -7).all()
    searches = {True: 9, False: 17}[case.dtype == torch.bfloat16]
    assert sent == exchanged_bytes(
        case.requests, case.gamma, ranks, filtered=case.filters, steps_searched=searches
    )


def test_min_p_alone_needs_no_search(device: torch.device) -> None:
    given = operands(Case(5, 3, 300, "listed", filters=True, temperature="sampled"), 3, device)
    filters = given["filters"]
    given["filters"] = filters._replace(
        top_k=torch.full_like(filters.top_k, 300),
        top_p=torch.ones_like(filters.top_p),
        min_p=torch.full_like(filters.min_p, 0.05),
    )
    whole = accept(**given, backend="triton")
    outcomes, sent = lockstep(shards(given, split(300, 4)), searched=False)
    assert sent == exchanged_bytes(5, 3, 4, filtered=True)
    for outcome in outcomes:
        assert all(torch.equal(a, b) for a, b in zip(outcome, whole, strict=True))


def test_bytes_exchanged_at_eight_ranks() -> None:
    """64 requests of 5 drafted tokens: a fifth of a megabyte; whole rows would be 99 MB."""
    assert exchanged_bytes(64, 5, 8) == 184_320
    assert exchanged_bytes(64, 5, 8, filtered=True) < 250_000


@pytest.mark.parametrize(
    "batch", one_dtype_each(batches(block=False), slow=("filtered-dense", "filtered-certain"))
)
def test_shards_decide_as_worked_out(batch: Batch, device: torch.device) -> None:
    given = batch.operands(device)
    if batch.method == "filtered":  # min-p only; the mixed batches search
        given["filters"].top_k[:] = WIDTH
    outcomes, _ = lockstep(shards(given, (60, 71)), searched=False)
    assert [unlike(outcome, batch.examples) for outcome in outcomes] == [{}] * 2


@pytest.mark.parametrize(
    "case",
    [
        # Two differ from others by temperatures alone.
        pytest.param(case, marks=[pytest.mark.slow] if case in (MIXED[3], MIXED[11]) else [])
        for case in MIXED
        if not case.block and not (case.keys and case.filters)
    ],
    ids=named,
)
def test_shards_of_mixed_batches_decide_as_whole_rows(case: Case, device: torch.device) -> None:
    given = operands(case, 1, device)
    before, _ = lockstep(shards(given, split(case.width, 3)))
    whole = spoil(given, 1)
    outcomes, _ = lockstep(shards(given, split(case.width, 3)))
    assert agree(given, outcomes[0]) >= 0.6 * case.requests
    for outcome in outcomes:
        for mine, first, theirs in zip(outcome, outcomes[0], before[0], strict=True):
            assert torch.equal(mine, first)
            assert torch.equal(mine[whole], theirs[whole])


def test_filters_that_leave_no_mass_leave_no_law_on_any_rank(device: torch.device) -> None:
    examples = [Example("sampled", (0, -1)), Example("greedy", (1, 42), {1: "nan"})]
    given = made(examples, "filtered", "certain", torch.float32, device)
    given["temperature"][1] = 0.0
    given["filters"].min_p[:] = 1.5  # more than any token has
    outcomes, _ = lockstep(shards(given, split(131, 3)), searched=False)
    assert [unlike(outcome, examples) for outcome in outcomes] == [{}] * 3


def test_a_temperature_that_is_nan_gives_no_law_on_any_rank(device: torch.device) -> None:
    outcomes, _ = lockstep(shards(_one(device, float("nan")), split(100, 3)))
    assert [[int(x) for x in outcome] for outcome in outcomes] == [[0, -1, 0]] * 3


def test_a_shard_too_light_to_be_read_again_is_not_drawn_from(device: torch.device) -> None:
    given = _one(device)
    given["rows"].logits[0] = 0.0
    given["rows"].logits[0, :40] = -100.0
    rows = given["rows"]._replace(lens=torch.zeros_like(given["rows"].lens))
    given |= {"rows": rows, "uniforms": torch.zeros_like(given["uniforms"])}
    outcomes, _ = lockstep(shards(given, (40, 60)))
    assert [[int(x) for x in outcome] for outcome in outcomes] == [[0, 40, 0]] * 2


def test_a_shard_without_mass_is_no_error(device: torch.device) -> None:
    given = _one(device)
    given["rows"].logits[:, 50:] = -torch.inf
    outcomes, _ = lockstep(shards(given, (50, 50)))
    assert [tuple(int(x) for x in o) for o in outcomes] == [(1, 8, 0)] * 2


def test_drafted_tokens_outside_the_vocabulary_are_flagged(device: torch.device) -> None:
    given = _one(device, drafted=torch.tensor([[7, 100]]))
    outcomes, _ = lockstep(shards(given, split(100, 3)))
    assert [int(o.flag) for o in outcomes] == [2, 2, 2]


def test_refusals(device: torch.device) -> None:
    given = shards(_one(device), (60, 40))[0]
    with pytest.raises(OperandError, match="the shard is"):
        begin(**{**given, "shard": Shard(1, (60, 40))})
    both = operands(Case(2, 2, 60, filters=True, keys=True), 1, device)
    with pytest.raises(OperandError, match="filters and keys"):
        begin(**shards(both, (60,))[0])


_WORKER = """
import sys, torch, torch.distributed as dist
sys.path[:0] = sys.argv[3:]
from dspark_kernels.accept import Rows, ListedDraft
from dspark_kernels.vocab_parallel_accept import Shard, vocab_parallel_accept

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)

def gather(record):
    out = record.new_empty((2, *record.shape))
    dist.all_gather_into_tensor(out.view(-1), record.reshape(-1))
    return out

g = torch.Generator().manual_seed(9)
width, requests, gamma = 140, 3, 2
logits = 2 * torch.randn((requests * (gamma + 1), width), generator=g)
tokens = torch.rand((requests, gamma, width), generator=g).topk(8).indices
probs = torch.full((requests, gamma, 8), 0.125)
widths = (80, 60)
shard = Shard(rank, widths)
rows = Rows(
    logits[:, shard.base : shard.base + widths[rank]].contiguous(),
    (torch.arange(requests) * (gamma + 1)).int(),
    torch.full((requests,), gamma, dtype=torch.int32),
    tokens[..., 0].contiguous(),
)
heat = torch.tensor([0.0, 1.0, 0.7])
uniforms = torch.rand((requests, gamma + 1), dtype=torch.float64, generator=g)
for backend in ("triton", "torch"):
    found = vocab_parallel_accept(
        rows, shard, heat, uniforms, gather, draft=ListedDraft(probs, tokens), backend=backend
    )
    print(backend, *(x.tolist() for x in found))
dist.destroy_process_group()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo ranks run in the interpreter")
def test_two_processes_over_gloo(tmp_path: Path) -> None:
    kernels = str(Path(__file__).resolve().parents[2] / "kernels")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(rank), str(tmp_path / "meeting"), kernels],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=240) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    lines = [out.split() for out, _ in said]
    assert lines[0] == lines[1]
    triton, plain = (line.split(" ", 1)[1] for line in said[0][0].splitlines())
    assert triton == plain


@pytest.mark.gpu
def test_one_rank_on_the_gpu_is_accept(device: torch.device) -> None:
    given = operands(Case(5, 5, 700, "listed", temperature="sampled"), 4, device)
    rows: Rows = given.pop("rows")
    given.pop("block")
    whole = accept(rows, **given)
    found = vocab_parallel_accept(rows, Shard(0, (700,)), gather=lambda x: x[None], **given)
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
