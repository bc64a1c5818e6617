"""The page of results: figures copied, not typed, and what is missing said."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from dspark_sglang.errors import ArtifactError
from tests.docs.results import PAGE, RESULTS, render


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def test_figures_are_copied_from_the_results() -> None:
    text = render(RESULTS)
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
    changed = result("demo") | {"speedup": 3.21, "speedup_ci95": [3.0, 3.5]}
    (tmp_path / "demo.json").write_text(json.dumps(changed))
    assert "| 3.21 | 3.00 to 3.50 |" in render(tmp_path)


def test_every_file_and_figure_is_named() -> None:
    text = render(RESULTS)
    for path in RESULTS.rglob("*.json"):
        assert f"\n| `{path.name}` |" in text
    for path in RESULTS.rglob("*.png"):
        assert f"({path.relative_to(PAGE.parent).as_posix()})" in text


def test_prices_are_shown_with_their_ranges_and_sources(tmp_path: Path) -> None:
    shutil.copy(RESULTS / "frontier-pro.json", tmp_path)
    text = render(tmp_path)
    assert "35 tokens/s for every user" in text
    assert "| gpu_hour | 1.7 | 2.42 | 3.5 |" in text and "2026-06" in text
    (tmp_path / "frontier-pro.json").unlink()
    assert "gpu_hour" not in render(tmp_path)


@pytest.mark.parametrize("folder", ["all", "none"])
def test_a_table_has_as_many_cells_in_every_row(tmp_path: Path, folder: str) -> None:
    text = render(RESULTS if folder == "all" else tmp_path)
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
    assert len(blocks) > (15 if folder == "all" else 1)
    assert not re.search(r"^[^|\n].*\n\|", text, flags=re.MULTILINE)  # a table needs an empty line


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    text = render(tmp_path)
    for name in ("demo", "load", "exactness", "evaluation", "simulation", "v4", "loadgen"):
        assert f"Missing: `{name}.json`. Make it with `" in text
    (tmp_path / "simulation.json").write_text(json.dumps({"label": "computed", "frontier": {}}))
    assert "run `make simulate-check`" in render(tmp_path)


def test_a_simulated_machine_is_not_shown_as_the_one_a_file_was_made_on() -> None:
    text = render(RESULTS)
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
        render(tmp_path)
