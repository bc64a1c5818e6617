"""Scheduling decides and learns as it did: golden traces of the simulator and of real servers."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.golden import record, scenario, servers, simulated, trace
from tests.golden.trace import Line

#: ``make golden`` records V4 too.
FAMILIES = ("dense", pytest.param("v4", marks=pytest.mark.slow))


def require_as_recorded(name: str, now: str) -> None:
    found = trace.compare(name, trace.load(name), now, exact=False)
    assert found.equal, f"\n{found.report}\nIf it is meant: python -m tests.golden.record {name}"


@pytest.mark.parametrize("name", simulated.CASES)
def test_the_simulator_decides_as_recorded(name: str) -> None:
    require_as_recorded(name, simulated.record(simulated.CASES[name]))


@pytest.mark.server
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
def test_servers_decide_as_recorded(family: str) -> None:
    cases = [case for case in scenario.CASES.values() if case.family == family]
    for name, now in servers.record(cases).items():
        require_as_recorded(name, now)


# --- what the stored traces hold ------------------------------------------------------------------


def steps(name: str) -> list[Line]:
    return trace.decode(trace.load(name))[1:-1]


def learned(name: str, ending: str) -> list[Any]:
    """Every value that some learned thing took, in order."""
    return [v for line in steps(name) for k, v in line["learned"].items() if k.endswith(ending)]


@pytest.mark.parametrize("name", record.NAMES)
def test_a_trace_is_worth_comparing(name: str) -> None:
    """A scenario that no longer does what it is for would be compared with itself for ever."""
    lines = steps(name)
    drafts = [line["draft"]["forward"] for line in lines]
    assert len(lines) > 120 and 0.2 < sum(drafts) / len(drafts) < 0.95
    sizes = {len(line["requests"]) for line in lines}
    assert min(sizes) == 1 and max(sizes) >= 8
    assert any(line["plan"]["verify_all"] for line in lines)
    depth = trace.decode(trace.load(name))[0]["gamma"]
    partial = [n for line in lines for n in line["admission"]["lens"] if 0 < n < depth]
    assert len(partial) > 20
    loads = {k for line in lines for k in line["learned"] if k.endswith(".drafting")}
    switched = [learned(name, load) for load in loads]
    assert any(False in values and True in values[values.index(False) :] for values in switched), (
        "speculation goes off and on by itself"
    )
    for part in ("cost_model.", "gain.", "correction.", "depth."):
        assert any(k.startswith(part) for line in lines for k in line["learned"])


@pytest.mark.parametrize("name", scenario.CASES)
def test_a_servers_trace_has_every_kind_of_step(name: str) -> None:
    case, lines = scenario.CASES[name], steps(name)
    assert any(learned(name, ".probing")), "the other way is looked at"
    assert {None, 0.4} <= set(learned(name, "scheduler.fixed_budget"))
    assert {"auto", "on", "off"} <= set(learned(name, "gain.choice"))
    assert any(line["draft"]["copied"] for line in lines) is not case.overlapped
    known = {request for line in lines for request in line["requests"]}
    assert known == {request.name for request in scenario.requests(case)}
    kept = sum(sum(line["outcome"]["kept"]) for line in lines)
    assert 0.3 < kept / sum(sum(line["admission"]["lens"]) for line in lines) < 0.97


# --- the comparison itself ------------------------------------------------------------------------

RECORDED = trace.decode(
    """\
{"trace":"one","format":1,"about":"an example","gamma":2,"known":{"gain.x":1.0}}
{"step":0,"requests":["a","b"],"plan":{"depth":2,"verify_all":false,"profile":false},"draft":{"forward":true,"copied":[],"head":[[0.51]]},"admission":{"budget":2,"lens":[1,1]},"outcome":{"committed":[1,2]},"learned":{"gain.x":1.25}}
{"end":{"steps":1},"learned":{}}
"""
)


def text(lines: list[Line]) -> str:
    return "".join(trace.encode(line) + "\n" for line in lines)


def changed(step: int, *path: Any, to: Any) -> str:
    lines = copy.deepcopy(RECORDED)
    place = lines[step]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = to
    return text(lines)


def compared(now: str, *, exact: bool = False) -> trace.Comparison:
    return trace.compare("one", text(RECORDED), now, exact=exact)


def test_the_same_trace_is_the_same() -> None:
    found = compared(text(RECORDED), exact=True)
    assert found.same_bytes and found.equal and "1 steps" in found.report


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("admission", "budget"), 3),
        (("admission", "lens"), [2, 0]),
        (("admission", "lens"), [1, 1, 0]),
        (("plan", "verify_all"), True),
        (("requests",), ["b", "a"]),
        (("outcome", "committed", 1), 1),
        (("learned", "gain.x"), 1.2501),
        (("learned",), {"gain.x": 1.25, "gain.y": 0.0}),
        (("learned",), {}),
        (("draft", "head", 0, 0), 0.57),
    ],
    ids=str,
)
def test_a_decision_that_differs_is_shown(path: tuple[Any, ...], to: Any) -> None:
    found = compared(changed(1, *path, to=to))
    assert not found.equal and found.line == 1
    assert "step 0 is the first that differs" in found.report
    assert ".".join(map(str, path[:2])) in found.report.replace("[", ".")


@pytest.mark.parametrize(
    ("path", "to"), [(("learned", "gain.x"), 1.2500002), (("draft", "head", 0, 0), 0.52)], ids=str
)
def test_rounding_is_no_difference_unless_bytes_are_asked_for(
    path: tuple[Any, ...], to: float
) -> None:
    assert compared(changed(1, *path, to=to)).equal
    assert not compared(changed(1, *path, to=to), exact=True).equal


def test_a_missing_step_is_a_difference() -> None:
    found = compared(text([RECORDED[0], RECORDED[2]]))
    assert not found.equal


def test_a_whole_number_is_no_other_kind_of_number() -> None:
    assert not compared(changed(1, "admission", "budget", to=2.0)).equal
    assert not compared(changed(1, "plan", "verify_all", to=0)).equal
