"""Every kernel against its reference on this device, before a request is served.

A kernel that was never wrong on the machine it was written on can be wrong on this one: another
compiler, another driver, another card. Small random operands, the same for both, a second or two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dspark_kernels.accept import Filters, Keys, ListedDraft, Rows, accept
from dspark_kernels.admit import admit
from dspark_kernels.confidence import confidence
from dspark_kernels.kv_inject import kv_inject, pools, rope_table
from dspark_kernels.markov_step import Head, Sampling, draft_shortlist
from dspark_kernels.support.backend import Backend
from dspark_kernels.vocab_parallel_accept import Shard, begin
from dspark_sglang.core.accept import Accepted
from dspark_sglang.core.penalties import OutputCounts, Penalties, Terms
from dspark_sglang.core.step import Step
from dspark_sglang.errors import CompatibilityError
from dspark_sglang.serving.ops.triton_step import TritonStep

_VOCAB, _HIDDEN, _RANK, _REQUESTS, _GAMMA, _LISTED = 1000, 64, 32, 6, 3, 32
#: Numbers may differ by this much of their size: one in bfloat16, of keys that were rounded twice.
_TOLERANCE = 2e-2

Check = Callable[[torch.device, Backend], Sequence[torch.Tensor]]


def _random(device: torch.device, *shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(device)


def _integers(device: torch.device, high: int, *shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(high, shape, generator=generator).to(device)


def _temperatures(device: torch.device) -> torch.Tensor:
    """Greedy and sampled requests in turns."""
    return torch.tensor([0.0, 1.0, 0.7] * (_REQUESTS // 3), device=device)


def _draft(device: torch.device, backend: Backend) -> Sequence[torch.Tensor]:
    w1, w2 = (_random(device, _VOCAB, _RANK, seed=i, scale=0.3).bfloat16() for i in (1, 2))
    found = draft_shortlist(
        _random(device, _REQUESTS, _GAMMA, _VOCAB, seed=3, scale=2.0).bfloat16(),
        _integers(device, _VOCAB, _REQUESTS, seed=4),
        Head(w1, w2),
        size=_LISTED,
        sampling=Sampling(
            _temperatures(device),
            _integers(device, 1 << 40, _REQUESTS, seed=5),
            _integers(device, 1000, _REQUESTS, seed=6),
        ),
        support_dtype=torch.int64,
        backend=backend,
    )
    assert found.probs is not None
    return found.tokens, found.support, found.probs[_temperatures(device) > 0]


def _confidence(device: torch.device, backend: Backend) -> Sequence[torch.Tensor]:
    found = confidence(
        _random(device, _REQUESTS, _GAMMA, _HIDDEN, seed=7).bfloat16(),
        _integers(device, _VOCAB, _REQUESTS, _GAMMA, seed=8),
        _random(device, _HIDDEN + _RANK, seed=9, scale=0.1),
        _random(device, 1, seed=10)[0],
        torch.tensor([1.0, 1.5, 0.8], device=device),
        w1=_random(device, _VOCAB, _RANK, seed=11).bfloat16(),
        backend=backend,
    )
    return tuple(found)


def _admit(device: torch.device, backend: Backend) -> Sequence[torch.Tensor]:
    # Coarse values, so that ties within and across requests are there.
    steps = _integers(device, 4, _REQUESTS, _GAMMA, seed=12).double() / 4
    budget = torch.full((1,), 7, dtype=torch.int32, device=device)
    return tuple(admit(steps.cumprod(1), budget, backend=backend))


def _rows(device: torch.device) -> tuple[Rows, ListedDraft, torch.Tensor]:
    """Target rows, drafted distributions and uniforms of one round."""
    lens = torch.tensor([3, 0, 2, 3, 1, 3], dtype=torch.int32, device=device)
    first = (lens + 1).cumsum(0, dtype=torch.int32) - lens - 1
    dist = _random(device, _REQUESTS, _GAMMA, _LISTED, seed=13).softmax(-1)
    tokens = _integers(device, 1 << 30, _REQUESTS, _GAMMA, _VOCAB, seed=14).argsort(-1)[
        ..., :_LISTED
    ]
    tokens = tokens.contiguous()
    generator = torch.Generator().manual_seed(15)
    uniforms = torch.rand((_REQUESTS, _GAMMA + 1), generator=generator, dtype=torch.float64)
    logits = _random(device, int((lens + 1).sum()), _VOCAB, seed=16, scale=2.0).bfloat16()
    rows = Rows(logits, first, lens, tokens[..., 0].contiguous())
    return rows, ListedDraft(dist, tokens), uniforms.to(device)


def _filters(device: torch.device) -> Filters:
    whole = torch.full((_REQUESTS,), _VOCAB, dtype=torch.int32, device=device)
    whole[1] = 20
    top_p = torch.tensor([1.0, 0.9, 1.0, 1.0, 0.8, 1.0], device=device)
    return Filters(whole, top_p, torch.zeros(_REQUESTS, device=device))


def _accept(device: torch.device, backend: Backend) -> Sequence[torch.Tensor]:
    rows, draft, uniforms = _rows(device)
    found = accept(
        rows,
        _temperatures(device),
        uniforms,
        draft=draft,
        filters=_filters(device),
        keys=Keys(
            _integers(device, 1 << 40, _REQUESTS, seed=17),
            _integers(device, 1000, _REQUESTS, seed=18),
            torch.tensor([0, 0, 1, 0, 0, 1], dtype=torch.int32, device=device),
        ),
        backend=backend,
    )
    return tuple(found)


def _accept_sharded(device: torch.device, backend: Backend) -> Sequence[torch.Tensor]:
    """Two shards in this process, in lockstep; the reference has whole rows."""
    rows, draft, uniforms = _rows(device)
    both = (_temperatures(device), uniforms)
    if backend == "torch":
        return tuple(accept(rows, *both, draft=draft, filters=_filters(device), backend=backend))
    widths = [_VOCAB // 2 + 12, _VOCAB - _VOCAB // 2 - 12]
    parts = torch.split(rows.logits, widths, dim=1)
    keep = _filters(device)
    running = [
        begin(
            rows._replace(logits=part.contiguous()),
            Shard(rank, tuple(widths)),
            *both,
            draft=draft,
            filters=keep,
        )
        for rank, part in enumerate(parts)
    ]
    records = [next(rank) for rank in running]
    while True:
        every, records = torch.stack(records), []
        for rank in running:
            try:
                records.append(rank.send(every))
            except StopIteration as end:
                outcome = end.value
        if not records:
            return tuple(outcome)


def _kv_inject(device: torch.device, backend: Backend) -> Sequence[torch.Tensor]:
    layers, heads, dim, slots = 2, 2, 16, 12
    into = [torch.zeros((slots, heads, dim), dtype=torch.bfloat16, device=device) for _ in range(4)]
    kv_inject(
        _random(device, _REQUESTS, layers, heads * dim, seed=19).bfloat16(),
        _random(device, _REQUESTS, layers, heads * dim, seed=20).bfloat16(),
        _integers(device, 64, _REQUESTS, seed=21),
        torch.tensor([3, -1, 0, 11, -1, 5], device=device),
        1.0 + _random(device, layers, dim, seed=22, scale=0.1),
        rope_table(64, dim, 10000.0).to(device),
        pools(into[:layers], into[layers:]),
        eps=1e-6,
        backend=backend,
    )
    return into


def _step(device: torch.device, backend: Backend) -> Sequence[torch.Tensor]:
    confidence = _random(device, _REQUESTS, _GAMMA, seed=23).sigmoid()
    ones = torch.ones(_REQUESTS, dtype=torch.int64, device=device)
    known = torch.stack([_GAMMA * ones, _integers(device, 2, _REQUESTS, seed=24), 0 * ones])
    shift = _random(device, 2, _GAMMA, 10, seed=25, scale=0.1)
    whole = torch.arange(_GAMMA, 0, -1, dtype=torch.float64, device=device)
    count = _integers(device, _GAMMA + 1, _REQUESTS, seed=26)
    tokens = _integers(device, 8, _REQUESTS, _GAMMA, seed=27)
    places = torch.arange(_REQUESTS * (_GAMMA + 1), device=device)
    stops = _integers(device, 8, _REQUESTS, 2, seed=28)
    of = Step() if backend == "torch" else TritonStep()
    done = of.finish(Accepted(count, ones), tokens, stops, _GAMMA * ones, ones)
    return (
        of.survival(confidence, known, shift, whole),
        *of.window(places[1:], ones, tokens, places + 5, places + 7, rows=len(places) + 3),
        *done,
        *of.kept(places, done.committed, places + 5, places + 7),
    )


def _penalise(device: torch.device, backend: Backend) -> Sequence[torch.Tensor]:
    penalties = [Penalties(0.5, 0.25, 1.25, 4, (3, 9)), Penalties(), Penalties(repetition=0.75)] * 2
    terms = Terms.of(penalties, [0, 0, 1, 2, 0, 3], device)
    counts = OutputCounts(_VOCAB, device)
    counts.begin({slot: [3, 5, 5 + slot] for slot in range(4)})
    block = _integers(device, 12, _REQUESTS, _GAMMA + 1, seed=29)
    rows = torch.arange(1, block.numel(), 2, device=device)
    logits = _random(device, len(rows), _VOCAB, seed=30, scale=2.0)
    kept = _integers(device, _GAMMA + 1, _REQUESTS, seed=31)
    of = Step() if backend == "torch" else TritonStep()
    of.penalise(logits, counts, terms, rows, block)
    of.extend(counts, terms, block, kept)
    # Infinite where a stop token is excluded, in both alike.
    return logits.nan_to_num(neginf=-1e9), *counts.tensors


CHECKS: dict[str, Check] = {
    "markov_step": _draft,
    "confidence": _confidence,
    "admit": _admit,
    "accept": _accept,
    "step": _step,
    "penalise": _penalise,
    "kv_inject": _kv_inject,
}


def check_kernels(device: torch.device) -> None:
    """Run every kernel that one rank needs and its reference on the same operands.

    Raises:
        CompatibilityError: one differs: whole numbers at all, others by more than rounding.
    """
    for name, check in CHECKS.items():
        _compare(name, check, device)


def check_sharded(device: torch.device) -> None:
    """The same of the kernels that several ranks need beside them.

    Raises:
        CompatibilityError: as :func:`check_kernels`.
    """
    _compare("vocab_parallel_accept", _accept_sharded, device)


def _compare(name: str, check: Check, device: torch.device) -> None:
    ours, wanted = check(device, "triton"), check(device, "torch")
    for found, expected in zip(ours, wanted, strict=True):
        if not _agree(found, expected):
            raise CompatibilityError(
                f"The kernel {name} disagrees with its reference on {device}.",
                expected="the same result, up to rounding",
                fix="Set DSPARK_KERNELS=torch, and report the device, the driver and the "
                "versions that `dspark doctor` prints.",
            )


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if not expected.is_floating_point():
        return bool(torch.equal(found, expected))
    gap = (found.double() - expected.double()).abs()
    return bool((gap <= _TOLERANCE * expected.double().abs().clamp(min=1.0)).all())
