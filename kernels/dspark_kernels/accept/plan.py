"""Checks of the operands, and the kernel's arguments and configuration from their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from dspark_kernels.accept.operands import (
    Accepted,
    Adjustments,
    DenseDraft,
    Filters,
    Keys,
    ListedDraft,
    Rows,
)
from dspark_kernels.support.checks import operand
from dspark_kernels.support.errors import OperandError

#: How each kernel is compiled: warps a program, and registers a thread where ptxas would rather spill some
#: so that more programs fit.
OPTIONS: dict[str, dict[str, int]] = {
    "scan": {"num_warps": 8},
    "cut": {"num_warps": 16},
    "residual": {"num_warps": 16},
    "accept": {"num_warps": 8, "maxnreg": 255},
}
#: Columns of a chunk, and the most candidates it gives: so many tokens kept by top-k are always among them.
SPAN, CAP = 8192, 256
FLOATS = (torch.float32, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)
#: Dtypes by name of the operand.
Types = Mapping[str, torch.dtype | tuple[torch.dtype, ...]]


class Plan(NamedTuple):
    """The launches of one call, from shapes only."""

    requests: int
    gamma: int
    chunks: int
    constants: dict[str, Any]

    @property
    def kernels(self) -> dict[str, tuple[int, ...]]:
        """Kernels in order, and the grid of each."""
        rows, chunks, c = self.requests * (self.gamma + 1), self.chunks, self.constants
        grids: dict[str, tuple[int, ...]] = {"scan": (rows, chunks)}
        if c["FILTERED"]:
            grids["cut"] = (rows,)
        if c["LAW"] == 1:
            grids["residual"] = (self.requests, chunks)
        return grids | {"accept": (self.requests,)}

    def workspace(self, device: torch.device) -> dict[str, torch.Tensor]:
        """What the kernels hand to each other; one number where a configuration has none."""
        rows, c = self.requests * (self.gamma + 1), self.constants
        each = rows * self.chunks
        sizes = {
            "tops": (torch.float32, each),
            "sums": (torch.float32, each),
            "choices": (torch.int32, each),
            "scores": (torch.float64, each if c["COUPLED"] else 1),
            "draws": (torch.int32, each if c["COUPLED"] else 1),
            "values": (torch.float32, each * c["CAP"] if c["FILTERED"] else 1),
            "lanes": (torch.int16, each * c["CAP"] if c["FILTERED"] else 1),
            "counts": (torch.int32, each if c["FILTERED"] else 1),
            "bounds": (torch.int32, each if c["FILTERED"] else 1),
            "cuts": (torch.int32, 2 * rows if c["FILTERED"] else 1),
            "left": (torch.float64, each if c["LAW"] == 1 else 1),
        }
        return {
            name: torch.empty(size, dtype=dtype, device=device)
            for name, (dtype, size) in sizes.items()
        }


def power(n: int) -> int:
    """The least power of two of at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def constants(
    width: int,
    gamma: int,
    *,
    bfloat16: bool,
    law: int,
    coupled: bool = False,
    filtered: bool = False,
    adjusted: bool = False,
    joint: bool = False,
) -> dict[str, Any]:
    """The kernels' compile-time constants; each takes those it has.

    Args:
        width: ``V``; small ones get small chunks, so that there are several.
        law: how the drafted law is given, see ``final.py``.
    """
    block = min(SPAN, max(64, power(width) // 16))
    return {
        # Every step of up to 7 drafted tokens runs the same kernels.
        "PLACES": max(8, power(gamma + 1)),
        "BLOCK": block,
        "SLOTS": power(-(-width // block)),
        "CAP": min(CAP, block // 4),
        # Of a row that is bisected; ranks take registers.
        "TILE": min(512 if coupled else 2048, block),
        "STAGES": 1,
        "SHIFT": 16 if bfloat16 else 0,
        "LAW": law,
        "COUPLED": coupled,
        "FILTERED": filtered,
        "ADJUSTED": adjusted,
        "JOINT": joint,
    }


def check(
    rows: Rows,
    temperature: torch.Tensor,
    uniforms: torch.Tensor,
    draft: DenseDraft | ListedDraft | None,
    filters: Filters | None,
    keys: Keys | None,
    adjustments: Adjustments | None,
    block: bool,
    out: Accepted | None,
) -> Plan:
    """Refuse operands the kernel would read wrongly; plan the launch of the others.

    Raises:
        OperandError: see :func:`dspark_kernels.accept.accept`.
    """
    requests, gamma, width = check_rows(rows)
    device = rows.logits.device
    operand("temperature", temperature, shape=[requests], dtype=torch.float32, device=device)
    operand(
        "uniforms",
        uniforms,
        shape=[requests, gamma + 1],
        dtype=(torch.float64, torch.float32),
        device=device,
    )
    law = _check_draft(draft, requests, gamma, width, device)
    vectors(filters, "filters", FILTER_TYPES, requests, device)
    vectors(keys, "keys", KEY_TYPES, requests, device)
    if adjustments is not None:
        _check_adjustments(adjustments, rows.logits.dtype, requests, device)
    if out is not None:
        vectors(out, "out", OUT_TYPES, requests, device)
    chosen = constants(
        width,
        gamma,
        bfloat16=rows.logits.dtype == torch.bfloat16,
        law=law,
        coupled=keys is not None,
        filtered=filters is not None,
        adjusted=adjustments is not None,
        joint=block,
    )
    return Plan(requests, gamma, -(-width // chosen["BLOCK"]), chosen)


FILTER_TYPES = {"top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}
KEY_TYPES = {"seeds": torch.int64, "positions": torch.int64, "coupled": torch.int32}
OUT_TYPES: Types = {"count": INTEGERS, "token": torch.int64, "flag": torch.int32}
LISTED_TYPES = {
    "tokens": torch.int64,
    "counts": torch.int32,
    "bias": torch.float32,
    "stops": torch.int32,
}
PENALTY_TYPES = {
    "frequency": torch.float32,
    "presence": torch.float32,
    "repetition": torch.float32,
    "min_new_tokens": torch.int32,
    "lengths": torch.int32,
}


def check_rows(rows: Rows) -> tuple[int, int, int]:
    """Check the logits and drafted tokens: requests, gamma and ``V``."""
    logits, drafted = rows.logits, rows.drafted
    operand("rows.logits", logits, shape=[None, None], dtype=FLOATS, contiguous=False)
    device = logits.device
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise OperandError(
            f"rows.logits has strides {list(logits.stride())}.",
            expected="contiguous rows (a last stride of 1); the row stride is free",
            fix="Call rows.logits.contiguous(), or allocate it so.",
        )
    operand("rows.drafted", drafted, shape=[None, None], dtype=torch.int64, device=device)
    requests, gamma = drafted.shape
    for name, tensor in (("first", rows.first), ("lens", rows.lens)):
        operand(f"rows.{name}", tensor, shape=[requests], dtype=INTEGERS, device=device)
    if gamma < 1 or logits.shape[1] < 1:
        raise OperandError(
            f"rows.drafted has shape {list(drafted.shape)} and rows.logits {list(logits.shape)}.",
            expected="at least one drafted token a request and one token in the vocabulary",
            fix="Do not call acceptance where nothing was drafted.",
        )
    return requests, gamma, logits.shape[1]


def vectors(
    given: tuple[torch.Tensor, ...] | None,
    name: str,
    types: Types,
    size: int,
    device: torch.device,
) -> None:
    """Check a tuple of ``[size]`` tensors; None passes."""
    for (field, dtype), tensor in zip(types.items(), given or (), strict=False):
        operand(f"{name}.{field}", tensor, shape=[size], dtype=dtype, device=device)


def _check_draft(
    draft: DenseDraft | ListedDraft | None,
    requests: int,
    gamma: int,
    width: int,
    device: torch.device,
) -> int:
    """How the drafted law is given: ``CERTAIN``, ``DENSE`` or ``LISTED`` of ``final.py``."""
    if draft is None:
        return 0
    if isinstance(draft, DenseDraft):
        shape: list[int | None] = [requests, gamma, width]
        operand("draft.logits", draft.logits, shape=shape, dtype=FLOATS, device=device)
        operand("draft.lse", draft.lse, shape=shape[:2], dtype=torch.float32, device=device)
        return 1
    shape = [requests, gamma, None]
    operand("draft.probs", draft.probs, shape=shape, dtype=torch.float32, device=device)
    listed = list(draft.probs.shape)
    operand("draft.tokens", draft.tokens, shape=listed, dtype=torch.int64, device=device)
    return 2


def _check_adjustments(
    given: Adjustments, dtype: torch.dtype, requests: int, device: torch.device
) -> None:
    if dtype != torch.float32:
        raise OperandError(
            "rows.logits is bfloat16 and there are adjustments.",
            expected="float32 logits: a penalised logit rounded to bfloat16 would be another law",
            fix="Convert the logits with .float() before they are adjusted.",
        )
    operand("adjustments.tokens", given.tokens, shape=[requests, None], dtype=torch.int64)
    shape = list(given.tokens.shape)
    for name, tensor, kind in zip(LISTED_TYPES, given[:4], LISTED_TYPES.values(), strict=True):
        operand(f"adjustments.{name}", tensor, shape=shape, dtype=kind, device=device)
    vectors(given[4:], "adjustments", PENALTY_TYPES, requests, device)


def arguments(
    rows: Rows,
    temperature: torch.Tensor,
    uniforms: torch.Tensor,
    draft: DenseDraft | ListedDraft | None,
    filters: Filters | None,
    keys: Keys | None,
    adjustments: Adjustments | None,
    out: Accepted,
) -> dict[str, Any]:
    """The kernels' run-time arguments; a tensor stands in for those a configuration does not read."""
    idle = temperature
    law, lse, listed, size = idle, idle, rows.drafted, 1
    if isinstance(draft, DenseDraft):
        law, lse = draft.logits, draft.lse
    elif isinstance(draft, ListedDraft):
        law, listed, size = draft.probs, draft.tokens, draft.probs.shape[2]
    named: dict[str, Any] = {
        "logits": rows.logits,
        "logits_stride": rows.logits.stride(0),
        "rows": rows.logits.shape[0],
        "width": rows.logits.shape[1],
        "gamma": rows.drafted.shape[1],
        "first": rows.first,
        "lens": rows.lens,
        "drafted": rows.drafted,
        "temperature": temperature,
        "uniforms": uniforms,
        "law": law,
        "lse": lse,
        "listed": listed,
        "law_size": size,
        "count_out": out.count,
        "token_out": out.token,
        "flag_out": out.flag,
    }
    named |= dict(zip(("top_k", "top_p", "min_p"), filters or (idle,) * 3, strict=True))
    named |= dict(zip(("seeds", "positions", "coupling"), keys or (idle,) * 3, strict=True))
    fields = [f"adjust_{name}" for name in LISTED_TYPES]
    fields += ["frequency", "presence", "repetition", "min_new", "lengths"]
    named |= dict(zip(fields, adjustments or (idle,) * len(fields), strict=True))
    named["adjust_size"] = 0 if adjustments is None else adjustments.tokens.shape[1]
    return named
