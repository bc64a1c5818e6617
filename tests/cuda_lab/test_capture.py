"""What SGLang's capture makes of attention backends and modes, and what its hooks are given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from tests.cuda_lab import capture

pytestmark = pytest.mark.costly  # attention backends are imported

#: What SGLang 0.5.23 does.
KNOWN = {
    "fa3 static": [],
    "fa3 compact": [],
    "flashinfer static": [],
    "flashinfer compact": ["refused"],
    "triton static": [],
    "triton compact": ["rows", "never"],
    "trtllm_mha static": [],
    "trtllm_mha compact": [],
    "trtllm_mha xqa static": [],
    "trtllm_mha xqa compact": ["refused"],
}


@pytest.mark.parametrize("name", [name for name in KNOWN if KNOWN[name]])
def test_a_planted_mode_is_found_wanting(name: str) -> None:
    """A1 and A2: the modes that a server may not be started in."""
    backend, mode = name.rsplit(maxsplit=1)
    found = capture.check(backend, mode)
    assert list(dict.fromkeys(fault.kind for fault in found)) == KNOWN[name]


@pytest.mark.parametrize("name", [name for name in KNOWN if not KNOWN[name]])
def test_a_sound_mode_captures(name: str) -> None:
    assert capture.check(*name.rsplit(maxsplit=1)) == []


@pytest.mark.parametrize("name", capture.BACKENDS)
def test_the_mode_that_is_chosen_captures(name: str) -> None:
    """A1 and A2: blocks of any length where they can be, and whole ones elsewhere."""
    mode = capture.chosen(name)
    assert capture.check(name, mode) == []
    assert mode == "compact" or capture.check(name, "compact")


def test_planted_ranks_that_embed_apart_are_found() -> None:
    """A5: SGLang captures the embedding of every draft that has ``forward_embed``."""
    apart = capture.draft_exchanges(placement="single", ours=False)
    assert capture.same_exchanges(apart)
    together = capture.draft_exchanges(placement="replicate", ours=False)
    assert any(together) and not capture.same_exchanges(together)


@pytest.mark.parametrize("placement", ["single", "replicate", "shard"])
def test_no_draft_graph_holds_an_exchange_of_the_embedding(placement: str) -> None:
    assert not any(capture.draft_exchanges(placement=placement, ours=True))


def test_planted_differences_of_order_are_found() -> None:
    assert capture.same_exchanges([["all_reduce", "broadcast"], ["broadcast", "all_reduce"]])
    assert not capture.same_exchanges([["all_reduce"], ["all_reduce"]])


def test_tail_hooks_see_every_shape_with_its_own_output() -> None:
    """What a tail on either graph relies on."""
    seen: list[tuple[int, int]] = []
    output = SimpleNamespace(next_token_logits=None, hidden_states=None)

    def tail(runner: Any, out: Any, batch: Any, tokens: int) -> None:
        assert out is output and batch.forward_mode.is_target_verify()
        seen.append((batch.batch_size, tokens))

    with capture.published():
        given = capture.runner(
            capture.Recording("fa3"), mode="static", forward=lambda *_: output, hooks=[tail]
        )
        shapes = capture.captured(given)
    assert [shape.hooks for shape in shapes] == [("tail",) * 3] * len(capture.SIZES)
    assert seen[::3] == [(bs, bs * capture.WIDTH) for bs in reversed(capture.SIZES)]
