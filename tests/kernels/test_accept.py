"""The accept op: the kernel against its reference, the laws of both, traffic and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
from dspark_kernels.support.errors import OperandError
from dspark_kernels.support.traffic import count
from dspark_sglang.core import accept as core
from dspark_sglang.core.sampling import Filters as CoreFilters
from dspark_sglang.core.sampling import target_weights
from dspark_sglang.core.seeded import Noise, seeded_draw

#: Decisions closer to their boundary than this (in probability) may differ: float32 sums.
FAIR = 2e-6
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


def named(case: Case) -> str:
    flags = [n for n in ("filters", "keys", "adjustments", "block") if getattr(case, n)]
    kind = "bf16" if case.dtype == torch.bfloat16 else "fp32"
    shape = f"r{case.requests}-g{case.gamma}-v{case.width}-{case.draft}-{kind}-{case.temperature}"
    return "-".join([shape, *flags])


CASES = [
    Case(0, 3, 40),
    Case(1, 1, 5),
    Case(1, 1, 257, temperature="greedy"),
    Case(5, 7, 131, temperature="greedy", dtype=torch.bfloat16),
    Case(3, 7, 300, dtype=torch.bfloat16),
    Case(5, 5, 300, temperature="sampled"),
    Case(5, 5, 700, "listed", temperature="sampled"),
    Case(5, 3, 300, "listed", torch.bfloat16),
    Case(4, 3, 300, "certain", temperature="sampled"),
    Case(5, 3, 300, keys=True),
    Case(5, 3, 131, "listed", torch.bfloat16, keys=True),
    Case(4, 2, 140, filters=True, temperature="sampled"),
    Case(5, 3, 300, "listed", torch.bfloat16, filters=True),
    Case(2, 2, 90, filters=True, keys=True, temperature="sampled"),
    Case(3, 3, 140, filters=True, keys=True, dtype=torch.bfloat16),
    Case(5, 3, 300, adjustments=True),
    Case(2, 4, 90, "listed", filters=True, keys=True, adjustments=True, temperature="sampled"),
    Case(5, 5, 300, block=True, temperature="sampled"),
    Case(5, 5, 300, "listed", torch.bfloat16, block=True, temperature="sampled"),
    Case(2, 3, 90, filters=True, block=True, keys=True, adjustments=True, temperature="sampled"),
    Case(4, 3, 140, apart=0.0, temperature="sampled"),
    Case(4, 3, 140, "listed", apart=0.0, temperature="sampled"),
]


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


def agree(given: dict[str, Any]) -> int:
    """Compare kernel and reference where the margin is fair; returns how many requests were."""
    expected = judge(**{**given, "rows": _moved(given["rows"], torch.device("cpu"))})
    found = _moved(run(given), torch.device("cpu"))
    fair = expected.margin > FAIR
    for mine, theirs in zip(found, expected.outcome, strict=True):
        assert (mine != -7).all()
        assert torch.equal(mine[fair], theirs[fair]), (found, expected)
    return int(fair.sum())


@pytest.mark.parametrize("case", CASES, ids=named)
def test_kernel_decides_as_the_reference(case: Case, device: torch.device) -> None:
    given = operands(case, 11, device)
    fair = agree(given)
    # p = q: every ratio is 1 and the residual is rounding, so only the margins of uniforms count.
    assert case.apart == 0.0 or fair >= 0.6 * case.requests


def test_rows_and_counts_may_be_int64(device: torch.device) -> None:
    given = operands(CASES[-1], 12, device)
    narrow = run(given)
    rows = given["rows"]._replace(
        logits=given["rows"].logits.clone(),
        first=given["rows"].first.long(),
        lens=given["rows"].lens.long(),
    )
    out = poisoned(len(rows.lens), device)
    wide = accept(
        **{**given, "rows": rows}, backend="triton", out=out._replace(count=out.count.long())
    )
    assert wide.count.dtype == torch.int64
    for mine, theirs in zip(wide, narrow, strict=True):
        assert torch.equal(mine.long(), theirs.long())


@settings(max_examples=8)
@given(
    requests=st.integers(1, 3),
    gamma=st.integers(1, 4),
    width=st.integers(2, 150),
    draft=st.sampled_from(["dense", "listed", "certain"]),
    seed=st.integers(0, 10**6),
    block=st.booleans(),
)
def test_any_shape_agrees(
    requests: int, gamma: int, width: int, draft: str, seed: int, block: bool
) -> None:
    case = Case(requests, gamma, width, draft, keys=seed % 2 == 0, block=block)
    agree(operands(case, seed, DEVICE))


def _some(value: Any, many: int) -> Any:
    """The first ``many`` requests of per-request operands."""
    if isinstance(value, torch.Tensor):
        return value[:many].contiguous()
    if isinstance(value, tuple):
        return type(value)(*(_some(v, many) for v in value))
    return value


# --- laws ----------------------------------------------------------------------------------

SMALL = 4
TARGET = torch.tensor(
    [[0.6, 0.3, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.2, 0.3], [0.0, 0.5, 0.1, 0.4]],
    dtype=torch.float64,
)
DRAFT = torch.tensor(
    [[0.3, 0.3, 0.2, 0.2], [0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.2, 0.3], [0.3, 0.3, 0.4, 0.0]],
    dtype=torch.float64,
)


@pytest.mark.parametrize("listed", [False, True], ids=["dense", "listed"])
@pytest.mark.parametrize("block", [False, True], ids=["rejection", "block"])
def test_two_tokens_follow_the_target(block: bool, listed: bool, device: torch.device) -> None:
    """Chi-square over the pairs of tokens that are committed, and the kernel on some of the draws.

    A correct sampler fails once in ten thousand seeds; the seed is fixed. A run that stops after
    the first token is completed by a draw of the target.
    """
    many, g = 4000, torch.Generator().manual_seed(5)
    one = torch.multinomial(DRAFT[1].expand(many, -1), 1, generator=g)[:, 0]
    two = torch.multinomial(DRAFT[one], 1, generator=g)[:, 0]
    laws = torch.stack([DRAFT[1].expand(many, -1), DRAFT[one]], 1)
    logits = torch.stack([TARGET[1].expand(many, -1), TARGET[one], TARGET[two]], 1).log()
    draft: Any = DenseDraft(laws.log().float(), torch.zeros(many, 2))
    if listed:
        tokens = torch.arange(SMALL).flip(0).expand(many, 2, -1).contiguous()
        draft = ListedDraft(laws.flip(-1).float().contiguous(), tokens)
    rows = Rows(
        logits.reshape(-1, SMALL).float(),
        (3 * torch.arange(many)).int(),
        torch.full((many,), 2, dtype=torch.int32),
        torch.stack([one, two], 1),
    )
    given = {
        "rows": rows,
        "temperature": torch.ones(many),
        "uniforms": torch.rand((many, 3), dtype=torch.float64, generator=g),
        "draft": draft,
        "block": block,
    }
    found = judge(**given).outcome
    few = {name: _some(value, 12) for name, value in given.items()}
    few["rows"] = few["rows"]._replace(logits=rows.logits)
    assert agree({name: _moved(value, device) for name, value in few.items()}) == 12
    first = torch.where(found.count > 0, one, found.token)
    drawn = torch.multinomial(TARGET[found.token], 1, generator=g)[:, 0]
    second = torch.where(found.count > 1, two, torch.where(found.count > 0, found.token, drawn))
    counts = torch.bincount(first * SMALL + second, minlength=SMALL**2).double()
    law = (TARGET[1][:, None] * TARGET).reshape(-1)
    assert counts[law == 0].sum() == 0
    likely = law * many >= 5
    seen = torch.cat([counts[likely], counts[~likely].sum()[None]])
    wanted = torch.cat([law[likely], law[~likely].sum()[None]]) * many
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((len(seen) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(freedom, statistic / 2) > 1e-4


def test_the_reference_integrates_to_the_target() -> None:
    """The first token's law over a grid of both uniforms, within the width of its cells."""
    grid = (torch.arange(40, dtype=torch.float64) + 0.5) / 40
    test, final = (x.reshape(-1) for x in torch.meshgrid(grid, grid, indexing="ij"))
    many, law = len(test), torch.zeros(SMALL, dtype=torch.float64)
    for x in range(SMALL):
        rows = Rows(
            TARGET[[1, x]].log().float(),
            torch.zeros(many, dtype=torch.int32),
            torch.ones(many, dtype=torch.int32),
            torch.full((many, 1), x),
        )
        draft = DenseDraft(DRAFT[1].log().float().expand(many, 1, -1), torch.zeros(many, 1))
        found = judge(rows, torch.ones(many), torch.stack([test, final], 1), draft=draft).outcome
        first = torch.where(found.count > 0, x, found.token)
        law += DRAFT[1, x] * torch.bincount(first, minlength=SMALL).double() / many
    assert (law - TARGET[1]).abs().max() < 1 / 40


@pytest.mark.parametrize("draft", ["dense", "listed"])
def test_equal_laws_leave_the_target_after_an_impossible_rejection(
    draft: str, device: torch.device
) -> None:
    """u = 1 rejects p = q, all exactly 1/4: the residual is 0, so the token comes from p."""
    laws: Any = DenseDraft(torch.zeros(1, 1, 4), torch.full((1, 1), torch.tensor(4.0).log()))
    if draft == "listed":
        laws = ListedDraft(torch.full((1, 1, 4), 0.25), torch.arange(4).view(1, 1, 4))
    rows = Rows(
        torch.zeros(2, 4),
        torch.zeros(1, dtype=torch.int32),
        torch.ones(1, dtype=torch.int32),
        torch.tensor([[1]]),
    )
    given = (rows, torch.ones(1), torch.tensor([[1.0, 0.6]], dtype=torch.float64), laws)
    moved = [_moved(x, device) for x in given]
    found = accept(*moved[:3], draft=moved[3], backend="triton", out=poisoned(1, device))
    assert (found.count.item(), found.token.item(), found.flag.item()) == (0, 2, 0)


# --- broken input ----------------------------------------------------------------------------


def _one(device: torch.device, heat: float = 1.0, **changes: torch.Tensor) -> dict[str, Any]:
    """One request of two drafted tokens, the first kept, the second rejected."""
    width = 100
    logits = torch.zeros(4, width)
    logits[0, 7] = logits[1, 8] = logits[2, 9] = 6.0
    rows = Rows(
        logits,
        torch.zeros(1, dtype=torch.int32),
        torch.full((1,), 2, dtype=torch.int32),
        torch.tensor([[7, 3]]),
    )
    probs = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    tokens = torch.tensor([[[7, 1], [3, 1]]])
    given = {
        "rows": rows._replace(**changes),
        "temperature": torch.tensor([heat]),
        "uniforms": torch.tensor([[0.01, 0.9, 0.5]], dtype=torch.float64),
        "draft": ListedDraft(probs, tokens),
    }
    return {name: _moved(value, device) for name, value in given.items()}


@pytest.mark.parametrize("heat", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_broken_row_is_flagged_if_it_is_read(
    row: int, value: float, heat: float, device: torch.device
) -> None:
    given = _one(device, heat)
    given["rows"].logits[row, 42] = value
    found = run(given)
    if row == 2:  # after the rejection in row 1: never read
        assert (found.count.item(), found.token.item(), found.flag.item()) == (1, 8, 0)
    else:
        assert (found.count.item(), found.token.item(), found.flag.item()) == (0, 0, 1)


def test_a_row_without_mass_is_flagged(device: torch.device) -> None:
    given = _one(device)
    given["rows"].logits[0] = -torch.inf
    assert run(given).flag.item() == 1


def test_a_broken_drafted_law_is_flagged(device: torch.device) -> None:
    given = _one(device)
    given["draft"].probs[0, 1, 0] = torch.nan
    found = run(given)
    assert (found.count.item(), found.token.item(), found.flag.item()) == (0, 0, 1)
    given["block"] = True
    assert run(given).flag.item() == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"first": torch.tensor([2], dtype=torch.int32)},
        {"first": torch.tensor([-1], dtype=torch.int32)},
        {"lens": torch.tensor([3], dtype=torch.int32)},
        {"drafted": torch.tensor([[7, 100]])},
        {"drafted": torch.tensor([[-1, 3]])},
    ],
    ids=["rows-past-the-end", "rows-before-the-start", "len", "token-high", "token-low"],
)
def test_operands_that_point_outside_are_flagged(
    changes: dict[str, torch.Tensor], device: torch.device
) -> None:
    found = run(_one(device, **changes))
    assert (found.count.item(), found.token.item(), found.flag.item()) == (0, 0, 2)


def test_rows_farther_apart_than_int32(device: torch.device) -> None:
    """Rows 2^31 elements apart in memory that is reserved and, but for the rows, never touched."""
    try:
        far = torch.empty(2**32 + 200, dtype=torch.bfloat16, device=device)
    except RuntimeError:
        pytest.skip("the machine does not reserve 8 GiB")
    given = _one(device)
    near = given["rows"].logits[:3].bfloat16()
    logits = far.as_strided((3, 100), (2**31, 1))
    logits.copy_(near)
    found = accept(
        given["rows"]._replace(logits=logits),
        given["temperature"],
        given["uniforms"],
        draft=given["draft"],
        backend="triton",
        out=poisoned(1, device),
    )
    assert (found.count.item(), found.flag.item()) == (1, 0)
    given["rows"] = given["rows"]._replace(logits=near)
    assert found.token.item() == run(given).token.item()


# --- what is read and written ----------------------------------------------------------------


@pytest.mark.skipif(DEVICE.type != "cpu", reason="bytes are counted in the interpreter")
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_rows_after_the_first_rejection_are_not_read(kept: int) -> None:
    given = _one(DEVICE)
    given["uniforms"][0, :kept] = 0.0
    given["uniforms"][0, kept] = 0.999
    traffic = count(lambda: accept(**given, backend="triton"))
    rows, width = min(kept, 2) + 1, 100
    block = 64
    read = traffic.loaded["accept_kernel.logits"] // 4
    # Beside the rows: one block again, drafted tokens, and the listed tokens of one residual.
    assert rows * width <= read <= rows * width + block + 2 * 2 + 2
    assert traffic.launches == 1
    assert traffic.outside == 0


def test_adjusted_rows_change_in_place_and_once(device: torch.device) -> None:
    given = operands(Case(1, 2, 90, adjustments=True, temperature="greedy"), 3, device)
    rows = given["rows"]
    given["rows"] = rows._replace(lens=torch.full_like(rows.lens, 2), first=rows.first * 0)
    logits = torch.randn(5, 90, device=device)
    given["rows"] = given["rows"]._replace(logits=logits.clone())
    found = accept(**given, backend="triton")
    read = int(found.count) + 1
    changed = (given["rows"].logits != logits).any(-1)
    assert changed.tolist() == [j < read for j in range(5)]
    again = accept(**{**given, "adjustments": None}, backend="torch")
    assert torch.equal(again.count, found.count)
    assert torch.equal(again.token, found.token)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("logits", lambda x: x.double(), "rows.logits has dtype float64"),
        ("logits", lambda x: x.repeat(1, 2)[:, ::2], "last stride of 1"),
        ("logits", lambda x: x[0], "rows.logits has shape"),
        ("lens", lambda x: x.short(), "rows.lens has dtype int16"),
        ("first", lambda x: x.repeat(2), "rows.first has shape"),
        ("drafted", lambda x: x.int(), "rows.drafted has dtype int32"),
        ("drafted", lambda x: x[:, :0], "at least one drafted token"),
        ("drafted", lambda x: x.repeat(1, 2)[:, ::2], "contiguous"),
    ],
    ids=[
        "float64",
        "columns",
        "vector",
        "int16-lens",
        "first",
        "int32-tokens",
        "gamma0",
        "strided",
    ],
)
def test_wrong_rows_are_refused(
    field: str, change: Any, message: str, device: torch.device
) -> None:
    given = _one(device)
    given["rows"] = given["rows"]._replace(**{field: change(getattr(given["rows"], field))})
    with pytest.raises(OperandError, match=message):
        accept(**given)


def test_other_wrong_operands_are_refused(device: torch.device) -> None:
    given = _one(device)
    with pytest.raises(OperandError, match="uniforms has shape"):
        accept(**{**given, "uniforms": given["uniforms"][:, :2].contiguous()})
    with pytest.raises(OperandError, match="temperature has dtype"):
        accept(**{**given, "temperature": given["temperature"].double()})
    with pytest.raises(OperandError, match=r"draft.lse has shape"):
        accept(**{**given, "draft": DenseDraft(torch.zeros(1, 2, 100), torch.zeros(1, 3))})
    with pytest.raises(OperandError, match=r"filters.top_k has dtype"):
        accept(**given, filters=Filters(*(torch.ones(1) for _ in range(3))))
    with pytest.raises(OperandError, match="another law"):
        made = operands(Case(1, 2, 90, adjustments=True), 3, device)
        rows = made["rows"]
        accept(**{**made, "rows": rows._replace(logits=rows.logits.bfloat16())})


def test_strided_rows_are_read_in_place(device: torch.device) -> None:
    given = operands(Case(5, 5, 300, "listed", temperature="sampled"), 2, device)
    expected = run(given)
    rows = given["rows"]
    wide = torch.full((rows.logits.shape[0], 512), torch.nan, device=device)
    wide[:, :300] = rows.logits
    found = accept(**{**given, "rows": rows._replace(logits=wide[:, :300])}, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- against the algorithm that serving runs on CPU -------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "method", ["greedy", "rejection", "filtered", "block", "coupled", "ranked"]
)
def test_agrees_with_core(method: str, seed: int, device: torch.device) -> None:
    many = 1 if method == "ranked" else 3
    case = Case(
        many, 3, 60,
        temperature="greedy" if method == "greedy" else "sampled",
        filters=method in ("filtered", "ranked"),
        keys=method in ("coupled", "ranked"),
        block=method == "block",
    )  # fmt: skip
    given = operands(case, seed, torch.device("cpu"))
    rows, heat = given["rows"], given["temperature"]
    # Filters and ranks of tied tokens depend on an unstable sort in core: no ties here.
    g = torch.Generator().manual_seed(seed)
    rows = rows._replace(logits=rows.logits + 0.01 * torch.rand(rows.logits.shape, generator=g))
    if "keys" in given:
        given["keys"] = given["keys"]._replace(coupled=torch.ones(many, dtype=torch.int32))
    given["rows"] = rows
    owner = torch.repeat_interleave(torch.arange(many), rows.lens.long() + 1)
    start = (rows.lens.long() + 1).cumsum(0) - (rows.lens.long() + 1)
    within = torch.arange(len(owner)) - start[owner]
    logits = rows.logits[rows.first.long()[owner] + within]
    filters = (
        {} if not case.filters else {k: v[owner] for k, v in given["filters"]._asdict().items()}
    )
    lens = rows.lens.long()
    if method == "greedy":
        expected = core.accept_greedy(logits.argmax(-1), rows.drafted, lens, start)
    elif case.keys:
        probs = torch.softmax(logits / heat[owner, None], -1)
        keys = given["keys"]
        noise = Noise(
            keys.seeds[owner], keys.positions[owner] + within,
            CoreFilters(**filters) if filters else None,
        )  # fmt: skip
        expected = core.accept_greedy(seeded_draw(probs, noise), rows.drafted, lens, start)
    else:
        weights = target_weights(logits, heat[owner], **filters)
        laws = torch.softmax(given["draft"].logits / heat[:, None, None], -1)
        judge_core = core.accept_block if case.block else core.accept_sampled
        expected = judge_core(
            core.Round(weights, rows.drafted, laws, lens, start), given["uniforms"]
        )
    found = run({name: _moved(value, device) for name, value in given.items()})
    assert torch.equal(found.count.cpu().long(), expected.count)
    assert torch.equal(found.token.cpu(), expected.token)


# --- ahead of time ---------------------------------------------------------------------------


def test_combined_features_compile_without_spills(
    compiling_python: Callable[[str], str],
) -> None:
    """Beyond the configurations of the bench: several features at the largest vocabulary."""
    code = """
from dspark_kernels.accept.bench import Shape, signature
from dspark_kernels.accept.kernel import accept_kernel
from dspark_kernels.accept.plan import WARPS, constants
from dspark_kernels.support.aot import compile_sm90
everything = dict(coupled=True, filtered=True, adjusted=True, joint=True)
for flags in (
    dict(everything, law=0), dict(everything, law=1), dict(everything, law=2),
    dict(everything, law=2, joint=False), dict(coupled=True, filtered=True, law=2),
    dict(filtered=True, joint=True, law=2),
):
    chosen = constants(262144, 7, bfloat16=False, **flags)
    found = compile_sm90(
        accept_kernel, signature=signature(Shape(262144, 7, False, **flags)), constants=chosen,
        num_warps=WARPS, aligned=("logits_stride", "width", "law_size"),
    )
    print(found.spills, found.stack, found.registers <= 128, found.shared_bytes <= 65536)
"""
    assert compiling_python(code).splitlines() == ["0 0 True True"] * 6


# --- on a GPU only ---------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_captured_launch_replays(device: torch.device) -> None:
    given = operands(Case(5, 5, 700, "listed", temperature="sampled"), 4, device)
    expected = accept(**given)
    out = poisoned(5, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        accept(**given, out=out)
    for tensor in out:
        tensor.fill_(-7)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
