"""Seconds of a step of a mixture-of-experts target on GPUs, from shapes and published kernel speeds.

Attention is data parallel and experts are spread over all GPUs, as DeepSeek describes its own decoding
(arXiv 2412.19437, section 3.4). A part of a layer takes as long as reading its weights and cache, or as
its multiplications, whichever is longer, but at least its kernels. Of the experts those are read that some
token chose. Dispatch and combine wait and move bytes; two half batches may hide them behind the
computation where that is faster. Nothing here was run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dspark_sglang.errors import ConfigError
from dspark_sglang.planning import reading
from dspark_sglang.planning.kv import CompressedKv, page_bytes
from dspark_sglang.planning.model import Loading, Model, load
from dspark_sglang.planning.tensors import Layout, Tensor, by_part

#: Of one token sent to an expert: fp8 values with a float32 scale for every 128, and bfloat16 back.
_DISPATCH_BYTES, _COMBINE_BYTES = 1.0 + 4.0 / 128.0, 2.0
#: Parts that live in a layer and are whole on every GPU.
_DENSE = (
    "attention",
    "router",
    "compressor",
    "indexer",
    "hyper",
    "norms",
    "main_proj",
    "shared_experts",
)


@dataclass(frozen=True, slots=True)
class Gpus:
    """GPUs of one server; bytes, operations and seconds of one of them."""

    name: str
    count: int
    #: Reached bytes a second from memory, and operations a second in fp8 and in attention (bfloat16).
    memory: float
    fp8: float
    attention: float
    #: One all-to-all of experts: seconds that it waits, and bytes a second.
    exchange_wait: float
    exchange: float
    #: Seconds of the shortest kernel in a graph, kernels of a layer, of a draft step beside its layers.
    kernel: float
    layer_kernels: int
    head_kernels: int
    #: Seconds a step that no graph hides: sampling, scheduling, the host.
    host: float
    #: Tokens of the captured graphs are multiples of this.
    bucket: int


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
class Attention:
    """Cache that one request reads a step, and operations of one token, over all layers."""

    request_bytes: float
    context_bytes: float
    token_operations: float


@dataclass(frozen=True, slots=True)
class Sizes:
    """A target with its drafters."""

    name: str
    gamma: int
    layers: Layers
    draft: Layers
    mtp: Layers
    attention: Attention
    head_bytes: float
    head_values: float


def sizes(name: str) -> Sizes:
    """Sizes of a published DeepSeek-V4 checkpoint (``deepseek-v4-flash-dspark``).

    Raises:
        ConfigError: a model without bundled drafter.
    """
    model = load(name, None, Loading())
    if not isinstance(model.kv, CompressedKv) or not model.bundled:
        raise ConfigError(
            f"{name} is no DeepSeek-V4 checkpoint with a drafter.",
            expected="deepseek-v4-flash-dspark or deepseek-v4-pro-dspark",
            fix="Take a measured cost (`dspark profile`) for other models.",
        )
    config = model.target.config
    whole = Layout()
    return Sizes(
        name=name,
        gamma=model.gamma,
        layers=_layers(config, model.tensors, model.kv.layers),
        draft=_layers(config, model.draft_tensors, model.draft_kv.compressed_stages),
        mtp=_layers(config, model.mtp_tensors, 1),
        attention=_attention(model, model.kv),
        head_bytes=by_part(model.tensors, whole)["head"],
        head_values=_values(model.tensors)["head"],
    )


def _values(tensors: list[Tensor]) -> dict[str, float]:
    """Weights (not scales) of each part; fp4 packs two in a byte."""
    found: dict[str, float] = {}
    for tensor in tensors:
        if not tensor.name.endswith(".scale"):
            count = tensor.elements * (2 if tensor.stored == "I8" else 1)
            found[tensor.part] = found.get(tensor.part, 0.0) + count
    return found


def _layers(config: dict[str, object], tensors: list[Tensor], count: int) -> Layers:
    held, values = by_part(tensors, Layout()), _values(tensors)
    experts = reading.integer(config, "n_routed_experts")
    return Layers(
        count=count,
        hidden=reading.integer(config, "hidden_size"),
        experts=experts,
        active=reading.integer(config, "num_experts_per_tok"),
        expert_bytes=held["experts"] / (count * experts),
        dense_bytes=sum(held.get(part, 0) for part in _DENSE) / count,
        expert_values=values["experts"] / (count * experts),
        dense_values=sum(values.get(part, 0.0) for part in _DENSE) / count,
    )


def _attention(model: Model, kv: CompressedKv) -> Attention:
    config = model.target.config
    heads, chosen = (
        reading.integer(config, "num_attention_heads"),
        reading.integer(config, "index_topk"),
    )
    latent = page_bytes(64) / 64
    index = kv.index_dim + kv.index_dim // 128 * 4
    # Layers that compress by 4 score every key and attend to the best; by 128 they attend to all.
    request = kv.layers * kv.window * latent + kv.count(4) * chosen * latent
    context = kv.count(4) * index / 4 + kv.count(128) * latent / 128
    attended = kv.layers * kv.window + kv.count(4) * chosen
    return Attention(request, context, 4.0 * heads * kv.head_dim * attended)


class Roofline:
    """Steps of DSpark (``drafter`` "dspark"), of MTP-1 ("mtp") or of plain decoding."""

    def __init__(self, sizes: Sizes, gpus: Gpus, *, drafter: str = "dspark") -> None:
        self.sizes, self.gpus, self.drafter = sizes, gpus, drafter
        self.gamma = 1 if drafter == "mtp" else sizes.gamma

    def plain(self, requests: int, context: int, sampled: int) -> float:
        return self._verify(requests, requests, context) + self.gpus.host

    def round(self, requests: int, drafted: int, context: int, sampled: int) -> float:
        target = self._verify(requests + drafted, requests, context)
        return target + self.draft(requests) + self.gpus.host

    def prefill(self, tokens: int, requests: int) -> float:
        """Without the cache of tokens before; as if its multiplications ran at full speed."""
        own = self.sizes
        return self._stack(own.layers, tokens) + self._attend(tokens, 0, 0) + self.gpus.host

    def between(self, requests: int) -> float:
        return 0.0

    def draft(self, requests: int) -> float:
        """Seconds of drafting one block a request."""
        own, gpus = self.sizes, self.gpus
        if self.drafter == "mtp":
            return self._stack(own.mtp, requests) + self._head(requests)
        rows = requests * own.gamma
        chain = gpus.kernel * gpus.head_kernels * own.gamma
        return self._stack(own.draft, rows) + self._head(rows) + chain

    def _verify(self, tokens: int, requests: int, context: int) -> float:
        tokens = -(-tokens // self.gpus.bucket) * self.gpus.bucket
        cache = self._attend(tokens, requests, context)
        return self._stack(self.sizes.layers, tokens) + cache + self._head(tokens)

    def _attend(self, tokens: int, requests: int, context: int) -> float:
        own, gpus = self.sizes.attention, self.gpus
        share = 1.0 / gpus.count
        read = (requests * own.request_bytes + context * own.context_bytes) * share / gpus.memory
        return max(read, tokens * own.token_operations * share / gpus.attention)

    def _head(self, tokens: int) -> float:
        own, gpus = self.sizes, self.gpus
        # Every GPU has the whole head for its own requests.
        work = 2.0 * tokens / gpus.count * own.head_values / gpus.attention
        return max(own.head_bytes / gpus.memory, work) + gpus.kernel * gpus.head_kernels

    def _stack(self, layers: Layers, tokens: float) -> float:
        """Seconds of all layers: whole, or in two halves that hide each other's exchange."""
        compute, exchange = self._layer(layers, tokens)
        half_compute, half_exchange = self._layer(layers, tokens / 2.0)
        return layers.count * min(compute + exchange, 2.0 * max(half_compute, half_exchange))

    def _layer(self, layers: Layers, tokens: float) -> tuple[float, float]:
        """Seconds of one layer's computation and of its two exchanges."""
        gpus, own = self.gpus, tokens / self.gpus.count
        missed = np.exp(tokens * np.log1p(-layers.active / layers.experts))
        hit = layers.experts * (1.0 - float(missed)) / gpus.count
        dense = max(layers.dense_bytes / gpus.memory, 2.0 * own * layers.dense_values / gpus.fp8)
        routed = max(
            hit * layers.expert_bytes / gpus.memory,
            2.0 * own * layers.active * layers.expert_values / gpus.fp8,
        )
        compute = max(dense + routed, gpus.kernel * gpus.layer_kernels)
        moved = own * layers.active * layers.hidden * (_DISPATCH_BYTES + _COMBINE_BYTES)
        return compute, 2.0 * gpus.exchange_wait + moved / gpus.exchange

    def with_gpus(self, **changes: float) -> Roofline:
        """The same with other assumptions, for sensitivities."""
        gpus = replace(self.gpus, **changes)  # type: ignore[arg-type]
        return Roofline(self.sizes, gpus, drafter=self.drafter)
