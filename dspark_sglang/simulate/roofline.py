"""Seconds of a step of a mixture-of-experts target on GPUs, from shapes and published kernel speeds.

Attention is data parallel and experts are spread over all GPUs, as DeepSeek describes its own decoding
(arXiv 2412.19437, section 3.4). A part of a layer takes as long as reading its weights and cache, or as
its multiplications, whichever is longer, but at least its kernels. Of the experts those are read that some
token chose. Dispatch and combine wait and move bytes; two half batches may hide them behind the
computation where that is faster. Nothing here was run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_sglang.core.placement import H800
from dspark_sglang.errors import ConfigError
from dspark_sglang.layouts.memory import CompressedKv, Loading, Ranks, Tensor, by_part
from dspark_sglang.layouts.v4.config import TargetShape
from dspark_sglang.layouts.v4.memory import shape_of
from dspark_sglang.planning.kv import page_bytes
from dspark_sglang.planning.model import load
from dspark_sglang.simulate.acceptance import Mixture, fitted, geometric

#: Of one token sent to an expert: fp8 values with a float32 scale for every 128, and bfloat16 back.
_DISPATCH_BYTES, _COMBINE_BYTES = 1.0 + 4.0 / 128.0, 2.0
#: DeepEP's low-latency kernels on H800: microseconds of dispatch and of combine of 128 tokens a GPU, width
#: 7168, 8 experts (its docs/legacy.md).
_DEEPEP_US = {8: (77.0, 114.0), 16: (118.0, 195.0), 32: (155.0, 273.0), 64: (173.0, 314.0)}
_DEEPEP_VALUES = 128 * 8 * 7168
#: Bytes a GPU of an H800 holds, and the share of them that weights may take.
_MEMORY, _FOR_WEIGHTS = 80e9, 0.8
#: Accepted lengths of DSpark in the paper's table 1 (Qwen3-4B, 8B, 14B, Gemma4-12B), blocks of 7.
TABLE_1 = (4.73, 4.81, 4.78, 4.66)
#: Parts that live in a layer and are whole on every GPU.
_DENSE = ("attention", "router", "compressor", "indexer", "hyper", "norms", "main_proj", "shared_experts")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Assumptions:
    """One set of numbers for both models, nothing fitted; sources are in :func:`.published.rows`."""

    #: Of a GPU: bytes a second from memory, operations a second in fp8 and in attention (bfloat16).
    memory: float = 3.0e12
    fp8: float = 1.55e15
    attention: float = 6.6e14
    #: Of an all-to-all of experts: times what :func:`exchange` says.
    exchange_wait: float = 1.0
    exchange_speed: float = 1.0
    #: Seconds of the shortest kernel in a graph, kernels of a layer, of a draft step beside its layers.
    kernel: float = 3e-6
    layer_kernels: int = 30
    head_kernels: int = 6
    #: Seconds a step that no graph hides: sampling, scheduling, the host.
    host: float = 5e-4
    #: Tokens a GPU of the captured graphs are multiples of this.
    bucket: int = 8
    mtp_acceptance: float = 0.85
    dspark_length: float = sum(TABLE_1) / len(TABLE_1)
    spread: float = 2.0
    context: int = 4989
    output: int = 256

    def mtp(self) -> Mixture:
        """What a token of MTP-1 is worth."""
        return Mixture([fitted("mtp", [self.mtp_acceptance], spread=self.spread)])

    def dspark(self, gamma: int) -> Mixture:
        """What a block of DSpark is worth."""
        return Mixture([
            geometric("dspark", accept_length=self.dspark_length, of=7, gamma=gamma, spread=self.spread)
        ])  # fmt: skip


def exchange(count: int) -> tuple[float, float]:
    """Seconds of waiting and bytes a second of an all-to-all: a line through DeepEP's two kernels."""
    dispatch, combine = (1e-6 * us for us in _DEEPEP_US[count])
    small, large = _DEEPEP_VALUES * (1 + 4 / 128), _DEEPEP_VALUES * 2
    speed = (large - small) / (combine - dispatch)
    return dispatch - small / speed, speed


@dataclass(frozen=True, slots=True)
class Layers:
    """A stack of layers: what a token reads and multiplies in it."""

    count: int
    hidden: int
    experts: int
    active: int
    #: Bytes of one routed expert, and of everything else in a layer (mean over layers).
    expert_bytes: float
    dense_bytes: float
    #: Values of both.
    expert_values: float
    dense_values: float


@dataclass(frozen=True, slots=True)
class Sizes:
    """A target with its drafters."""

    name: str
    gamma: int
    layers: Layers
    draft: Layers
    mtp: Layers
    #: Cache that one request reads a step, and one of its tokens of context, over all layers.
    request_bytes: float
    context_bytes: float
    #: Attention's operations of one token, over all layers.
    token_operations: float
    head_bytes: float
    head_values: float


def sizes(name: str) -> Sizes:
    """Sizes of a published DeepSeek-V4 checkpoint (``deepseek-v4-flash-dspark``).

    Raises:
        ConfigError: a model without bundled drafter.
    """
    model = load(name, None, Loading())
    kv = model.kv
    if not isinstance(kv, CompressedKv) or not model.bundled:
        raise ConfigError(
            f"{name} is no DeepSeek-V4 checkpoint with a drafter.",
            expected="deepseek-v4-flash-dspark or deepseek-v4-pro-dspark",
            fix="Take a measured cost (`dspark calibrate --cost`) for other models.",
        )
    shape = shape_of(model.target.config)
    latent, index = page_bytes(64) / 64, kv.index_dim + kv.index_dim // 128 * 4
    # Layers that compress by 4 score every key and attend to the best; by 128 they attend to all.
    attended = kv.layers * kv.window + kv.count(4) * shape.index_topk
    return Sizes(
        name=name,
        gamma=model.gamma,
        layers=_layers(shape, model.tensors, kv.layers),
        draft=_layers(shape, model.draft_tensors, model.draft_kv.compressed_stages),
        mtp=_layers(shape, model.mtp_tensors, 1),
        request_bytes=attended * latent,
        context_bytes=kv.count(4) * index / 4 + kv.count(128) * latent / 128,
        token_operations=4.0 * shape.layer.heads * kv.head_dim * attended,
        head_bytes=by_part(model.tensors, Ranks())["head"],
        head_values=_values(model.tensors)["head"],
    )


def _values(tensors: Sequence[Tensor]) -> dict[str, float]:
    """Weights (not scales) of each part; fp4 packs two in a byte."""
    found: dict[str, float] = {}
    for tensor in tensors:
        if not tensor.name.endswith(".scale"):
            count = tensor.elements * (2 if tensor.stored == "I8" else 1)
            found[tensor.part] = found.get(tensor.part, 0.0) + count
    return found


def _layers(shape: TargetShape, tensors: Sequence[Tensor], count: int) -> Layers:
    held, values, own = by_part(tensors, Ranks()), _values(tensors), shape.layer
    return Layers(
        count=count,
        hidden=own.hidden,
        experts=own.experts,
        active=own.active,
        expert_bytes=held["experts"] / (count * own.experts),
        dense_bytes=sum(held.get(part, 0) for part in _DENSE) / count,
        expert_values=values["experts"] / (count * own.experts),
        dense_values=sum(values.get(part, 0.0) for part in _DENSE) / count,
    )


class Roofline:
    """Steps of DSpark (``drafter`` "dspark"), of MTP-1 ("mtp") or of plain decoding.

    They run on the fewest whole nodes of 8 H800 that hold the weights.
    """

    def __init__(self, sizes: Sizes, given: Assumptions, *, drafter: str = "dspark") -> None:
        self.sizes, self.given, self.drafter = sizes, given, drafter
        self.gamma = 1 if drafter == "mtp" else sizes.gamma
        #: GPUs.
        self.count = 8
        while self._weights() > _FOR_WEIGHTS * _MEMORY:
            self.count *= 2
        self.name = f"{self.count // 8} x 8 x {H800.name}"
        wait, speed = exchange(self.count)
        self._wait, self._speed = wait * given.exchange_wait, speed * given.exchange_speed

    def _weights(self) -> float:
        """Bytes of one GPU: everything but experts is whole on each."""
        held = 2 * self.sizes.head_bytes  # the embedding is as large
        for stack in (self.sizes.layers, self.sizes.draft):
            own = stack.dense_bytes + stack.experts * stack.expert_bytes / self.count
            held += stack.count * own
        return held

    def plain(self, requests: int, context: int, sampled: int) -> float:
        return self._verify(requests, requests, context) + self.given.host

    def round(self, requests: int, drafted: int, context: int, sampled: int) -> float:
        target = self._verify(requests + drafted, requests, context)
        return target + self.draft(requests) + self.given.host

    def prefill(self, tokens: int, requests: int) -> float:
        """Without the cache of tokens before; as if its multiplications ran at full speed."""
        return self._stack(self.sizes.layers, tokens) + self._attend(tokens, 0, 0) + self.given.host

    def between(self, requests: int) -> float:
        return 0.0

    def draft(self, requests: int) -> float:
        """Seconds of drafting one block a request."""
        own, given = self.sizes, self.given
        if self.drafter == "mtp":
            return self._stack(own.mtp, requests) + self._head(requests)
        rows = requests * own.gamma
        chain = given.kernel * given.head_kernels * own.gamma
        return self._stack(own.draft, rows) + self._head(rows) + chain

    def _verify(self, tokens: int, requests: int, context: int) -> float:
        bucket = self.given.bucket * self.count
        tokens = -(-tokens // bucket) * bucket
        cache = self._attend(tokens, requests, context)
        return self._stack(self.sizes.layers, tokens) + cache + self._head(tokens)

    def _attend(self, tokens: int, requests: int, context: int) -> float:
        own, share = self.sizes, 1.0 / self.count
        held = requests * own.request_bytes + context * own.context_bytes
        read = held * share / self.given.memory
        return max(read, tokens * own.token_operations * share / self.given.attention)

    def _head(self, tokens: int) -> float:
        own, given = self.sizes, self.given
        # Every GPU has the whole head for its own requests.
        work = 2.0 * tokens / self.count * own.head_values / given.attention
        return max(own.head_bytes / given.memory, work) + given.kernel * given.head_kernels

    def _stack(self, layers: Layers, tokens: float) -> float:
        """Seconds of all layers: whole, or in two halves that hide each other's exchange."""
        compute, exchanged = self._layer(layers, tokens)
        half_compute, half_exchanged = self._layer(layers, tokens / 2.0)
        return layers.count * min(compute + exchanged, 2.0 * max(half_compute, half_exchanged))

    def _layer(self, layers: Layers, tokens: float) -> tuple[float, float]:
        """Seconds of one layer's computation and of its two exchanges."""
        given, own = self.given, tokens / self.count
        missed = np.exp(tokens * np.log1p(-layers.active / layers.experts))
        hit = layers.experts * (1.0 - float(missed)) / self.count
        dense = max(layers.dense_bytes / given.memory, 2.0 * own * layers.dense_values / given.fp8)
        routed = max(
            hit * layers.expert_bytes / given.memory,
            2.0 * own * layers.active * layers.expert_values / given.fp8,
        )
        compute = max(dense + routed, given.kernel * given.layer_kernels)
        moved = own * layers.active * layers.hidden * (_DISPATCH_BYTES + _COMBINE_BYTES)
        return compute, 2.0 * self._wait + moved / self._speed
