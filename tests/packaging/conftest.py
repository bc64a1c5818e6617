"""The tiny drafter of the packaging tests, as it is trained and packaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_packaging import artifact
from tests.packaging.samples import write_drafter


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_drafter(tmp_path / "source")


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    artifact.build(source, tmp_path / "out")
    return tmp_path / "out"
