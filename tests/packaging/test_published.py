"""Results in the Hub's format, speeds, published facts, and the committed check."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

import dspark_packaging
from dspark_packaging import artifact
from dspark_packaging.card import FACTS_FILE, check_card, read_facts, render_card
from dspark_packaging.errors import PackageError
from dspark_packaging.hub_rules import check_front_matter
from dspark_packaging.verify import verify_artifact
from dspark_sglang.errors import ArtifactError
from dspark_sglang.layouts.base import weights_digest
from tests.packaging.cases import CASES
from tests.packaging.samples import COMMITTED, add_measurements, edit, put

ROOT = Path(__file__).parents[2]
FACTS = sorted((ROOT / "model_cards").glob(f"*/{FACTS_FILE}"))
TEMPLATE = Path(dspark_packaging.__file__).parent / "templates" / "published.md.jinja"
RESULTS = ROOT / "docs" / "results" / "package.json"


# --- results in the Hub's format --------------------------------------------------------------


def test_results_are_what_the_hub_reads(packed: Path) -> None:
    add_measurements(packed)
    artifact.build(packed, packed)
    path = packed / ".eval_results" / "accepted-length.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    values = {entry.task_id: entry.value for entry in entries}
    assert values == {
        "accepted-length-all-temperature-0": 2.34,
        "accepted-length-chat-temperature-0": 2.11,
        "accepted-length-code-temperature-0": 2.77,
    }
    assert all("measure --it" in str(entry.notes) for entry in entries)


def test_results_that_say_something_else_are_refused(packed: Path) -> None:
    add_measurements(packed)
    artifact.build(packed, packed)
    path = packed / ".eval_results" / "accepted-length.yaml"
    path.write_text(path.read_text().replace("2.34", "3.34"))
    with pytest.raises(PackageError, match=r"not what eval\.json says"):
        verify_artifact(packed)


# --- speeds -----------------------------------------------------------------------------------


def load_summary(digest: str) -> dict[str, object]:
    mode = {"tok_s": 20.0, "tok_s_spread": 0.5}
    faster = {"tok_s": 30.0, "tok_s_spread": 1.5}
    cells = {
        "T0-c1": {"none": mode, "dspark": faster, "ratio_none": [1.4, 1.5, 1.6]},
        "T1-c8-float32": {"none": mode, "dspark": mode, "ratio_none": [0.8, 0.9, 1.1]},
        "T1-c1": {"none": mode, "dspark": {"missing": "no time"}},
    }
    return {
        "cells": cells | {"T1-c1": {"none": mode}},
        "drafter_sha256": digest,
        "machine": "some machine",
        "blocks": 3,
        "window_s": 7.0,
        "versions": {"sglang": "0.5.23"},
        "command": "make bench-load --blocks 3",
    }


def test_speeds_come_with_baseline_spread_command_and_machine(source: Path, tmp_path: Path) -> None:
    put(tmp_path / "load.json", load_summary(weights_digest(source)))
    options = artifact.Options(throughput=tmp_path / "load.json")
    artifact.build(source, tmp_path / "out", options)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 0 | 1 | bfloat16 | 20.0 ± 0.5 | 30.0 ± 1.5 | 1.50× (1.40× to 1.60×) |" in card
    assert "| 1 | 8 | float32 |" in card
    assert "make bench-load --blocks 3" in card
    assert "Slower than no speculation at temperature 1 with 8 requests" in card
    value = json.loads((tmp_path / "out" / "throughput.json").read_text())
    value["provenance"]["command"] = " "
    put(tmp_path / "out" / "throughput.json", value)
    with pytest.raises(ArtifactError, match="names no command"):
        render_card(tmp_path / "out")


def test_speeds_of_another_drafter_are_refused(source: Path, tmp_path: Path) -> None:
    put(tmp_path / "load.json", load_summary("f" * 64))
    with pytest.raises(ArtifactError, match="was measured with drafter ffffffffffff"):
        artifact.build(
            source, tmp_path / "out", artifact.Options(throughput=tmp_path / "load.json")
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["3x faster", "Saves 12 % of time", "about 90 tok/s", "needs 4 GB"]
)
def test_typed_figures_are_refused(packed: Path, text: str) -> None:
    edit(packed / "provenance.json", limits=[text])
    with pytest.raises(PackageError, match="no measurement behind it"):
        render_card(packed)


def test_a_step_cost_is_carried_if_it_is_of_this_drafter(source: Path, tmp_path: Path) -> None:
    fingerprint = {"gamma": "3", "drafter": weights_digest(source), "target": "some target"}
    put(source / "cost.json", {"kind": "cost", "fingerprint": fingerprint})
    artifact.build(source, tmp_path / "out")
    assert "`cost.json`: step cost" in (tmp_path / "out" / "README.md").read_text()
    put(source / "cost.json", {"kind": "cost", "fingerprint": fingerprint | {"gamma": "5"}})
    with pytest.raises(ArtifactError, match="measured with gamma 5"):
        artifact.build(source, tmp_path / "again")


# --- calibration ------------------------------------------------------------------------------


def test_the_plot_is_drawn_from_what_was_measured(packed: Path) -> None:
    add_measurements(packed)
    curve = {"predicted": [0.2, 0.7], "observed": [0.25, 0.6], "blocks": [40, 60]}
    calibration = {
        "blocks": 100,
        "ece_before": 0.05,
        "ece_after": None,
        "per_position_before": [0.05, 0.04, 0.06],
        "per_position_after": None,
        "reliability_before": [curve] * 3,
    }
    edit(packed / "eval.json", calibration=calibration)
    artifact.build(packed, packed)
    picture = (packed / "calibration.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    card = (packed / "README.md").read_text()
    assert "(calibration.png)" in card
    assert "| before | 0.0500 | 0.0400 | 0.0600 | 0.0500 |" in card
    artifact.build(packed, packed)
    assert (packed / "calibration.png").read_bytes() == picture
    edit(packed / "eval.json", calibration=None)
    artifact.build(packed, packed)
    assert not (packed / "calibration.png").exists()


# --- published facts --------------------------------------------------------------------------


def test_there_is_a_card_of_each_published_checkpoint() -> None:
    assert {path.parent.name for path in FACTS} == {
        "DeepSeek-V4-Flash-DSpark",
        "DeepSeek-V4-Pro-DSpark",
        *(f"dspark_qwen3_{size}_block7" for size in ("4b", "8b", "14b")),
        "dspark_gemma4_12b_block7",
    }


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.parent.name)
def test_published_card_is_current_and_acceptable(path: Path) -> None:
    check_card(path.parent)
    card = (path.parent / "README.md").read_text()
    check_front_matter(card, bundle=read_facts(path).shape == "bundle")
    assert "published facts" in card
    widths: list[int] = []
    for line in [*card.splitlines(), ""]:
        widths = [*widths, line.count("|")] if line.startswith("|") else []
        assert len(set(widths)) <= 1, line


def test_published_template_holds_no_number() -> None:
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", TEMPLATE.read_text(), flags=re.DOTALL)
    assert re.findall(r"\d", text.replace("DeepSeek-V4", "")) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  source: paper\n", "  source: hearsay\n", "hearsay"),
        ("  source: paper\n", "", "source"),
        ("family:", "famly:", "famly"),
        ("schema_version: 1", "schema_version: 1\nschema_version: 1", "repeated key"),
    ],
)
def test_a_fact_without_a_source_is_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = (FACTS[0].parent / FACTS_FILE).read_text()
    assert old in text
    (tmp_path / FACTS_FILE).write_text(text.replace(old, new, 1))
    with pytest.raises(PackageError, match=message):
        render_card(tmp_path)


# --- the committed check ----------------------------------------------------------------------


def test_the_committed_check_held() -> None:
    summary = json.loads(RESULTS.read_text())
    for key in ("round_trip_served", "split_back_identical", "v4_pro_layout_verified"):
        assert summary[key] is True
    assert summary["peak_rss_gb"] <= 1.0
    assert summary["large"]["bytes"] >= 100e9
    assert set(summary["refused"].values()) == {True}
    assert {case.name for case in CASES} | {"disk_full", "interrupted_upload"} <= set(
        summary["refused"]
    )


def test_the_committed_card_has_speed_and_fingerprint() -> None:
    card = (COMMITTED / "README.md").read_text()
    assert "Fingerprint in `target.json`" in card
    assert "bench-load --concurrency" in card
