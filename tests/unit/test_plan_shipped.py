"""What ``dspark plan`` ships: published values and the document."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_sglang.planning import layouts, published

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", published.names())
def test_published_values_have_one_source_each(name: str) -> None:
    found = published.find(name)
    assert found is not None
    assert len(keys := [key for one in found.sources for key in one.config]) == len(set(keys))
    assert all(source.origin for source in found.sources)


def test_the_document_is_current() -> None:
    assert (ROOT / "docs/layouts.md").read_text() == layouts.document()
