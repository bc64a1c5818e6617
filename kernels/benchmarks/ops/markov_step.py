"""Configurations of ``markov_step``, all in bfloat16.

With successors the base logits of the example are flat, so that every step of every request draws from the
base tail and reads one span again: the most that can be read. A model's logits seldom ask for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from benchmarks import ops
from benchmarks.ops import CPU, LISTED, Example
from dspark_kernels.markov_step import (
    Draft,
    Head,
    Sampling,
    ShortlistDraft,
    draft_block,
    draft_shortlist,
    reference,
)

_BF16 = 2


@dataclass(frozen=True)
class Case(ops.Case):
    """One configuration.

    Attributes:
        sampled: every row; else every row is greedy, and nothing is stored over the base logits.
        shortlist: the best of each position instead of the whole vocabulary.
        width: of the hidden states that gated and rnn heads read.
        follow: successors of a shortlist; sampled rows then draw from the base tail too.
    """

    kind: Literal["vanilla", "gated", "rnn"]
    columns: int
    rank: int
    gamma: int = 1
    sampled: bool = True
    shortlist: bool = False
    width: int = 0
    follow: int = 0

    @property
    def name(self) -> str:
        mode = f"shortlist{LISTED}" if self.shortlist else "full"
        mode += f"+{self.follow}" if self.follow else ""
        law = "sampled" if self.sampled else "greedy"
        return f"{mode}-{self.kind}-gamma{self.gamma}-V{self.columns}-r{self.rank}-{law}"

    @property
    def tail(self) -> bool:
        """Whether a shortlist stores a law over every column."""
        return self.sampled and self.follow > 0

    @property
    def joint(self) -> tuple[int, int]:
        """Outputs and inputs of the joint weight."""
        rank = self.rank
        shapes = {"gated": (rank, self.width + rank), "rnn": (3 * rank, self.width + 2 * rank)}
        return shapes.get(self.kind, (0, 0))

    def floor_bytes(self, batch: int) -> int:
        """Base logits, W2 once a step (or the candidates' rows), the joint weight once; outputs once."""
        gamma, rank, columns = self.gamma, self.rank, self.columns
        outputs, inputs = self.joint
        weights = (outputs * inputs + outputs) * _BF16
        row = 8 + (20 if self.sampled else 0) + gamma * self.width * _BF16
        row += gamma * (columns * _BF16 + rank * _BF16 + 16)
        if self.shortlist:
            law = _BF16 if self.tail else 4 if self.sampled else 0
            listed = (LISTED + self.follow) * (4 + _BF16 + rank * _BF16 + law)
            listed += self.follow * 4 + (4 if self.tail else 0)
            return weights + batch * (row + gamma * listed)
        stored = gamma * columns * _BF16 if self.sampled else 0
        return weights + gamma * columns * rank * _BF16 + batch * (row + stored + gamma * 8)

    def operands(self, batch: int) -> dict[str, Any]:
        """Random operands; the first rows of a larger batch are those of a smaller one."""
        random = torch.Generator().manual_seed(11)
        outputs, inputs = self.joint

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=random, dtype=torch.float32)

        def each(make: Callable[[], torch.Tensor]) -> torch.Tensor:
            if self.follow:
                # Which span is drawn from, and so what is read, is then the same for all.
                return make().expand(batch, -1, -1).contiguous()
            return torch.stack([make() for _ in range(batch)])

        w1 = normal(self.columns, self.rank).bfloat16()
        w2 = (normal(self.columns, self.rank) / self.rank**0.5).bfloat16()
        joint = (normal(outputs, inputs) / inputs**0.5).bfloat16() if outputs else None
        bias = normal(outputs).bfloat16() if outputs else None
        scale = 1 / 16 if self.follow else 2
        base = each(lambda: (scale * normal(self.gamma, self.columns)).bfloat16())
        hidden = each(lambda: normal(self.gamma, self.width).bfloat16()) if outputs else None
        anchors = torch.arange(batch) * (0 if self.follow else 7) + 1
        keys = Sampling(torch.full((batch,), 0.9), anchors * 12345678901, anchors + 100)
        given = {
            "base": base,
            "anchors": anchors,
            "head": Head(w1, w2, joint, bias),
            "hidden": hidden,
            "sampling": keys if self.sampled else None,
        }
        if self.follow:
            given["successors"] = scattered(self.columns, self.follow)
        return given

    def example(self, batch: int, device: torch.device = CPU) -> Example:
        """One call at the configuration's true sizes."""
        given = ops.on(device, self.operands(batch))
        stores = self.tail if self.shortlist else self.sampled

        def out() -> torch.Tensor | None:
            return given["base"].clone() if stores else None

        mine = out()

        def run() -> Draft | ShortlistDraft:
            if self.shortlist:
                return draft_shortlist(**given, size=LISTED, out=mine, backend="triton")
            return draft_block(**given, out=mine, backend="triton")

        def max_error(result: Draft | ShortlistDraft) -> float:
            wanted = {**given, "vocabulary": None, "out": out(), "dtype": torch.float64}
            if isinstance(result, ShortlistDraft):
                listed = reference.draft_shortlist(**wanted, size=LISTED)
                found = (result.tokens, result.support)
                ops.check_equal(found, (listed.tokens, listed.support), self.name)
                pairs = [(result.probs, listed.probs), (result.lse, listed.lse)]
            else:
                block, _ = reference.draft(**wanted)
                ops.check_equal((result.tokens,), (block.tokens,), self.name)
                pairs = [(result.logit, block.logit), (result.lse, block.lse)]
            known = [(a, b) for a, b in pairs if a is not None and b is not None]
            errors = [float((a.double() - b.double()).abs().max()) for a, b in known]
            return max(errors, default=0.0)

        return Example(run, max_error)


def scattered(columns: int, follow: int) -> torch.Tensor:
    """``[columns, follow]`` int32, distinct columns for each token: a table of no head, but at no cost."""
    lanes = torch.arange(follow, dtype=torch.int32) * (columns // follow)
    tokens = torch.arange(columns, dtype=torch.int32)
    return (tokens[:, None] * 31 + lanes) % columns


#: V4 Flash, Pro, Qwen3, Gemma, SmolLM2 and Llama vocabularies; one step of most, since a step costs the same
#: whichever it is.
CASES = (
    Case("vanilla", 129280, 256, gamma=5),
    Case("vanilla", 129280, 512, sampled=False),
    Case("gated", 151936, 256, width=4096),
    Case("vanilla", 262144, 64),
    Case("rnn", 49152, 256, width=960),
    Case("vanilla", 32000, 512),
    Case("vanilla", 129280, 256, gamma=5, shortlist=True),
    Case("gated", 49152, 256, gamma=5, shortlist=True, width=960),
    Case("rnn", 32000, 512, shortlist=True, width=1024),
    Case("vanilla", 262144, 256, sampled=False, shortlist=True),
    Case("vanilla", 129280, 256, gamma=5, shortlist=True, follow=LISTED),
    Case("vanilla", 32000, 512, shortlist=True, follow=LISTED),
    Case("vanilla", 49152, 256, sampled=False, shortlist=True, follow=LISTED),
    Case("vanilla", 151936, 256, shortlist=True, follow=LISTED),
    Case("vanilla", 262144, 256, shortlist=True, follow=LISTED),
)
