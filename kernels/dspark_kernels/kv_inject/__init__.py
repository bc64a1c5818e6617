"""Keys and values of accepted rows, normed and turned, into the draft's paged pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from dspark_kernels.kv_inject.kernel import kv_inject_kernel
from dspark_kernels.kv_inject.reference import reference, rope_table
from dspark_kernels.support.backend import Backend, launched, resolve
from dspark_kernels.support.checks import operand
from dspark_kernels.support.errors import OperandError

__all__ = ["Pools", "kv_inject", "pools", "rope_table"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

NUM_WARPS = 4


class Pools(NamedTuple):
    """The draft's KV pools, one of keys and one of values a layer; made by :func:`pools`."""

    #: ``[slots, heads, dim]`` of each layer.
    keys: tuple[torch.Tensor, ...]
    #: ``[slots, heads, dim]`` of each layer.
    values: tuple[torch.Tensor, ...]
    #: ``[L, 2]`` int64 on the pools' device: where each layer's keys and values start.
    addresses: torch.Tensor


def pools(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Pools:
    """Check the pools of all layers and note their addresses on the device.

    Call it once at start: it copies from the host, which a graph capture does not allow. The
    tensors must stay where they are; the result holds references to them.

    Args:
        keys: ``[slots, heads, dim]`` of each layer, all of one shape, dtype and stride; each slot
            contiguous; starting at a multiple of 16 bytes.
        values: likewise.

    Raises:
        OperandError: pools that differ from each other, or of a dtype, stride or start the kernel
            cannot write.
    """
    if not keys or len(keys) != len(values):
        raise OperandError(
            f"There are {len(keys)} pools of keys and {len(values)} of values.",
            expected="one of each for every layer, at least one",
            fix="Pass the buffers of every draft layer, in order.",
        )
    first = keys[0]
    operand("keys[0]", first, shape=(None, None, None), dtype=FLOATS, contiguous=False)
    for name, group in (("keys", keys), ("values", values)):
        for layer, pool in enumerate(group):
            _check_pool(f"{name}[{layer}]", pool, like=first, beside=group[0])
    table = [[a.data_ptr(), b.data_ptr()] for a, b in zip(keys, values, strict=True)]
    addresses = torch.tensor(table, dtype=torch.int64).to(first.device)
    return Pools(tuple(keys), tuple(values), addresses)


def _check_pool(name: str, pool: torch.Tensor, *, like: torch.Tensor, beside: torch.Tensor) -> None:
    operand(name, pool, shape=like.shape, dtype=like.dtype, device=like.device, contiguous=False)
    _, _, dim = pool.shape
    if pool.stride()[1:] != (dim, 1) or pool.stride() != beside.stride():
        raise OperandError(
            f"{name} has strides {list(pool.stride())}.",
            expected=f"[{beside.stride(0)}, {dim}, 1], each slot contiguous",
            fix="Pass the pool's own buffers, all layers laid out alike.",
        )
    if pool.data_ptr() % 16:
        raise OperandError(
            f"{name} starts at an address that leaves {pool.data_ptr() % 16} modulo 16.",
            expected="a multiple of 16 bytes",
            fix="Pass the pool's own buffers, not a slice inside a slot.",
        )


def kv_inject(
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    into: Pools,
    *,
    eps: float,
    backend: Backend = "auto",
) -> None:
    """``K[l][s_n] = rope(norm(k_{n,l}) * g_l, p_n)`` and ``V[l][s_n] = v_{n,l}`` for rows with a slot.

    Norm and rotation are float32; the normed key is rounded to ``k``'s dtype in between, as the
    draft's own layers round it. Rotation pairs ``i`` with ``i + rotary / 2``; what is behind ``rotary``
    is normed only.

    Of a row whose slot is negative nothing else is read, and nothing is written; nor of one whose
    slot is not in the pool. A position outside the table writes NaN keys. No two rows may name
    the same slot.

    Args:
        k: ``[N, L, heads * dim]`` bfloat16, float16 or float32 projected keys of every layer; the
            last dimension contiguous, the others of any stride (a view of a fused projection).
        v: likewise, projected values.
        positions: ``[N]`` int64 absolute positions.
        slots: ``[N]`` int64 slots in the pool; negative: the row was not accepted.
        weight: ``[L, dim]`` gain of each layer's key norm, bfloat16, float16 or float32.
        table: ``[P, rotary]`` cosines, then sines, of each position (:func:`rope_table`, or a
            model's own, scaled); bfloat16, float16 or float32; rotary even and at most ``dim``.
        into: the pools, of ``k``'s dtype.
        eps: added to the mean square.
        backend: what runs; see :func:`dspark_kernels.support.backend.resolve`.

    All tensors are on one device. One launch of ``N x L`` programs; no host sync.

    Raises:
        OperandError: an operand of the wrong shape, dtype, device or stride.
    """
    chosen = resolve(backend, k)
    _check(k, v, positions, slots, weight, table, into)
    if chosen == "torch":
        reference(k, v, positions, slots, weight, table, into.keys, into.values, eps=eps)
        return
    capacity, heads, dim = into.keys[0].shape
    rows, layers, _ = k.shape
    if not rows:
        return
    rotary = table.shape[1]
    kv_inject_kernel[(rows, layers)](
        k,
        v,
        positions,
        slots,
        weight,
        table,
        into.addresses,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        into.keys[0].stride(0),
        into.values[0].stride(0),
        capacity,
        table.shape[0],
        eps,
        **blocks(heads, dim, rotary),
        num_warps=NUM_WARPS,
    )
    launched("kv_inject")


def blocks(heads: int, dim: int, rotary: int) -> dict[str, int]:
    """The kernel's constants for so many heads of ``dim`` elements, ``rotary`` of them turning."""
    return {
        "HEADS": heads,
        "DIM": dim,
        "ROTARY": rotary,
        "HEADS_BLOCK": triton.next_power_of_2(heads),
        "HALF_BLOCK": triton.next_power_of_2(rotary // 2),
        "REST_BLOCK": triton.next_power_of_2(max(dim - rotary, 1)),
        "FLAT_BLOCK": triton.next_power_of_2(heads * dim),
    }


def _check(
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    into: Pools,
) -> None:
    pool = into.keys[0]
    _, heads, dim = pool.shape
    operand(
        "k",
        k,
        shape=(None, len(into.keys), heads * dim),
        dtype=pool.dtype,
        device=pool.device,
        contiguous=False,
    )
    operand("v", v, shape=k.shape, dtype=k.dtype, device=k.device, contiguous=False)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.numel() and tensor.stride(2) != 1:
            raise OperandError(
                f"{name} has stride {tensor.stride(2)} in its last dimension.",
                expected="1",
                fix=f"Call {name}.contiguous(), or keep heads and their elements last.",
            )
    for name, tensor in (("positions", positions), ("slots", slots)):
        operand(name, tensor, shape=(k.shape[0],), dtype=torch.int64, device=k.device)
    operand("weight", weight, shape=(len(into.keys), dim), dtype=FLOATS, device=k.device)
    operand("table", table, shape=(None, None), dtype=FLOATS, device=k.device)
    rotary = table.shape[1]
    if rotary % 2 or not 2 <= rotary <= dim:
        raise OperandError(
            f"table turns {rotary} of {dim} elements a head.",
            expected=f"an even number from 2 to {dim}",
            fix="Pass cosines and sines side by side: [P, rotary].",
        )
