"""``python -m dspark_sglang.training.bench_context``: a training step against context length.

A step with a fixed number of anchors is timed at several context lengths. The two parts that read
the context (its projection, and attention to it) are timed alone, on the same shapes, and taken
off; what is left is the draft's own work, which has to be flat.

Times are medians; lengths are interleaved so that drift of the machine hits all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import cast

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from dspark_sglang.checkpoint import DrafterConfig, parse_drafter_config
from dspark_sglang.memory import keep_freed_memory
from dspark_sglang.training.layers import Layer
from dspark_sglang.training.loss import Mix, vocabulary_loss, whole
from dspark_sglang.training.model import Drafter
from dspark_sglang.training.packing import Packed, visible

LENGTHS = (512, 1024, 2048, 4096)
_SHAPE = {
    "hidden_size": 576, "vocab_size": 49152, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 9, "head_dim": 64, "num_hidden_layers": 3, "num_target_layers": 30,
    "block_size": 5, "target_layer_ids": [2, 9, 16, 22, 28], "mask_token_id": 3, "markov_rank": 64,
}  # fmt: skip


class Step:
    """One step at one context length, and its context parts alone."""

    def __init__(self, model: Drafter, length: int, anchors: int, frequent: int) -> None:
        config: DrafterConfig = model.config
        generator = torch.Generator().manual_seed(length)
        self.model, self.config = model, config
        width, depth = config.hidden_size, len(config.target_layer_ids)
        self.states = torch.randn(1, length, depth * width, generator=generator).bfloat16()
        # Anchors sit at the end, so every block reads the whole context.
        place = torch.arange(length - anchors - config.gamma, length - config.gamma)
        self.anchors = place.view(1, -1)
        every = torch.ones(1, anchors, config.gamma, dtype=torch.bool)
        packed = Packed(
            torch.zeros(1, length, dtype=torch.int64), self.anchors, every.long(), every.long(),
            every.long(), every, (0,),
        )  # fmt: skip
        self.mask = visible(packed, model.rows)
        self.embedded = torch.randn(1, anchors, width, generator=generator).bfloat16()
        rows = anchors * config.gamma
        self.wanted = torch.randn(rows, width, generator=generator).bfloat16()
        self.labels = torch.randint(frequent, (rows,), generator=generator)
        self.previous = self.labels.view(1, anchors, config.gamma)
        head = torch.randn(frequent, width, generator=generator) * 0.05
        self.vocabulary = whole(head.bfloat16())
        shape = (1, config.num_heads, rows, config.head_dim)
        keys = (1, config.num_heads, length + rows, config.head_dim)
        self.query = torch.randn(shape, generator=generator).bfloat16().requires_grad_()
        self.key = torch.randn(keys, generator=generator).bfloat16().requires_grad_()
        self.value = torch.randn(keys, generator=generator).bfloat16().requires_grad_()

    def run(self) -> None:
        """Forward and backward of everything."""
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model(
                self.states, self.anchors, self.embedded, self.embedded[0, 0], self.mask
            )
            latent = self.model.latents(hidden, self.previous)
        assert latent is not None
        assert self.model.markov_head is not None
        size = self.vocabulary.head.shape[0]
        terms = vocabulary_loss(
            hidden.flatten(0, 2),
            latent.flatten(0, 2),
            self.model.markov_head.markov_w2.weight[:size],
            self.wanted,
            self.labels,
            torch.full((len(self.labels),), 1.0 / len(self.labels)),
            vocabulary=self.vocabulary,
            mix=Mix(0.1, 0.0, 0.9),
        )
        torch.autograd.backward(terms.loss)

    def run_projection(self) -> None:
        """Context rows, and their keys and values in every layer, forward and backward."""
        with torch.autocast("cpu", torch.bfloat16):
            context = self.model.context(self.states)
            total = torch.zeros(())
            for module in self.model.layers:
                attention = cast(Layer, module).self_attn
                assert attention.v_proj is not None
                keys = linear(context, attention.k_proj.weight)
                keys = attention.k_norm(
                    keys.view(1, -1, self.config.num_kv_heads, self.config.head_dim)
                )
                total = total + keys.sum() + linear(context, attention.v_proj.weight).sum()
        torch.autograd.backward(total)

    def run_attention(self) -> None:
        """Attention of every layer, forward and backward."""
        for _ in self.model.layers:
            out = scaled_dot_product_attention(
                self.query, self.key, self.value, attn_mask=self.mask
            )
            torch.autograd.backward(out.sum())


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(anchors: int, repeats: int, frequent: int) -> dict[str, object]:
    """Milliseconds of a step and its parts at every length, and the growth of the draft's own."""
    keep_freed_memory()
    model = Drafter(parse_drafter_config(_SHAPE))
    steps = {length: Step(model, length, anchors, frequent) for length in LENGTHS}
    found: dict[int, list[tuple[float, float, float]]] = {length: [] for length in LENGTHS}
    for repeat in range(repeats + 1):
        for length, step in steps.items():
            times = _seconds(step.run), _seconds(step.run_projection), _seconds(step.run_attention)
            if repeat:  # the first round allocates
                found[length].append(times)
    rows = []
    for length, taken in found.items():
        parts = zip(*taken, strict=True)
        whole_step, projection, attention = (statistics.median(part) for part in parts)
        own = statistics.median(t[0] - t[1] - t[2] for t in taken)
        rows.append(
            {
                "context": length,
                "step_ms": round(1e3 * whole_step, 1),
                "projection_ms": round(1e3 * projection, 1),
                "attention_ms": round(1e3 * attention, 1),
                "draft_ms": round(1e3 * own, 1),
            }
        )
    growth = 100 * (rows[-1]["draft_ms"] / rows[0]["draft_ms"] - 1)
    return {
        "anchors": anchors,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "context_cost_growth_pct": round(growth, 1),
    }


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--anchors", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--frequent", type=int, default=8192, help="tokens of the vocabulary")
    args = parser.parse_args()
    print(json.dumps(measure(args.anchors, args.repeats, args.frequent), indent=2))


if __name__ == "__main__":
    main()
