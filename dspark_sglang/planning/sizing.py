"""Memory on one rank: weights, what SGLang keeps free, and the pools that are left.

Source: SGLang 0.5.23, ``arg_groups/memory_hook.py``. What it keeps free is a rule of thumb in MiB, not a measurement:
what graphs and activations really take is known on the machine only.
"""

from __future__ import annotations

import math

import msgspec

from dspark_sglang.artifacts import DRAFT_VOCAB_FILE
from dspark_sglang.checkpoint import read_json
from dspark_sglang.layouts.memory import SIZES, Ranks, Split, by_part
from dspark_sglang.planning import kv
from dspark_sglang.planning import options as given
from dspark_sglang.planning.hardware import MIB, Hardware
from dspark_sglang.planning.model import Model, has_draft_vocabulary
from dspark_sglang.planning.options import Options

#: Parts of the drafter are shown under this prefix.
DRAFTER = "drafter: "
#: Types that the CPU platform keeps a second, packed copy of.
_PACKED = ("BF16", "F32")
#: Where SGLang's defaults leave too little room: prompt tokens a step and requests at once to try.
_TIGHTER = ((4096, 48), (4096, 32), (2048, 32), (2048, 16), (2048, 8), (2048, 4))
#: Activations of one token of prefill, graphs of one request and of one prompt length, in MiB.
_TOKEN_MIB, _REQUEST_MIB, _PREFILL_GRAPH_MIB = 1.5, 2.0, 8.0
_BASE_MIB, _LEAST_TOKENS = 512.0, 2048
#: From this much memory on, at least so much stays free.
_LARGE_MIB, _LARGE_RESERVE_MIB = 60 << 10, 10 << 10


class Reserve(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one rank that stay out of weights and pools."""

    graphs: int
    #: ``--mem-fraction-static``: weights and pools as a share of what is free before loading.
    mem_fraction: float
    chunked_prefill: int


def _chunk(machine: Hardware, options: Options) -> int:
    """Prompt tokens a step: SGLang chooses by memory."""
    if options.chunked_prefill is not None:
        return options.chunked_prefill
    steps = ((20 << 10, 2048), (60 << 10, 4096), (160 << 10, 8192))
    return next((size for limit, size in steps if machine.memory_mib < limit), 16384)


def _prefill_graphs(tokens: int) -> int:
    """Number of prompt lengths SGLang captures graphs for (``arg_groups/cuda_graph_hook.py:480``)."""
    sizes = [
        *range(4, 33, 4), *range(48, 257, 16), *range(288, 513, 32), *range(576, 1025, 64),
        *range(1280, 4097, 256), *range(4608, tokens + 1, 512),
    ]  # fmt: skip
    return sum(size <= tokens for size in sizes)


def reserve(machine: Hardware, model: Model, options: Options, layout: Ranks) -> Reserve:
    """What SGLang would set aside on one rank."""
    tokens = _chunk(machine, options)
    # The decoding side of PD has no prompts, only verified blocks.
    rows = options.running * (model.gamma + 1) if options.pd == "decode" else tokens
    activations = _BASE_MIB + max(rows, _LEAST_TOKENS) * _TOKEN_MIB + layout.tp / 8 * 1024
    graphs = 0.0 if machine.on_cpu else _graphs(options, layout, tokens)
    if machine.memory_mib > _LARGE_MIB and not machine.on_cpu:
        activations = max(activations, _LARGE_RESERVE_MIB - graphs)
    fraction = options.mem_fraction
    if fraction is None:
        fraction = round((machine.memory_mib - activations - graphs) / machine.memory_mib, 3)
    return Reserve(
        graphs=round(graphs * MIB),
        mem_fraction=max(fraction, 0.0),
        chunked_prefill=tokens // layout.attention_dp,
    )


def _graphs(options: Options, layout: Ranks, tokens: int) -> float:
    requests = min(options.running, 256 if layout.tp < 4 else 512)
    total = 0.0
    if options.pd != "prefill":
        total += requests * _REQUEST_MIB
        if layout.attention_dp > 1:
            total += requests * layout.attention_dp * (4.5 if requests > 300 else 3.0)
    if options.pd != "decode":
        # SGLang counts DeepSeek-V4 among its multi-head models (configs/model_config.py:1430).
        total += _prefill_graphs(tokens) * _PREFILL_GRAPH_MIB
    return total


class Sized(msgspec.Struct, frozen=True, kw_only=True):
    """One number of ranks, worked out."""

    options: Options
    layout: Ranks
    weights: dict[str, int]
    reserved: Reserve
    pools: kv.Pools
    #: Bytes left after the least that has to fit.
    headroom: int


class Sizer:
    """Works out numbers of ranks for one model on one machine.

    Args:
        model: what is served.
        machine: on what.
        options: what is fixed beforehand.
        context: tokens that each of ``options.requests`` must have room for.
    """

    def __init__(self, model: Model, machine: Hardware, options: Options, context: int) -> None:
        self.model = model
        self.machine = machine
        self.options = options
        self.context = context

    def size(self, tp: int) -> Sized:
        """Memory on one of ``tp`` ranks, with tighter settings where that makes it fit."""
        layout = given.layout(self.options, self.model, tp)
        weights = self._weights(layout)
        plain = self._sized(self.options, layout, weights)
        if plain.headroom >= 0:
            return plain
        for chunk, running in _TIGHTER:
            tighter = msgspec.structs.replace(
                self.options,
                chunked_prefill=self.options.chunked_prefill or chunk,
                max_running=self.options.max_running or max(running, self.options.requests),
            )
            sized = self._sized(tighter, layout, weights)
            if sized.headroom >= 0:
                return sized
        return plain

    def _serving(self, options: Options, reserved: Reserve) -> kv.Serving:
        return kv.Serving(
            max_running=options.running,
            draft_tokens=self.model.gamma + 1,
            page_size=options.page_size or self.model.page_size,
            chunked_prefill=reserved.chunked_prefill,
            overlap=not self.machine.on_cpu,
            radix_cache=options.radix_cache,
            pd_decode=options.pd == "decode",
            max_tokens=options.max_total_tokens,
        )

    def _weights(self, layout: Ranks) -> dict[str, int]:
        model = self.model
        weights = by_part(model.tensors, layout)
        drafted = by_part(model.draft_tensors, layout)
        weights |= {DRAFTER + part: size for part, size in drafted.items()}
        if rows := self._draft_vocabulary(layout):
            weights[DRAFTER + "draft vocabulary"] = rows
        weights["rotary tables"] = model.rope_bytes
        if copies := self._packed():
            weights["packed copies"] = copies
        return weights

    def _sized(self, options: Options, layout: Ranks, weights: dict[str, int]) -> Sized:
        machine = self.machine
        reserved = reserve(machine, self.model, options, layout)
        budget = machine.usable * reserved.mem_fraction - sum(weights.values())
        serving = self._serving(options, reserved)
        pools = self._pools(serving, layout, budget)
        window = self.context + serving.draft_tokens
        tokens = math.ceil(options.requests / layout.attention_dp) * window
        page = serving.page_size
        least = msgspec.structs.replace(serving, max_tokens=math.ceil(tokens / page) * page)
        needed = self._pools(least, layout, math.inf)
        taken = max(needed.charged, needed.target_bytes + needed.draft_bytes)
        headroom = round(budget) - taken
        capped = options.max_total_tokens is not None and options.max_total_tokens < tokens
        return Sized(
            options=options,
            layout=layout,
            weights=weights,
            reserved=reserved,
            pools=pools,
            headroom=min(headroom, -1) if capped else headroom,
        )

    def _pools(self, serving: kv.Serving, layout: Ranks, budget: float) -> kv.Pools:
        model = self.model
        return kv.size(model.kv, model.draft_kv, budget=budget, serving=serving, layout=layout)

    def _draft_vocabulary(self, layout: Ranks) -> int:
        """Bytes of the LM head's rows that drafting copies, where the drafter names some."""
        drafter = self.model.drafter
        unused = self.options.builtin or layout.attention_dp > 1
        if drafter is None or unused or not has_draft_vocabulary(drafter):
            return 0
        assert drafter.directory is not None
        path = drafter.directory / DRAFT_VOCAB_FILE
        tokens = read_json(path, what="a draft vocabulary").get("tokens")
        width = self.model.tensors[0].shape[1]
        count = len(tokens) if isinstance(tokens, list) else 0
        return count * width * SIZES[self.model.tensors[0].kept]

    def _packed(self) -> int:
        """Bytes of the copies that the CPU platform lays out for oneDNN (``serving/cpu/packing.py``)."""
        if not self.machine.on_cpu:
            return 0
        projections = (*self.model.tensors, *self.model.draft_tensors)
        size = sum(
            tensor.elements * SIZES[tensor.kept]
            for tensor in projections
            if tensor.kept in _PACKED and tensor.part in ("attention", "mlp", "layers")
            and len(tensor.shape) == 2
        )  # fmt: skip
        heads = [t for t in self.model.tensors if t.split in (Split.HEAD_VOCAB, Split.VOCAB)]
        if heads and heads[-1].kept in _PACKED:
            size += heads[-1].elements * SIZES[heads[-1].kept]
        return size if size <= self.machine.usable / 4 else 0
