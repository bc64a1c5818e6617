"""Every flag of every overlay that serves DeepSeek-V4 is known: started on a CPU, or named with what it needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import v4_flags
from v4_flags import ADDED, AS_IT_STANDS, FLAGS, NEEDS, REDUCED

ROOT = Path(__file__).resolve().parents[2]
OFF = "DSPARK_PLUGIN=off"


def test_the_overlays_of_v4() -> None:
    assert FLAGS.keys() == {
        "h100-flash-tp8", "h100-pro-2x8", "h100-pro-2x8-lws", "h200-pro-tp8", "h800-flash-tp8",
    }  # fmt: skip


@pytest.mark.parametrize("overlay", FLAGS)
def test_every_flag_is_started_here_or_says_what_it_needs(overlay: str) -> None:
    one = FLAGS[overlay]
    started = {name for name, _ in one.served}
    assert started | one.needs.keys() == v4_flags.flags(overlay)
    assert not started & one.needs.keys()
    assert all(len(reason) > 10 for reason in one.needs.values())


@pytest.mark.parametrize("overlay", FLAGS)
def test_every_planned_flag_is_among_them(overlay: str) -> None:
    """The flags of ``dspark plan`` lie in the overlay's ``arguments*.yaml``."""
    planned = {
        line.removeprefix("  value: ").strip()
        for path in (ROOT / "deploy" / "overlays" / overlay).glob("arguments*.yaml")
        for line in path.read_text().splitlines()
        if line.startswith("  value: --")
    }
    assert planned and planned <= v4_flags.flags(overlay)


def test_no_table_has_a_flag_that_nothing_uses() -> None:
    used = set().union(*(v4_flags.flags(overlay) for overlay in FLAGS))
    assert used == AS_IT_STANDS | REDUCED.keys() | NEEDS.keys()
    assert not AS_IT_STANDS & REDUCED.keys()


def test_a_tiny_bundle_is_started_as_an_overlay_does() -> None:
    words = v4_flags.words("h100-pro-2x8", Path("/tmp/tiny"), 31000, 31001)
    assert words[words.index("--model-path") + 1] == "/tmp/tiny"
    assert words[words.index("--speculative-draft-model-path") + 1] == "/tmp/tiny"
    assert words[words.index("--dist-init-addr") + 1] == "127.0.0.1:31001"
    assert words[words.index("--tp-size") + 1] == "2" and tuple(words[-len(ADDED) :]) == ADDED
    assert "marlin" not in words and "--rdma" not in words
    assert FLAGS["h100-pro-2x8"].environment["SGLANG_SHARED_EXPERT_TP1"] == "1"


@pytest.mark.parametrize("overlay", FLAGS)
def test_the_plugin_drafts(overlay: str) -> None:
    assert FLAGS[overlay].environment["DSPARK_PLUGIN"] == "auto"


def test_no_manifest_and_no_card_runs_the_builtin() -> None:
    files = [p for top in ("deploy", "model_cards") for p in (ROOT / top).rglob("*") if p.is_file()]
    texts = {path: path.read_bytes() for path in files}
    assert len(texts) > 50
    # A manifest may also say it in two lines or as a mapping.
    ways = [OFF.encode(), b'DSPARK_PLUGIN: "off"', b"DSPARK_PLUGIN: 'off'", b"DSPARK_PLUGIN: off"]
    found = {str(path) for path, text in texts.items() if any(way in text for way in ways)}
    assert found == set()
