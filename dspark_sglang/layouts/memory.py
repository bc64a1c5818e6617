"""What a layout says of memory: tensors, their bytes on disk and on one rank, and what is cached a token.

A tensor says how SGLang shares it out; what a rank holds follows from shape, kept type and layout.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from enum import StrEnum

import msgspec

from dspark_sglang.errors import ConfigError

#: Bytes of an element, by the name that safetensors headers use.
SIZES = {
    "F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4,
    "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1,
}  # fmt: skip
#: SGLang pads vocabularies to this (layers/vocab_parallel_embedding.py:48).
_VOCAB_PADDING = 64


class Split(StrEnum):
    """How ranks share a tensor."""

    WHOLE = "whole"
    #: Evenly over all tensor parallel ranks.
    TENSOR = "tensor"
    #: Over the ranks that share one attention (all, or fewer with attention data parallelism).
    ATTENTION = "attention"
    #: Key and value heads: as ATTENTION, repeated where there are fewer heads than ranks.
    HEADS = "heads"
    #: Rows of the vocabulary, padded; whole on every rank with attention data parallelism.
    VOCAB = "vocab"
    #: The same of the LM head, which ``--enable-dp-lm-head`` shares within attention.
    HEAD_VOCAB = "head_vocab"
    #: Rows of the vocabulary as VOCAB shares them, without the padding: W2 of the Markov head.
    ROWS = "rows"
    #: Routed experts: by expert, then by width among the ranks of one expert group.
    EXPERTS = "experts"
    #: Shared experts: TENSOR, or whole where ``SGLANG_SHARED_EXPERT_TP1`` says so.
    SHARED = "shared"


class Ranks(msgspec.Struct, frozen=True, kw_only=True):
    """How many ranks share what."""

    tp: int = 1
    #: Groups with an attention (and KV) of their own: ``--attn-dp-size``.
    attention_dp: int = 1
    ep: int = 1
    shared_experts_whole: bool = False

    @property
    def attention_tp(self) -> int:
        """Ranks that share one attention; 1 where ``attention_dp`` is beyond ``tp``, which a rule refuses."""
        return max(1, self.tp // self.attention_dp)


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """One stored tensor."""

    name: str
    shape: tuple[int, ...]
    #: Type on disk.
    stored: str
    #: Type on the device; empty: not kept.
    kept: str
    part: str
    split: Split = Split.WHOLE
    #: Extent of the shared dimension, and the smallest piece of it that a rank can hold.
    extent: int = 0
    grain: int = 1
    #: On the device only: a copy that loading makes.
    derived: bool = False

    @property
    def elements(self) -> int:
        """Number of values as stored."""
        return math.prod(self.shape)

    @property
    def disk_bytes(self) -> int:
        """Bytes in the checkpoint."""
        return 0 if self.derived else self.elements * SIZES[self.stored]


def rank_bytes(tensor: Tensor, layout: Ranks) -> int:
    """Bytes of ``tensor`` on one rank.

    Raises:
        ConfigError: it cannot be shared out like this.
    """
    if not tensor.kept:
        return 0
    size = SIZES[tensor.kept]
    ranks = _ranks(tensor.split, layout)
    if tensor.split in (Split.VOCAB, Split.HEAD_VOCAB):
        width = tensor.elements // tensor.shape[0]
        return _padded_rows(tensor.shape[0], ranks) // ranks * width * size
    if tensor.split is Split.ROWS:
        rows = min(tensor.shape[0], _padded_rows(tensor.shape[0], ranks) // ranks)
        return rows * (tensor.elements // tensor.shape[0]) * size
    pieces = tensor.extent // tensor.grain
    if tensor.split is Split.HEADS and pieces < ranks:
        if ranks % pieces:
            raise _uneven(tensor, ranks)
        return tensor.elements // pieces * size
    width_ranks = layout.tp // layout.ep if tensor.split is Split.EXPERTS else ranks
    if width_ranks > 1 and tensor.extent % (width_ranks * tensor.grain):
        raise _uneven(tensor, width_ranks)
    return math.ceil(tensor.elements / ranks) * size


@functools.cache
def _ranks(split: Split, layout: Ranks) -> int:
    """Ranks among which a tensor is shared."""
    with_dp = layout.attention_dp > 1
    return {
        Split.WHOLE: 1,
        Split.TENSOR: layout.tp,
        Split.ATTENTION: layout.attention_tp,
        Split.HEADS: layout.attention_tp,
        Split.VOCAB: 1 if with_dp else layout.tp,
        Split.ROWS: 1 if with_dp else layout.tp,
        Split.HEAD_VOCAB: layout.attention_tp if with_dp else layout.tp,
        Split.EXPERTS: layout.tp,
        Split.SHARED: 1 if layout.shared_experts_whole else layout.tp,
    }[split]


def _padded_rows(rows: int, ranks: int) -> int:
    padding = _VOCAB_PADDING
    if math.ceil(rows / padding) * padding % ranks:
        padding *= ranks
    return math.ceil(rows / padding) * padding


def _uneven(tensor: Tensor, ranks: int) -> ConfigError:
    return ConfigError(
        f"{tensor.name} has {tensor.extent} of width in pieces of {tensor.grain}, for {ranks} ranks.",
        expected="a share for each rank in whole pieces",
        fix="Choose another --tp or --ep, or --attention-dp for fewer ranks an attention.",
    )


def by_part(tensors: Iterable[Tensor], layout: Ranks) -> dict[str, int]:
    """Bytes on one rank, summed by part."""
    parts: dict[str, int] = {}
    # Tens of thousands of tensors are of a few kinds.
    known: dict[tuple[object, ...], int] = {}
    for tensor in tensors:
        kind = (tensor.shape, tensor.kept, tensor.split, tensor.extent, tensor.grain)
        size = known.get(kind)
        if size is None:
            size = known[kind] = rank_bytes(tensor, layout)
        parts[tensor.part] = parts.get(tensor.part, 0) + size
    return parts


def disk_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of a checkpoint made of ``tensors``."""
    return sum(tensor.disk_bytes for tensor in tensors)


class FullKv(msgspec.Struct, frozen=True, kw_only=True):
    """Keys and values of every token in every layer (multi-head, or one latent for MLA)."""

    layers: int
    #: Values of one token in one layer, on one rank, by number of ranks: heads × (key + value width).
    heads: int
    width: int
    element: int

    def token_bytes(self, layout: Ranks) -> int:
        """Bytes of one token on one rank."""
        heads = max(1, self.heads // layout.attention_tp)
        return self.layers * heads * self.width * self.element


class SlidingKv(msgspec.Struct, frozen=True, kw_only=True):
    """Some layers keep everything, the others a window, in a pool of its own."""

    full: FullKv
    sliding: FullKv
    window: int


class CompressedKv(msgspec.Struct, frozen=True, kw_only=True):
    """DeepSeek-V4: every layer keeps a window; some also one latent for 4 or for 128 tokens."""

    #: Compression ratio of each layer: 0 (window only), 4 or 128.
    ratios: tuple[int, ...]
    head_dim: int
    index_dim: int
    window: int

    @property
    def layers(self) -> int:
        """Layers of the target."""
        return len(self.ratios)

    def count(self, ratio: int) -> int:
        """Layers of a compression ratio."""
        return self.ratios.count(ratio)


Kv = FullKv | SlidingKv | CompressedKv


class DraftKv(msgspec.Struct, frozen=True, kw_only=True):
    """Of a drafter: full attention over its own pool, or V4 stages that keep the target's window."""

    full: FullKv | None = None
    compressed_stages: int = 0


class Loading(msgspec.Struct, frozen=True, kw_only=True):
    """What of the server's arguments decides about how weights are kept."""

    #: ``--dtype``; None: as in the checkpoint.
    dtype: str | None = None
    blackwell: bool = False
    marlin: bool = False
    #: Bytes of one value in the pools; None: as the weights.
    kv_element: int | None = None
    config_only: bool = False
    #: This plugin's CPU platform, which unpacks quantised weights of DeepSeek-V4.
    on_cpu: bool = False


class TargetMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What a target takes."""

    tensors: list[Tensor]
    #: What a drafter replaces in the checkpoint.
    mtp_tensors: list[Tensor] = []
    kv: Kv
    #: Most tokens of a request.
    context: int
    #: Bytes of rotary tables on one rank.
    rope_bytes: int
    #: Attention heads.
    heads: int


class DrafterMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What a drafter takes more."""

    tensors: list[Tensor]
    kv: DraftKv
    #: Attention heads that are shared over ranks as the target's are; 0: they are no matter of their own.
    heads: int = 0
