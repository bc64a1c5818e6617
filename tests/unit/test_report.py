"""The page of results: figures copied, not typed, what is missing said, and make that runs only what it has to."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from dspark_loadtests import frontier
from dspark_sglang import artifacts
from dspark_sglang.cli.main import app
from dspark_sglang.errors import ArtifactError
from dspark_sglang.simulate import price
from tests import report

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "runs" / "report" / "report.md"


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


# --- the page ------------------------------------------------------------------------------------


def test_figures_are_copied_from_the_results() -> None:
    text = report.render([RESULTS], PAGE)
    cell = result("load")["cells"]["T1-c8"]
    low, middle, high = cell["ratio_none"]
    row = f"| 1 | 8 | {cell['none']['tok_s']:.1f} | {cell['dspark']['tok_s']:.1f} | {middle:.2f} | {low:.2f} to {high:.2f} |"
    assert row in text and result("load")["command"] in text
    pair = result("simulation")["frontier"]["flash_80"]
    assert f"| flash_80 | {pair['published']:.2f} | {pair['simulated']:.2f} |" in text
    assert f"| throughput | {result('simulation')['sim_error_pct']['throughput']:.1f}% |" in text
    assert f"| lag, 99th percentile | {result('loadgen')['lag_ms']:.2f} ms |" in text
    assert f"{result('demo')['identical']} of {result('demo')['compared']}" in text


def test_a_changed_result_changes_the_page(tmp_path: Path) -> None:
    shutil.copy(RESULTS / "demo.json", tmp_path)
    changed = result("demo") | {"speedup": 3.21, "speedup_ci95": [3.0, 3.5]}
    (tmp_path / "demo.json").write_text(json.dumps(changed))
    assert "| 3.21 | 3.00 to 3.50 |" in report.render([tmp_path], PAGE)


def test_every_file_and_figure_is_named_and_every_link_leads_somewhere() -> None:
    text = report.render([RESULTS], PAGE)
    for path in RESULTS.rglob("*.json"):
        assert f"\n| `{path.name}` |" in text
    for path in RESULTS.rglob("*.png"):
        assert path.name in text
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert Path(os.path.normpath(PAGE.parent / target)).is_file(), target


def priced(folder: Path, sla: float) -> price.Answer:
    found = price.answer(
        frontier.read(RESULTS / "frontier-pro.json"), price.load("v4-pro", None), sla=sla
    )
    artifacts.write_json(folder / f"price-{sla:g}.json", found)
    return found


def test_prices_are_shown_with_their_ranges_and_sources(tmp_path: Path) -> None:
    ours = priced(tmp_path, 60).sides[1]
    assert ours.hour is not None and ours.hour.margin is not None and ours.times_first is not None
    text = report.render([tmp_path], PAGE)
    cells = (
        f"{ours.hour.cost_per_million:.3g} | {ours.times_first:.2f} | {100 * ours.hour.margin:.0f}%"
    )
    assert (
        f"| DSpark-5 | {ours.tok_s_per_gpu:,.0f} | {ours.hour.tokens / 1e6:.3g} | {cells} |" in text
    )
    assert "| gpu_hour | 1.7 | 2.42 | 3.5 |" in text and "2026-06" in text
    priced(tmp_path, 150)
    assert "| MTP-1 | at most 74.7 tok/s/user |" in report.render([tmp_path], PAGE)


def test_a_table_has_as_many_cells_in_every_row(tmp_path: Path) -> None:
    for sla in (60, 150):
        priced(tmp_path, sla)
    text = report.render([RESULTS, tmp_path], PAGE)
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
    assert len(blocks) > 15
    assert not re.search(r"^[^|\n].*\n\|", text, flags=re.MULTILINE)  # a table needs an empty line


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    text = report.render([tmp_path], PAGE)
    for name in ("demo", "load", "exactness", "evaluation", "simulation", "price", "loadgen"):
        assert f"Missing: `{name}.json`. Make it with `" in text
    (tmp_path / "simulation.json").write_text(json.dumps({"label": "computed", "frontier": {}}))
    assert "run `make simulate-check`" in report.render([tmp_path], PAGE)


def test_a_simulated_machine_is_not_shown_as_the_one_a_file_was_made_on() -> None:
    text = report.render([RESULTS], PAGE)
    assert "| `frontier-flash.json` | - |" in text
    assert f"| `frontier-cpu.json` | {result('load')['machine']} |" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("demo", "{", "demo.json cannot be read"),
        ("demo", "{}", "not what the page shows"),
        ("load", '{"cells": {"T1-c8": {}}, "machine": "m", "command": "c"}', "none"),
        (
            "loadgen",
            '{"streams": 5, "lag_ms": "b", "metric_error_pct": 1}',
            "not what the page shows",
        ),
    ],
)
def test_a_damaged_result_is_an_error(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(ArtifactError, match=message):
        report.render([tmp_path], PAGE)


# --- make report ---------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make report` depends on, all of it there and the page the newest."""
    for name in ("Makefile", "tests/report.py", "tests/report.md.jinja", "requirements/cpu.lock", "pyproject.toml",
                 "dspark_sglang/simulate/price.py", "dspark_sglang/simulate/prices.toml"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(RESULTS, tmp_path / "docs" / "results")
    for number, name in enumerate((".venv/.dspark-installed", "price-flash.json", "price-pro.json", "price-cpu.json", "report.md")):  # fmt: skip
        path = tmp_path / (name if "/" in name else f"runs/report/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        os.utime(path, (4e9 + number, 4e9 + number))
    return tmp_path


def would_run(checkout: Path) -> list[str]:
    done = subprocess.run(
        ["make", "-n", "report"], cwd=checkout, capture_output=True, text=True, check=True
    )
    return [line for line in done.stdout.splitlines() if line.startswith(".venv")]


def newer(path: Path) -> None:
    os.utime(path, (5e9, 5e9))


def test_make_runs_nothing_where_all_is_there(checkout: Path) -> None:
    assert would_run(checkout) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("docs/results/drill.json", ["tests.report"]),
        ("tests/report.md.jinja", ["tests.report"]),
        ("docs/results/frontier-pro.json", ["frontier-pro.json", "tests.report"]),
        ("dspark_sglang/simulate/prices.toml", ["frontier-flash.json", "frontier-pro.json", "frontier-cpu.json", "tests.report"]),
    ],
)  # fmt: skip
def test_make_runs_what_is_older(checkout: Path, name: str, expected: list[str]) -> None:
    newer(checkout / name)
    found = would_run(checkout)
    assert len(found) == len(expected)
    assert all(word in line for word, line in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loadgen.json", "tests.selfcheck"),
        ("load.json", "benchmarks.load"),
        ("frontier-flash.json", "simulate published"),
        ("simulation.json", "simulate published"),
    ],
)
def test_make_runs_what_is_missing_once(checkout: Path, name: str, expected: str) -> None:
    (checkout / "docs" / "results" / name).unlink()
    found = would_run(checkout)
    assert sum(expected in line for line in found) == 1 and "tests.report" in found[-1]


def test_make_uses_commands_and_options_that_exist(checkout: Path) -> None:
    """Each `dspark` of `make report` is taken by the command line as far as its own checks."""
    shutil.rmtree(checkout / "docs")
    shutil.rmtree(checkout / "runs")
    lines = [line.split(">")[0].split()[1:] for line in would_run(checkout) if "/dspark " in line]
    assert len(lines) == 4
    for words in lines:
        at = typer.main.get_command(app)
        while words[0] in getattr(at, "commands", {}):
            at = at.commands[words.pop(0)]
        known = {name for one in at.params for name in [*one.opts, *one.secondary_opts]}
        used = {word for word in words if word.startswith("--")}
        assert used and used <= known, (at.name, used - known)
