"""Rounds worked out by hand around rows without a law, drafted laws that are NaN, and greedy choices.

Row ``j`` has one high logit, at token ``7 + j``, which is drafted and offered with certainty:
``p = 403 / 533`` there and ``1 / 533`` at the others. With the uniforms of :class:`Example` every
drafted token is kept and token 10 comes after.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import pytest
import torch
from accept_operands import _moved

from dspark_kernels.accept import DenseDraft, Filters, Keys, ListedDraft, Rows

#: Columns, in more than two blocks and not whole ones; drafted tokens a request.
WIDTH, GAMMA = 131, 3
METHODS = ("greedy", "coupled", "rejection", "block", "filtered", "filtered-block")
#: What ``max(0, p - q)`` gives at the last uniform where the high token was drafted.
REST = 64


class Example(NamedTuple):
    """One request: what is spoilt in it, and what it has to come to."""

    name: str
    outcome: tuple[int, int]
    #: How rows are spoilt (see :func:`_spoil_row`), and drafted laws (see :func:`_spoil_law`).
    rows: dict[int, str] = {}  # noqa: RUF012
    laws: dict[int, str] = {}  # noqa: RUF012
    #: Drafted tokens other than the high one.
    drafted: dict[int, int] = {}  # noqa: RUF012
    uniforms: tuple[float, ...] = (0.01, 0.01, 0.01, 0.49)
    length: int = GAMMA


#: Choices of greedy requests of a spoilt row, as ``torch.argmax`` makes them.
CHOICES = {
    "nan": 42, "-nan": 42, "inf": 42, "nothing": 0, "last": WIDTH - 1, "nans": 0, "nan over inf": 90,
    "two nans": 70, "two signs": 50, "two infs": 17, "edge": 64, "zeros": 0,
}  # fmt: skip
#: Of these a row has a law.
LAWFUL = ("zeros",)


def greedy() -> list[Example]:
    """Every choice once as the correction, once kept."""
    found = [Example("nothing spoilt", (3, 10)), Example("law", (3, 10), laws={1: "beside"})]
    for kind, choice in CHOICES.items():
        found += [
            Example(f"{kind}, not drafted", (1, choice), {1: kind}),
            Example(f"{kind}, drafted", (3, 10), {1: kind}, drafted={1: choice}),
            Example(f"{kind}, last", (3, choice), {3: kind}),
        ]
    return [*found, Example("padded", (0, 0), {0: "nan"}, length=-1)]


def lawless() -> list[Example]:
    """Rows without a law, whichever way a coupled or sampled request is judged."""
    found = [Example("nothing spoilt", (3, 10)), Example("rejected", (1, 8), drafted={1: 3})]
    found += [Example(f"nan in row {j}", (j, -1), {j: "nan"}) for j in range(GAMMA + 1)]
    for i, kind in enumerate(kind for kind in CHOICES if kind not in LAWFUL):
        j = i % (GAMMA + 1)
        found.append(Example(f"{kind} in row {j}", (j, -1), {j: kind}))
    return [
        *found,
        Example("zeros keep a law", (1, 8), {3: "zeros"}, drafted={1: 3}),
        Example("behind the rejection", (1, 8), {2: "nan"}, drafted={1: 3}),
        Example("the last, behind the rejection", (0, 7), {3: "inf"}, drafted={0: 3}),
        Example("where it would be rejected", (2, -1), {2: "nan"}, drafted={2: 3}),
        Example("before the rejection", (0, -1), {0: "nothing"}, drafted={2: 3}),
        Example("two", (1, -1), {1: "inf", 2: "nan"}),
        Example("nothing drafted", (0, -1), {0: "nan"}, length=0),
        Example("behind the block", (1, 8), {2: "nan"}, length=1),
        Example("padded", (0, 0), {0: "nan"}, length=-1),
    ]


def offered(dense: bool) -> list[Example]:
    """Drafted laws that are NaN, for rejection sampling and block verification."""
    kinds = ("drafted", "beside", "lse", "infinite") if dense else ("drafted", "beside")
    return [
        *(Example(f"{kind} at {k}", (k, 7 + k), laws={k: kind}) for kind in kinds for k in range(GAMMA)),
        Example("behind the rejection", (0, 7), laws={1: "drafted"}, drafted={0: 3}),
        Example("where it is rejected", (1, 8), laws={1: "drafted"}, drafted={1: 3}),
        Example("no row either", (1, -1), {1: "nan"}, {1: "drafted"}),
        Example("before a row", (1, 8), {2: "nan"}, {1: "drafted"}),
        Example("behind a row", (1, -1), {1: "nan"}, {2: "drafted"}),
        Example("two", (1, 8), laws={1: "beside", 2: "drafted"}),
        Example("behind the block", (1, 8), laws={1: "drafted"}, length=1),
    ]  # fmt: skip


def hidden(block: bool) -> list[Example]:
    """A NaN of a dense law that neither the drafted token's chance nor the log-sum-exp shows."""
    kept = Example("kept", (3, 10), laws={1: "hidden"})
    if block:
        return [
            kept,
            Example("tested", (2, 9), laws={2: "hidden"}, uniforms=(0.9, 0.5, 0.9, 0.49)),
            Example("tested later", (1, 8), laws={1: "hidden"}, uniforms=(0.5, 0.9, 0.9, 0.49)),
        ]
    return [
        kept,
        Example("rejected", (1, 8), laws={1: "hidden"}, uniforms=(0.01, 0.99, 0.01, 0.49)),
    ]


def whole() -> list[Example]:
    """Prefixes of a block that ends early: ``w_2 = 0.57``, but 0.25 where it went on; ``h_1 = 0.43``."""
    found = []
    for name, outcome, uniforms in (
        ("whole", 2, (0.9, 0.5, 0.01, 0.49)),
        ("shorter", 1, (0.3, 0.9, 0.01, 0.49)),
        ("none", 0, (0.5, 0.9, 0.01, 0.49)),
    ):
        for what, token in ({"rows": {2: "nan"}}, -1), ({"laws": {2: "drafted"}}, 9):
            after = token if outcome == 2 else REST
            found.append(
                Example(f"{name}, {next(iter(what))}", (outcome, after), uniforms=uniforms, **what)
            )
    return found


def _signed(sign: float, like: torch.Tensor) -> torch.Tensor:
    """A NaN with this sign bit."""
    return torch.copysign(like.new_tensor(torch.nan), like.new_tensor(sign))


def _spoil_row(row: torch.Tensor, kind: str) -> None:
    plus, minus = _signed(1.0, row), _signed(-1.0, row)
    assert bool(minus.signbit()) and not bool(plus.signbit())
    values: dict[str, dict[int, torch.Tensor | float]] = {
        "nan": {42: plus},
        "-nan": {42: minus},
        "inf": {42: torch.inf},
        "last": {WIDTH - 1: plus},
        "nan over inf": {3: torch.inf, 90: plus},
        "two nans": {99: plus, 70: plus},
        "two signs": {50: minus, 60: plus},
        "two infs": {17: torch.inf, 90: torch.inf},
        "edge": {64: minus},
    }
    if kind == "nothing":
        row[:] = -torch.inf
    elif kind == "nans":
        row[:] = plus
        row[5] = minus
    elif kind == "zeros":
        row[:] = 0.0
        row[0] = -0.0
    else:
        for column, value in values[kind].items():
            row[column] = value
    assert int(row.argmax()) == CHOICES[kind]


def _spoil_law(draft: DenseDraft | ListedDraft, place: tuple[int, int], kind: str) -> None:
    """Spoil a law at the drafted token or beside it; ``hidden``: its log-sum-exp does not tell."""
    if isinstance(draft, ListedDraft):
        draft.probs[place][0 if kind == "drafted" else 1] = torch.nan
        return
    if kind != "lse":
        draft.logits[place][7 + place[1] if kind == "drafted" else 120] = torch.nan
    if kind != "hidden":
        draft.lse[place] = torch.inf if kind == "infinite" else torch.nan


def made(
    examples: list[Example], method: str, draft: str, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """The operands of one batch.

    Args:
        draft: ``dense``, ``listed`` or ``certain``.
    """
    many = len(examples)
    # Noise of seeded draws is at most 22.2 and at least -6.6, so the high token is always drawn.
    logits = torch.zeros((many, GAMMA + 1, WIDTH), dtype=dtype)
    logits[:, range(GAMMA + 1), range(7, 8 + GAMMA)] = 30.0 if method == "coupled" else 6.0
    tokens = torch.arange(7, 7 + GAMMA).repeat(many, 1)
    for r, example in enumerate(examples):
        for place, token in example.drafted.items():
            tokens[r, place] = token
    law: DenseDraft | ListedDraft | None = None
    if draft == "dense":
        peaks = torch.zeros((many, GAMMA, WIDTH), dtype=dtype)
        peaks.scatter_(-1, tokens[..., None], 20.0)
        law = DenseDraft(peaks, torch.logsumexp(peaks.float(), -1))
    elif draft == "listed":
        listed = torch.stack([tokens, torch.full_like(tokens, 120)], -1)
        law = ListedDraft(torch.tensor([1.0, 0.0]).repeat(many, GAMMA, 1), listed)
    for r, example in enumerate(examples):
        for place, kind in example.rows.items():
            _spoil_row(logits[r, place], kind)
        for place, kind in example.laws.items():
            if law is not None:
                _spoil_law(law, (r, place), kind)
    rows = Rows(
        logits.view(-1, WIDTH),
        (torch.arange(many) * (GAMMA + 1)).int(),
        torch.tensor([example.length for example in examples], dtype=torch.int32),
        tokens,
    )
    given: dict[str, Any] = {
        "rows": rows,
        "temperature": torch.full((many,), float(method != "greedy")),
        "uniforms": torch.tensor([e.uniforms for e in examples], dtype=torch.float64),
        "draft": law,
        "block": method.endswith("block"),
    }
    if method.startswith("filtered"):
        # Leaves out the last token, or nothing; the token after is the same.
        some = torch.arange(many) % 16 == 3
        top_k = torch.where(some, WIDTH - 1, WIDTH).int()
        given["filters"] = Filters(top_k, torch.ones(many), torch.where(some, 0.0, 1e-3))
    if method == "coupled":
        given["keys"] = Keys(
            torch.arange(many), torch.arange(many) * 5, torch.ones(many, dtype=torch.int32)
        )
    return {name: _moved(value, device) for name, value in given.items()}


class Batch(NamedTuple):
    """Examples to judge together, and how."""

    method: str
    draft: str
    dtype: torch.dtype
    examples: list[Example]

    @property
    def name(self) -> str:
        """Readable id."""
        kind = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        return f"{self.method}-{self.draft}-{kind}"

    def operands(self, device: torch.device) -> dict[str, Any]:
        """Fresh operands."""
        return made(self.examples, self.method, self.draft, self.dtype, device)


def one_dtype_each(given: list[Batch], slow: Collection[str] = ()) -> list[Any]:
    """As parameters of a test: of two that differ by their dtype alone, every other time the first, one is slow.

    Args:
        slow: methods and drafted laws that are slow whatever their dtype.
    """
    found, kinds = [], list(dict.fromkeys((batch.method, batch.draft) for batch in given))
    for number, kind in enumerate(kinds):
        own = [batch for batch in given if (batch.method, batch.draft) == kind]
        for place, batch in enumerate(own):
            fast = "-".join(kind) not in slow and (len(own) == 1 or place == number % 2)
            marks = () if fast else pytest.mark.slow
            found.append(pytest.param(batch, id=batch.name, marks=marks))
    return found


def batches(*, block: bool = True) -> list[Batch]:
    """Every way to judge with every drafted law; ``block``: with block verification."""
    found = []
    for method in METHODS:
        joint, sampled = method.endswith("block"), method not in ("greedy", "coupled")
        if joint and not block:
            continue
        for draft in ("dense", "listed", "certain") if sampled else ("certain",):
            examples = greedy() if method == "greedy" else lawless()
            if draft != "certain":
                examples += offered(draft == "dense") + (whole() if joint else [])
            if draft == "dense":
                examples += hidden(joint)
            # Filters are slow to interpret: one dtype each.
            dtypes = [torch.float32] if draft == "dense" else [torch.bfloat16]
            if not method.startswith("filtered"):
                dtypes = [torch.float32, torch.bfloat16]
            found += [Batch(method, draft, dtype, examples) for dtype in dtypes]
    return found


def unlike(
    found: Any, examples: list[Example]
) -> dict[str, tuple[tuple[int, int, int], tuple[int, int]]]:
    """What did not come out as worked out, by name; no outcome has a flag."""
    outcomes = list(zip(*(values.tolist() for values in found), strict=True))
    return {
        f"{r} {example.name}": (outcome, example.outcome)
        for r, (outcome, example) in enumerate(zip(outcomes, examples, strict=True))
        if outcome != (*example.outcome, 0)
    }
