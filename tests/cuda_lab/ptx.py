"""Two faults that only compiled code shows: stale read-only loads, and missing barriers between a store and a load.

Kernels are compiled for sm_90 without a GPU, and their PTX is read. Which parameter an address comes from is
followed through moves, additions, conversions and selections; an address that was itself loaded (a table of
pointers) counts as ``*`` and the parameter of its table.

- *nc*: ``ld.global.nc`` of a parameter that the kernel writes. Such loads go through the read-only cache, and
  may bring what was there before the store.
- *barrier*: a load that a path reaches from a store to the same parameter, or the other way round, without
  ``bar.sync`` on the way. Another thread of the program may have made the store.

It cannot see which elements are meant: a thread that stores and loads its own elements is reported too. So a
kernel's known and harmless pairs are listed where it is tested. It knows nothing of other programs of the grid.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

_LABEL = re.compile(r"^(\$?[\w$]+):")
_ACCESS = re.compile(r"\b(ld|st|atom|red)\.(?:[\w:]+\.)*?global\b([\w.:]*)\s")
_REGISTER = re.compile(r"%[a-z]+\d+")
_ADDRESS = re.compile(r"\[\s*(%[a-z]+\d+)")


class Fault(NamedTuple):
    """Something to look at in a compiled kernel."""

    #: ``nc`` or ``barrier``.
    kind: str
    #: The kernel's parameter.
    parameter: str
    #: The instruction, and for a pair the earlier one.
    text: str

    def __str__(self) -> str:
        return f"{self.kind} {self.parameter}: {self.text}"

    def named(self, names: dict[str, str]) -> Fault:
        """The same with the kernel's own names of parameters."""
        plain = self.parameter.removeprefix("*")
        star = "*" * (len(self.parameter) - len(plain))
        return self._replace(parameter=star + names.get(plain, plain))


class Access(NamedTuple):
    """An instruction that reads or writes global memory."""

    reads: bool
    writes: bool
    #: Through the read-only cache.
    constant: bool
    address: str
    text: str


def _lines(ptx: str) -> Iterator[str]:
    for line in ptx.splitlines():
        stripped = line.split("//")[0].strip()
        if stripped and not stripped.startswith("."):
            yield stripped.rstrip(";{} \t")
        elif stripped.startswith((".reg", ".param", ".loc", ".file", ".section")):
            continue


def access(line: str) -> Access | None:
    """What an instruction does with global memory; None: nothing."""
    found = re.match(r"(?:@!?%p\d+\s+)?(ld|st|atom|red)\.(\S*)", line)
    if found is None or "global" not in found.group(2).split("."):
        return None
    address = _ADDRESS.search(line)
    if address is None:
        return None
    what = found.group(1)
    modifiers = found.group(2).split(".")
    return Access(
        reads=what in ("ld", "atom"),
        writes=what in ("st", "atom", "red"),
        constant="nc" in modifiers,
        address=address.group(1),
        text=line,
    )


def origins(lines: list[str]) -> dict[str, set[str]]:
    """Parameters that each register's value may be an address in."""
    known: dict[str, set[str]] = defaultdict(set)
    edges: dict[str, set[str]] = defaultdict(set)
    loads: list[tuple[list[str], str]] = []
    for line in lines:
        body = re.sub(r"^@!?%p\d+\s+", "", line)
        parameter = re.match(r"ld\.param\S*\s+(.+),\s*\[(\w+?)(?:\+\d+)?\]", body)
        if parameter is not None:
            for register in _REGISTER.findall(parameter.group(1)):
                known[register].add(parameter.group(2))
            continue
        seen = access(line)
        if seen is not None:
            if seen.reads:
                loads.append((_REGISTER.findall(body.split("[")[0]), seen.address))
            continue
        if re.match(
            r"(mov|add|sub|cvta|selp|mad|or|cvt|shfl|prmt)\b|(mov|add|sub|cvta|selp|mad|or)\.", body
        ):
            registers = _REGISTER.findall(body)
            if len(registers) > 1:
                # The first is written; a braced group writes or joins several.
                edges[registers[0]].update(registers[1:])
    changed = True
    while changed:
        changed = False
        for register, sources in edges.items():
            before = len(known[register])
            for source in sources:
                known[register] |= known.get(source, set())
            changed |= len(known[register]) > before
        for registers, address in loads:
            for register in registers:
                before = len(known[register])
                known[register] |= {
                    f"*{name}" for name in known.get(address, set()) if not name.startswith("*")
                }
                changed |= len(known[register]) > before
    return known


class Block(NamedTuple):
    """Instructions between two labels or branches, and what comes after."""

    lines: list[str]
    after: list[int]


def blocks(lines: list[str]) -> list[Block]:
    """The control flow of one function."""
    starts: dict[str, int] = {}
    made: list[tuple[list[str], list[str], bool]] = [([], [], True)]
    for line in lines:
        label = _LABEL.match(line)
        if label is not None:
            if made[-1][0]:
                made.append(([], [], True))
            starts[label.group(1)] = len(made) - 1
            continue
        made[-1][0].append(line)
        branch = re.match(r"(@!?%p\d+\s+)?bra(?:\.uni)?\s+(\$?[\w$]+)", line)
        ends = re.match(r"(@!?%p\d+\s+)?(ret|exit)\b", line)
        if branch is not None:
            code, to, _ = made[-1]
            made[-1] = (code, [*to, branch.group(2)], branch.group(1) is not None)
            made.append(([], [], True))
        elif ends is not None and ends.group(1) is None:
            made[-1] = (made[-1][0], [], False)
            made.append(([], [], True))
    return [
        Block(
            code,
            [starts[name] for name in to if name in starts]
            + ([index + 1] if falls and index + 1 < len(made) else []),
        )
        for index, (code, to, falls) in enumerate(made)
    ]


def check(ptx: str) -> list[Fault]:
    """Faults of one kernel's PTX."""
    lines = list(_lines(ptx))
    known = origins(lines)
    accesses = [seen for seen in map(access, lines) if seen is not None]

    def where(seen: Access) -> set[str]:
        return known.get(seen.address, set()) or {"?"}

    written = {name for seen in accesses if seen.writes for name in where(seen)}
    found = {
        Fault("nc", name, seen.text)
        for seen in accesses
        if seen.constant
        for name in where(seen) & written
    }
    flow = blocks(lines)
    #: Accesses since the last barrier that a block may begin with: writes of, or reads of a parameter.
    entering: list[set[tuple[bool, str, str]]] = [set() for _ in flow]
    waiting = list(range(len(flow)))
    while waiting:
        index = waiting.pop()
        pending = set(entering[index])
        for line in flow[index].lines:
            if re.search(r"\b(bar\.sync|barrier\.sync|bar\.warp\.sync\.never)\b", line):
                pending.clear()
            seen = access(line)
            if seen is None:
                continue
            for name in where(seen):
                for wrote, other, text in pending:
                    if other == name and (wrote and seen.reads) | (not wrote and seen.writes):
                        found.add(
                            Fault("barrier", name, f"{_short(text)} then {_short(seen.text)}")
                        )
                if name in written:
                    pending.add((seen.writes, name, seen.text))
        for after in flow[index].after:
            if not pending <= entering[after]:
                entering[after] |= pending
                waiting.append(after)
    return sorted(found)


def _short(text: str) -> str:
    return re.sub(r"^@!?%p\d+\s+", "", text).split()[0]


def compiled(run: Callable[[], object]) -> list[Any]:
    """Triton's compiled kernels of a call, in order of their launches."""
    from benchmarks import aot

    with mock.patch.object(aot, "_resources", lambda kernel: kernel):
        found: list[Any] = aot.compile_sm90(run)
    return found


def parameters(kernel: Any) -> dict[str, str]:
    """Names of a kernel's parameters by those of its PTX."""
    entry = re.search(r"\.entry\s+(\w+)", kernel.asm["ptx"])
    assert entry is not None
    given = kernel.src.signature
    runtime = [name for name in kernel.src.fn.arg_names if given[name] != "constexpr"]
    return {f"{entry.group(1)}_param_{i}": name for i, name in enumerate(runtime)}


def check_op(op: str, most: int | None = None) -> dict[str, list[str]]:
    """Faults of an op's configurations, by kernel and configuration; those without are left out."""
    from benchmarks import ops

    found: dict[str, list[str]] = {}
    for case in ops.cases(op)[:most]:
        for kernel in compiled(case.example(case.compiled_batch).run):
            names = parameters(kernel)
            faults = [str(fault.named(names)) for fault in check(kernel.asm["ptx"])]
            if faults:
                found[f"{kernel.name} {case.name}"] = faults
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", default="")
    parser.add_argument("--most", type=int, default=None, help="configurations an op")
    given = parser.parse_args()
    from benchmarks import ops as known

    ops = given.ops.split(",") if given.ops else known.names()
    print(json.dumps({op: check_op(op, given.most) for op in ops}))


if __name__ == "__main__":
    main()
