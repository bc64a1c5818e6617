"""An overlay's flags start a real server of the tiny bundle, which drafts and says what the target says."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_sglang.layouts.v4 import tiny
from dspark_sglang.layouts.v4.reference import Reference
from tests.v4 import overlays

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]


def test_an_overlay_of_two_nodes(tmp_path: Path) -> None:
    """Two ranks stand for sixteen; ``make v4`` starts the other overlays."""
    bundle = tmp_path / "bundle"
    tiny.write(bundle, published=True)
    with overlays.server("h100-pro-2x8", bundle, tmp_path / "log") as of:
        of.wait_ready()
        assert overlays.refuses_strangers(of)
        found = overlays.ask(of, Reference.load(bundle))
        info = of.info()
    assert found.equal == found.total and found.drafted, found
    assert info["tp_size"] == 2 and info["max_running_requests"] == 32
