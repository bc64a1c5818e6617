"""The format of a trace, and how two of them are compared.

A trace is a text of JSON lines: a head, one line a decode step, an end. Its words are those of the redesign (plan,
draft, admission, outcome, learned), so it stays as it is whatever classes are called. Only
:mod:`tests.golden.adapter` knows those.

Two traces are compared in one of two ways:

- ``exact``: the texts are the same, byte for byte. Numbers have nine significant digits, survivals six. This is what one
  machine must reproduce.
- otherwise: every integer, flag, word and length is the same. Other numbers may differ by :data:`RELATIVE`, which is
  far more than another processor's rounding and far less than a changed rule. Confidences of the drafter's own head
  are shown, and compared roughly: they come from the model, and decide nothing in a trace.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "traces"
FORMAT = 1
#: Significant digits of numbers, and of survivals, of which there are many.
DIGITS, SHORT = 9, 6
#: Largest relative difference of two numbers that are taken for equal, and of two that are nearly 0.
RELATIVE, ABSOLUTE = 5e-6, 1e-9
#: Numbers of the drafter's own head: another processor's are this close.
ROUGHLY = {"draft.head": 0.02}
#: Steps shown before the first that differs.
_BEFORE = 3

Line = dict[str, Any]


def number(value: float, digits: int = DIGITS) -> float:
    """``value`` with so many significant digits."""
    return float(f"{float(value):.{digits}g}")


def numbers(values: Any, digits: int = DIGITS) -> Any:
    """The same of nested lists of floats."""
    if isinstance(values, list | tuple):
        return [numbers(value, digits) for value in values]
    return number(values, digits)


def encode(line: Mapping[str, Any]) -> str:
    """One line of a trace, without its end."""
    return json.dumps(line, separators=(",", ":"), ensure_ascii=True)


def decode(text: str) -> list[Line]:
    """The lines of a trace."""
    return [json.loads(line) for line in text.splitlines()]


def path_of(name: str) -> Path:
    """Where the stored trace of that name is."""
    return FOLDER / f"{name}.jsonl.gz"


def save(name: str, text: str) -> Path:
    """Store a trace; the same text makes the same file."""
    path = path_of(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    path.with_name(f"{name}.txt").write_text(summary(name, text), encoding="utf-8")
    return path


def load(name: str) -> str:
    """The stored trace of that name."""
    return gzip.decompress(path_of(name).read_bytes()).decode()


# --- what changed since the step before -----------------------------------------------------------


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Line:
    """Entries of ``after`` that ``before`` has not, or has otherwise; None where one is gone."""
    found = {name: value for name, value in after.items() if before.get(name) != value}
    return found | {name: None for name in before if name not in after}


# --- comparison -----------------------------------------------------------------------------------


class Difference(NamedTuple):
    """One place where two lines differ."""

    place: str
    recorded: Any
    now: Any


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every place of a line, with what stands there; empty lists and objects count as such."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            # Names of learned values have dots of their own.
            yield from leaves(part, f"{place}.{name}" if place else name)
    elif isinstance(value, list) and value:
        for at, part in enumerate(value):
            yield from leaves(part, f"{place}[{at}]")
    else:
        yield place, value


def _alike(place: str, one: object, other: object) -> bool:
    if type(one) is not type(other):
        return False
    if one == other:
        return True
    if not (isinstance(one, float) and isinstance(other, float)):
        return False
    for start, most in ROUGHLY.items():
        if place.startswith(start):
            return abs(one - other) <= most
    return math.isclose(one, other, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def differences(recorded: Line, now: Line, *, exact: bool) -> list[Difference]:
    """Where two lines differ."""
    known, found = dict(leaves(recorded)), dict(leaves(now))
    places = [*known, *(place for place in found if place not in known)]
    missing = "nothing"
    pairs = ((p, known.get(p, missing), found.get(p, missing)) for p in places)
    if exact:
        return [Difference(*one) for one in pairs if encode({"": one[1]}) != encode({"": one[2]})]
    return [Difference(*one) for one in pairs if not _alike(*one)]


class Comparison(NamedTuple):
    """What a comparison has found."""

    #: Whether the texts are the same.
    same_bytes: bool
    #: Number of the first line that differs, 0 for the head; None: none does.
    line: int | None
    #: Words for people; one paragraph.
    report: str

    @property
    def equal(self) -> bool:
        """Whether nothing differs that is compared."""
        return self.line is None


def compare(name: str, recorded: str, now: str, *, exact: bool) -> Comparison:
    """Compare two traces up to the first line that differs.

    Args:
        name: of both, for the report.
        recorded: the stored trace.
        now: the new one.
        exact: byte for byte.
    """
    same = recorded == now
    if same:
        return Comparison(
            True, None, f"{name}: the same bytes, {recorded.count(chr(10)) - 2} steps"
        )
    before, after = decode(recorded), decode(now)
    for at, (old, new) in enumerate(zip(before, after, strict=False)):
        found = differences(old, new, exact=exact)
        if found:
            return Comparison(False, at, _report(name, before, after, at, found))
    if len(before) != len(after):
        at = min(len(before), len(after))
        words = f"{name}: {len(before) - 2} steps were recorded, now there are {len(after) - 2}"
        return Comparison(False, at, words)
    words = f"{name}: the same decisions; the largest relative difference of a number is {_largest(before, after):.1e}"
    return Comparison(False, None, words)


def _largest(before: Sequence[Line], after: Sequence[Line]) -> float:
    """Largest relative difference of two numbers at the same place."""
    found = 0.0
    for old, new in zip(before, after, strict=True):
        values = dict(leaves(new))
        for place, one in leaves(old):
            other = values.get(place)
            rough = any(place.startswith(start) for start in ROUGHLY)
            if isinstance(one, float) and isinstance(other, float) and one != other and not rough:
                found = max(found, abs(one - other) / max(abs(one), abs(other)))
    return found


def _report(
    name: str, before: Sequence[Line], after: Sequence[Line], at: int, found: list[Difference]
) -> str:
    where = "its head" if not at else _title(before[at])
    lines = [f"{name}: {where} is the first that differs"]
    lines += [f"  before  {brief(line)}" for line in before[max(1, at - _BEFORE) : at]]
    lines += [f"  recorded  {brief(before[at])}", f"  now       {brief(after[at])}"]
    lines += [f"    {d.place}: recorded {d.recorded!r}, now {d.now!r}" for d in found[:16]]
    if len(found) > 16:
        lines.append(f"    and {len(found) - 16} more places")
    return "\n".join(lines)


def _title(line: Line) -> str:
    return f"step {line['step']}" if "step" in line else "its end"


def brief(line: Line) -> str:
    """One line for people."""
    if "step" not in line:
        return encode(line)[:160]
    plan, draft, admission = line["plan"], line["draft"], line["admission"]
    kind = "drafts" if draft["forward"] else "copies" if draft["copied"] else "decodes"
    words = [word for word in ("verify_all", "profile") if plan[word]]
    parts = [
        f"step {line['step']}: requests {line['requests']} {kind}",
        *([f"({', '.join(words)})"] if words else []),
        f"depth {plan['depth']}, budget {admission['budget']}, lens {admission['lens']},",
        f"committed {line['outcome']['committed']}",
    ]
    return " ".join(parts)


# --- for readers of the repository ----------------------------------------------------------------


def _runs(lines: Iterable[Line]) -> Iterator[tuple[str, int, int]]:
    """Kinds of successive steps, with the first and the last of each run."""
    kind, first, last = "", 0, 0
    for line in lines:
        draft, plan = line["draft"], line["plan"]
        now = "drafting" if draft["forward"] else "copying" if draft["copied"] else "decoding"
        now += ", everything verified" if plan["verify_all"] and draft["forward"] else ""
        if now != kind:
            if kind:
                yield kind, first, last
            kind, first = now, int(line["step"])
        last = int(line["step"])
    if kind:
        yield kind, first, last


def summary(name: str, text: str) -> str:
    """A trace in a page, to see in a diff what has changed."""
    head, *steps, end = decode(text)
    verified = sum(sum(line["admission"]["lens"]) for line in steps)
    kept = sum(sum(line["outcome"]["kept"]) for line in steps)
    committed = sum(sum(line["outcome"]["committed"]) for line in steps)
    learned = {entry.split(".")[0] for line in steps for entry in line["learned"]}
    lines = [
        f"{name}: {head['about']}",
        f"{len(steps)} steps, {committed} tokens committed, {verified} drafted tokens verified, {kept} kept",
        f"requests of a step: 1 to {max(len(line['requests']) for line in steps)}",
        f"learned: {', '.join(sorted(learned))}",
        f"end: {encode(end['end'])}",
        "",
        "steps         kind",
        *(f"{a:>5} to {b:<5} {kind}" for kind, a, b in _runs(steps)),
    ]
    return "\n".join(lines) + "\n"
