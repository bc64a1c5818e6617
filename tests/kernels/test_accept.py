"""The accept op: the kernel against its reference, the laws of both, traffic and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accept_operands import Case, _moved, agree, operands, poisoned, run
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.traffic import count
from dspark_kernels.accept import (
    DenseDraft,
    Filters,
    ListedDraft,
    Rows,
    accept,
)
from dspark_kernels.support.errors import OperandError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
def test_a_broken_row_counts_if_it_is_read(
    row: int, value: float, heat: float, device: torch.device
) -> None:
    """Greedy: its argmax. Sampled: no token, behind what is kept. More in ``test_accept_lawless.py``."""
    given = _one(device, heat)
    given["rows"].logits[row, 42] = value
    found = run(given)
    # Row 2 comes after the rejection in row 1.
    expected = (1, 8) if row == 2 else (row, -1 if heat else 42)
    assert tuple(int(x) for x in found) == (*expected, 0)


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
@pytest.mark.parametrize("kept", [0, 2])
def test_every_row_is_read_once(kept: int) -> None:
    given = _one(DEVICE)
    given["uniforms"][0, :kept] = 0.0
    given["uniforms"][0, kept] = 0.999
    traffic = count(lambda: accept(**given, backend="triton"))
    rows, width, chunk = 3, 100, 64
    assert traffic.loaded["scan_kernel.logits"] == rows * width * 4
    # Beside the rows: one chunk again, drafted tokens, and the listed tokens of one residual.
    assert traffic.loaded["accept_kernel.logits"] <= (chunk + 2 * 2 + 2) * 4
    assert traffic.launches == 2
    assert traffic.outside == 0


def test_adjusted_rows_change_in_place_and_once(device: torch.device) -> None:
    given = operands(Case(1, 2, 90, adjustments=True, temperature="greedy"), 3, device)
    rows = given["rows"]
    given["rows"] = rows._replace(lens=torch.full_like(rows.lens, 2), first=rows.first * 0)
    logits = torch.randn(5, 90, device=device)
    given["rows"] = given["rows"]._replace(logits=logits.clone())
    found = accept(**given, backend="triton")
    changed = (given["rows"].logits != logits).any(-1)
    assert changed.tolist() == [j < 3 for j in range(5)]
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


# --- ahead of time ---------------------------------------------------------------------------


def test_combined_features_compile_without_spills(
    compiling_python: Callable[[str], str],
) -> None:
    """Beyond the configurations of the bench: several features at the largest vocabulary."""
    code = """
from benchmarks.aot import compile_sm90
from benchmarks.ops.accept import Case
everything = dict(coupled=True, filtered=True, adjusted=True, joint=True)
for law in ("certain", "dense", "listed"):
    found = compile_sm90(Case(262144, 7, law=law, **everything).example(3).run)
    for kernel in found if law == "dense" else found[2:]:
        fits = kernel.registers * 32 * kernel.warps <= 65536
        print(kernel.spills, kernel.stack, fits, kernel.shared_bytes <= 65536)
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
