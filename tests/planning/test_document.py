"""What ``dspark plan`` ships: published values and the document."""

from __future__ import annotations

import pytest

from dspark_sglang.planning import published
from tests.planning import document


@pytest.mark.parametrize("name", published.names())
def test_published_values_have_one_source_each(name: str) -> None:
    found = published.find(name)
    assert found is not None
    assert len(keys := [key for one in found.sources for key in one.config]) == len(set(keys))
    assert all(source.origin for source in found.sources)


@pytest.mark.costly
def test_the_document_is_current() -> None:
    assert document.OUT.read_text() == document.document()
