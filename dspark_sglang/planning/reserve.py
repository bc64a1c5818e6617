"""What a server keeps free beside weights and pools, by SGLang's own heuristic.

Source: SGLang 0.5.23, ``arg_groups/memory_hook.py``. It is a rule of thumb in MiB, not a measurement: what
graphs and activations really take is known on the machine only.
"""

from __future__ import annotations

import msgspec

from dspark_sglang.planning.hardware import MIB, Hardware
from dspark_sglang.planning.model import V3, Model
from dspark_sglang.planning.options import Options
from dspark_sglang.planning.tensors import Layout

#: Activations of one token of prefill, graphs of one request, in MiB.
_TOKEN_MIB, _REQUEST_MIB = 1.5, 2.0
_BASE_MIB, _LEAST_TOKENS = 512.0, 2048
#: From this much memory on, at least so much stays free.
_LARGE_MIB, _LARGE_RESERVE_MIB = 60 << 10, 10 << 10
_LATENT_PREFILL_MIB, _PREFILL_GRAPH_MIB = 1536.0, 8.0


class Reserve(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one rank that stay out of weights and pools."""

    activations: int
    graphs: int
    #: ``--mem-fraction-static``: weights and pools as a share of what is free before loading.
    mem_fraction: float
    chunked_prefill: int


def chunk(machine: Hardware, options: Options) -> int:
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


def reserve(machine: Hardware, model: Model, options: Options, layout: Layout) -> Reserve:
    """What SGLang would set aside on one rank."""
    tokens = chunk(machine, options)
    # The decoding side of PD has no prompts, only verified blocks.
    rows = options.running * (model.gamma + 1) if options.pd == "decode" else tokens
    activations = _BASE_MIB + max(rows, _LEAST_TOKENS) * _TOKEN_MIB + layout.tp / 8 * 1024
    graphs = 0.0 if machine.on_cpu else _graphs(model, options, layout, tokens)
    if machine.memory_mib > _LARGE_MIB and not machine.on_cpu:
        activations = max(activations, _LARGE_RESERVE_MIB - graphs)
    fraction = options.mem_fraction
    if fraction is None:
        fraction = round((machine.memory_mib - activations - graphs) / machine.memory_mib, 3)
    return Reserve(
        activations=round(activations * MIB),
        graphs=round(graphs * MIB),
        mem_fraction=max(fraction, 0.0),
        chunked_prefill=tokens // layout.attention_dp,
    )


def _graphs(model: Model, options: Options, layout: Layout, tokens: int) -> float:
    requests = min(options.running, 256 if layout.tp < 4 else 512)
    total = 0.0
    if options.pd != "prefill":
        total += requests * _REQUEST_MIB
        if layout.attention_dp > 1:
            total += requests * layout.attention_dp * (4.5 if requests > 300 else 3.0)
    if options.pd != "decode":
        # SGLang counts DeepSeek-V4 among its multi-head models (configs/model_config.py:1430).
        latent = model.architecture == V3
        total += _LATENT_PREFILL_MIB if latent else _prefill_graphs(tokens) * _PREFILL_GRAPH_MIB
    return total
