"""The accept op where a row or a drafted law says nothing: rounds worked out by hand, and mixed batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accept_operands import Case, _moved, agree, operands, poisoned, run
from lawless_operands import (
    WIDTH,
    Batch,
    Example,
    batches,
    greedy,
    lawless,
    made,
    one_dtype_each,
    unlike,
)
from test_accept import _one, named
from triton.runtime import interpreter

from dspark_kernels.accept import Filters, Rows, accept
from dspark_kernels.accept.reference import judge


# As the interpreter does it, test_a_decision_is_the_one_worked_out covers the same rounds.
@pytest.fixture(params=[pytest.param("dropping", marks=pytest.mark.slow), "keeping"])
def maxima(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers may drop NaN from a maximum or keep it; the interpreter drops it."""
    if request.param == "keeping":
        if torch.cuda.is_available():
            pytest.skip("only the interpreter can be told")
        right = interpreter.ReduceOps.min_max

        def keeping(self: Any, input: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
            kept = {np.nanmax: np.max, np.nanmin: np.min}.get(val_reduce_op, val_reduce_op)
            return right(self, input, kept, idx_reduce_op)

        monkeypatch.setattr(interpreter.ReduceOps, "min_max", keeping)


#: With filters each drafted law is judged once, in one of the two ways.
SLOW = ("filtered-listed", "filtered-block-dense", "filtered-block-certain")


@pytest.mark.parametrize("batch", one_dtype_each(batches(), slow=SLOW))
def test_a_decision_is_the_one_worked_out(batch: Batch, device: torch.device) -> None:
    given = batch.operands(device)
    assert unlike(accept(**given, backend="torch"), batch.examples) == {}
    assert unlike(run(given), batch.examples) == {}


@pytest.mark.parametrize("method", ["greedy", "coupled", "rejection"])
def test_maxima_may_drop_or_keep_nan(method: str, maxima: None, device: torch.device) -> None:
    examples = greedy() if method == "greedy" else lawless()
    given = made(examples, method, "certain", torch.float32, device)
    assert unlike(run(given), examples) == {}


@pytest.mark.parametrize("sampling", ["sampled", "coupled"])
def test_filters_that_leave_no_mass_leave_no_law(sampling: str, device: torch.device) -> None:
    example = Example("no mass", (0, -1))
    method = "coupled" if sampling == "coupled" else "filtered"
    given = made([example], method, "certain", torch.float32, device)
    width = torch.full((1,), WIDTH, dtype=torch.int32)
    # More than any token has: not even the likeliest is kept.
    filters = Filters(width, torch.ones(1), torch.full((1,), 1.5))
    given["filters"] = _moved(filters, device)
    for found in (run(given), accept(**given, backend="torch")):
        assert unlike(found, [example]) == {}


def test_a_temperature_that_is_nan_gives_no_law(device: torch.device) -> None:
    given = _one(device, float("nan"))
    for found in (run(given), accept(**given, backend="torch")):
        assert [int(x) for x in found] == [0, -1, 0]


def test_a_block_too_light_to_be_read_again_is_not_drawn_from(device: torch.device) -> None:
    """Sums of a block can hold weights that are 0 once they are divided by the mass."""
    row = torch.zeros(1, WIDTH)
    row[:, :64] = -100.0
    rows = Rows(
        row, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.ones(1, 1).long()
    )  # fmt: skip
    given = {
        "rows": rows,
        "temperature": torch.ones(1),
        "uniforms": torch.zeros(1, 2),
        "draft": None,
    }
    found = run({name: _moved(value, device) for name, value in given.items()})
    assert [int(x) for x in found] == [0, 64, 0]


# --- among others --------------------------------------------------------------------------


MIXED = [
    Case(9, 4, 131),
    Case(9, 4, 131, dtype=torch.bfloat16, keys=True),
    Case(12, 3, 300, "listed", temperature="sampled"),
    Case(12, 3, 300, temperature="sampled"),
    Case(9, 3, 131, "certain", keys=True),
    Case(12, 4, 131, block=True, temperature="sampled"),
    Case(12, 4, 131, "listed", torch.bfloat16, block=True, temperature="sampled"),
    Case(6, 2, 70, "listed", torch.bfloat16, filters=True),
    Case(6, 2, 70, filters=True, keys=True, temperature="sampled"),
    Case(6, 3, 131, "listed", torch.bfloat16, filters=True, block=True, temperature="sampled"),
    Case(9, 3, 131, adjustments=True, keys=True),
    Case(9, 3, 131, adjustments=True, temperature="greedy"),
]


def spoil(given: dict[str, Any], seed: int) -> torch.Tensor:
    """Spoil a row, a drafted law or both of two requests in three; returns which are whole."""
    g = torch.Generator().manual_seed(seed)
    rows, draft = given["rows"], given["draft"]
    values = [torch.nan, -torch.nan, torch.inf, -torch.inf]

    def one_of(many: int) -> int:
        return int(torch.randint(many, (1,), generator=g))

    whole = torch.arange(len(rows.lens)) % 3 == 2
    whole |= rows.lens.cpu() < 0
    for r in (~whole).nonzero().flatten().tolist():
        kind, sent = one_of(3), int(rows.lens[r])
        if kind < 2 or draft is None:
            row = rows.logits[int(rows.first[r]) + one_of(sent + 1)]
            value = values[one_of(4)]
            width = len(row)
            columns = (
                slice(None) if value == -torch.inf else torch.randint(width, (2,), generator=g)
            )
            row[columns] = value
        if kind > 0 and draft is not None:
            place = one_of(rows.drafted.shape[1])
            # The first is listed wherever a law is.
            draft[0][r, place, one_of(2) * one_of(19)] = torch.nan
            if hasattr(draft, "lse"):
                draft.lse[r, place] = torch.nan
    return whole


@pytest.mark.parametrize("case", MIXED, ids=named)
def test_requests_beside_a_broken_one_are_decided_as_without(
    case: Case, device: torch.device
) -> None:
    given = operands(case, 1, device)
    before = run(given)
    whole = spoil(given, 1)
    after = run(given)
    assert agree(given, after) >= 0.6 * case.requests
    assert 0 < whole.sum() < case.requests
    for mine, theirs in zip(after, before, strict=True):
        assert torch.equal(mine[whole], theirs[whole])


def test_mixed_batches_hold_all_there_is() -> None:
    """What the batches above come to, by the reference: each kind often enough to be seen."""
    undecided = decided = 0
    for case in MIXED:
        given = operands(case, 1, torch.device("cpu"))
        whole = spoil(given, 1)
        token = judge(**given).outcome.token
        cold = given["temperature"] <= 0
        assert (token[whole | cold] >= 0).all()
        undecided += int((token < 0).sum())
        decided += int((token[~whole & ~cold] >= 0).sum())
    assert undecided >= 10 and decided >= 10


def test_greedy_choices_of_adjusted_rows_are_those_of_argmax(device: torch.device) -> None:
    given = operands(MIXED[-1], 5, device)
    spoil(given, 5)
    rows: Rows = given["rows"]
    found = accept(**given, backend="triton", out=poisoned(len(rows.lens), device))
    # The rows that were read are adjusted now.
    for r, (sent, count) in enumerate(zip(rows.lens.tolist(), found.count.tolist(), strict=True)):
        if sent >= 0:
            start = int(rows.first[r])
            choices = rows.logits[start : start + count + 1].argmax(-1)
            assert choices.tolist() == [*rows.drafted[r, :count].tolist(), int(found.token[r])]
