"""Every kernel that acceptance can be asked for.

What is compiled depends on a :class:`Variant`, the vocabulary, gamma (up to 7 alike) and dtypes, on nothing that
differs from step to step: not on requests, rows, the step's depth or where operands lie.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from dspark_kernels.accept.operands import DenseDraft, Filters, Keys, ListedDraft, Rows


class Variant(NamedTuple):
    """What a call of ``accept`` may ask for. Greedy requests are part of each."""

    draft: Literal["certain", "dense", "listed"] = "certain"
    filtered: bool = False
    coupled: bool = False
    block: bool = False


def variants(*, seeded: bool = False, block: bool = False) -> list[Variant]:
    """All that a server can ask for.

    Args:
        seeded: requests draw by seeds of their own (``--enable-deterministic-inference``).
        block: it verifies whole blocks.
    """
    kinds: list[Literal["certain", "dense", "listed"]] = (
        ["certain"] if seeded else ["dense", "listed"]
    )
    return [
        Variant(block=block),
        *(Variant(kind, filtered, seeded, block) for kind in kinds for filtered in (False, True)),
    ]


def padded(
    variant: Variant,
    width: int,
    gamma: int,
    device: torch.device,
    *,
    requests: int = 1,
    logits: torch.dtype = torch.float32,
    law: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Operands of ``accept``, of which no logit is read: a call compiles the variant's kernels.

    Args:
        width: ``V``.
        logits, law: dtypes of the target's logits and of a dense drafted law.
    """
    integers = torch.zeros((requests, gamma), dtype=torch.int64, device=device)
    none, ones = integers[:, 0].contiguous(), torch.ones(requests, device=device)
    number = none.to(torch.int32)
    draft: DenseDraft | ListedDraft | None = None
    if variant.draft == "dense":
        shape = (requests, gamma, width)
        draft = DenseDraft(torch.empty(shape, dtype=law, device=device), integers.float())
    elif variant.draft == "listed":
        draft = ListedDraft(integers[..., None].float(), integers[..., None].clone())
    return {
        "rows": Rows(
            torch.empty((1, width), dtype=logits, device=device), none, none - 1, integers
        ),
        "temperature": ones,
        "uniforms": torch.zeros((requests, gamma + 1), dtype=torch.float64, device=device),
        "draft": draft,
        "filters": Filters(number, ones, ones) if variant.filtered else None,
        "keys": Keys(none, none, number) if variant.coupled else None,
        "block": variant.block,
        "backend": "triton",
    }
