"""The card: generated from the artifacts, current, and acceptable to the Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import dspark_packaging
from dspark_packaging.card import check_card, render_card, write_card
from dspark_packaging.errors import PackageError
from dspark_packaging.hub_rules import check_front_matter
from dspark_packaging.records import ACCEPTED_LENGTH
from tests.packaging.samples import COMMITTED, add_measurements, draft_vocabulary, put

TEMPLATE = Path(dspark_packaging.__file__).parent / "templates" / "card.md.jinja"


def test_committed_card_is_current() -> None:
    check_card(COMMITTED)


def test_card_regenerates_identically(packed: Path) -> None:
    before = (packed / "README.md").read_bytes()
    assert render_card(packed).encode() == before
    assert write_card(packed) is False
    (packed / "README.md").unlink()
    assert write_card(packed) is True
    assert (packed / "README.md").read_bytes() == before


def test_template_holds_no_number() -> None:
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", TEMPLATE.read_text(), flags=re.DOTALL)
    assert re.findall(r"\d", text) == []


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_unmeasured_sections_print_no_number(packed: Path) -> None:
    card = render_card(packed)
    for title in ("Accepted length", "Calibration"):
        assert section(card, title).strip().startswith("Not measured")
        assert re.findall(r"\d", section(card, title)) == []
    assert "has not been measured" in section(card, "Limits")


def test_measured_sections_print_the_artifacts(packed: Path) -> None:
    add_measurements(packed)
    card = render_card(packed)
    measured = section(card, "Accepted length")
    assert ACCEPTED_LENGTH in measured
    row = "| 0 | 2.34 | 2.28 to 2.41 | 2.11 | not measured | 2.77 | not measured | 9,876 |"
    assert row in measured
    assert "| 0 | 0.711 | 0.422 | 0.233 |" in measured
    for text in ("some prompts", "some machine", "measure --it", "sglang 0.5.23"):
        assert text in measured
    calibration = section(card, "Calibration")
    assert "| Temperature | 1.125 | 0.875 | 1.500 |" in calibration
    assert "0.0625 before, 0.0123 after" in calibration
    assert "costs less than 2.34 plain decoding steps" in section(card, "Limits")


def test_a_draft_vocabulary_is_on_the_card(packed: Path) -> None:
    assert "draft_vocab.json" not in render_card(packed)
    put(packed / "draft_vocab.json", draft_vocabulary())
    card = render_card(packed)
    assert "| Tokens it drafts | the 3 most frequent, 93.1% of 1,000 counted;" in card
    assert "`draft_vocab.json`: the tokens it drafts" in section(card, "Files")


def test_every_table_is_rectangular(packed: Path) -> None:
    add_measurements(packed)
    widths: list[int] = []
    for line in [*render_card(packed).splitlines(), ""]:
        if line.startswith("|"):
            widths.append(len(re.findall(r"(?<!\\)\|", line)))
        else:
            assert len(set(widths)) <= 1, line
            widths = []


def test_card_leads_with_what_it_is_and_how_to_serve_it(packed: Path) -> None:
    body = render_card(packed).split("\n---\n", 1)[1]
    assert body.index("Not a standalone model") < body.index("sglang.launch_server")
    first = re.search(r"```bash\n(.*?)```", body, re.DOTALL)
    assert first is not None
    assert first[1].replace("\\\n", "").split() == [
        *("python", "-m", "sglang.launch_server", "--model-path", "owner/tiny"),
        *("--speculative-algorithm", "DSPARK"),
        *("--speculative-draft-model-path", "./tiny-dspark"),
    ]


def test_card_pins_the_target(packed: Path) -> None:
    value = json.loads((packed / "provenance.json").read_text())
    value["target"]["revision"] = "abc123"
    value["repo_id"] = "owner/tiny-dspark"
    put(packed / "provenance.json", value)
    card = render_card(packed)
    assert "--revision abc123" in card
    assert "--speculative-draft-model-path owner/tiny-dspark" in card


def test_memory_is_computed_from_the_weights(packed: Path) -> None:
    arrays = load_file(packed / "model.safetensors").values()
    parameters, size = sum(a.size for a in arrays), sum(a.nbytes for a in arrays)
    total = f"| **total** | **{parameters:,}** | **{size:,}**"
    assert total in section(render_card(packed), "Memory")


def test_author_text_cannot_break_a_table(packed: Path) -> None:
    value = json.loads((packed / "provenance.json").read_text())
    value["target"]["source"] = "a | b\n| c |"
    put(packed / "provenance.json", value)
    assert "| Target weights used | a \\| b \\| c \\| |" in render_card(packed)


def test_stale_card_is_found(packed: Path) -> None:
    add_measurements(packed)
    with pytest.raises(PackageError, match="differs"):
        check_card(packed)


# --- front matter --------------------------------------------------------------------------

GOOD = """---
license: apache-2.0
base_model: owner/name
base_model_relation: finetune
pipeline_tag: text-generation
library_name: sglang
tags: [speculative-decoding, dspark, draft-model, sglang]
language: [en]
---
text
"""


def test_good_front_matter() -> None:
    assert check_front_matter(GOOD)["base_model"] == "owner/name"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("---\nlicense", "\n---\nlicense", "missing"),
        ("license: apache-2.0", "license: Apache 2", "license 'Apache 2'"),
        ("license: apache-2.0", "license: other", "license_name"),
        ("license: apache-2.0\n", "", "no license"),
        ("license: apache-2.0", "license: [", "not YAML"),
        ("license: apache-2.0", "license: mit\nlicense: mit", "repeated key license"),
        ("owner/name", "name", "base_model 'name'"),
        ("owner/name", "owner/na--me", "base_model"),
        ("owner/name", "https://host/owner/name", "base_model"),
        ("finetune", "draft", "base_model_relation 'draft'"),
        ("text-generation", "text-gen", "pipeline_tag"),
        ("library_name", "library", "no library_name"),
        ("draft-model, ", "", "lacks the tags draft-model"),
        ("dspark,", "dspark, dspark,", "repeats a value in tags"),
        ("[en]", "[no]", "language"),
        ("[en]", "english", "language"),
        ("language: [en]", "model-index: []", "model-index"),
    ],
)
def test_bad_front_matter(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(PackageError, match=message):
        check_front_matter(GOOD.replace(old, new, 1))
