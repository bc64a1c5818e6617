"""What the reader of PTX finds, in planted programs and in our kernels."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from tests.cuda_lab import ptx, record

HEAD = """
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
{
  ld.param.b64 %rd1, [kernel_param_0];
  ld.param.b64 %rd2, [kernel_param_1];
  cvta.to.global.u64 %rd3, %rd1;
  mul.wide.s32 %rd4, %r1, 4;
  add.s64 %rd5, %rd3, %rd4;
"""
STALE = HEAD + "  ld.global.nc.b32 %r2, [%rd5];\n  st.global.b32 [%rd5], %r3;\n  ret;\n}\n"
#: The table's address, not the parameter, is written through.
TABLE = HEAD + (
    "  ld.global.b64 %rd6, [%rd5];\n  ld.global.nc.b32 %r2, [%rd6+16];\n"
    "  st.global.b32 [%rd6], %r3;\n  ret;\n}\n"
)
UNORDERED = HEAD + "  st.global.b32 [%rd5], %r3;\n  ld.global.b32 %r2, [%rd3+4];\n  ret;\n}\n"
#: The load is before the store in the text, and after it in the loop's next turn.
LOOP = HEAD + (
    "$L1:\n  ld.global.b32 %r2, [%rd5];\n  bar.sync 0;\n  st.global.b32 [%rd5+4], %r3;\n"
    "  @%p1 bra $L1;\n  ret;\n}\n"
)
PLANTED = {
    "stale": (STALE, "nc kernel_param_0"),
    "table": (TABLE, "nc *kernel_param_0"),
    "unordered": (UNORDERED, "barrier kernel_param_0"),
    "loop": (LOOP, "barrier kernel_param_0"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str) -> None:
    text, wanted = PLANTED[name]
    assert any(str(fault).startswith(wanted) for fault in ptx.check(text))


@pytest.mark.parametrize(
    "body",
    [
        "  ld.global.nc.b32 %r2, [%rd5];\n  st.global.b32 [%rd2], %r3;\n",
        "  st.global.b32 [%rd5], %r3;\n  bar.sync 0;\n  ld.global.b32 %r2, [%rd3+4];\n",
        "  ld.global.b32 %r2, [%rd5];\n  ld.global.b32 %r4, [%rd3];\n",
        "  st.shared.b32 [%r9], %r3;\n  ld.shared.b32 %r2, [%r9];\n",
        "  @%p1 bra $L2;\n  st.global.b32 [%rd5], %r3;\n  bra.uni $L3;\n$L2:\n"
        "  ld.global.b32 %r2, [%rd5];\n$L3:\n",
    ],
)
def test_what_is_ordered_is_not_blamed(body: str) -> None:
    assert ptx.check(HEAD + body + "  ret;\n}\n") == []


#: Pairs that were looked at: the thread that stores a value is the one that has read it.
HARMLESS: dict[str, set[str]] = {
    "finish_kernel": {"barrier token_out: ld.global.b64 then st.global.b64"},
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, list[str]]]:
    """One configuration of the ops that compile fast; ``make cuda-lab`` reads all of them."""
    result: dict[str, Any] = record.in_a_process(
        "ptx", "--ops", "admit,confidence,kv_inject", "--most", "1"
    )
    return result


@pytest.mark.costly
def test_our_kernels_have_no_such_fault(found: dict[str, dict[str, list[str]]]) -> None:
    for kernels in found.values():
        for name, faults in kernels.items():
            assert set(faults) <= HARMLESS.get(name.split()[0], set()), name
