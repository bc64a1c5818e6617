"""What the documents say is what was measured, and what they name exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_type_hints

import msgspec
import pytest

from dspark_sglang.cli.main import app
from dspark_sglang.config import PREFIX, Settings
from dspark_sglang.demo import report
from dspark_sglang.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = json.loads((ROOT / "docs" / "results" / "demo.json").read_text())
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_shows_the_committed_measurement() -> None:
    assert report.markdown(SUMMARY) in README
    assert SUMMARY["machine"] in README


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 90


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_every_setting_is_documented_and_nothing_else() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    documented = set(re.findall(rf"^\| `({PREFIX}\w+)` \|", text, flags=re.MULTILINE))
    assert documented == {PREFIX + field.upper() for field in Settings.__struct_fields__}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_make_target_named_exists(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)`", document.read_text()))
    assert named <= targets


def test_every_training_field_is_documented_with_its_section() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    named = set(re.findall(r"`([a-z_0-9.]+)`", text))
    for field in msgspec.structs.fields(TrainConfig):
        section = get_type_hints(TrainConfig)[field.name]
        if isinstance(section, type) and issubclass(section, msgspec.Struct):
            for inner in section.__struct_fields__:
                assert f"{field.name}.{inner}" in named
        else:
            assert field.name in named


def test_every_command_is_in_the_documents() -> None:
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    for command in (one for one in app.registered_commands if not one.hidden):
        assert f"dspark {command.name}" in text, command.name
