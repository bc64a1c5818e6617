"""The accept op by chunks: candidates and the row behind them, the grid, and what is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accept_operands import _moved, agree
from accept_variants import padded, variants

from benchmarks.traffic import count
from dspark_kernels.accept import Filters, Keys, ListedDraft, Rows, accept
from dspark_kernels.accept.plan import check, constants

#: Chunks of 64 columns, at most 16 candidates each.
WIDTH, CAP = 200, 16
INTERPRETED = not torch.cuda.is_available()


def one_row(logits: torch.Tensor, device: torch.device, **filters: float) -> dict[str, Any]:
    """Bonus tokens of one row: two sampled, one drawn by seed."""
    many = 3
    none = torch.zeros(many, dtype=torch.int32)
    uniforms = torch.tensor([[0.0, 0.1], [0.0, 0.97], [0.0, 0.0]], dtype=torch.float64)
    given = {
        "rows": Rows(logits[None], none, none, none[:, None].long()),
        "temperature": torch.full((many,), 0.8),
        "uniforms": uniforms,
        "draft": None,
        "filters": Filters(
            torch.full((many,), int(filters.get("top_k", WIDTH)), dtype=torch.int32),
            torch.full((many,), filters.get("top_p", 1.0)),
            torch.full((many,), filters.get("min_p", 0.0)),
        ),
        "keys": Keys(torch.full((many,), 7), torch.full((many,), 3), torch.arange(many).int() // 2),
    }
    return {name: _moved(value, device) for name, value in given.items()}


def _peaked() -> torch.Tensor:
    return 4 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))


def _tied() -> torch.Tensor:
    """Five values, so that every threshold falls among ties, and the candidates' too."""
    return torch.arange(WIDTH).remainder(5).float()


#: Logits, filters, and whether the candidates are enough.
FILTERED: list[tuple[str, Callable[[], torch.Tensor], dict[str, float], bool]] = [
    ("top-k", _peaked, {"top_k": 9}, True),
    ("top-k of all candidates", _peaked, {"top_k": CAP}, True),
    ("top-p of a peaked row", _peaked, {"top_p": 0.8}, True),
    ("min-p of a peaked row", _peaked, {"min_p": 0.05}, True),
    ("top-k over top-p", _peaked, {"top_k": 12, "top_p": 0.7, "min_p": 0.01}, True),
    ("top-p of a flat row", lambda: _peaked() / 40, {"top_p": 0.9}, False),
    ("top-k of more", lambda: _peaked() / 40, {"top_k": 100}, False),
    ("min-p of a flat row", lambda: _peaked() / 40, {"min_p": 0.8}, False),
    ("top-k among ties", _tied, {"top_k": 13}, True),
    ("top-k of as many ties as there are candidates", _tied, {"top_k": CAP}, True),
    ("top-p among ties", _tied, {"top_p": 0.3}, True),
    (
        "few tokens",
        lambda: torch.where(torch.arange(WIDTH) % 70 == 3, _peaked(), -torch.inf),
        {"top_k": 8, "top_p": 0.9},
        True,
    ),
]


@pytest.mark.parametrize(
    ("logits", "filters", "enough"),
    [case[1:] for case in FILTERED],
    ids=[case[0] for case in FILTERED],
)
def test_candidates_decide_where_they_are_enough(
    logits: Callable[[], torch.Tensor],
    filters: dict[str, float],
    enough: bool,
    device: torch.device,
) -> None:
    given = one_row(logits(), device, **filters)
    if not INTERPRETED:
        agree(given)
        return
    kept: list[Any] = []
    traffic = count(lambda: kept.append(accept(**given, backend="triton")))
    assert traffic.outside == 0
    assert agree(given, kept[0]) >= 2
    assert (traffic.loaded.get("cut_kernel.logits", 0) == 0) == enough


def test_filtered_rows_are_read_once_and_dense_laws_where_tokens_are_kept(
    device: torch.device,
) -> None:
    """Bytes at a size where they count: within 1.3 of the floor."""
    if not INTERPRETED:
        pytest.skip("bytes are counted in the interpreter")
    from benchmarks.ops.accept import TOP_K, Case

    case = Case(24000, gamma=1, law="dense", filtered=True)
    traffic = count(case.example(1).run)
    assert case.floor_bytes(1) < traffic.kernels <= 1.3 * case.floor_bytes(1)
    assert traffic.loaded["residual_kernel.law"] <= 2 * TOP_K


@pytest.mark.parametrize("width", [151936, 129280, 262144])
def test_one_request_fills_an_h100(width: int) -> None:
    """132 multiprocessors, two programs of ``scan`` on each at once: 128 registers a thread at most."""
    block = constants(width, 7, bfloat16=False, law=1)["BLOCK"]
    programs = 8 * -(-width // block)
    assert programs >= 0.9 * 132
    assert programs <= 2 * 132


def test_steps_of_any_size_run_the_same_kernels(compiling_python: Callable[[str], str]) -> None:
    """The keys that Triton compiles by, over requests, rows, depths and places of operands."""
    code = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
import dspark_kernels.accept as op
import sys
sys.path.insert(0, "tests/kernels")
import accept_variants

backend = make_backend(GPUTarget("cuda", 90, 32))

class Keys:
    def __init__(self, kernel):
        self.kernel, self.arg_names, self.found = kernel, kernel.arg_names, set()
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    def __getitem__(self, grid):
        return lambda **given: self.found.add(repr(self.bind(**given)[1:]))

for seeded in (False, True):
    for block in (False, True):
        total = 0
        for variant in accept_variants.variants(seeded=seeded, block=block):
            op.KERNELS = {name: Keys(getattr(op.kernel, name + "_kernel")) for name in op.KERNELS}
            for requests, depth, rows in ((1, 7, 8), (1, 1, 1), (2, 3, 16), (16, 7, 113), (5, 2, 17)):
                given = accept_variants.padded(variant, 1600, depth, torch.device("cpu"), requests=requests)
                shifted = torch.empty(rows * 1600 + 1)[1:].view(rows, 1600)
                given["rows"] = given["rows"]._replace(logits=shifted)
                del given["backend"]
                given = {"keys": None, "filters": None, "adjustments": None, **given}
                names = ("rows", "temperature", "uniforms", "draft", "filters", "keys", "adjustments")
                operands = [given[name] for name in names]
                plan = op.check(*operands, variant.block, None)
                op._launch(plan, *operands, op._empty(given["rows"]))
            found = {name: len(keys.found) for name, keys in op.KERNELS.items()}
            assert set(found.values()) <= {0, 1}, (variant, found)
            total += sum(found.values())
        print(total)
"""
    # Greedy 2; dense 3 + 4, listed 2 + 3, and coupled 2 + 3.
    assert compiling_python(code).splitlines() == ["14", "14", "7", "7"]


def test_padded_operands_run_every_variant(device: torch.device) -> None:
    for seeded in (False, True):
        for variant in variants(seeded=seeded):
            found = accept(**padded(variant, 100, 2, device))
            assert [int(x) for x in found] == [0, 0, 0]
            rows = padded(variant, 100, 2, device)
            rows.pop("backend")
            plan = check(
                *(rows[n] for n in ("rows", "temperature", "uniforms", "draft", "filters", "keys")),
                None,
                False,
                None,
            )
            assert (plan.constants["FILTERED"], plan.constants["COUPLED"]) == (
                variant.filtered,
                variant.coupled,
            )


def test_a_listed_law_longer_than_a_tile_is_found(device: torch.device) -> None:
    """The drafted token's chance and the residual come from the end of a long list."""
    size = 40
    tokens = torch.arange(size).flip(0).view(1, 1, size)
    probs = torch.full((1, 1, size), 1 / size)
    rows = Rows(
        torch.zeros(2, 64), torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), torch.tensor([[0]])
    )  # fmt: skip
    given = {
        "rows": rows,
        "temperature": torch.ones(1),
        "uniforms": torch.tensor([[0.7, 0.5]], dtype=torch.float64),
        "draft": ListedDraft(probs, tokens),
    }
    # 0.7 / 40 > 1 / 64: rejected; what is left of p lies at tokens 40 to 63 alone.
    found = accept(
        **{name: _moved(value, device) for name, value in given.items()}, backend="triton"
    )
    assert [int(x) for x in found] == [0, 52, 0]
