"""The summary of the kernels: put together from small made-up counts, shown, and written down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import kernels, moved, report, summary, timing
from benchmarks import round as rounds
from benchmarks.children import MeasurementError, results
from dspark_sglang.artifacts import Provenance
from dspark_sglang.errors import ArtifactError, ConfigError, DSparkError

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "docs" / "results" / "kernels.json"
DOCUMENT = ROOT / "docs" / "explanation" / "kernels.md"
WHEN = Provenance(created="2026-01-01", command="make bench-kernels", versions={"torch": "2"})
BATCHES = (*report.COUNTED, *report.EXTRAPOLATED)
OURS = rounds.OURS
ACCEPT = OURS["accept"][1]


def entry(each: int, launches: int) -> dict[str, Any]:
    """A configuration as ``benchmarks.report`` gives it; ``each`` bytes a request."""
    return {
        "registers": 40,
        "spills": 0,
        "shared_bytes": 2048,
        "counted_bytes": {str(batch): each * batch for batch in BATCHES},
        "formula_bytes": {str(batch): each * batch for batch in BATCHES},
        "floor_bytes": {str(batch): each * batch // 2 for batch in BATCHES},
        "launches": launches,
        "max_error": 0.0,
    }


def counts(each: int, launches: int = 1, operations: int = 0) -> rounds.Counts:
    """A part that moves ``each`` bytes a request and column."""
    places = [(batch, columns) for batch in (1, 4) for columns in (10, 20)]
    return rounds.Counts({(b, v): each * b * v for b, v in places}, launches, operations)


def measured(**changed: Any) -> kernels.Measured:
    each = {"draft": (10_000, 6), "draft_shortlist": (3000, 3)}
    each |= {"accept": (4000, 1), "accept_shortlist": (2000, 1)}
    report: dict[str, dict[str, Any]] = {"accept": {}, "markov_step": {}}
    for part, (op, name) in OURS.items():
        report[op][name] = entry(*each[part])
    parts = {
        "builtin_draft": counts(12, 3, 2),
        "builtin_accept": counts(50),
        "builtin_accept_optin": counts(20),
    }
    found = kernels.Measured(
        report=report | {"kv_inject": {"gamma5": entry(10, 1)}},
        parts=parts,
        times={},
        device=None,
        step=(6, 11),
    )
    return found._replace(**changed)


def summed(found: kernels.Measured) -> summary.Summary:
    return kernels.summarise(found, machine="here", commit="abc", provenance=WHEN)


# --- the summary -------------------------------------------------------------------------------


def test_the_round_is_ours_beside_sglangs() -> None:
    found = summed(measured())
    unit, row = rounds.BATCH * rounds.VOCABULARY / 1e9, rounds.BATCH / 1e6
    assert found.accept_gb == round(4 * row, 4)
    assert found.accept_shortlist_gb == round(2 * row, 4)
    assert found.draft_accept_gb == pytest.approx(14 * row, abs=1e-4)
    # Its distribution is over every token.
    assert found.draft_accept_shortlist_gb == pytest.approx(7 * row, abs=1e-4)
    assert found.builtin_draft_accept_gb == pytest.approx(62 * unit, abs=1e-4)
    assert found.builtin_optin_accept_gb == pytest.approx(20 * unit, abs=1e-4)
    assert (found.launches_per_step, found.torch_operations_per_step) == (7, 11)
    assert found.round["draft"].floor_bytes == rounds.BATCH * 5000


def test_our_parts_of_the_round_are_configurations_of_the_ops() -> None:
    for op, name in OURS.values():
        assert name in {case.name for case in report.bench(op).cases()}


def test_a_roofline_is_computed_and_nothing_is_timed_without_a_device() -> None:
    found = summed(measured())
    config = found.ops["accept"][ACCEPT]
    assert config.roofline_us == round(64 * 4000 / 3.35e12 * 1e6, 2)
    assert "computed, not timed" in found.labels["roofline_us"]
    assert found.device is None
    assert config.timed_us is None
    assert all(part.timed_us is None for part in found.round.values())
    shown = summary.text(found)
    assert "Nothing was timed" in shown
    assert "timed, µs" not in shown


def test_times_get_a_column_of_their_own() -> None:
    times = {f"accept/{ACCEPT}": 12.5, "builtin_accept": 35.0}
    found = summed(measured(times=times, device="a GPU"))
    assert found.ops["accept"][ACCEPT].timed_us == 12.5
    assert found.round["accept"].timed_us == 12.5
    assert found.round["builtin_accept"].timed_us == 35.0
    shown = summary.text(found)
    assert "Timed on a GPU." in shown
    assert "timed, µs" in shown
    assert "not measured" in shown  # the others


def test_what_was_not_measured_is_none() -> None:
    found = summed(measured(report={"admit": {"R1": entry(1, 1)}}, parts={}, step=None))
    gigabytes = [name for name in summary.Summary.__struct_fields__ if name.endswith("_gb")]
    assert len(gigabytes) == 8
    assert {getattr(found, name) for name in gigabytes} == {None}
    assert found.launches_per_step is None
    assert {value for _, value, _ in summary.headline_rows(found)} == {"not measured"}


@given(st.tuples(*[st.integers(0, 10**9)] * 4), st.integers(1, 300), st.integers(1, 300_000))
def test_counts_are_linear_in_batch_and_vocabulary(
    terms: tuple[int, int, int, int], batch: int, columns: int
) -> None:
    def exact(b: int, v: int) -> int:
        return terms[0] + terms[1] * b + terms[2] * v + terms[3] * b * v

    known = {(b, v): exact(b, v) for b in (1, 4) for v in (64640, 129280)}
    assert rounds.Counts(known, 1, 0).at(batch, columns) == exact(batch, columns)


# --- counting torch operations -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "bytes_"),
    [
        (lambda x: x.view(2, 50)[0].unsqueeze(0).expand(3, -1), 0),
        (lambda x: torch.empty(1000), 0),
        (lambda x: torch.zeros(1000), 4000),
        (lambda x: x + 1, 800),
        (lambda x: x.add_(1), 800),
        (lambda x: x.zero_(), 400),
        (lambda x: x.copy_(torch.empty(100)), 800),
        (lambda x: torch.add(x, x, out=torch.empty(100)), 800),
        (lambda x: x.expand(50, 100).sum(), 404),
        (lambda x: x[torch.empty(3, dtype=torch.int64).fill_(0)], 24 + 24 + 2 * 12),
        (lambda x: x.to(torch.bfloat16), 600),
        (lambda x: torch.zeros_like(x), 400),
    ],
    ids=[
        *("views", "allocation", "zeros", "sum", "in place", "overwritten", "copied", "out"),
        *("repeated in place", "rows picked", "converted", "shape of another"),
    ],
)
def test_bytes_of_torch_operations(call: Any, bytes_: int) -> None:
    x = torch.arange(100.0)
    assert moved.count(lambda: call(x)).torch == bytes_


def test_uniform_numbers_are_one_half_inside_a_count() -> None:
    kept: list[torch.Tensor] = []
    found = moved.count(lambda: kept.append(torch.rand(7)))
    assert kept[0].tolist() == [0.5] * 7
    assert (found.torch, found.operations) == (28, {"rand": 1})
    assert torch.rand(100).std() > 0


def test_operands_of_examples_are_made_on_the_device() -> None:
    generator = torch.Generator().manual_seed(0)
    with timing._Made(torch.device("meta")):
        made = torch.randn(3, generator=generator).bfloat16() * torch.arange(3)
    assert made.device.type == "meta"
    assert torch.arange(3).device.type == "cpu"


# --- children ------------------------------------------------------------------------------------


def environment(*names: str) -> Iterator[dict[str, str | None]]:
    """Runs in a child: variables of its environment."""
    import os

    print("something a library says")
    yield {name: {**os.environ}.get(name) for name in names}


def failing() -> Iterator[int]:
    """Runs in a child, and fails there."""
    yield 1
    raise ValueError("the reason")


@pytest.mark.parametrize("interpret", [True, False], ids=["interpreted", "compiled"])
def test_a_child_has_the_interpreter_or_not(
    interpret: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0" if interpret else "1")
    (found,) = results(f"{__name__}.environment", "TRITON_INTERPRET", interpret=interpret)
    assert found == {"TRITON_INTERPRET": "1" if interpret else None}


def test_a_child_that_fails_says_why() -> None:
    found = results(f"{__name__}.failing", interpret=False)
    assert next(found) == 1
    with pytest.raises(MeasurementError, match="the reason"):
        next(found)


# --- command line --------------------------------------------------------------------------------


def test_the_command_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(kernels, "measure", lambda ops: asked.append(ops) or measured())
    kernels.main(["--out", str(tmp_path), "--ops", "accept, markov_step"])
    assert asked == [("accept", "markov_step")]
    assert summary.read(tmp_path / "summary.json").accept_gb == summed(measured()).accept_gb
    shown = capsys.readouterr().out
    assert "Nothing was timed" in shown
    assert shown.count(f"| {ACCEPT} |") == 1


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that answer at once."""
    monkeypatch.setattr(kernels, "_summarise", lambda op: measured().report[op])
    monkeypatch.setattr(kernels, "_count", lambda part: measured().parts[part])
    monkeypatch.setattr(kernels, "_count_step", lambda: (6, 11))
    monkeypatch.setattr(kernels, "_times", lambda entries, parts: (None, {}))


def test_the_round_is_counted_where_both_its_ops_are_asked_for(quick: None) -> None:
    both, one = (kernels.measure(ops) for ops in (("markov_step", "accept"), ("kv_inject",)))
    assert both == measured(report={op: measured().report[op] for op in ("markov_step", "accept")})
    assert (set(one.report), one.parts, one.step) == ({"kv_inject"}, {}, (6, 11))


def test_a_step_that_fails_ends_the_command(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong() -> tuple[int, int]:
        raise MeasurementError("A kernel is wrong.", expected="right ones", fix="Correct it.")

    monkeypatch.setattr(kernels, "_count_step", wrong)
    with pytest.raises(MeasurementError):
        kernels.main(["--out", str(tmp_path), "--ops", "kv_inject"])
    assert not (tmp_path / "summary.json").exists()


def test_tables_are_written_into_a_document(tmp_path: Path) -> None:
    path, document = tmp_path / "summary.json", tmp_path / "kernels.md"
    path.write_bytes(msgspec.json.encode(summed(measured())))
    document.write_text(f"before\n{summary.BEGIN}\nold\n{summary.END}\nafter\n")
    for _ in range(2):  # written again it stays as it is
        kernels.main(["--summary", str(path), "--docs", str(document)])
        text = document.read_text()
        assert text.startswith(f"before\n{summary.BEGIN}\nNothing was timed")
        assert text.endswith(f"{summary.END}\nafter\n")
        assert "old" not in text
        assert text.count("| SGLang: Markov loop |") == 1


@pytest.mark.parametrize(
    ("flags", "error", "match"),
    [
        (["--ops", "accept,softmax"], ConfigError, "no softmax"),
        (["--ops", ","], ConfigError, "all, or some of"),
        (["--summary", "none.json"], ArtifactError, "none.json"),
        (["--summary", "SUMMARY", "--docs", "none.md"], ConfigError, "none.md"),
        (["--summary", "SUMMARY", "--docs", "SUMMARY"], ConfigError, "no generated part"),
    ],
    ids=["no such op", "no op", "no summary", "no document", "no markers"],
)
def test_wrong_flags_are_explained(
    flags: list[str], error: type[DSparkError], match: str, tmp_path: Path
) -> None:
    path = tmp_path / "summary.json"
    path.write_bytes(msgspec.json.encode(summed(measured())))
    with pytest.raises(error, match=match):
        kernels.main([str(path) if flag == "SUMMARY" else flag for flag in flags])


# --- what is committed ---------------------------------------------------------------------------


def test_the_document_shows_the_committed_summary() -> None:
    text = DOCUMENT.read_text()
    generated = summary.markdown(summary.read(COMMITTED))
    assert summary.replaced(text, generated, "docs/explanation/kernels.md") == text


def test_every_op_is_explained() -> None:
    text = DOCUMENT.read_text()
    for op in report.ops():
        assert f"## `{op}`" in text, op


def test_nothing_committed_spills_or_was_timed_without_a_device() -> None:
    found = summary.read(COMMITTED)
    for op, configs in found.ops.items():
        for name, config in configs.items():
            assert config.spills == 0, (op, name)
            assert (config.timed_us is None) or found.device, (op, name)
