"""The summary of the kernels: put together from small made-up counts, shown, and written down."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import kernels, measure, ops
from benchmarks.aot import Resources
from benchmarks.kernels import MeasurementError, call, worker
from benchmarks.measure import Counted
from benchmarks.traffic import Traffic
from dspark_sglang.artifacts import Provenance
from dspark_sglang.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "docs" / "results" / "kernels.json"
DOCUMENT = ROOT / "docs" / "explanation" / "kernels.md"
WHEN = Provenance(created="2026-01-01", command="make bench-kernels", versions={"torch": "2"})
OURS = kernels.OURS
ACCEPT = OURS["accept"][1]
STEP = Traffic({}, {}, 0, 6, 44, {"max": 10, "copy_": 1})


def counted(each: int, launches: int = 1, operations: int = 0) -> Counted:
    """A call that moves ``each`` bytes a request, a quarter of it by torch where it has operations."""
    batches = (*measure.COUNTED, *measure.EXTRAPOLATED)
    share = each // 4 if operations else 0
    return Counted(
        kernels={batch: (each - share) * batch for batch in batches},
        torch={batch: share * batch for batch in batches},
        floor={batch: each * batch // 2 for batch in batches},
        launches=launches,
        operations=operations,
        max_error=0.0,
    )


def resources(launches: int) -> list[Resources]:
    return [Resources("k", 4, 40 + number, 0, 0, 2048) for number in range(launches)]


def measured(**changed: Any) -> kernels.Measured:
    each = {"draft": (10_000, 6), "draft_shortlist": (3000, 3)}
    each |= {"accept": (4000, 1), "accept_shortlist": (2000, 1)}
    traffic: dict[str, dict[str, Any]] = {"accept": {}, "markov_step": {}}
    for part, (op, name) in OURS.items():
        traffic[op][name] = counted(*each[part])
    traffic["kv_inject"] = {"gamma5": counted(10, 1)}
    found = kernels.Measured(
        resources={
            op: {name: resources(one.launches) for name, one in configs.items()}
            for op, configs in traffic.items()
        },
        traffic=traffic,
        parts={
            "builtin_draft": counted(12_000, 3, 2),
            "builtin_accept": counted(50_000),
            "builtin_accept_optin": counted(20_000),
        },
        step=STEP,
    )
    return found._replace(**changed)


def summed(found: kernels.Measured) -> dict[str, Any]:
    return kernels.summarise(found, machine="here", commit="abc", provenance=WHEN)


def shown(summary: dict[str, Any]) -> str:
    console = Console(width=250, record=True)
    kernels.show(summary, console)
    return console.export_text()


# --- the summary -------------------------------------------------------------------------------


def test_the_round_is_ours_beside_sglangs() -> None:
    found = summed(measured())
    row = kernels.BATCH / 1e6
    assert found["accept_gb"] == round(4 * row, 4)
    assert found["accept_shortlist_gb"] == round(2 * row, 4)
    assert found["draft_accept_gb"] == pytest.approx(14 * row, abs=1e-4)
    # Its distribution is over every token.
    assert found["draft_accept_shortlist_gb"] == pytest.approx(7 * row, abs=1e-4)
    assert found["builtin_draft_accept_gb"] == pytest.approx(62 * row, abs=1e-4)
    assert found["builtin_optin_accept_gb"] == pytest.approx(20 * row, abs=1e-4)
    assert (found["launches_per_step"], found["torch_operations_per_step"]) == (7, 11)
    assert found["round"]["draft"]["floor_bytes"] == kernels.BATCH * 5000
    assert found["round"]["builtin_draft"]["torch_operations"] == 2
    assert found["ops"]["markov_step"][OURS["draft"][1]]["registers"] == 45


def test_parts_of_the_round_are_configurations_of_the_ops() -> None:
    for op, name in OURS.values():
        assert name in {case.name for case in ops.cases(op)}


def test_a_roofline_is_computed_and_nothing_is_timed_without_a_device() -> None:
    found = summed(measured())
    config = found["ops"]["accept"][ACCEPT]
    assert config["roofline_us"] == round(64 * 4000 / 3.35e12 * 1e6, 2)
    assert "computed, not timed" in found["labels"]["roofline_us"]
    assert found["device"] is config["timed_us"] is None
    assert all(part["timed_us"] is None for part in found["round"].values())
    text = shown(found)
    assert "Nothing was timed" in text
    assert "µs (timed)" not in text


def test_times_get_a_column_of_their_own() -> None:
    times = {f"accept/{ACCEPT}": 12.5, "builtin_accept": 35.0}
    found = summed(measured(times=times, device="a GPU"))
    assert found["ops"]["accept"][ACCEPT]["timed_us"] == 12.5
    assert found["round"]["accept"]["timed_us"] == 12.5
    assert found["round"]["builtin_accept"]["timed_us"] == 35.0
    text = shown(found)
    assert "Timed on a GPU." in text
    assert "µs (timed)" in text
    assert "not measured" in text  # the others


def test_what_was_not_measured_is_none() -> None:
    alone = {"admit": {"R1": counted(1)}}
    found = summed(measured(resources={"admit": {"R1": resources(1)}}, traffic=alone, parts={}))
    gigabytes = [name for name in found if name.endswith("_gb")]
    assert len(gigabytes) == 8
    assert {found[name] for name in (*gigabytes, "launches_per_step")} == {None}
    assert shown(found).count("not measured") == len(kernels.TARGETS)


def test_other_launches_interpreted_than_compiled_are_refused() -> None:
    alone = {"admit": {"R1": resources(2)}}
    with pytest.raises(MeasurementError, match="admit/R1 launched 1 kernels interpreted and 2"):
        summed(measured(resources=alone, traffic={"admit": {"R1": counted(1)}}))


def test_operands_are_moved_wherever_they_are() -> None:
    given = {"rows": (torch.zeros(2), [torch.zeros(1)]), "block": True, "keys": None}
    moved = ops.on(torch.device("meta"), given)
    assert moved["rows"][0].is_meta and moved["rows"][1][0].is_meta
    assert (moved["block"], moved["keys"]) == (True, None)


# --- workers -------------------------------------------------------------------------------------


def environment(name: str) -> str | None:
    """Runs in a worker."""
    return os.environ.get(name)


def failing() -> None:
    """Runs in a worker, and fails there with an error that cannot be sent back."""
    raise MeasurementError("the reason", expected="none", fix="none")


@pytest.mark.parametrize("interpret", [True, False], ids=["interpreted", "compiled"])
def test_a_worker_has_the_interpreter_or_not(
    interpret: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0" if interpret else "1")
    with worker(interpret=interpret) as pool:
        found = pool.submit(call, __name__, "environment", "TRITON_INTERPRET").result()
    assert found == str(int(interpret))


def test_a_worker_that_fails_says_why() -> None:
    with worker(interpret=False) as pool, pytest.raises(RuntimeError, match="Error: the reason"):
        pool.submit(call, __name__, "failing").result()


# --- command line --------------------------------------------------------------------------------


def test_the_command_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(kernels, "measure", lambda ops: asked.append(ops) or measured())
    kernels.main(["--out", str(tmp_path), "--ops", "accept, markov_step"])
    assert asked == [("accept", "markov_step")]
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["accept_gb"] == summed(measured())["accept_gb"]
    assert "Nothing was timed" in capsys.readouterr().out


def answer(module: str, function: str, *of: str) -> Any:
    """Runs in place of :func:`kernels.call`: answers at once."""
    found = measured()
    answers: dict[str, Any] = {
        "compile_op": found.resources,
        "count_op": found.traffic,
        "count_builtin": found.parts,
    }
    return found.step if function == "count_step" else answers[function][of[0]]


def failing_step(module: str, function: str, *of: str) -> Any:
    if function == "count_step":
        raise RuntimeError("A kernel is wrong.")
    return answer(module, function, *of)


@pytest.mark.costly
def test_the_round_is_counted_where_both_its_ops_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "call", answer)
    both, one = (kernels.measure(ops) for ops in (("markov_step", "accept"), ("kv_inject",)))
    assert both.parts == measured().parts
    assert both.traffic == {op: measured().traffic[op] for op in ("markov_step", "accept")}
    assert (set(one.resources), one.parts, one.step) == ({"kv_inject"}, {}, STEP)


@pytest.mark.costly
def test_a_step_that_fails_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "call", failing_step)
    with pytest.raises(MeasurementError, match="A kernel is wrong"):
        kernels.main(["--out", str(tmp_path), "--ops", "kv_inject"])
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("names", "match"), [("accept,softmax", "no softmax"), (",", "all, or some of")]
)
def test_ops_that_are_none_are_refused(names: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        kernels.main(["--ops", names])


# --- what is committed ---------------------------------------------------------------------------


def test_every_op_is_explained() -> None:
    text = DOCUMENT.read_text()
    for op in ops.names():
        assert f"## `{op}`" in text, op


def test_nothing_committed_spills_or_was_timed_without_a_device() -> None:
    found = json.loads(COMMITTED.read_text())
    for op, configs in found["ops"].items():
        for name, config in configs.items():
            assert config["spills"] == 0, (op, name)
            assert (config["timed_us"] is None) or found["device"], (op, name)
