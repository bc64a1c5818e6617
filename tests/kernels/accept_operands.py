"""Random operands of the accept op, and runs whose outputs are poisoned before."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dspark_kernels.accept import (
    Accepted,
    Adjustments,
    DenseDraft,
    Filters,
    Keys,
    ListedDraft,
    Rows,
    accept,
)
from dspark_kernels.accept.reference import judge

#: Decisions closer to their boundary than this (in probability) may differ: float32 sums.
FAIR = 2e-6


class Case(NamedTuple):
    """Random operands of one shape."""

    requests: int
    gamma: int
    width: int
    draft: str = "dense"
    dtype: torch.dtype = torch.float32
    filters: bool = False
    keys: bool = False
    adjustments: bool = False
    block: bool = False
    temperature: str = "mixed"
    #: How close the drafted law is to the target's: 0 equal.
    apart: float = 0.7


def operands(case: Case, seed: int, device: torch.device) -> dict[str, Any]:
    """Random operands on the CPU, drafted tokens drawn from the drafted laws."""
    g = torch.Generator().manual_seed(seed)
    requests, gamma, width = case.requests, case.gamma, case.width
    lens = torch.randint(0, gamma + 1, (requests,), generator=g)
    if requests > 3:
        lens[0], lens[1] = gamma, -1
    gaps = torch.randint(0, 3, (requests,), generator=g)
    first = (lens + 1 + gaps).cumsum(0) - (lens + 1)
    size = int((lens + 1 + gaps).sum()) + 2
    logits = 3 * torch.randn((size, width), generator=g)
    logits[:, :: max(2, width // 9)] = -torch.inf
    logits = logits.round(decimals=1)  # ties
    logits = logits.to(case.dtype)
    heat = 0.5 + torch.rand(requests, generator=g)
    if case.temperature == "mixed":
        heat[::2] = 0.0
        if requests > 4:
            heat[0] = 0.8
    elif case.temperature == "greedy":
        heat[:] = 0.0
    place = (first[:, None] + torch.arange(gamma)).clamp(0, size - 1)
    target = logits.float()[place]
    hot = torch.where(heat > 0, heat, torch.ones_like(heat))[:, None, None]
    noise = case.apart * torch.randn(target.shape, generator=g)
    q_logits = (target + noise).to(case.dtype)
    laws = torch.softmax(q_logits.double() / hot, -1)
    draft: Any = None
    if case.draft == "listed":
        probs, tokens = laws.topk(min(width, 20), dim=-1)
        probs = probs / probs.sum(-1, keepdim=True)
        tokens[..., -1], probs[..., -1] = -1, 0.0
        draft = ListedDraft(probs.float(), tokens)
        drafted = tokens[..., :-1].gather(
            -1, _drawn(probs[..., :-1].reshape(-1, probs.shape[-1] - 1), g, requests, gamma)
        )[..., 0]
    else:
        drafted = _drawn(laws.reshape(-1, width), g, requests, gamma)[..., 0]
        if case.draft == "dense":
            draft = DenseDraft(q_logits, torch.logsumexp(q_logits.double() / hot, -1).float())
    best = target.argmax(-1)
    take = (heat <= 0)[:, None] & (torch.rand((requests, gamma), generator=g) < 0.7)
    drafted = torch.where(take, best, drafted)
    given: dict[str, Any] = {
        "rows": Rows(logits, first.int(), lens.int(), drafted),
        "temperature": heat,
        "uniforms": torch.rand((requests, gamma + 1), dtype=torch.float64, generator=g),
        "draft": draft,
        "block": case.block,
    }
    if case.filters:
        top_k = torch.tensor([3, width, 20, 1, width])[torch.arange(requests) % 5]
        top_p = torch.tensor([1.0, 0.8, 0.95, 0.5, 1.0])[torch.arange(requests) % 5]
        min_p = torch.tensor([0.0, 0.02, 0.0, 0.3, 0.05])[torch.arange(requests) % 5]
        order = torch.randperm(requests, generator=g)
        given["filters"] = Filters(top_k[order].int(), top_p[order], min_p[order])
    if case.keys:
        given["keys"] = Keys(
            torch.randint(-(2**62), 2**62, (requests,), generator=g),
            torch.randint(0, 10**6, (requests,), generator=g),
            (torch.arange(requests) % 3 != 1).int(),
        )
    if case.adjustments:
        given["adjustments"] = _adjustments(requests, width, drafted, g)
    return {name: _moved(value, device) for name, value in given.items()}


def _drawn(laws: torch.Tensor, g: torch.Generator, requests: int, gamma: int) -> torch.Tensor:
    if not requests:
        return torch.zeros((0, gamma, 1), dtype=torch.int64)
    return torch.multinomial(laws.float(), 1, generator=g).view(requests, gamma, 1)


def _adjustments(
    requests: int, width: int, drafted: torch.Tensor, g: torch.Generator
) -> Adjustments:
    many = min(30, width // 2)
    tokens = torch.stack([torch.randperm(width, generator=g)[:many] for _ in range(requests)])
    tokens[:, 0] = drafted[:, 0]
    tokens[:, 1:][tokens[:, 1:] == drafted[:, :1]] = -1
    counts = torch.randint(0, 4, (requests, many), generator=g).int()
    bias = torch.randn((requests, many), generator=g)
    stops = (torch.rand((requests, many), generator=g) < 0.2).int()
    part = torch.rand((3, requests), generator=g)
    return Adjustments(
        tokens, counts, bias, stops, part[0], part[1], 0.8 + 0.6 * part[2],
        torch.randint(0, 8, (requests,), generator=g).int(),
        torch.randint(2, 6, (requests,), generator=g).int(),
    )  # fmt: skip


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return type(value)(*(_moved(v, device) for v in value))
    return value


def poisoned(requests: int, device: torch.device) -> Accepted:
    return Accepted(
        torch.full((requests,), -7, dtype=torch.int32, device=device),
        torch.full((requests,), -7, dtype=torch.int64, device=device),
        torch.full((requests,), -7, dtype=torch.int32, device=device),
    )


def run(given: dict[str, Any]) -> Accepted:
    """The kernel's outcome, with poisoned outputs and logits of its own."""
    rows = given["rows"]
    own = rows._replace(logits=rows.logits.clone())
    out = poisoned(len(rows.lens), rows.logits.device)
    return accept(**{**given, "rows": own}, backend="triton", out=out)


def agree(given: dict[str, Any], found: Accepted | None = None) -> int:
    """Compare kernel and reference where the margin is fair; returns how many requests were.

    Args:
        found: what the kernel found; None: it is run.
    """
    expected = judge(**{**given, "rows": _moved(given["rows"], torch.device("cpu"))})
    found = _moved(run(given) if found is None else found, torch.device("cpu"))
    fair = expected.margin > FAIR
    for mine, theirs in zip(found, expected.outcome, strict=True):
        assert (mine != -7).all()
        assert torch.equal(mine[fair], theirs[fair]), (found, expected)
    return int(fair.sum())
