"""Where a drafter lives on the ranks of a server: what each placement costs a round.

A cost model of the draft backbone alone, since heads and acceptance are sharded over the vocabulary
whatever its placement. It reads weights and KV from memory, or multiplies where that takes longer,
and waits for collectives: ``latency + bytes / bandwidth`` each. It was computed, not fitted to runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Placement = Literal["replicate", "shard", "single"]


@dataclass(frozen=True, slots=True)
class Machine:
    """What a rank runs on."""

    name: str
    #: Bytes a second a rank reads from its memory, and operations a second in the drafter's type.
    memory: float
    compute: float
    #: Bytes a second and direction that a rank sends to the others, and seconds that a collective of a
    #: few bytes takes.
    link: float
    latency: float
    #: Whether ranks share memory and cores, so that what each does adds up.
    shared: bool = False


#: Vendors' data sheets: HBM3 3.35 TB/s, 989 TFLOP/s in bfloat16 without sparsity, NVLink 900 GB/s (H100) and
#: 400 GB/s (H800) in both directions together. The latency is an assumption: 10 us for 8 ranks on NVLink.
H100 = Machine("H100", memory=3.35e12, compute=989e12, link=450e9, latency=10e-6)
H800 = Machine("H800", memory=3.35e12, compute=989e12, link=200e9, latency=10e-6)
#: Ranks of a test on one machine, over gloo.
CPU = Machine("CPU", memory=10e9, compute=1e11, link=1e9, latency=2e-4, shared=True)


def machine(device: str) -> Machine:
    """The machine of a device's name; an H100 where it is not known."""
    known = (H800, CPU)
    return next((m for m in known if m.name.lower() in device.lower()), H100)


@dataclass(frozen=True, slots=True)
class Backbone:
    """Sizes of a drafter without its embedding, LM head, Markov and confidence heads."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    #: Parameters of all layers, of the projection of target states and the norms.
    parameters: int
    gamma: int
    #: Bytes of one element of weights and states.
    element: int = 2

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.element

    def divides(self, ranks: int) -> bool:
        """Whether SGLang can shard the heads: a rank has whole ones, or ranks share a KV head evenly."""
        kv = self.kv_heads
        return self.heads % ranks == 0 and (kv % ranks == 0 or ranks % kv == 0)


def seconds(
    backbone: Backbone, ranks: int, requests: int, machine: Machine, *, context: int = 2048
) -> dict[Placement, float]:
    """What drafting one block a request costs, by placement; ``shard`` is absent where heads do not divide.

    Args:
        requests: drafted for at once.
        context: cached tokens of each.
    """
    rows = requests * backbone.gamma
    states = rows * backbone.hidden * backbone.element
    anchors = requests * backbone.hidden * backbone.element

    def wait(size: int) -> float:
        return machine.latency + size / machine.link

    def work(share: float, kv_share: float, ranks_at_work: int) -> float:
        weights = backbone.parameters * backbone.element * share
        read = (weights + requests * context * backbone.kv_bytes * kv_share) / machine.memory
        once = max(read, 2 * rows * backbone.parameters * share / machine.compute)
        return once * (ranks_at_work if machine.shared else 1)

    found: dict[Placement, float] = {
        "replicate": work(1.0, 1.0, ranks) + wait(anchors),
        "single": work(1.0, 1.0, 1) + wait(anchors) + wait(states),
    }
    if backbone.divides(ranks):
        kv_share = max(1, backbone.kv_heads // ranks) / backbone.kv_heads
        # A ring moves 2 (W - 1) / W of the bytes through each rank's link.
        reduced = wait(int(2 * states * (ranks - 1) / ranks))
        collectives = 2 * backbone.layers * reduced + wait(anchors)
        found["shard"] = work(1.0 / ranks, kv_share, ranks) + collectives
    return found


def choose(costs: dict[Placement, float]) -> Placement:
    """The cheapest placement, the first named among equals."""
    return min(costs, key=lambda placement: costs[placement])


def exchanged_bytes(
    *,
    requests: int,
    gamma: int,
    ranks: int,
    hidden: int,
    element: int = 2,
    sampled: bool = False,
    heads: Placement = "replicate",
    markov_rank: int = 256,
) -> dict[str, int]:
    """Bytes a rank receives for drafting and acceptance of one round with a replicated backbone.

    An all-gather counts what it leaves on a rank (``ranks`` records), an all-reduce and a broadcast
    their operand. The target's own collectives are not in it.

    Args:
        sampled: all requests sample, without filters; else all are greedy.
        heads: where W1, of ``markov_rank`` columns, and the confidence head are.
    """
    rows = requests * (gamma + 1)
    record = 8 * ranks
    parts = {
        "embed": requests * hidden * element,
        "plan": 8 * (3 + requests),
        "draft": gamma * requests * (3 if sampled else 2) * record,
        "block": 8 * (1 + requests + 2 * requests * gamma),
        "accept": rows * (6 if sampled else 2) * record + (3 * requests * record if sampled else 0),
        "outcome": 16 * requests,
    }
    if heads != "replicate":
        parts["markov"] = gamma * requests * markov_rank * element
        parts["confidence"] = 4 * requests * gamma
    return parts | {"all": sum(parts.values())}


def builtin_bytes(
    *, requests: int, gamma: int, ranks: int, hidden: int, vocabulary: int, element: int = 2
) -> dict[str, int]:
    """The same for SGLang's builtin with a dense drafter, counted from its sources (0.5.23).

    ``models/dspark.py`` gathers base logits of ``gamma`` rows a request, ``layers/logits_processor.py`` the
    target's of ``gamma + 1``; a round's nine broadcasts and the backbone's all-reduces (two a layer)
    are left out, which favours the builtin.
    """
    padded = -(-vocabulary // (64 * ranks)) * 64 * ranks
    parts = {
        "embed": requests * gamma * hidden * element,
        "base_logits": requests * gamma * padded * element,
        "target_logits": requests * (gamma + 1) * padded * element,
    }
    return parts | {"all": sum(parts.values())}
