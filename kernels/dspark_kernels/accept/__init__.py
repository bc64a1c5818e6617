"""Acceptance: how much of each drafted block the target keeps, and the token after it."""

from __future__ import annotations

from typing import Any

import torch

from dspark_kernels.accept import kernel
from dspark_kernels.accept.operands import (
    Accepted,
    Adjustments,
    DenseDraft,
    Filters,
    Keys,
    ListedDraft,
    Rows,
)
from dspark_kernels.accept.plan import OPTIONS, Plan, arguments, check
from dspark_kernels.accept.reference import judge
from dspark_kernels.support.backend import Backend, launched, resolve

__all__ = [
    "Accepted",
    "Adjustments",
    "DenseDraft",
    "Filters",
    "Keys",
    "ListedDraft",
    "Rows",
    "accept",
]

KERNELS: dict[str, Any] = {
    "scan": kernel.scan_kernel,
    "cut": kernel.cut_kernel,
    "residual": kernel.residual_kernel,
    "accept": kernel.accept_kernel,
}


def accept(
    rows: Rows,
    temperature: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    draft: DenseDraft | ListedDraft | None = None,
    filters: Filters | None = None,
    keys: Keys | None = None,
    adjustments: Adjustments | None = None,
    block: bool = False,
    backend: Backend = "auto",
    out: Accepted | None = None,
) -> Accepted:
    """Judge a ragged batch; greedy, coupled and sampled requests mix freely.

    Two launches; filters add one, and a dense drafted law another. Every row of a request is read once,
    and of the deciding one what the token after needs.

    With ``p_j`` the law of a request's row ``j`` (temperature and filters applied) and ``q_j`` the
    drafted law of token ``x_{j+1}``:

    - greedy (``temperature <= 0``): the longest prefix of argmaxes, then the argmax, as ``torch.argmax``:
      the lowest token among equals, a NaN above all others, 0 where all are ``-inf``;
    - coupled (``keys.coupled``): the longest prefix of the target's own seeded draws
      ``argmax log p_j(x) + g(seed, position + j, x)``, then that draw;
    - sampled: ``x_{j+1}`` is kept iff ``u_j q_j(x_{j+1}) < p_j(x_{j+1})``; the token after comes from
      ``max(0, p_j - q_j)`` normalised, after the last row from ``p``. With ``block``, block verification
      (Sun et al. 2024, algorithm 2) instead.

    A token is drawn by inverting the cumulative sum in token order with the last uniform. Where ``p = q`` up
    to rounding leaves no residual mass, ``p`` itself is drawn from. Among tokens tied at a filter's
    threshold, and in the ranks that key seeded draws of filtered rows, the lower token comes first.

    A row of a coupled or sampled request *has no law* where its largest logit is not finite or its mass (what
    filters leave of it) is not finite and positive. Tokens before it are kept as ever; a decision
    that comes to such a row ends in token -1. A drafted law that is NaN at one of its tokens says nothing:
    the block ends before the token it drafted, and the token there comes from ``p`` itself. With ``block``
    it also ends before the first row without a law, whose token is then -1.
    A dense law with a NaN but a finite ``lse`` is noticed only where that token was drafted, or where a
    residual is taken from a ``p`` that has the token: ``p`` is taken then.

    Decisions follow float32 probabilities: those within about 1e-6 of a boundary may fall on
    either side of it. A seeded draw compares float64 scores.

    Args:
        rows: the target's logits and the drafted tokens. With ``adjustments`` every row of a request
            is **changed in place** (as plain decoding's own logits are), so it must be judged once
            only; by the ``torch`` backend it is left alone.
        temperature: ``[R]`` float32.
        uniforms: ``[R, gamma + 1]`` float32 or float64 in [0, 1): one a test, the last for the token.
            Not read for greedy and coupled requests.
        draft: what the drafted tokens of sampled requests were drawn from; None: each was certain
            (``q = 1`` at the drafted token).
        filters, keys: None where no request has any.
        adjustments: penalties, bias and stop exclusion; float32 logits only: rounded to bfloat16 an
            adjusted logit would be another law.
        block: block verification for sampled requests.
        backend: see :func:`dspark_kernels.support.backend.resolve`.
        out: written and returned instead of new tensors: ``[R]`` int32 or int64, int64 and int32.

    Returns:
        counts, tokens (-1: no law) and flags.

    Raises:
        OperandError: an operand of the wrong dtype, shape, device, stride or size; the backend
            cannot run on these tensors; bfloat16 logits with adjustments.
    """
    plan = check(rows, temperature, uniforms, draft, filters, keys, adjustments, block, out)
    if resolve(backend, rows.logits) == "torch":
        found = judge(
            rows,
            temperature,
            uniforms,
            draft=draft,
            filters=filters,
            keys=keys,
            adjustments=adjustments,
            block=block,
        ).outcome
        if out is None:
            return found
        for mine, theirs in zip(out, found, strict=True):
            mine.copy_(theirs)
        return out
    if out is None:
        out = _empty(rows)
    if plan.requests:
        _launch(plan, rows, temperature, uniforms, draft, filters, keys, adjustments, out)
    return out


def _empty(rows: Rows) -> Accepted:
    requests, device = rows.drafted.shape[0], rows.logits.device
    return Accepted(
        torch.empty(requests, dtype=torch.int32, device=device),
        torch.empty(requests, dtype=torch.int64, device=device),
        torch.empty(requests, dtype=torch.int32, device=device),
    )


def _launch(
    plan: Plan,
    rows: Rows,
    temperature: torch.Tensor,
    uniforms: torch.Tensor,
    draft: DenseDraft | ListedDraft | None,
    filters: Filters | None,
    keys: Keys | None,
    adjustments: Adjustments | None,
    out: Accepted,
) -> None:
    given = arguments(rows, temperature, uniforms, draft, filters, keys, adjustments, out)
    given |= plan.constants | plan.workspace(rows.logits.device) | {"chunks": plan.chunks}
    for name, grid in plan.kernels.items():
        launched(f"accept.{name}" if name != "accept" else name)
        run = KERNELS[name]
        run[grid](**{key: given[key] for key in run.arg_names}, **OPTIONS[name])
