"""Batches: a fixed number of anchors a sequence, their blocks packed behind index masks.

The draft's own work then depends on the number of anchors, not on the length of the context;
only the context projection and the attention to it grow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dspark_sglang.training.chat import TokenSequence


class Packed(NamedTuple):
    """Blocks of ``B`` sequences with ``A`` anchors each, ``G`` tokens a block, padded to ``S``."""

    #: ``[B, S]`` int64 tokens.
    tokens: torch.Tensor
    #: ``[B, A]`` int64 anchor positions; unused ones are 0 with no valid label.
    anchors: torch.Tensor
    #: ``[B, A, G]`` int64 position of the token before each drafted one.
    place: torch.Tensor
    #: ``[B, A, G]`` int64 tokens to be drafted, and the tokens before them.
    labels: torch.Tensor
    previous: torch.Tensor
    #: ``[B, A, G]`` bool: the label was written by the target, in the anchor's own turn.
    valid: torch.Tensor
    #: Which sequence each row is.
    source: tuple[int, ...]

    def to(self, device: torch.device | str) -> Packed:
        """The same batch on another device."""
        moved = (t.to(device) if isinstance(t, torch.Tensor) else t for t in self)
        return Packed(*moved)  # type: ignore[arg-type]


def sample_anchors(
    sequence: TokenSequence, count: int, seed: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Up to ``count`` different anchors of a sequence, sorted; ``seed`` alone decides which."""
    candidates = sequence.anchors()
    if len(candidates) <= count:
        return candidates
    chosen = np.random.default_rng(list(seed)).choice(candidates, count, replace=False)
    chosen.sort()
    return chosen


def pack(
    sequences: Sequence[TokenSequence],
    anchors: Sequence[npt.NDArray[np.int64]],
    source: Sequence[int],
    gamma: int,
) -> Packed:
    """Pack the blocks at ``anchors`` of each sequence."""
    rows = len(sequences)
    length = max(len(sequence.tokens) for sequence in sequences)
    width = max(1, *(len(chosen) for chosen in anchors))
    tokens = np.zeros((rows, length), dtype=np.int64)
    written = np.zeros((rows, length), dtype=np.bool_)
    start = np.zeros((rows, width), dtype=np.int64)
    used = np.zeros((rows, width), dtype=np.bool_)
    for row, (sequence, chosen) in enumerate(zip(sequences, anchors, strict=True)):
        tokens[row, : len(sequence.tokens)] = sequence.tokens
        written[row, : len(sequence.tokens)] = sequence.written
        start[row, : len(chosen)] = chosen
        used[row, : len(chosen)] = True
    place = start[..., None] + np.arange(gamma)
    label_place = np.minimum(place + 1, length - 1)
    at = np.arange(rows)[:, None, None]
    # A block ends where the turn ends: what follows is not drafted from here.
    inside = (place + 1 < length) & written[at, label_place] & used[..., None]
    valid = np.logical_and.accumulate(inside, axis=-1)
    return Packed(
        tokens=torch.from_numpy(tokens),
        anchors=torch.from_numpy(start),
        place=torch.from_numpy(np.minimum(place, length - 1)),
        labels=torch.from_numpy(tokens[at, label_place]),
        previous=torch.from_numpy(tokens[at, np.minimum(place, length - 1)]),
        valid=torch.from_numpy(valid),
        source=tuple(source),
    )


def visible(anchors: torch.Tensor, length: int, rows: int) -> torch.Tensor:
    """Attention mask ``[B, 1, A * rows, S + A * rows]``: own context and own block.

    Args:
        anchors: ``[B, A]`` int64 positions.
        length: of the context, ``S``.
        rows: input rows a block.
    """
    batch, count = anchors.shape
    context = torch.arange(length, device=anchors.device) < anchors[..., None]
    context = context[:, :, None].expand(-1, -1, rows, -1).reshape(batch, count * rows, length)
    block = torch.arange(count * rows, device=anchors.device) // rows
    own = (block[:, None] == block[None]).expand(batch, -1, -1)
    return torch.cat([context, own], dim=-1)[:, None]


def epoch_batches(
    lengths: npt.NDArray[np.int64], batch: int, seed: int, epoch: int
) -> list[npt.NDArray[np.int64]]:
    """The batches of one epoch: shuffled, of similar lengths, the same for every process layout.

    A rest smaller than a batch waits for another epoch's shuffle.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    whole = len(order) // batch
    pool = batch * 32
    batches: list[npt.NDArray[np.int64]] = []
    for begin in range(0, whole * batch, pool):
        part = order[begin : min(begin + pool, whole * batch)]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += np.split(part, len(part) // batch)
    return [batches[i] for i in rng.permutation(len(batches))]


def step_batches(
    lengths: npt.NDArray[np.int64], batch: int, seed: int, first_step: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Batches of steps ``first_step``, ``first_step + 1``, ... over as many epochs as it takes."""
    per_epoch = len(lengths) // batch
    epoch, skip = divmod(first_step, per_epoch)
    while True:
        yield from epoch_batches(lengths, batch, seed, epoch)[skip:]
        epoch, skip = epoch + 1, 0
