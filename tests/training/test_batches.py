"""Packing: which blocks are trained, what they see, and in which order sequences come."""

from __future__ import annotations

import numpy as np
import torch

from dspark_sglang.training.batches import (
    epoch_batches,
    pack,
    sample_anchors,
    step_batches,
    visible,
)
from dspark_sglang.training.chat import TokenSequence

GAMMA = 3


def sequence(tokens: int, prompt: int, source: int = 0) -> TokenSequence:
    written = np.arange(tokens) >= prompt
    return TokenSequence(np.arange(100, 100 + tokens, dtype=np.int32), written, source)


def test_first_written_token_is_the_first_anchor():
    assert sequence(8, 4).anchors().tolist() == [4, 5, 6]
    assert sequence(8, 4).remaining().tolist() == [3, 2, 1]


def test_two_turns_have_their_own_ends():
    written = np.array([0, 1, 1, 1, 0, 0, 1, 1], dtype=bool)
    both = TokenSequence(np.arange(8, dtype=np.int32), written, 0)
    assert both.anchors().tolist() == [1, 2, 6]
    assert both.remaining().tolist() == [2, 1, 1]
    packed = pack([both], [both.anchors()], [0], GAMMA)
    assert packed.valid[0].tolist() == [
        [True, True, False],
        [True, False, False],
        [True, False, False],
    ]


def test_labels_follow_their_places():
    one, two = sequence(9, 3), sequence(6, 4, source=1)
    packed = pack([one, two], [np.array([3, 5]), two.anchors()], [7, 9], GAMMA)
    assert packed.source == (7, 9)
    assert packed.labels[0, 0].tolist() == [104, 105, 106]
    assert packed.previous[0, 0].tolist() == [103, 104, 105]
    assert packed.place[0, 1].tolist() == [5, 6, 7]
    # The second sequence has one anchor and one label; its second place is unused.
    assert packed.valid[1].tolist() == [[True, False, False], [False, False, False]]


def test_blocks_see_their_context_and_themselves_only():
    packed = pack([sequence(9, 3)], [np.array([3, 6])], [0], GAMMA)
    mask = visible(packed.anchors, packed.tokens.shape[1], GAMMA)[0, 0]
    assert mask.shape == (6, 9 + 6)
    for row in range(6):
        block = row // GAMMA
        anchor = (3, 6)[block]
        assert mask[row, :9].nonzero().view(-1).tolist() == list(range(anchor))
        own = [9 + block * GAMMA + i for i in range(GAMMA)]
        assert (mask[row, 9:].nonzero().view(-1) + 9).tolist() == own


def test_anchors_depend_on_the_seed_alone():
    long = sequence(80, 10)
    first = sample_anchors(long, 8, (1, 2, 3))
    assert first.tolist() == sample_anchors(long, 8, (1, 2, 3)).tolist()
    assert first.tolist() != sample_anchors(long, 8, (1, 2, 4)).tolist()
    assert len(set(first.tolist())) == 8
    assert sorted(first) == first.tolist()
    assert set(first.tolist()) <= set(long.anchors().tolist())


def test_every_sequence_once_an_epoch_whatever_the_batch():
    lengths = np.random.default_rng(0).integers(5, 50, 37)
    batches = epoch_batches(lengths, 4, seed=3, epoch=0)
    seen = np.concatenate(batches)
    assert len(batches) == 9
    assert len(set(seen.tolist())) == 36


def test_batches_hold_similar_lengths():
    lengths = np.random.default_rng(0).integers(5, 500, 512)
    spread = [np.ptp(lengths[batch]) for batch in epoch_batches(lengths, 8, seed=0, epoch=0)]
    assert np.mean(spread) < 0.2 * np.ptp(lengths)


def test_resuming_gives_the_steps_that_were_left():
    lengths = np.arange(10, 50)
    whole = step_batches(lengths, 4, seed=5, first_step=0)
    first = [next(whole).tolist() for _ in range(25)]  # two and a half epochs
    later = step_batches(lengths, 4, seed=5, first_step=13)
    assert [next(later).tolist() for _ in range(12)] == first[13:]


def test_packed_moves():
    packed = pack([sequence(9, 3)], [np.array([3])], [4], GAMMA).to("cpu")
    assert packed.source == (4,)
    assert isinstance(packed.tokens, torch.Tensor)
