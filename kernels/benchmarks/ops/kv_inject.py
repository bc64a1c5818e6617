"""Configurations and bytes of ``kv_inject``; the protocol is in :mod:`benchmarks.report`."""

from __future__ import annotations

import torch

from benchmarks.report import Build, Case, Example
from dspark_kernels.kv_inject import NUM_WARPS, blocks, kv_inject, pools, rope_table
from dspark_kernels.kv_inject.kernel import kv_inject_kernel
from dspark_kernels.kv_inject.reference import reference

#: Positions of the example's table and slots of its pool; neither is read as a whole.
_POSITIONS = 64
_SLOTS = 4096

#: gamma, layers, heads, dim and rotary of what is served: the published dense drafters (Qwen3 8B
#: and 14B, Gemma 4 12B), a drafter of SmolLM2's size, and one that turns half of each head.
_SIZES = (
    (7, 5, 8, 128, 128),
    (5, 5, 8, 128, 128),
    (7, 5, 8, 256, 256),
    (7, 2, 5, 64, 64),
    (7, 5, 8, 128, 64),
)


def cases() -> list[Case]:
    """The configurations served, in bfloat16; half of each request's window is accepted."""
    return [_case(*sizes) for sizes in _SIZES]


def _case(gamma: int, layers: int, heads: int, dim: int, rotary: int) -> Case:
    strides = (
        "k_row_stride",
        "k_layer_stride",
        "v_row_stride",
        "v_layer_stride",
        "k_slot_stride",
        "v_slot_stride",
    )
    build = Build(
        kernel=kv_inject_kernel,
        signature={
            "k": "*bf16",
            "v": "*bf16",
            "positions": "*i64",
            "slots": "*i64",
            "weight": "*bf16",
            "table": "*fp32",
            "addresses": "*i64",
            **dict.fromkeys(strides, "i32"),
            "capacity": "i32",
            "positions_held": "i32",
            "eps": "fp32",
        },
        constants=blocks(heads, dim, rotary),
        num_warps=NUM_WARPS,
        aligned=strides,
    )
    sizes = {
        "rows": gamma + 1,
        "accepted": (gamma + 1) // 2,
        "layers": layers,
        "heads": heads,
        "dim": dim,
        "rotary": rotary,
    }
    return Case(f"gamma{gamma}-L{layers}-H{heads}-D{dim}-rotary{rotary}-bf16", sizes, (build,))


def floor_bytes(case: Case, batch: int) -> int:
    """K and V of accepted rows in and out; every slot; a position and a rotation an accepted row.

    The gains and the table of addresses are read once.
    """
    s = case.sizes
    moved = s["layers"] * s["heads"] * s["dim"] * 2 * 4
    row = moved + 8 + 4 * s["rotary"]
    shared = s["layers"] * (2 * s["dim"] + 16)
    return batch * (s["accepted"] * row + s["rows"] * 8) + shared


def formula_bytes(case: Case, batch: int) -> int:
    """Each layer's program reads its row's slot, position, rotation, gain and addresses again."""
    s = case.sizes
    moved = s["heads"] * s["dim"] * 2 * 4
    row = moved + 8 + 4 * s["rotary"] + 2 * s["dim"] + 16
    return batch * s["layers"] * (s["accepted"] * row + s["rows"] * 8)


def example(case: Case, batch: int) -> Example:
    """Random rows; the first ones of each request are accepted, to scattered slots."""
    s = case.sizes
    random = torch.Generator().manual_seed(7)
    rows, layers, width = batch * s["rows"], s["layers"], s["heads"] * s["dim"]
    fused = torch.randn(rows, layers, 2, width, generator=random).bfloat16()
    positions = torch.randint(_POSITIONS, (rows,), generator=random)
    slots = torch.randperm(_SLOTS, generator=random)[:rows]
    slots[torch.arange(rows) % s["rows"] >= s["accepted"]] = -1
    weight = (1 + 0.1 * torch.randn(layers, s["dim"], generator=random)).bfloat16()
    table = rope_table(_POSITIONS, s["rotary"], 1e6)

    def fresh() -> list[torch.Tensor]:
        shape = (_SLOTS, s["heads"], s["dim"])
        return [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(layers)]

    into = pools(fresh(), fresh())
    operands = (fused[:, :, 0], fused[:, :, 1], positions, slots, weight, table)

    def run() -> None:
        kv_inject(*operands, into, eps=1e-6, backend="triton")

    def max_error(result: None) -> float:
        keys, values = [p.double() for p in fresh()], [p.double() for p in fresh()]
        widened = (operands[0].double(), operands[1].double(), *operands[2:])
        reference(*widened, keys, values, eps=1e-6, dtype=torch.float64)
        found = (*into.keys, *into.values)
        pairs = zip(found, (*keys, *values), strict=True)
        return max(float((a.double() - b).abs().max()) for a, b in pairs)

    named = {f"keys.{i}": pool for i, pool in enumerate(into.keys)}
    named |= {f"values.{i}": pool for i, pool in enumerate(into.values)}
    return Example(run, max_error, named)
