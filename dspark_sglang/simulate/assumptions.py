"""What the re-derivation of the published result assumes, each with its source; nothing is fitted to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import msgspec

from dspark_sglang.core.placement import H800
from dspark_sglang.simulate.acceptance import Mixture, fitted, geometric
from dspark_sglang.simulate.roofline import Gpus, Sizes

#: DeepEP's low-latency kernels on H800: microseconds of dispatch and of combine of 128 tokens a GPU, width
#: 7168, 8 experts (its docs/legacy.md).
_DEEPEP_US = {8: (77.0, 114.0), 16: (118.0, 195.0), 32: (155.0, 273.0), 64: (173.0, 314.0)}
_DEEPEP_VALUES = 128 * 8 * 7168
#: Bytes a GPU of an H800 holds, and the share of them that weights may take.
_MEMORY, _FOR_WEIGHTS = 80e9, 0.8
#: Accepted lengths of DSpark in the paper's table 1 (Qwen3-4B, 8B, 14B, Gemma4-12B), blocks of 7.
TABLE_1 = (4.73, 4.81, 4.78, 4.66)


@dataclass(frozen=True, slots=True)
class Assumptions:
    """One set of numbers for both models; the names are those of ``docs/simulation.md``."""

    memory: float = 3.0e12
    fp8: float = 1.55e15
    attention: float = 6.6e14
    exchange_wait: float = 1.0
    kernel: float = 3e-6
    layer_kernels: int = 30
    head_kernels: int = 6
    host: float = 5e-4
    bucket: int = 64
    mtp_acceptance: float = 0.85
    dspark_length: float = sum(TABLE_1) / len(TABLE_1)
    spread: float = 2.0
    context: int = 4989
    output: int = 256

    def gpus(self, sizes: Sizes) -> Gpus:
        """The fewest whole nodes of 8 H800 that hold the weights."""
        count = 8
        while _weights(sizes, count) > _FOR_WEIGHTS * _MEMORY:
            count *= 2
        wait, speed = exchange(count)
        return Gpus(
            name=f"{count // 8} x 8 x {H800.name}",
            count=count,
            memory=self.memory,
            fp8=self.fp8,
            attention=self.attention,
            exchange_wait=wait * self.exchange_wait,
            exchange=speed,
            kernel=self.kernel,
            layer_kernels=self.layer_kernels,
            head_kernels=self.head_kernels,
            host=self.host,
            bucket=self.bucket,
        )

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


def _weights(sizes: Sizes, count: int) -> float:
    """Bytes of one GPU: everything but experts is whole on each."""
    held = 2 * sizes.head_bytes  # the embedding is as large
    for stack in (sizes.layers, sizes.draft):
        held += stack.count * (stack.dense_bytes + stack.experts * stack.expert_bytes / count)
    return held


class Row(msgspec.Struct, frozen=True):
    """One assumption as it is told."""

    name: str
    value: str
    source: str
    #: Other values that are tried, each instead of this one.
    instead: tuple[float, ...] = ()


def rows() -> list[Row]:
    """All assumptions with their sources."""
    own = Assumptions()
    lines = ", ".join(
        f"{count} GPUs {1e6 * wait:.0f} us and {speed / 1e9:.0f} GB/s"
        for count, (wait, speed) in ((n, exchange(n)) for n in (8, 16, 32))
    )
    return [
        Row("memory", f"{own.memory / 1e12:.2f} TB/s a GPU",
            "FlashMLA's README: up to 3000 GB/s on H800; data sheet 3.35 TB/s", (2.4e12, 3.35e12)),
        Row("fp8", f"{own.fp8 / 1e12:.0f} TFLOP/s a GPU",
            "DeepGEMM's README: up to 1550 TFLOP/s on H800; data sheet 1979", (0.8e15, 1.979e15)),
        Row("attention", f"{own.attention / 1e12:.0f} TFLOP/s a GPU, bfloat16",
            "FlashMLA's README: up to 660 TFLOP/s on H800", (4e14,)),
        Row("exchange_wait", f"dispatch or combine: {lines}",
            "a line through DeepEP's low-latency dispatch and combine on H800, docs/legacy.md", (0.5, 2.0)),
        Row("kernel", f"{1e6 * own.kernel:g} us the shortest kernel in a graph",
            "assumed, no public source for these kernels", (1.5e-6, 6e-6)),
        Row("layer_kernels", f"{own.layer_kernels} kernels a layer",
            "assumed: attention with indexer and compression, hyper-connections, router, experts", (15, 60)),
        Row("host", f"{1e3 * own.host:g} ms a step that no graph hides",
            "assumed: sampling, scheduling", (0.0, 2e-3)),
        Row("bucket", f"graphs at multiples of {own.bucket} tokens", "assumed: 8 a GPU on 8 GPUs", (8,)),
        Row("mtp_acceptance", f"{own.mtp_acceptance:g}",
            "DeepSeek-V3's report (arXiv 2412.19437, 5.4.3): 85% to 90% of second tokens", (0.8, 0.9)),
        Row("dspark_length", f"{own.dspark_length:.3f} tokens a round with blocks of 7",
            "the paper's table 1, mean of its four targets; one chance at every position", (4.0, 5.5)),
        Row("spread", f"confidences Beta with concentration {own.spread:g}",
            "assumed; calibrated, as after STS (paper: error about 1%)", (0.7, 8.0)),
        Row("context", f"{own.context} cached tokens a request",
            "DeepSeek's account of its inference system (2025): mean KV length per output token", (1024, 20000)),
        Row("draft_depth", "MTP-1 one layer, DSpark three layers and 5 chained heads",
            "shapes of the checkpoints (`dspark plan`)"),
        Row("nodes", "the fewest whole nodes (1, 2, 4) that hold the weights, prefill elsewhere",
            "shapes of the checkpoints, attention data parallel, experts spread (arXiv 2412.19437, 3.4)"),
    ]  # fmt: skip


def changed(name: str, value: float) -> Assumptions:
    """The assumptions with one of them replaced."""
    kinds = {field.name: field.type for field in fields(Assumptions)}
    assert name in kinds
    return replace(Assumptions(), **{name: int(value) if kinds[name] == "int" else float(value)})  # type: ignore[arg-type]


def bucketed(tokens: float, bucket: int) -> int:
    """Tokens of the graph that runs ``tokens``."""
    return math.ceil(tokens / bucket) * bucket
