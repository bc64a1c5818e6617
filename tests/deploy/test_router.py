"""The overlays' router for real: skipped where `make deploy-check` has not fetched it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import router
import tools
import yaml

RENDERED = Path(__file__).resolve().parents[2] / "deploy/rendered/qwen3-8b-1xh100.yaml"
DOCS = list(yaml.safe_load_all(RENDERED.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def python() -> Path:
    found = router.router_of(DOCS)
    assert found is not None
    release = found[0]["image"].rsplit(":", 1)[1]
    here = tools.router(release, install=False)
    if here is None:
        pytest.skip(f"sglang-router {release} is not there: `make deploy-check` fetches it")
    return here


def test_a_rogue_worker_is_refused(python: Path) -> None:
    found = router.run(python, DOCS)
    assert router.faults(found) == [], found


def test_without_the_key_the_rogue_gets_requests(python: Path) -> None:
    """Else the check above could not find anything."""
    docs = copy.deepcopy(DOCS)
    container, _ = router.router_of(docs) or ({}, {})
    at = container["args"].index("--api-key")
    del container["args"][at : at + 2]
    found = router.run(python, docs)
    assert found["register_without_key"] == 202
    assert found["reached_rogue"] > 0
    assert len(router.faults(found)) >= 3
