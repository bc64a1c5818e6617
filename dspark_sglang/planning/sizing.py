"""Memory on one rank: weights, what SGLang keeps free, and the pools that are left."""

from __future__ import annotations

import math

import msgspec

from dspark_sglang.artifacts import DRAFT_VOCAB_FILE
from dspark_sglang.checkpoint import read_json
from dspark_sglang.planning import kv
from dspark_sglang.planning import options as given
from dspark_sglang.planning.hardware import Hardware
from dspark_sglang.planning.model import Model, has_draft_vocabulary
from dspark_sglang.planning.options import Options
from dspark_sglang.planning.reserve import Reserve, reserve
from dspark_sglang.planning.tensors import SIZES, Layout, Split, by_part

#: Parts of the drafter are shown under this prefix.
DRAFTER = "drafter: "
#: Types that the CPU platform keeps a second, packed copy of.
_PACKED = ("BF16", "F32")
#: Where SGLang's defaults leave too little room: prompt tokens a step and requests at once to try.
_TIGHTER = ((4096, 48), (4096, 32), (2048, 32), (2048, 16), (2048, 8), (2048, 4))


class Sized(msgspec.Struct, frozen=True, kw_only=True):
    """One number of ranks, worked out."""

    options: Options
    layout: Layout
    weights: dict[str, int]
    reserved: Reserve
    pools: kv.Pools
    budget: float
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

    def _weights(self, layout: Layout) -> dict[str, int]:
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

    def _sized(self, options: Options, layout: Layout, weights: dict[str, int]) -> Sized:
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
            budget=budget,
            headroom=min(headroom, -1) if capped else headroom,
        )

    def _pools(self, serving: kv.Serving, layout: Layout, budget: float) -> kv.Pools:
        model = self.model
        return kv.size(model.kv, model.draft_kv, budget=budget, serving=serving, layout=layout)

    def _draft_vocabulary(self, layout: Layout) -> int:
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
