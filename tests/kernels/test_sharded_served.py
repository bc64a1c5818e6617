"""The operations of several ranks with the kernels inside: what the server calls decides as whole rows do."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch

from dspark_kernels.support.backend import LAUNCHES
from dspark_sglang.core.accept import Accepted
from dspark_sglang.core.draft import DraftBlock
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.core.tensor_parallel import Shard
from dspark_sglang.serving.ops import Ops, SampledRows, Verified, make, selfcheck
from dspark_sglang.serving.ops.sharded_ops import ShardedOps
from dspark_sglang.serving.ops.supply import Supply
from dspark_sglang.serving.telemetry import Telemetry

VOCAB, RANKS, REQUESTS, GAMMA, HIDDEN, RANK = 120, 2, 5, 2, 16, 8
WIDTHS = (72, 48)
Found = TypeVar("Found")


class Lockstep:
    """Ranks as threads of which one runs at a time: Triton's interpreter is not for several."""

    def __init__(self, count: int) -> None:
        self.turn = threading.Lock()
        self.barrier = threading.Barrier(count)
        self.records: list[torch.Tensor | None] = [None] * count

    def gather(self, rank: int, record: torch.Tensor) -> torch.Tensor:
        self.records[rank] = record.clone()
        self.turn.release()
        try:
            self.barrier.wait(60)
            every = torch.stack([r for r in self.records if r is not None])
            self.barrier.wait(60)
        finally:
            self.turn.acquire()
        return every

    def run(self, work: Callable[[int], Found]) -> list[Found]:
        def one(rank: int) -> Found:
            with self.turn:
                return work(rank)

        ranks = range(len(self.records))
        with concurrent.futures.ThreadPoolExecutor(len(ranks)) as pool:
            return [future.result(120) for future in [pool.submit(one, r) for r in ranks]]


def drive(lockstep: Lockstep, rank: int, exchange: Any) -> Any:
    try:
        record = next(exchange)
        while True:
            record = exchange.send(lockstep.gather(rank, record))
    except StopIteration as end:
        return end.value


def vocabulary(lockstep: Lockstep, rank: int) -> Any:
    shard = Shard(rank, sum(WIDTHS[:rank]), WIDTHS[rank], VOCAB)
    ranks = SimpleNamespace(
        rank=rank,
        run=lambda exchange, what: drive(lockstep, rank, exchange),
        gather=lambda values, what: lockstep.gather(rank, values),
    )
    columns = slice(shard.start, shard.start + shard.width)
    return SimpleNamespace(shard=shard, ranks=ranks, own=lambda logits: logits[..., columns])


def one_rank(kernels: Any, device: torch.device, verification: Any) -> Ops:
    made = torch.Generator().manual_seed(3)
    w1, w2 = (torch.randn((VOCAB, RANK), generator=made).to(device) for _ in range(2))
    draws = torch.Generator(device).manual_seed(4)
    return make(
        kernels,
        device=device,
        markov=MarkovHead(w1=w1, w2=w2),
        confidence=ConfidenceHead(torch.zeros(HIDDEN), torch.zeros(()), False, torch.ones(GAMMA)),
        generator=draws,
        verification=verification,
        telemetry=Telemetry(gamma=GAMMA),
    )


def operations(
    kernels: Any, device: torch.device, lockstep: Lockstep, rank: int, verification: Any
) -> ShardedOps:
    return ShardedOps(
        one_rank(kernels, device, verification),
        vocabulary(lockstep, rank),
        generator=torch.Generator(device).manual_seed(5),
        verification=verification,
        telemetry=Telemetry(gamma=GAMMA),
    )


def rows(kind: str, device: torch.device) -> SampledRows | None:
    if kind == "greedy":
        return None
    index = torch.tensor([1, 2, 4], device=device)
    filtered = kind == "filtered"
    return SampledRows(
        index=index,
        temperatures=torch.tensor([1.0, 0.6, 1.3], device=device),
        top_k=torch.tensor([7, VOCAB, 20], device=device) if filtered else None,
        top_p=torch.tensor([1.0, 0.8, 0.9], device=device) if filtered else None,
        min_p=torch.tensor([0.0, 0.01, 0.0], device=device) if filtered else None,
        seeds=torch.tensor([11, 12, 13], device=device) if kind == "seeded" else None,
    )


def one_round(
    kernels: Any, kind: str, device: torch.device, spoilt: bool = False
) -> tuple[DraftBlock, list[Accepted]]:
    """Draft and accept on every rank, the target's logits near the drafter's."""
    made = torch.Generator().manual_seed(7)
    base = torch.randn((REQUESTS, GAMMA, VOCAB), generator=made).to(device) * 2
    hidden = torch.zeros((REQUESTS, GAMMA, HIDDEN), device=device)
    anchors = torch.randint(VOCAB, (REQUESTS,), generator=made).to(device)
    positions = torch.arange(REQUESTS, device=device) * 9
    lens = torch.tensor([2, 2, 1, 0, 2], device=device)
    first = (lens + 1).cumsum(0) - lens - 1
    noise = torch.randn((int((lens + 1).sum()), VOCAB), generator=made).to(device)
    wanted = rows(kind, device)
    lockstep = Lockstep(RANKS)

    def work(rank: int) -> tuple[DraftBlock, Accepted]:
        ops = operations(kernels, device, lockstep, rank, "rejection")
        own = base[..., sum(WIDTHS[:rank]) : sum(WIDTHS[: rank + 1])].contiguous()
        block = ops.draft(own, hidden, anchors, positions, wanted, None)
        logits = noise.clone()
        for request, (start, sent) in enumerate(zip(first.tolist(), lens.tolist(), strict=True)):
            for place in range(sent):
                logits[start + place, block.tokens[request, place]] += 4.0
        if spoilt:
            logits[first[:2]] = float("nan")
        laws = None if wanted is None or wanted.seeds is not None else block.probs
        given = Verified(
            logits, block.tokens, wanted, laws, block.support, block.lse, lens, first, positions
        )
        return block, ops.accept(given)

    found = lockstep.run(work)
    return found[0][0], [outcome for _, outcome in found]


def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws of a request, whether they are asked for all requests or for the sampling ones."""
    table = torch.rand((REQUESTS, GAMMA + 1), generator=torch.Generator().manual_seed(9))
    sampling = torch.tensor([1, 2, 4])

    def uniforms(self: Supply, count: int, width: int) -> torch.Tensor:
        return (table if count == REQUESTS else table[sampling]).double()

    def seeds(self: Supply, count: int) -> torch.Tensor:
        every = torch.arange(REQUESTS) * 977 + 5
        return every if count == REQUESTS else every[sampling]

    monkeypatch.setattr(Supply, "uniforms", uniforms)
    monkeypatch.setattr(Supply, "seeds", seeds)


def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check at start, which every rank makes and the interpreter makes slowly."""
    for name in ("check_kernels", "check_sharded"):
        monkeypatch.setattr(selfcheck, name, lambda device: None)


@pytest.mark.parametrize("kind", ["greedy", "sampled", "seeded"])
@pytest.mark.parametrize("widths", [(72, 48), (40, 50, 30)])
def test_blocks_are_drafted_from_the_best_of_every_rank(
    kind: str, widths: tuple[int, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on one rank from the same candidates, found there one by one; in one exchange."""
    same_draws(monkeypatch)
    unchecked(monkeypatch)
    size = 16
    made = torch.Generator().manual_seed(8)
    base = torch.randn((REQUESTS, GAMMA, VOCAB), generator=made).to(device) * 2
    hidden = torch.zeros((REQUESTS, GAMMA, HIDDEN), device=device)
    anchors = torch.randint(VOCAB, (REQUESTS,), generator=made).to(device)
    positions = torch.arange(REQUESTS, device=device) * 9
    wanted, lockstep = rows(kind, device), Lockstep(len(widths))
    starts = [sum(widths[:rank]) for rank in range(len(widths))]

    def work(rank: int) -> DraftBlock:
        ops = one_rank("triton", device, "rejection")
        shard = Shard(rank, starts[rank], widths[rank], VOCAB)
        own = base[..., starts[rank] : starts[rank] + widths[rank]]
        given = (own, hidden, anchors, positions, wanted, shard, size)
        found: DraftBlock = drive(lockstep, rank, ops.sharded_draft(*given))
        return found

    found = lockstep.run(work)
    best = [
        base[..., start : start + width].topk(size).indices + start
        for start, width in zip(starts, widths, strict=True)
    ]
    allowed = torch.zeros(base.shape, dtype=torch.bool).scatter_(2, torch.cat(best, 2), True)
    alone = one_rank("torch", device, "rejection")
    logits, previous = base.masked_fill(~allowed, -torch.inf), anchors
    for step in range(GAMMA):
        z = logits[:, step] + alone.markov.w1[previous] @ alone.markov.w2.T
        for block in found:
            assert torch.equal(block.previous[:, step], previous)
            assert allowed[torch.arange(REQUESTS), step, block.tokens[:, step]].all()
        greedy = torch.ones(REQUESTS, dtype=torch.bool)
        if wanted is not None:
            greedy[wanted.index] = False
            law = (z[wanted.index] / wanted.temperatures[:, None]).softmax(-1)
        for block in found:
            tokens = block.tokens[:, step]
            assert torch.equal(tokens, found[0].tokens[:, step])
            assert torch.equal(tokens[greedy], z.argmax(-1)[greedy])
            if kind == "sampled":
                assert wanted is not None and block.probs is not None and block.support is not None
                spread = torch.zeros(len(law), VOCAB).scatter_add_(
                    1, block.support[wanted.index, step], block.probs[wanted.index, step]
                )
                torch.testing.assert_close(spread, law, atol=1e-5, rtol=1e-4)
            else:
                assert block.probs is None
        previous = found[0].tokens[:, step]


@pytest.mark.parametrize("kind", ["greedy", "sampled", "filtered", "seeded"])
def test_ranks_decide_with_the_kernels_as_without(
    kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_draws(monkeypatch)
    unchecked(monkeypatch)
    block, without = one_round("torch", kind, device)
    before = dict(LAUNCHES)
    again, outcomes = one_round("triton", kind, device)
    if kind == "seeded":  # such rows that filter nothing stay sharded
        assert rows(kind, device).filters is False  # type: ignore[union-attr]
    assert (
        LAUNCHES["vocab_parallel_accept.finish"]
        >= before.get("vocab_parallel_accept.finish", 0) + RANKS
    )
    assert torch.equal(block.tokens, again.tokens)
    for outcome in outcomes:
        assert torch.equal(outcome.count, without[0].count)
        assert torch.equal(outcome.token, without[0].token)
        assert outcome.count.dtype == torch.int64
    assert int(outcomes[0].count.sum()) > 0


def test_blocks_of_a_draft_vocabulary_are_verified_as_on_one_rank(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels list laws of all requests; verifying whole blocks over shards reads the sampling ones'."""
    same_draws(monkeypatch)
    unchecked(monkeypatch)
    made = torch.Generator().manual_seed(11)
    tokens = torch.arange(0, VOCAB, 3, device=device)
    base = torch.randn((REQUESTS, GAMMA, len(tokens)), generator=made).to(device)
    positions = torch.arange(REQUESTS, device=device)
    lens = torch.full((REQUESTS,), GAMMA, device=device)
    first = positions * (GAMMA + 1)
    logits = torch.randn((REQUESTS * (GAMMA + 1), VOCAB), generator=made).to(device)
    wanted = rows("sampled", device)
    hidden = torch.zeros((REQUESTS, GAMMA, HIDDEN), device=device)
    whole = one_rank("triton", device, "block")
    block = whole.draft(base, hidden, positions, positions, wanted, tokens)
    for request in range(REQUESTS):
        for place in range(GAMMA):
            logits[first[request] + place, block.tokens[request, place]] += 3.0
    given = Verified(
        logits, block.tokens, wanted, block.probs, block.support, block.lse, lens, first, positions
    )
    alone = whole.accept(given)
    lockstep = Lockstep(RANKS)
    for outcome in lockstep.run(
        lambda rank: operations("triton", device, lockstep, rank, "block").accept(given)
    ):
        assert torch.equal(outcome.count, alone.count)
        assert torch.equal(outcome.token, alone.token)
    assert 0 < int(alone.count[torch.tensor([1, 2, 4])].sum()) < 3 * GAMMA


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["sampled", "seeded"])
def test_rows_without_a_law_end_no_other_request(
    kind: str, kernels: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of NaN: the greedy request 0 takes token 0, the sampling request 1 none, on every rank."""
    same_draws(monkeypatch)
    unchecked(monkeypatch)
    block, (whole, _) = one_round("torch", kind, device)
    assert block.tokens[0, 0] != 0
    _, outcomes = one_round(kernels, kind, device, spoilt=True)
    for outcome in outcomes:
        assert outcome.count.tolist() == [0, 0, *whole.count[2:].tolist()]
        assert outcome.token.tolist() == [0, -1, *whole.token[2:].tolist()]


def test_the_kernels_of_several_ranks_agree_with_the_reference(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    selfcheck.check_sharded(device)
    right = selfcheck._accept_sharded

    def wrong(device: torch.device, backend: Any) -> Any:
        count, token, flag = (value.clone() for value in right(device, "torch"))
        if backend == "triton":
            token[-1] += 1
        return count, token, flag

    monkeypatch.setattr(selfcheck, "_accept_sharded", wrong)
    with pytest.raises(Exception, match="vocab_parallel_accept disagrees"):
        selfcheck.check_sharded(device)
